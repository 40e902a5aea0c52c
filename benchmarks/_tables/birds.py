"""Early birds: optimizers beside each other, memory of training, cost of a check, rank correlation by buckets."""

from __future__ import annotations

import statistics
import textwrap

from _tables._format import READ, Results, load, machine_line, mean_and_error, other_work


def optimizers() -> str:
    """Do optimizers find the same ticket?"""
    optimizers = load("early_bird_optimizers")
    return f"""## Do optimizers find the same ticket?

Early-bird tickets of sparsity {optimizers["sparsity"]} on {optimizers["data"]}, drawn by each optimizer from the
same initial weights and batches, {seeds_of(optimizers)} seeds. Overlaps are Dice's, and the excess over chance as
a share of what chance leaves: 0 for independent masks of the same layer densities, 1 for equal ones; means and
their standard errors over seeds.

{optimizers_table(optimizers)}

Accuracy of networks trained from the initial weights for {optimizers["recipe"]["epochs"]} epochs by one recipe,
SGD with momentum {optimizers["recipe"]["momentum"]}; a random mask removes as many weights of each tensor as the
ticket:

{accuracy_table(optimizers)}

{optimizers_text(optimizers)}

{machine_line(optimizers)}
"""


def memory() -> str:
    """Training in little memory."""
    training = load("early_bird_memory")
    return f"""## Training in little memory

One step of a Llama-shaped model of {training["weights"] / 1e9:.2f}B random weights, each way in a fresh process:
peak of the resident set over the bytes of the weights. Ours step inside the backward pass, make activations again
on the way back and take the loss in chunks; torch's are the plain loop with transformers' own loss. The bar for
plain SGD is {training["ratio_bar"]}. "predicted" is what `training_bytes` says before training; it knows nothing
of the holes that the CPU's allocator leaves between tensors, most where new states come between gradients that go.

{training_table(training)}

Predicted for the shape of Qwen2.5-14B in bfloat16 on a device of its own, {training["qwen_batch"]} x
{training["qwen_length"]} tokens, in GB of 10^9 bytes; of the moments (at the loss, in a block, at the embedding)
only the largest counts. The bar for plain SGD is {training["qwen_bar_bytes"] / 1e9:.0f} GB:

{prediction_table(training)}

{machine_line(training)}
"""


def check() -> str:
    """A check for early birds."""
    check = load("early_bird_check")
    return f"""## A check for early birds

What `compute_early_bird_tickets` spends on a check of {check["weights"]:,} weights in {check["dtype"]} at sparsity
{check["sparsity"]}, against an epoch of {check["batches"]} batches of {check["batch_size"]} MNIST digits, which
takes {check["epoch_seconds"]:.0f} s of SGD (told from {check["trained_batches"]} of the batches). A check draws
the mask, compares it with those that are kept, and measures on a sample how many weights moved and how far chance
would have taken the mask.

{epoch_table(check)}

{machine_line(check)}
"""


def rank_correlation() -> str:
    """Rank correlation by buckets."""
    ranks = load("rank_correlation")
    return f"""## Rank correlation by buckets

`MagnitudeRanks` holds one byte a weight and knows a magnitude to one of 256 ranks; Spearman's correlation of the
magnitudes themselves comes from scipy, which sorts them. SmolLM2 is the linear layers of its first blocks, beside
themselves with Gaussian noise of a share of each tensor's standard deviation; LeNet-300-100 is trained on MNIST
digits by SGD and compared from one epoch to the next.

{agreement_table(ranks)}

### The parts of a check

Each part of a check on {ranks["check"]["numel"] // 10**6}M random weights in float32 at
sparsity {ranks["check"]["sparsity"]}, medians; the unit is one parallel read pass over them. Movement looks at a
sample, so its time does not grow with the model.

{parts_table(ranks)}

{machine_line(ranks)}{other_work(ranks)}
"""


def seeds_of(results: Results) -> int:
    """How many starts each network had."""
    return len(next(iter(results["starts"].values())))


