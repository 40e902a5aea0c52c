"""What ranks tell each other for a mask, what it takes of their memory, and how long.

    python benchmarks/distributed.py [--quick]

Processes on this machine, gloo between them, each with its shard of a model and nothing else of it: FSDP's layout
on 1, 2 and 4 ranks, and a mesh of 2 x 2 that cuts rows too. Bytes are those handed to the calls of
torch.distributed, beside what the machine's loopback interface counted in the meantime, packets' headers included.
Memory is what a process takes above what it had with its shard, the imports and a small mask drawn beforehand.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from _common import MIB, _status, benchmark_parser, keep
from lottery_tickets import create_magnitude_mask

SPARSITY = 0.9
# Rows that neither 2 nor 4 divides, and most weights tied with others: they are multiples of 2^-10 in bfloat16.
ROWS, COLUMNS = 2047, 2048
MESHES = ((1,), (2,), (4,), (2, 2))
DTYPES = ("bfloat16", "float32")
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "gather", "all_gather_object")
PRELOADED = ("torch._dynamo", "torch.distributed.tensor", "lottery_tickets._kernels")
BAR_TOLD = 2_000_000
BAR_MEMORY = 64 * MIB


def shards(tensors: int, dtype: torch.dtype, mesh_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """This rank's part of a model whose weights depend on their place in it alone."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", mesh_shape)
    placements = [Shard(0), Shard(1)][: len(mesh_shape)]
    at = mesh.get_coordinate()
    made = {}
    for number in range(tensors):
        rows = np.arange(ROWS)[_part(ROWS, mesh_shape[0], at[0])]
        local = torch.empty(len(rows), COLUMNS, dtype=dtype)
        for row, target in zip(rows.tolist(), local, strict=True):
            seed = np.random.Philox(key=number * ROWS + row)
            target.copy_(torch.from_numpy(np.random.Generator(seed).standard_normal(COLUMNS, np.float32)))
        if len(mesh_shape) == 2:
            local = local[:, _part(COLUMNS, mesh_shape[1], at[1])].clone()
        made[f"layers.{number}.weight"] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=torch.Size((ROWS, COLUMNS)), stride=(COLUMNS, 1)
        )
    return made


def _part(size: int, number: int, place: int) -> slice:
    length = -(-size // number)
    return slice(place * length, min((place + 1) * length, size))


def rank_main(rank: int, mesh: tuple[int, ...], meeting: str, dtype: str, tensors: int, answers: Any) -> None:
    """Draw masks on one rank, and say what that took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=int(np.prod(mesh)))
    model = shards(tensors, getattr(torch, dtype), mesh)
    create_magnitude_mask(shards(1, getattr(torch, dtype), mesh), SPARSITY, progress=False)  # kernels are loaded
    told = count_bytes()
    figures: dict[str, Any] = {"shard_bytes": sum(part.to_local().nbytes for part in model.values())}
    for scope in ("global", "layer"):
        dist.barrier()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free but still held would be reused and not be seen
        over, before = loopback(), told()
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")
        resident, start = _status("VmHWM"), time.perf_counter()
        mask = create_magnitude_mask(model, SPARSITY, scope=scope, progress=False)
        seconds, peak, bytes_told = time.perf_counter() - start, _status("VmHWM") - resident, told() - before
        dist.barrier()
        figures[scope] = {
            "seconds": seconds,
            "peak_bytes": peak,
            "mask_bytes": sum(mask.local.packed(name).nbytes for name in mask.names),
            "told_bytes": bytes_told,
            "loopback_bytes": loopback() - over,
            "digest": mask.digest(),
        }
    answers.put((rank, figures))
    dist.destroy_process_group()


def count_bytes() -> Callable[[], int]:
    """Count what is handed to collectives from now on; what this returns tells how much it was."""
    total = 0

    def counting(name: str) -> None:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal total
            # The first tensor of those that receive and give, as large as what this rank gives.
            given = next((one for one in arguments if isinstance(one, torch.Tensor)), None)
            total += 0 if given is None else given.nbytes
            return original(*arguments, **options)

        call.__name__ = name
        setattr(dist, name, call)

    for name in COLLECTIVES:
        counting(name)
    return lambda: total


def loopback() -> int:
    """Bytes that this machine has sent to itself."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def measure_one(mesh: tuple[int, ...], dtype: str, tensors: int, folder: str) -> dict[str, Any]:
    """One way of spreading, the worst of its ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    answers: Any = context.Queue()
    size, meeting = int(np.prod(mesh)), f"{folder}/{dtype}-{'x'.join(map(str, mesh))}"
    processes = [
        context.Process(target=rank_main, args=(rank, mesh, meeting, dtype, tensors, answers))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    drawn: dict[str, Any] = {}
    for scope in ("global", "layer"):
        runs = [figures[scope] for figures in found.values()]
        drawn[scope] = {
            **{key: max(run[key] for run in runs) for key in ("seconds", "mask_bytes", "told_bytes")},
            "extra_bytes": max(run["peak_bytes"] - run["mask_bytes"] for run in runs),
            "loopback_bytes_a_rank": runs[0]["loopback_bytes"] / size,
            "digests": sorted({run["digest"] for run in runs}),
        }
    return {
        "mesh": list(mesh),
        "dtype": dtype,
        "shard_bytes": max(figures["shard_bytes"] for figures in found.values()),
        **drawn,
    }


def measure(tensors: int) -> dict[str, Any]:
    """All figures of this benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure_one(mesh, dtype, tensors, folder) for dtype in DTYPES for mesh in MESHES]
    for dtype in DTYPES:
        for scope in ("global", "layer"):
            digests = {digest for run in runs if run["dtype"] == dtype for digest in run[scope]["digests"]}
            if len(digests) != 1:
                raise SystemExit(f"{dtype}, {scope}: the masks differ between ranks and meshes.")
    return {
        "sparsity": SPARSITY,
        "weights": tensors * ROWS * COLUMNS,
        "tensors": tensors,
        "shape": [ROWS, COLUMNS],
        "told_bar": BAR_TOLD,
        "memory_bar": BAR_MEMORY,
        "runs": runs,
    }


def table(results: dict[str, Any]) -> Table:
    """What each way of spreading takes."""
    shown = Table(title=f"{results['weights'] / 1e6:,.0f}M weights, sparsity {results['sparsity']}")
    columns = (
        "type",
        "mesh",
        "scope",
        "seconds",
        "told, kB a rank",
        "loopback, kB a rank",
        "memory, MiB",
        "of it mask",
    )
    for column in columns:
        shown.add_column(column, justify="right")
    for run in results["runs"]:
        for scope in ("global", "layer"):
            one = run[scope]
            shown.add_row(
                *(run["dtype"], " x ".join(map(str, run["mesh"])), scope, f"{one['seconds']:.2f}"),
                *(f"{one['told_bytes'] / 1e3:.1f}", f"{one['loopback_bytes_a_rank'] / 1e3:.1f}"),
                f"{(one['extra_bytes'] + one['mask_bytes']) / MIB:.1f}",
                f"{one['mask_bytes'] / MIB:.1f}",
            )
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/distributed.json."""
    given = benchmark_parser(__doc__, "4 tensors").parse_args()
    console = Console(width=120)
    results = measure(4 if given.quick else 48)
    console.print(table(results))
    console.print(keep("distributed", results, given))


if __name__ == "__main__":
    main()
