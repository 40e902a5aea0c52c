"""What leaves, leaves time and memory: SmolLM2-135M without half of its neurons and a third of its heads.

    python benchmarks/structured.py [--quick]

Half of the neurons of every feed-forward layer and one of three heads of keys and values of every layer (with the
three queries that share it) go, by magnitude. Seconds of a forward pass over 512 tokens in float32: dense, with
half of its weights zero in place, and without the units; by PyTorch and, the first and the last, by ONNX Runtime.
Peak memory of loading each from a folder and computing 64 tokens, each in a fresh process. Bars: at most 0.70 of
the dense time by PyTorch; memory at most the share of parameters that is left and 0.05.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import benchmark_parser, interleaved, keep, medians, peak_bytes_in_fresh_process
from lottery_tickets import apply_mask, create_magnitude_mask, create_structured_mask, extract_subnetwork
from lottery_tickets._data import model_folder
from lottery_tickets._structured._checking import relative_error
from lottery_tickets.large_models import load_model
from lottery_tickets.structured import save_onnx

TOKENS, FEW_TOKENS = 512, 64
TIME_BAR, MEMORY_SLACK = 0.70, 0.05
REMOVED = {"neuron": 0.5, "head": 1 / 3}
UNSTRUCTURED = 0.5


def smaller(model: Any) -> Any:
    """The model without the units, and what is left of them in every layer."""
    for unit, share in REMOVED.items():
        mask = create_structured_mask(model, share, unit=unit, count="units", allocation="uniform")
        model = extract_subnetwork(model, mask)
    return model


def tokens(count: int) -> torch.Tensor:
    """Any text."""
    return torch.randint(0, 49152, (1, count), generator=torch.Generator().manual_seed(0))


def by_torch(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """A forward pass."""

    def run() -> Any:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    return run


def by_onnx(path: Path, ids: torch.Tensor) -> Callable[[], Any]:
    """The same by ONNX Runtime, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: ids.numpy()}
    return lambda: session.run(None, fed)


def prepared(folder: str, count: int) -> Callable[[], Any]:
    """Loading a model and computing with it, with the libraries there already."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    by_torch(LlamaForCausalLM(tiny), tokens(4))()

    def work() -> Any:
        return by_torch(load_model(folder, progress=False), tokens(count))()

    return work


def made(folder: Path) -> None:
    """The models and their ONNX files, those that are not there yet."""
    if not (folder / "dense").exists():
        model: Any = load_model(model_folder(), torch.float32, progress=False)
        model.save_pretrained(folder / "dense")
        smaller(model).save_pretrained(folder / "small")
    for name in ("dense", "small"):
        if not (folder / f"{name}.onnx").exists():
            save_onnx(load_model(folder / name, progress=False), folder / f"{name}.onnx")


def main() -> None:
    """Measure, print, write."""
    parser = benchmark_parser(__doc__, "one repeat, 64 tokens")
    parser.add_argument("--folder", type=Path, help="Keep models here, and take those that are there.")
    parser.add_argument("--prepare", action="store_true", help="Make the models in --folder, and measure nothing.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        made(folder)
        if not given.prepare:
            results = measured(folder, quick=given.quick)
            print(keep("structured", results, given))


def measured(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Time and memory of the models in a folder."""
    count, repeats = (FEW_TOKENS, 1) if quick else (TOKENS, 7)
    dense, masked, small = (load_model(folder / name, progress=False) for name in ("dense", "dense", "small"))
    apply_mask(masked, create_magnitude_mask(masked, UNSTRUCTURED, progress=False))
    sizes = {"dense": dense, "small": small}
    parameters = {name: sum(one.numel() for one in model.parameters()) for name, model in sizes.items()}
    share = parameters["small"] / parameters["dense"]
    ids = tokens(count)
    ways = {
        "dense, PyTorch": by_torch(dense, ids),
        "half of the weights zero, PyTorch": by_torch(masked, ids),
        "without the units, PyTorch": by_torch(small, ids),
        "dense, ONNX Runtime": by_onnx(folder / "dense.onnx", ids),
        "without the units, ONNX Runtime": by_onnx(folder / "small.onnx", ids),
    }
    onnx_errors = {
        name: relative_error([ways[f"{told}, PyTorch"]()], [torch.from_numpy(ways[f"{told}, ONNX Runtime"]()[0])])
        for name, told in (("dense", "dense"), ("small", "without the units"))
    }
    ways["half of the weights zero, PyTorch"]()
    seconds = interleaved(ways, repeats)
    config: Any = small.config
    del ways, masked, dense, small, sizes
    peaks = {
        name: peak_bytes_in_fresh_process(prepared, str(folder / name), FEW_TOKENS) for name in ("dense", "small")
    }
    median = medians(seconds)
    results = {
        "removed": REMOVED,
        "tokens": count,
        "parameters": parameters,
        "share_left": share,
        "config": {
            key: getattr(config, key)
            for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        },
        "seconds": seconds,
        "tokens_per_second": {name: count / one for name, one in median.items()},
        "ratios": {
            "half of the weights zero": median["half of the weights zero, PyTorch"] / median["dense, PyTorch"],
            "PyTorch": median["without the units, PyTorch"] / median["dense, PyTorch"],
            "ONNX Runtime": median["without the units, ONNX Runtime"] / median["dense, ONNX Runtime"],
        },
        "time_bar": TIME_BAR,
        "peak_bytes": peaks,
        "memory_ratio": peaks["small"] / peaks["dense"],
        "memory_bar": share + MEMORY_SLACK,
        "onnx_relative_error": onnx_errors,
    }
    show(results, median)
    return results


def show(results: dict[str, Any], median: dict[str, float]) -> None:
    """The figures as tables."""
    console = Console()
    table = Table("network", "ms", "tokens a second", title=f"Forward pass over {results['tokens']} tokens")
    for name, one in median.items():
        table.add_row(name, f"{1000 * one:.0f}", f"{results['tokens_per_second'][name]:.0f}")
    console.print(table)
    console.print(f"parameters left: {results['share_left']:.3f}; ratios of time: {results['ratios']}")
    console.print(
        f"peak bytes: {results['peak_bytes']}: x {results['memory_ratio']:.3f}, bar {results['memory_bar']:.3f}"
    )


if __name__ == "__main__":
    main()
