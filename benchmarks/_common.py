"""What the benchmarks share: the machine, interleaved timing, peak memory in a fresh process, result files."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("lottery-tickets", "torch", "numpy", "numba", "scipy", "transformers")
MIB = 1 << 20


def machine() -> dict[str, Any]:
    """Processor, cores, memory, threads and versions: what a figure depends on."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        # Well above torch_threads means that others computed too, and that seconds are not to be trusted.
        "load_average": list(os.getloadavg()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {package: _version(package) for package in PACKAGES},
    }


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, the functions taking turns so that a slow spell of the machine hits them all.

    Every other round runs in the opposite order. Nothing is warmed up here.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        names = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in names:
            gc.collect()
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(runs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of each."""
    return {name: statistics.median(values) for name, values in runs.items()}


def peak_bytes_in_fresh_process(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Peak resident memory of a piece of work above what is resident when it starts.

    Args:
        prepare: A function at the top level of a script, called as `prepare(*arguments)` in a new process; makes
            what is there beforehand and returns the work, a function without arguments, which is then measured.
        arguments: Anything that pickles.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        process.join()
        raise RuntimeError(f"{prepare.__name__}{arguments} ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def benchmark_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: `--quick` and `--results`.

    Args:
        description: The script's docstring, of which the first line is shown.
        quick: What the quick form leaves out.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}; written only if --results is given")
    parser.add_argument("--results", type=Path, help="folder for the results; default: benchmarks/results")
    return parser


def keep(name: str, results: Mapping[str, Any], given: argparse.Namespace) -> str:
    """Write the results where they were asked for, and tell where; those of a quick form go nowhere by default."""
    if given.quick and given.results is None:
        return f"not written: {json.dumps(machine())}"
    return f"written to {write_results(name, results, given.results or RESULTS)}"


def write_results(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<name>.json`: the results, the machine and the date."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path.write_text(json.dumps({"date": date, "machine": machine(), **results}, indent=2) + "\n")
    return path


def _measure(sender: Any, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    work = prepare(*arguments)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but still held would be reused and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _status("VmHWM")
    work()
    sender.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
