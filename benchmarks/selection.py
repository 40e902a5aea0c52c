"""From weights to finished mask: time and memory, against what a user would pick instead.

The unit of time is one parallel read pass over the same bytes in the same process. Times are medians of
interleaved runs after a warm-up; each figure of memory comes from a process of its own and is what the resident
set rises above the weights. A peer that would not fit in memory, by its bytes a weight at the smallest size, is
not run, and the table says so.

    python benchmarks/selection.py [--quick] [--sparsity 0.9]
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils import prune
from tqdm import tqdm

from _common import MIB, benchmark_parser, keep, machine, medians, peak_bytes_in_fresh_process
from lottery_tickets import Mask, create_magnitude_mask

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = {"50M": 50_000_000, "200M": 200_000_000, "1B": 1_000_000_000}
QUICK_SIZES = {"10M": 10_000_000, "50M": 50_000_000}
TENSORS = 100
CHUNK = 1 << 20
READ = "read pass"
OURS = "create_magnitude_mask"
OURS_ROUNDS = 9
PEER_ROUNDS = 3
# A peer that has taken this long over one size is not repeated.
PEER_SECONDS = 60.0

Weights = Mapping[str, torch.Tensor]


def make_weights(numel: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Normal weights over a hundred tensors whose sizes rise evenly and are no multiples of anything."""
    generator = torch.Generator().manual_seed(0)
    ends = [round(numel * (index / TENSORS) ** 1.5) for index in range(TENSORS + 1)]
    weights = {}
    for index, (start, end) in enumerate(pairwise(ends)):
        tensor = torch.empty(end - start, dtype=dtype)
        for chunk in tensor.split(CHUNK):
            chunk.copy_(torch.randn(chunk.shape, generator=generator) * 0.02)
        weights[f"{index}.weight"] = tensor
    return weights


