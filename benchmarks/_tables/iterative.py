"""Iterative pruning beside loops by hand."""

from __future__ import annotations

from _tables._format import MIB, Results, load, machine_line, other_work

OURS, PLAIN, FUSED = "ours", "by hand, Adam as it comes", "by hand, fused Adam"


def imp() -> str:
    """Iterative magnitude pruning."""
    found = load("imp")
    return f"""## Iterative magnitude pruning

{found["network"]} on {found["images"]:,} images of {found["data"]} held as tensors, batches of
{found["batch_size"]}, Adam, one epoch a round: the dense network, then {found["rounds"]} rounds that remove a
fifth of the weights and rewind the others, by the same batches everywhere. The loop by hand multiplies the weights
by their masks after every step. Ours holds gradients and the optimizer's averages at zero too, which the loop
leaves alone, and looks for losses and gradients that are not finite. Medians of {found["repeats"]} interleaved
runs, one thread; the bar is {found["time_bar"]} times the loop by hand. Memory is what the resident set rises
above the data.

{table(found)}

{text(found)}

{machine_line(found)}{other_work(found)}
"""


def table(found: Results) -> str:
    """The ways beside each other."""
    lines = ["| | a step | ours takes | peak memory |", "| --- | --- | --- | --- |"]
    for way, seconds in found["median_seconds"].items():
        lines.append(
            f"| {way} | {seconds / found['steps'] * 1e6:,.0f} us | x {found['ratios'][way]:.3f} "
            f"| {found['peak_bytes'][way] / MIB:,.0f} MiB |"
        )
    return "\n".join(lines)


def text(found: Results) -> str:
    """What to make of it."""
    ratios, bar = found["ratios"], found["time_bar"]
    verdicts = [
        f"The bar is {'' if ratios[way] <= bar else 'not '}met against the loop with {name} (x {ratios[way]:.3f})."
        for way, name in ((PLAIN, "Adam as torch makes it"), (FUSED, "the fused Adam that ours uses"))
    ]
    return f"""{" ".join(verdicts)} What the
latter leaves is calls more than numbers: the network is small. "Adam as it comes" steps operation by operation on
the CPU. Given to ours as a function it is slower than by hand (x {found["as_it_comes_ratio"]:.3f}): pruned weights
have averages of zero, and torch's square root takes several times longer for a zero than for another number. By
name ours takes the fused step, which does not."""
