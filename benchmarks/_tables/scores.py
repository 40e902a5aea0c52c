"""Scores: what they cost, what each criterion keeps, and why a ticket can fail by one tensor."""

from __future__ import annotations

from _tables._format import MIB, Results, interval, load, machine_line, number, other_work


def scoring() -> str:
    """Scores from gradients."""
    scoring = load("scoring")
    return f"""## Scores from gradients

`compute_gradient_importance` of {scoring["model"]}, {scoring["sequences"]} sequences of
{scoring["length"]} tokens in batches of {scoring["batch_size"]}, against forward and `loss.backward()` over the
same batches, as training does them. Every sequence's own gradient is looked at. Times are medians of
{scoring["repeats"]} interleaved runs; memory is the peak above the loaded model, medians of as many processes.
It may be what the plain step takes, plus the sums' {scoring["sums_bytes"] / MIB:.0f} MiB if in memory, less
the {scoring["gradients_bytes"] / MIB:.0f} MiB of gradients that the plain step holds and scoring does not.

{scoring_table(scoring)}

The rest is what autograd keeps of the forward pass, which grows with the tokens of a batch: smaller batches and
`checkpoint_activations=True` shrink it. The bar on time is for sums in memory.

{machine_line(scoring)}
"""


def criteria() -> str:
    """Criteria beside each other."""
    criteria = load("criteria")
    restoring = load("restoring")
    dense = criteria["dense"]["perplexity"]
    return f"""## Criteria beside each other

Tickets of {criteria["model"]}, judged on the same {criteria["windows"]} windows of {criteria["context"]}
tokens from the middle of the text. Scores come from {criteria["samples"]} sequences of
{criteria["calibration_context"]} tokens from another part. "global" is one threshold for all weights, "layer" one
for each tensor, "row" one for each output row, as the paper of wanda has it; "magnitude+fisher" adds ranks.
Perplexity, dense {number(dense)}:

{perplexity_table(criteria)}

Wanda lies far below magnitude, as its paper has it, within rows, which is what its scores are made for: between
tensors they do not compare. obd and taylor weigh a gradient by the weight that would go; fisher and grad_norm do
not, so they rank how far the loss follows a weight, not what its removal costs, and alone they prune badly. snip
takes the magnitude after the mean over samples, where gradients cancel. grasp and synflow are made for networks
before training; on a trained one they prune far worse than magnitude.

### Why the smaller ticket can be the worse one

{restoring_text(restoring)}

{restoring_table(restoring)}

### Intervals and costs

With their {criteria["confidence"]:.0%} intervals over windows, and with what they cost: seconds, of which those of
scoring come first and serve every row of a criterion, those of drawing second; and how far the resident memory of
the process rose above the loaded model, the scores themselves being four bytes a weight.

{criteria_table(criteria)}

{machine_line(criteria)}{other_work(criteria)}
"""


def scoring_table(results: Results) -> str:
    """Time and memory of each criterion beside the plain step and the bars."""
    lines = [
        "| | time | against plain | at most | peak memory | at most |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds in results["median_seconds"].items():
        allowed = results["allowed_peak_bytes"].get(name)
        cells = [
            "forward and backward" if name == "plain" else name.replace(", disk", ', `store="disk"`'),
            f"{seconds:.2f} s",
            f"x {results['time_ratios'][name]:.3f}",
            f"x {results['time_bar']}" if allowed is not None and "disk" not in name else "",
            f"{results['median_peak_bytes'][name] / MIB:.0f} MiB",
            "" if allowed is None else f"{allowed / MIB:.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def perplexity_table(results: Results) -> str:
    """A row for each criterion, a column for each way to spread and each sparsity."""
    found = {(row["criterion"], place(row)): row["quality"]["perplexity"] for row in results["rows"]}
    criteria, places = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    lines = ["| criterion | ranks by | " + " | ".join(places) + " |", "| --- | --- |" + " ---: |" * len(places)]
    for criterion in criteria:
        cells = [number(found[criterion, one]) if (criterion, one) in found else "" for one in places]
        about = results["ranks_by"][criterion].replace("|", "\\|")
        lines.append(f"| {criterion} | {about} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def place(row: Results) -> str:
    """Heading of the column that a row's perplexity stands in."""
    target = row["target_sparsity"]
    return str(row["spread"]) if target is None else f"{row['spread']} {target}"


def restoring_text(results: Results) -> str:
    """What the table of restored tensors shows."""
    low, high = (str(sparsity) for sparsity in results["sparsities"])
    name, perplexity = min(results["by_tensor"].items(), key=lambda item: item[1])
    at_low, at_high = results["tensor_sparsities"][name]
    plain, inside = (number(results["tickets"][one]) for one in (low, high))
    return f"""Under one threshold by {results["criterion"]} the ticket of {low} does worse than that of {high},
which lies inside it (perplexity {plain} and {inside}). It fails by a single tensor: with
`{name}` made dense again, its perplexity is {number(perplexity)}. It
removes {at_low:.1%} of that tensor, the other {at_high:.1%}. Scores rank weights as if each went alone, and say
nothing of what those that go together do. Perplexity of the ticket of {low} with some tensors made dense:"""


def restoring_table(results: Results) -> str:
    """Perplexity by what was made dense."""
    lines = ["| made dense | perplexity |", "| --- | ---: |", f"| everything | {number(results['dense'])} |"]
    lines.append(f"| nothing | {number(results['tickets'][str(results['sparsities'][0])])} |")
    for part in ("by_kind", "by_blocks", "by_tensor"):
        lines += [f"| {label} | {number(value)} |" for label, value in results[part].items()]
    return "\n".join(lines)


def criteria_table(results: Results) -> str:
    """A row for each ticket, with intervals and costs."""
    lines = [
        "| criterion | spread | sparsity | perplexity | retention | seconds | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        quality, peak = row["quality"], row["peak_bytes"]
        cells = [
            row["criterion"],
            row["spread"],
            f"{quality['sparsity']:.3f}",
            interval(quality["perplexity"], quality["perplexity_interval"], 2),
            interval(quality["performance_retention"], quality["retention_interval"], 3),
            f"{row['seconds_scoring']:.1f} + {row['seconds_drawing']:.1f}",
            "" if peak is None else f"{peak / MIB:.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