def optimizers_table(results: Results) -> str:
    """Overlaps beyond chance, and when masks settled."""
    networks = results["summary"]
    lines = ["| | " + " | ".join(networks) + " |", "| --- |" + " ---: |" * len(networks)]
    first = next(iter(networks.values()))
    parts = {
        "between_optimizers": "{}, same batches",
        "between_orders": "{}, against other batches",
        "with_initial": "{}, against the mask of the initial weights",
    }
    for part, label in parts.items():
        for name in first[part]:
            cells = [mean_and_error(one[part][name], 3) for one in networks.values()]
            lines.append(f"| {label.format(name.replace(' / ', ' and '))} | " + " | ".join(cells) + " |")
    for name in first["convergence_epochs"]:
        cells = [
            ", ".join("never" if epoch is None else str(epoch) for epoch in one["convergence_epochs"][name])
            for one in networks.values()
        ]
        lines.append(f"| {name} settled at epoch | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_table(results: Results) -> str:
    """What each network gets right."""
    networks = results["summary"]
    lines = ["| network | " + " | ".join(networks) + " |", "| --- |" + " ---: |" * len(networks)]
    for name in next(iter(networks.values()))["accuracy"]:
        cells = [mean_and_error(one["accuracy"][name], 4) for one in networks.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def optimizers_text(results: Results) -> str:
    """What the two tables say, told by their figures."""
    sentences = []
    for network, one in results["summary"].items():
        across = statistics.fmean(pair["mean"] for pair in one["between_optimizers"].values())
        orders = statistics.fmean(pair["mean"] for pair in one["between_orders"].values())
        start = statistics.fmean(pair["mean"] for pair in one["with_initial"].values())
        sentences.append(
            f"On {network} tickets of two optimizers agree on {across:.0%} of what chance leaves, those of one "
            f"optimizer over two orders of the data on {orders:.0%}, and with the mask of the initial weights "
            f"they agree on {start:.0%}."
        )
    return textwrap.fill(" ".join(sentences), 115)


def training_table(results: Results) -> str:
    """Measured and predicted peaks over the weights."""
    lines = [
        "| weights | tokens | way | peak | over the weights | predicted |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        cells = [
            row["dtype"],
            str(row["tokens"]),
            row["way"],
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"x {row['ratio']:.2f}",
            f"x {row['predicted_bytes'] / row['weights_bytes']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prediction_table(results: Results) -> str:
    """A row for each item, a column for each way of training."""
    ways = results["qwen"]
    moments = ("throughout", "at_the_loss", "in_a_block", "at_the_embedding")
    items = list(dict.fromkeys((moment, name) for moment in moments for row in ways for name in row[moment]))
    lines = ["| item | " + " | ".join(row["way"] for row in ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for moment, name in items:
        cells = [f"{row[moment][name] / 1e9:.2f}" if row[moment].get(name) else "" for row in ways]
        if any(cells):
            lines.append(f"| {moment.replace('_', ' ')}: {name} | " + " | ".join(cells) + " |")
    lines.append("| update | " + " | ".join(f"{row['update'] / 1e9:.2f}" for row in ways) + " |")
    lines.append("| **peak** | " + " | ".join(f"**{row['peak'] / 1e9:.1f}**" for row in ways) + " |")
    return "\n".join(lines)


def epoch_table(results: Results) -> str:
    """A row for each criterion, beside the bar."""
    lines = ["| criterion | median check | share of the epoch | at most |", "| --- | ---: | ---: | ---: |"]
    for name, seconds in results["median_check_seconds"].items():
        bar = f"{results['bar']:.0%}" if name == "window" else ""
        lines.append(f"| {name} | {seconds:.2f} s | {results['ratios'][name]:.2%} | {bar} |")
    return "\n".join(lines)


def agreement_table(results: Results) -> str:
    """A row for each pair of weights: both correlations, and what they took."""
    lines = [
        "| weights | number | exact | by buckets | difference | seconds, exact | seconds | bytes a weight |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["agreement"]:
        cells = [
            row["case"],
            f"{row['numel']:,}",
            f"{row['exact']:.6f}",
            f"{row['bucketed']:.6f}",
            f"{row['bucketed'] - row['exact']:+.1e}",
            f"{row['exact_seconds']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['bytes_a_weight']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(results: Results) -> str:
    """A row for each part of a check."""
    seconds = results["check"]["median_seconds"]
    lines = ["| part | seconds | read passes |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {taken:.3f} | {taken / seconds[READ]:.1f} |" for name, taken in seconds.items()]
    return "\n".join(lines)
