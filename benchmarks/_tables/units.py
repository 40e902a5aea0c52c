"""What it gains to take units out."""

from __future__ import annotations

from _tables._format import MIB, Results, interval, load, machine_line, number, other_work

ROWS = ("dense", "half of the weights zero", "without the units")
RUNTIMES = ("PyTorch", "ONNX Runtime")


def structured() -> str:
    """Time and memory of SmolLM2-135M and of what a ticket leaves of it."""
    results = load("structured")
    config = results["config"]
    peaks = results["peak_bytes"]
    return f"""## Structured tickets

SmolLM2-135M in float32 without half of the neurons of every layer and a third of its heads, by magnitude: {
        100 * results["share_left"]:.1f}% of the
parameters are left, with {config["intermediate_size"]} neurons, {config["num_key_value_heads"]} heads of keys and
values and {config["num_attention_heads"]} of queries a layer. A forward pass over {
        results["tokens"]
    } tokens, medians:

{structured_table(results)}

| without the units, against dense | measured | at most |
| --- | ---: | ---: |
| time by PyTorch | x {results["ratios"]["PyTorch"]:.2f} | x {results["time_bar"]:.2f} |
| peak memory of loading and 64 tokens ({peaks["small"] / MIB:,.0f} of {peaks["dense"] / MIB:,.0f} MiB) | x {
        results["memory_ratio"]:.3f} | x {results["memory_bar"]:.3f} |

Zeros in place gain nothing: they are multiplied like any number. ONNX Runtime is within {
        max(results["onnx_relative_error"].values()):.1g} of PyTorch's largest output.

{machine_line(results)}{other_work(results)}
"""


def structured_table(results: Results) -> str:
    """Speed of each network in each runtime."""
    lines = ["| | runtime | tokens a second | time |", "| --- | --- | ---: | ---: |"]
    speeds = results["tokens_per_second"]
    for runtime in RUNTIMES:
        for name in ROWS:
            speed = speeds.get(f"{name}, {runtime}")
            if speed is not None:
                ratio = speeds[f"dense, {runtime}"] / speed
                lines.append(f"| {name} | {runtime} | {number(speed, 0)} | x {ratio:.2f} |")
    return "\n".join(lines)


def early_bird_channels() -> str:
    """Early-Bird Train against whole trainings."""
    results = load("early_bird_channels")
    settled = [run["early bird 0.5"]["settled_at"] for run in results["runs"]]
    return f"""## Early birds of channels

A small residual network on {results["train_images"]:,} images of Fashion-MNIST, {results["epochs"]} epochs,
{results["seeds"]} seeds: accuracy in per cent on 10,000 test images with a 95% interval over seeds, seconds and
multiplications of everything from the first step on over those of dense training. The number is the share of
channels taken out. Searches ended after {min(settled):.1f} to {max(settled):.1f} epochs, when the masks of all
three shares had settled or the epochs were over; what is left trains for the rest of the {results["epochs"]}
epochs. Train, prune, train again is network slimming: {results["epochs"]} epochs, and as many once more.

{channels_table(results)}

{machine_line(results)}{other_work(results)}
"""


def channels_table(results: Results) -> str:
    """A row for each training."""
    lines = [
        "| training | accuracy | time | arithmetic | parameters |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results["rows"].items():
        accuracy = interval(100 * row["accuracy"], [100 * one for one in row["accuracy_interval"]], 1)
        lines.append(
            f"| {name} | {accuracy} | x {row['time_ratio']:.2f} | x {row['operations_ratio']:.2f} "
            f"| {row['parameters']:,.0f} |"
        )
    return "\n".join(lines)
