"""What a sparse model gains where: SmolLM2-135M at half, a tenth and 2:4 of its weights, on disk and on CPU.

    python benchmarks/deployment.py [--quick]

Bytes of the weights in bfloat16 on disk: with zeros in place, the same compressed by gzip and zstd, the kept
values beside a packed mask, these compressed, and the ticket alone. Bytes of the weights in memory and seconds of
a forward pass in float32, over many tokens (a prompt) and over one (generation): dense, zeros in place, weights as
`torch.sparse` CSR, ONNX Runtime, and ONNX Runtime with eight-bit weights. 2:4 by
`torch.sparse.to_sparse_semi_structured` needs CUDA; without it the result is null. The smaller model of a
structured ticket is measured by structured.py.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import zstandard
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from _common import MIB, benchmark_parser, interleaved, keep
from lottery_tickets import Mask, apply_mask, create_magnitude_mask
from lottery_tickets._data import model_folder
from lottery_tickets._structured._checking import relative_error
from lottery_tickets.large_models import load_model
from lottery_tickets.structured import save_onnx
from structured import by_onnx, by_torch, tokens

PROMPT, ONE = 128, 1
QUICK_PROMPT, QUICK_BLOCKS = 64, 3
SPARSE, VERY_SPARSE, PATTERN = "0.5", "0.9", "2:4"
GZIP, ZSTD = 6, 3
PIECE = 1 << 24
EIGHT_BITS = "eight-bit weights, ONNX Runtime"


def drawn(model: nn.Module) -> dict[str, Mask]:
    """The tickets, by magnitude."""
    half, tenth = create_magnitude_mask(model, [float(SPARSE), float(VERY_SPARSE)], progress=False)
    return {SPARSE: half, VERY_SPARSE: tenth, PATTERN: create_magnitude_mask(model, None, pattern=PATTERN)}


def pruned(model: nn.Module, mask: Mask) -> nn.Module:
    """A copy with zeros in place."""
    made = copy.deepcopy(model)
    apply_mask(made, mask)
    return made


def bytes_on_disk(weights: Mapping[str, torch.Tensor], mask: Mask | None, folder: Path) -> dict[str, int]:
    """Bytes of every form of the weights."""
    whole = folder / "whole.safetensors"
    save_file({name: one if mask is None else zeroed(one, mask, name) for name, one in weights.items()}, whole)
    found = {
        "safetensors": whole.stat().st_size,
        "gzip": squeezed(zlib.compressobj(GZIP, wbits=31), whole),
        "zstd": by_zstd(whole),
    }
    if mask is not None:
        ticket, kept = packed(weights, mask, folder)
        found |= {
            "kept values and ticket": kept.stat().st_size + ticket.stat().st_size,
            "kept values and ticket, zstd": by_zstd(kept) + by_zstd(ticket),
            "ticket": ticket.stat().st_size,
        }
    return found


def packed(weights: Mapping[str, torch.Tensor], mask: Mask, folder: Path) -> tuple[Path, Path]:
    """The ticket's file, and that of what it keeps."""
    ticket, kept = folder / "ticket.safetensors", folder / "kept.safetensors"
    mask.save(ticket)
    save_file({name: one[mask[name]] if name in mask else one for name, one in weights.items()}, kept)
    return ticket, kept


def by_zstd(path: Path) -> int:
    """Bytes of the file, compressed."""
    return squeezed(zstandard.ZstdCompressor(level=ZSTD).compressobj(), path)


def squeezed(compressor: Any, path: Path) -> int:
    """Bytes that come out of a compressor."""
    return sum(len(compressor.compress(piece)) for piece in pieces(path)) + len(compressor.flush())


def zeroed(weight: torch.Tensor, mask: Mask, name: str) -> torch.Tensor:
    """The weight with zeros where the mask removes."""
    return weight.masked_fill(~mask[name], 0) if name in mask else weight