def read_pass(weights: Weights) -> None:
    """Every byte once, by as many threads as torch uses."""
    chunks = [
        chunk.view(torch.int16).numpy()[: chunk.nbytes // 8 * 4].view(np.int64)
        for tensor in weights.values()
        for chunk in tensor.split(CHUNK)
    ]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(
            pool.map(
                lambda share: [chunk.sum() for chunk in share], [chunks[turn::threads] for turn in range(threads)]
            )
        )


def ours(weights: Weights, sparsity: float) -> Mask:
    return create_magnitude_mask(weights, sparsity, progress=False)


def torch_global_pruning(weights: Weights, sparsity: float) -> list[torch.nn.Module]:
    layers = []
    for tensor in weights.values():
        layer = torch.nn.Module()
        layer.register_parameter("weight", torch.nn.Parameter(tensor, requires_grad=False))
        layers.append(layer)
    prune.global_unstructured(
        [(layer, "weight") for layer in layers], prune.L1Unstructured, amount=removals(weights, sparsity)
    )
    return layers


def kthvalue(weights: Weights, sparsity: float) -> float:
    return float(magnitudes(weights).kthvalue(removals(weights, sparsity)).values)


def torch_sort(weights: Weights, sparsity: float) -> float:
    return float(magnitudes(weights).sort().values[removals(weights, sparsity) - 1])


def numpy_partition(weights: Weights, sparsity: float) -> float:
    """On the bit patterns for bf16, which numpy does not know."""
    rank = removals(weights, sparsity) - 1
    if next(iter(weights.values())).dtype == torch.bfloat16:
        patterns = np.concatenate([tensor.view(torch.int16).numpy() for tensor in weights.values()])
        patterns &= 0x7FFF
        patterns.partition(rank)
        return float(torch.tensor(patterns[rank]).view(torch.bfloat16))
    joined = np.concatenate([tensor.numpy() for tensor in weights.values()])
    np.abs(joined, out=joined)
    joined.partition(rank)
    return float(joined[rank])


def magnitudes(weights: Weights) -> torch.Tensor:
    return torch.cat(list(weights.values())).abs()


def removals(weights: Weights, sparsity: float) -> int:
    return round(sparsity * sum(tensor.numel() for tensor in weights.values()))


PEERS: dict[str, Callable[[Weights, float], object]] = {
    "torch global_unstructured": torch_global_pruning,
    "torch kthvalue": kthvalue,
    "torch sort": torch_sort,
    "numpy partition": numpy_partition,
}
METHODS = {OURS: ours, **PEERS}


# -------------------------------------------------------------------- in processes of their own


def measure_times(numel: int, dtype: str, sparsity: float, peers: list[str]) -> dict[str, Any]:
    """Seconds of every run, interleaved: reads and ours around each run of a peer."""
    weights = make_weights(numel, DTYPES[dtype])
    seconds: dict[str, list[float]] = {name: [] for name in (READ, OURS, *peers)}

    def clock(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - started)

    def clock_ours() -> None:
        clock(READ, lambda: read_pass(weights))
        clock(OURS, lambda: ours(weights, sparsity))

    clock_ours()
    seconds[READ].clear()
    seconds[OURS].clear()
    for turn in range(PEER_ROUNDS):
        for peer in peers:
            if turn == 0 or sum(seconds[peer]) < PEER_SECONDS:
                clock(peer, lambda peer=peer: PEERS[peer](weights, sparsity))
                clock_ours()
    while len(seconds[OURS]) < OURS_ROUNDS:
        clock_ours()
    mask = ours(weights, sparsity)
    return {"seconds": seconds, "removed": mask.numel - mask.kept, "expected": removals(weights, sparsity)}


def prepare_memory(numel: int, dtype: str, sparsity: float, method: str) -> Callable[[], object]:
    """One run over these weights, after a warm-up on few weights of the same kind."""
    weights = make_weights(numel, DTYPES[dtype])
    METHODS[method](make_weights(5_000_000, DTYPES[dtype]), sparsity)
    return lambda: METHODS[method](weights, sparsity)


def measure(sizes: Mapping[str, int], sparsity: float) -> list[dict[str, Any]]:
    rows = []
    smallest = min(sizes.values())
    bytes_a_weight: dict[tuple[str, str], float] = {}
    for size, numel in sizes.items():
        for dtype in tqdm(DTYPES, desc=f"{size} weights"):
            peak = {OURS: peak_bytes_in_fresh_process(prepare_memory, numel, dtype, sparsity, OURS)}
            too_large = {}
            for peer in PEERS:
                if numel == smallest:
                    peak[peer] = peak_bytes_in_fresh_process(prepare_memory, numel, dtype, sparsity, peer)
                    bytes_a_weight[dtype, peer] = peak[peer] / numel
                needed = (bytes_a_weight[dtype, peer] + DTYPES[dtype].itemsize) * numel
                if needed > 0.9 * machine()["memory_bytes"]:
                    too_large[peer] = needed
            peers = [peer for peer in PEERS if peer not in too_large]
            timed = _times_in_a_process(numel, dtype, sparsity, peers)
            assert timed["removed"] == timed["expected"], timed
            rows.append(
                {
                    "size": size,
                    "numel": numel,
                    "dtype": dtype,
                    **timed,
                    "median_seconds": medians(timed["seconds"]),
                    "peak_bytes": peak,
                    "allowed_peak_bytes": numel // 8 + 64 * MIB,
                    "bytes_that_do_not_fit": too_large,
                }
            )
    return rows


def _times_in_a_process(numel: int, dtype: str, sparsity: float, peers: list[str]) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_times, numel, dtype, sparsity, peers).result()


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="From weights to mask (medians; memory above the weights)")
    for column in (
        "weights",
        "dtype",
        "method",
        "seconds",
        "read passes",
        "ours is faster by",
        "MiB",
        "bytes a weight",
    ):
        table.add_column(column, justify="left" if column in {"dtype", "method"} else "right")
    for row in rows:
        seconds = row["median_seconds"]
        for name in (READ, OURS, *PEERS):
            if name in row["bytes_that_do_not_fit"]:
                needed = f"needs {row['bytes_that_do_not_fit'][name] / 2**30:.0f} GiB"
                table.add_row(row["size"], row["dtype"], name, needed)
                continue
            peak = row["peak_bytes"].get(name)
            table.add_row(
                row["size"],
                row["dtype"],
                name,
                f"{seconds[name]:.3f}",
                f"{seconds[name] / seconds[READ]:.1f}",
                f"{seconds[name] / seconds[OURS]:.0f}x" if name in PEERS else "",
                "" if peak is None else f"{peak / MIB:.0f}",
                "" if peak is None else f"{peak / row['numel']:.2f}",
            )
        table.add_section()
    Console(width=120).print(table)


def main() -> None:
    parser = benchmark_parser(__doc__, "smaller sizes")
    parser.add_argument("--sparsity", type=float, default=0.9)
    arguments = parser.parse_args()
    rows = measure(QUICK_SIZES if arguments.quick else SIZES, arguments.sparsity)
    show(rows)
    print(keep("selection", {"sparsity": arguments.sparsity, "rows": rows}, arguments))


if __name__ == "__main__":
    main()
