"""Masks of models that lie on several ranks."""

from __future__ import annotations

from _tables._format import MIB, Results, load, machine_line, other_work


def ranks() -> str:
    """What ranks tell each other, and what it takes of their memory."""
    results = load("distributed")
    return f"""## On several ranks

A mask of sparsity {results["sparsity"]} of {results["weights"] / 1e6:,.0f}M weights, {results["tensors"]} tensors
of {results["shape"][0]} x {results["shape"][1]}, each rank with its shard: rows dealt out to 1, 2 and 4 ranks, and
a mesh of 2 x 2 that cuts the rows as well. All masks of a data type and scope have the same digest. Told is what a
rank hands to collectives; loopback is what the machine sent to itself in the meantime, packets' headers and
acknowledgements included, by rank. Memory is what the rank with the most takes above what it had with its shard.
All ranks share the processor's cores, so seconds say what working together costs, not what it gains. A threshold
for each tensor is searched for tensor by tensor, in many small messages, of which the packets are the larger part.

{ranks_table(results)}

| | measured | at most |
| --- | ---: | ---: |
{bars(results)}

{machine_line(results)}{other_work(results)}
"""


def ranks_table(results: Results) -> str:
    """One line for each data type, mesh and scope."""
    lines = [
        "| type | mesh | scope | seconds | told | loopback | memory | of it the mask |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in results["runs"]:
        for scope in ("global", "layer"):
            one = run[scope]
            lines.append(
                f"| {run['dtype']} | {' x '.join(map(str, run['mesh']))} | {scope} | {one['seconds']:.2f} "
                f"| {one['told_bytes'] / 1e3:.1f} kB | {one['loopback_bytes_a_rank'] / 1e3:.0f} kB "
                f"| {(one['extra_bytes'] + one['mask_bytes']) / MIB:.1f} MiB | {one['mask_bytes'] / MIB:.1f} MiB |"
            )
    return "\n".join(lines)


def bars(results: Results) -> str:
    """What was to be reached."""
    drawn = [run[scope] for run in results["runs"] for scope in ("global", "layer")]
    told = max(one["told_bytes"] for one in drawn)
    extra = max(one["extra_bytes"] for one in drawn)
    sent = max(run["global"]["loopback_bytes_a_rank"] for run in results["runs"])
    bar = f"{results['told_bar'] / 1e6:.0f} MB"
    return "\n".join(
        [
            f"| told by a rank | {told / 1e6:.2f} MB | {bar} |",
            f"| on the loopback by a rank, for one threshold | {sent / 1e6:.2f} MB | {bar} |",
            f"| memory of a rank beside its shard and its share of the mask | {extra / MIB:.1f} MiB "
            f"| {results['memory_bar'] / MIB:.0f} MiB |",
        ]
    )