def pieces(path: Path) -> Iterator[bytes]:
    """A file, piece by piece."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


class CSRLinear(nn.Module):
    """A linear layer over the weights that are left: their values, their columns, and where rows begin."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        sparse = layer.weight.detach().to_sparse_csr()
        parts = (
            sparse.crow_indices().int(),
            sparse.col_indices().int(),
            sparse.values(),
        )  # MKL takes four-byte indices
        self.weight = torch.sparse_csr_tensor(*parts, size=sparse.shape)
        self.bias = layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        outputs = (self.weight @ rows.T).T.reshape(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


def compressed(model: nn.Module, mask: Mask) -> nn.Module:
    """A copy with zeros gone from the layers that the mask prunes."""
    made = pruned(model, mask)
    for name in mask:
        path = name.removesuffix(".weight")
        made.set_submodule(path, CSRLinear(made.get_submodule(path)))
    return made


def bytes_in_memory(model: nn.Module) -> int:
    """Of weights, tied ones once, and of the indices of those in CSR."""
    total = sum(one.numel() * one.element_size() for one in model.parameters())
    for layer in model.modules():
        if isinstance(layer, CSRLinear):
            parts = layer.weight.crow_indices(), layer.weight.col_indices(), layer.weight.values()
            total += sum(one.numel() * one.element_size() for one in parts)
    return total


def exported(model: nn.Module, folder: Path) -> dict[str, Path]:
    """The network as an ONNX file, and that with weights of eight bits and a scale for 128; made if not there."""
    plain, small = folder / "model.onnx", folder / "eight-bits.onnx"
    if not plain.exists():
        save_onnx(model, plain)
    if not small.exists():
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
        # Level 4: products of eight-bit integers, inputs quantised block by block as they come.
        made = MatMulNBitsQuantizer(onnx.load(plain), bits=8, block_size=128, is_symmetric=True, accuracy_level=4)
        made.process()
        made.model.save_model_to_file(str(small), use_external_data_format=False)
    return {f"{VERY_SPARSE}, zeros in place, ONNX Runtime": plain, EIGHT_BITS: small}


def on_cuda(model: nn.Module, mask: Mask, ids: torch.Tensor, repeats: int) -> dict[str, Any] | None:
    """Seconds of dense and of 2:4 kernels in float16, None without CUDA."""
    if not torch.cuda.is_available():
        return None
    dense = pruned(model, mask).half().cuda()
    sparse = copy.deepcopy(dense)
    for name in mask:
        layer = sparse.get_submodule(name.removesuffix(".weight"))
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    ids = ids.cuda()

    def synchronised(run: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            run()
            torch.cuda.synchronize()

        return work

    runs = {"dense": by_torch(dense, ids), "2:4": by_torch(sparse, ids)}
    error = relative_error([runs["dense"]()], [runs["2:4"]()])
    seconds = interleaved({name: synchronised(run) for name, run in runs.items()}, repeats)
    return {"device": torch.cuda.get_device_name(), "seconds": seconds, "relative_error": error}


def forward_passes(model: nn.Module, masks: Mapping[str, Mask], folder: Path, *, quick: bool) -> dict[str, Any]:
    """Bytes of the weights in memory, and seconds of every way to compute with them."""
    very_sparse = pruned(model, masks[VERY_SPARSE])
    networks = {
        "dense": model,
        f"{VERY_SPARSE}, zeros in place": very_sparse,
        f"{SPARSE}, CSR": compressed(model, masks[SPARSE]),
        f"{VERY_SPARSE}, CSR": compressed(model, masks[VERY_SPARSE]),
    }
    files = exported(very_sparse, folder)
    held = {name: bytes_in_memory(network) for name, network in networks.items()}
    held |= {name: path.stat().st_size for name, path in files.items()}
    seconds, errors = {}, {}
    for count, repeats in ((QUICK_PROMPT if quick else PROMPT, 3), (ONE, 25)):
        ids = tokens(count)
        ways = {name: by_torch(network, ids) for name, network in networks.items()}
        ways |= {name: by_onnx(path, ids) for name, path in files.items()}
        outputs = {name: run() for name, run in ways.items()}  # and all are warm
        expected = outputs[f"{VERY_SPARSE}, zeros in place"]
        for name in (f"{VERY_SPARSE}, CSR", *files):
            given = outputs[name]
            errors[f"{name}, {count}"] = relative_error(
                [expected], [given if isinstance(given, torch.Tensor) else torch.from_numpy(given[0])]
            )
        seconds[str(count)] = interleaved(ways, 1 if quick else repeats)
    return {"weight_bytes": held, "seconds": seconds, "relative_errors": errors}


def main() -> None:
    """Measure, print, write."""
    parser = benchmark_parser(__doc__, "three blocks, 64 tokens, one repeat")
    parser.add_argument("--folder", type=Path, help="Keep ONNX files here, and take those that are there.")
    parser.add_argument("--prepare", action="store_true", help="Make the files in --folder, and measure nothing.")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)  # CSR is called a beta
    model: Any = load_model(model_folder(), torch.float32, progress=False).eval()
    if given.quick:
        del model.model.layers[QUICK_BLOCKS:]
        model.config.num_hidden_layers = QUICK_BLOCKS
    masks = drawn(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        if given.prepare:
            exported(pruned(model, masks[VERY_SPARSE]), folder)
        else:
            print(keep("deployment", measured(model, masks, folder, quick=given.quick), given))


def measured(model: nn.Module, masks: Mapping[str, Mask], folder: Path, *, quick: bool) -> dict[str, Any]:
    """Sizes and times."""
    # The checkpoint's own type: float32 holds its values exactly, so nothing is lost on the way back.
    weights = {name: one.detach().bfloat16() for name, one in model.named_parameters()}
    with tempfile.TemporaryDirectory() as scratch:
        disk = {"dense": bytes_on_disk(weights, None, Path(scratch))}
        disk |= {name: bytes_on_disk(weights, mask, Path(scratch)) for name, mask in masks.items()}
    results = {
        "parameters": sum(one.numel() for one in weights.values()),
        "prunable": masks[SPARSE].numel,
        "gzip_level": GZIP,
        "zstd_level": ZSTD,
        "disk": disk,
        **forward_passes(model, masks, folder, quick=quick),
        "cuda": on_cuda(model, masks[PATTERN], tokens(PROMPT), 1 if quick else 25),
    }
    show(results)
    return results


def show(results: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console()
    table = Table("ticket", "form", "MiB", "of dense", title="On disk, bfloat16")
    for ticket, forms in results["disk"].items():
        for form, size in forms.items():
            share = size / results["disk"]["dense"]["safetensors"]
            table.add_row(ticket, form, f"{size / MIB:.1f}", f"{share:.2f}")
    console.print(table)
    table = Table("network", "tokens", "ms", "of dense", "MiB of weights", title="Forward passes, float32")
    for count, seconds in results["seconds"].items():
        least = {name: min(values) for name, values in seconds.items()}  # what others compute beside it only adds
        for name, one in least.items():
            held = results["weight_bytes"][name] / MIB
            table.add_row(name, count, f"{1000 * one:.1f}", f"{one / least['dense']:.2f}", f"{held:.1f}")
    console.print(table)
    console.print(f"errors: {results['relative_errors']}; 2:4 on CUDA: {results['cuda']}")


if __name__ == "__main__":
    main()
