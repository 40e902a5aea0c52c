"""Tickets of checkpoints that do not fit in memory: time, memory and bytes read, beside plain reading and copying.

A sharded bfloat16 checkpoint of the exact shapes of a Qwen2.5 model is made of normal random numbers. A ticket of
sparsity 0.9 under one threshold is drawn from its folder, and then applied to it. Each figure comes from a process
of its own; before each, what the system has cached of the files is dropped. Drawing is timed against reading the
files twice with a plain sequential reader, applying against `cp`, both with the time until the disk has it all.
Memory stands beside what `plan_memory` says before.

    python benchmarks/streaming.py [--billions 1.5] [--folder DIR] [--keep]

Without --billions it is 14, which takes 29.5 GB on disk and as much again for the copy, and writes
benchmarks/results/streaming.json; smaller ones print only.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from _common import MIB, benchmark_parser, keep

# Hidden size, size of the MLP, blocks, heads, heads of keys and values, vocabulary, whether the head is tied: as
# the models of these billions of parameters were published (https://huggingface.co/Qwen/Qwen2.5-14B/blob/main/config.json).
SHAPES = {
    0.5: (896, 4864, 24, 14, 2, 151936, True),
    1.5: (1536, 8960, 28, 12, 2, 151936, True),
    3.0: (2048, 11008, 36, 16, 2, 151936, True),
    7.0: (3584, 18944, 28, 28, 4, 152064, False),
    14.0: (5120, 13824, 48, 40, 8, 152064, False),
}
FULL = 14.0
SPARSITY = 0.9
# How the library guesses a threshold: so many weights, and so many standard deviations of their rank either way.
SAMPLE, SIGMAS = 1 << 20, 6
SHARD = 4_000_000_000
BLOCK = 1 << 22
READ = "read twice"
DRAW = "create_magnitude_mask"
COPY = "cp"
APPLY = "prune_checkpoint"
ALLOWED_ANONYMOUS = 256 * MIB
TIME_BARS = {DRAW: 1.3, APPLY: 1.6}


# --- The checkpoint ---


def make_checkpoint(folder: Path, billions: float) -> None:
    """Shards in the order of the model, written block by block, with their index and configuration."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, mlp, blocks, heads, key_heads, vocabulary, tied = SHAPES[billions]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    config.architectures = ["Qwen2ForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, parameter in parameters.items():
        if sum(shape.numel() for shape in shards[-1].values()) + parameter.numel() > SHARD // 2:
            shards.append({})
        shards[-1][name] = parameter.shape
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    places = {name: file for file, shapes in zip(files, shards, strict=True) for name in shapes}
    for number, (file, shapes) in enumerate(tqdm(zip(files, shards, strict=True), "writing", len(files))):
        write_shard(folder / file, shapes, number)
    total = 2 * sum(parameter.numel() for parameter in parameters.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def check_room(home: Path, billions: float) -> None:
    """End, if the disk cannot take the checkpoint and a copy."""
    home.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * int(2.2e9 * billions) + (1 << 30), shutil.disk_usage(home).free
    if needed > free:
        raise SystemExit(f"{home}: about {needed / 1e9:.0f} GB are needed, and {free / 1e9:.0f} are free there")


def write_shard(path: Path, shapes: Mapping[str, torch.Size], seed: int) -> None:
    """One shard of normal numbers, drawn by two threads ahead of the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [reached, reached := reached + 2 * shape.numel()],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numel = reached // 2

    def drawn(start: int) -> bytes:
        generator = np.random.Generator(np.random.SFC64([seed, start]))
        values = generator.standard_normal(min(BLOCK, numel - start), np.float32)
        values *= np.float32(0.02)
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().tobytes()

    with path.open("wb") as file, ThreadPoolExecutor(2) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        starts = range(0, numel, BLOCK)
        for first in range(0, len(starts), 16):
            for block in pool.map(drawn, starts[first : first + 16]):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())


# --- What is timed, each in a process of its own ---


def read_twice(folder: Path) -> Callable[[], object]:
    """All shards from beginning to end, and again, into one buffer."""

    def work() -> None:
        buffer = bytearray(8 << 20)
        for _ in range(2):
            for path in sorted(folder.glob("*.safetensors")):
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

    return work


def draw(folder: Path) -> Callable[[], object]:
    """The ticket, written beside the checkpoint."""
    from lottery_tickets import create_magnitude_mask

    prepare_library(folder)

    def work() -> dict[str, Any]:
        started = time.perf_counter()
        mask = create_magnitude_mask(folder, SPARSITY, progress=False)
        drawn = time.perf_counter() - started
        mask.save(folder.with_name("ticket.safetensors"))
        return {"seconds": drawn, "digest": mask.digest(), "numel": mask.numel, "kept": mask.kept}

    return work


def copy(folder: Path) -> Callable[[], object]:
    """`cp`, and the disk until it has it all."""

    def work() -> None:
        subprocess.run(["cp", "-r", folder, folder.with_name("copy")], check=True)
        sync(folder.with_name("copy"))

    return work


def apply(folder: Path) -> Callable[[], object]:
    """The ticket applied, which syncs by itself."""
    from lottery_tickets import Mask
    from lottery_tickets.large_models import prune_checkpoint

    prepare_library(folder)
    mask = Mask.load(folder.with_name("ticket.safetensors"))

    def work() -> dict[str, Any]:
        return dict(prune_checkpoint(folder, mask, folder.with_name("pruned"), progress=False))

    return work


def prepare_library(folder: Path) -> None:
    """Have the kernels compiled or loaded, and transformers imported, before the clock starts."""
    from safetensors.torch import save_file

    from lottery_tickets import create_magnitude_mask
    from lottery_tickets.large_models import prune_checkpoint

    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "small"
        small.mkdir()
        key = "model.layers.0.mlp.up_proj.weight"
        save_file({key: torch.randn(5000, 1000).bfloat16()}, small / "model.safetensors")
        mask = create_magnitude_mask(small, SPARSITY, progress=False)
        prune_checkpoint(small, mask, small.with_name("pruned"), progress=False)
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        config.num_hidden_layers = 1
        transformers.AutoModelForCausalLM.from_config(config)


def measured(prepare: Callable[[Path], Callable[[], object]], folder: Path) -> dict[str, Any]:
    """Seconds, peaks and bytes of a piece of work in a fresh process, nothing of the files being cached."""
    drop_cached(folder)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, prepare, folder))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    finally:
        process.join()
    return found


def measure(sender: Any, prepare: Callable[[Path], Callable[[], object]], folder: Path) -> None:
    """What `measured` runs in its process."""
    work = prepare(folder)
    before, read = anonymous(), bytes_read()
    peak = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(max(peak.pop(), anonymous()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    read = bytes_read() - read
    done.set()
    watcher.join()
    found = {"seconds": seconds, "anonymous_before": before, "anonymous_peak": peak[0], "bytes_read": read}
    sender.send({**found, **(result if isinstance(result, dict) else {})})


def drop_cached(folder: Path) -> None:
    """Let the system forget what it has of the files."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(folder: Path) -> None:
    """Wait until the disk has all files of a folder."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def bytes_read() -> int:
    """Bytes that this process had the disk read."""
    with Path("/proc/self/io").open() as counts:
        return next(int(line.split()[1]) for line in counts if line.startswith("read_bytes"))


# --- All of it ---


def benchmark(folder: Path, billions: float, repeats: int) -> dict[str, Any]:
    """All figures of one checkpoint."""
    rounds = [{**drawing(folder), **applying(folder)} for _ in range(repeats)]
    rounds.sort(key=lambda found: found[DRAW]["seconds"] / found[READ]["seconds"])
    return told(folder, billions, rounds[len(rounds) // 2])


def drawing(folder: Path) -> dict[str, Any]:
    """The files read twice, and the ticket drawn."""
    return {READ: measured(read_twice, folder), DRAW: measured(draw, folder)}


def applying(folder: Path) -> dict[str, Any]:
    """The files copied, and the ticket applied."""
    found = {}
    for name, prepare, target in ((COPY, copy, "copy"), (APPLY, apply, "pruned")):
        found[name] = measured(prepare, folder)
        shutil.rmtree(folder.with_name(target))
    return found


def planned(folder: Path) -> dict[str, int]:
    """What `plan_memory` says before: all of drawing, and what applying adds to the ticket, which is loaded."""
    from lottery_tickets.large_models import plan_memory

    draws = plan_memory(folder, "mask", from_disk=True, device="cpu")
    applies = plan_memory(folder, "apply", device="cpu")
    return {DRAW: draws["total"], APPLY: applies["total"] - applies["mask"]}


def one_read(folder: Path, numel: int) -> dict[str, float]:
    """What would have to be kept aside for bits to be written in the pass that counts.

    A sample as large as the library's guesses the rank to `SIGMAS` standard deviations either way. Of each
    magnitude in that bracket, and there is no narrower one than a single pattern, all places would be kept: as
    distances from one to the next in 16 bits each.
    """
    from lottery_tickets.large_models import map_weights

    with map_weights(folder) as weights:
        tensors = [tensor.reshape(-1) for tensor in weights.tensors.values()]
        share = SAMPLE / sum(tensor.numel() for tensor in tensors)
        # One stretch from the middle of each: neighbours are as random as any here.
        taken = [
            tensor[(half := tensor.numel() // 2) : half + round(tensor.numel() * share)] for tensor in tensors
        ]
        patterns = torch.cat(taken).view(torch.int16).bitwise_and(0x7FFF).sort().values
    ties = float((patterns == patterns[int(SPARSITY * len(patterns))]).float().mean())
    bracket = 2 * SIGMAS * math.sqrt(SPARSITY * (1 - SPARSITY) / len(patterns))
    magnitudes = math.ceil(bracket / ties) + 1
    return {"ties_share": ties, "magnitudes": magnitudes, "aside_bytes": magnitudes * ties * numel * 2}


def told(folder: Path, billions: float, middle: dict[str, Any]) -> dict[str, Any]:
    """A round's figures, and what they say."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    packed = (middle[DRAW]["numel"] + 7) // 8
    return {
        "billions": billions,
        "file_bytes": size,
        "numel": middle[DRAW]["numel"],
        "sparsity": SPARSITY,
        "digest": middle[DRAW]["digest"],
        "runs": {name: {key: middle[name][key] for key in FIGURES} for name in (READ, DRAW, COPY, APPLY)},
        "packed_mask_bytes": packed,
        "anonymous_bytes": middle[DRAW]["anonymous_peak"] - middle[DRAW]["anonymous_before"],
        "anonymous_bar": packed + ALLOWED_ANONYMOUS,
        "planned_bytes": planned(folder),
        "one_read": one_read(folder, middle[DRAW]["numel"]),
        "once_ratio": 2 * middle[DRAW]["seconds"] / middle[READ]["seconds"],
        "read_ratio": middle[DRAW]["bytes_read"] / size,
        "time_ratios": {
            DRAW: middle[DRAW]["seconds"] / middle[READ]["seconds"],
            APPLY: middle[APPLY]["seconds"] / middle[COPY]["seconds"],
        },
        "time_bars": TIME_BARS,
    }


FIGURES = ("seconds", "anonymous_before", "anonymous_peak", "bytes_read")


def table(results: Mapping[str, Any]) -> Table:
    """Times, memory and bytes."""
    shown = Table(title=f"{results['numel'] / 1e9:.1f}B prunable weights, {results['file_bytes'] / 1e9:.1f} GB")
    headings = ("", "seconds", "GB/s", "times the file read", "anonymous memory above the start", "planned")
    for heading in headings:
        shown.add_column(heading, justify="left" if not heading else "right")
    for name, run in results["runs"].items():
        shown.add_row(
            name,
            f"{run['seconds']:.1f}",
            f"{results['file_bytes'] / run['seconds'] / 1e9:.2f}",
            f"{run['bytes_read'] / results['file_bytes']:.2f}",
            f"{(run['anonymous_peak'] - run['anonymous_before']) / MIB:,.0f} MiB",
            f"{results['planned_bytes'][name] / MIB:,.0f} MiB" if name in results["planned_bytes"] else "",
        )
    return shown


def main() -> None:
    """Make the checkpoint, run, print, and write benchmarks/results/streaming.json."""
    parser = benchmark_parser(__doc__, "the smallest of the models")
    parser.add_argument("--billions", type=float, choices=sorted(SHAPES), default=FULL)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made, or found; default: a temporary one"
    )
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--repeats", type=int, help="rounds, of which the middle one is told")
    parser.add_argument("--make-only", action="store_true", help="make the checkpoint and no more")
    given = parser.parse_args()
    billions = min(SHAPES) if given.quick else given.billions
    console = Console()
    home = given.folder or Path(tempfile.mkdtemp(prefix="streaming-", dir="/var/tmp"))
    checkpoint = home / "checkpoint"
    if not checkpoint.is_dir():
        check_room(home, billions)
        make_checkpoint(home / "unfinished", billions)
        (home / "unfinished").rename(checkpoint)
    if given.make_only:
        return
    results = benchmark(checkpoint, billions, given.repeats or (1 if billions == FULL else 3))
    console.print(table(results))
    for name, ratio in results["time_ratios"].items():
        console.print(f"{name}: {ratio:.2f} times the plain way, at most {TIME_BARS[name]}")
    console.print(f"{DRAW}: {results['once_ratio']:.2f} times half the time of reading twice")
    console.print(
        f"anonymous memory {results['anonymous_bytes'] / MIB:,.0f} MiB, at most "
        f"{results['anonymous_bar'] / MIB:,.0f}; the file read {results['read_ratio']:.2f} times, at most 2"
    )
    if given.quick or given.results or billions == FULL:
        console.print(keep("streaming", results, given))
    if not given.keep:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
