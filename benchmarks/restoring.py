"""Which tensors a ticket fails by: perplexity with some of its tensors made dense again.

    python benchmarks/restoring.py [--quick]

The ticket removes 30% of SmolLM2-135M's weights under one threshold by Taylor scores, as in criteria.py, and does
worse than the ticket of 50% inside it. First all tensors of a kind (q_proj, down_proj, ...) are made dense, then
all of three neighbouring blocks, then single tensors where the best kind and the best blocks meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import benchmark_parser, keep
from criteria import (
    BATCH_SIZE,
    CALIBRATION_CONTEXT,
    CALIBRATION_START,
    CONTEXT,
    TEST_START,
)
from lottery_tickets import Mask, compute_lottery_ticket_qualities, create_importance_mask
from lottery_tickets._data import model_folder, text_file
from lottery_tickets.cli._calibration import Excerpt, kept_apart
from lottery_tickets.importance_scoring import compute_taylor_importance
from lottery_tickets.large_models import load_model, load_tokenizer

SPARSITIES = (0.3, 0.5)
NEIGHBOURS = 3


def kind_of(name: str) -> str:
    """q_proj of model.layers.3.self_attn.q_proj.weight."""
    return name.split(".")[-2]


def block_of(name: str) -> int:
    """3 of the same."""
    return int(name.split(".")[2])


def with_dense(mask: Mask, names: Iterable[str]) -> Mask:
    """The mask, these tensors kept whole."""
    dense, chosen = Mask.ones_like(mask), set(names)
    return Mask.from_packed(
        {name: (dense if name in chosen else mask).packed(name) for name in mask}, dict(mask.shapes)
    )


def grouped(names: Iterable[str], label: Any) -> dict[str, list[str]]:
    """Names by label, in their order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(label(name), []).append(name)
    return groups


def neighbourhood(name: str) -> str:
    """Blocks 18 to 20, for one that is among them."""
    first = block_of(name) // NEIGHBOURS * NEIGHBOURS
    return f"blocks {first} to {first + NEIGHBOURS - 1}"


def measure(windows: int, samples: int) -> dict[str, Any]:
    """All figures of this benchmark."""
    folder, text = model_folder(), text_file()
    calibration, test = kept_apart(
        Excerpt(text, CALIBRATION_CONTEXT, samples, CALIBRATION_START), Excerpt(text, CONTEXT, windows, TEST_START)
    )
    model, tokenizer = load_model(folder, torch.float32, progress=False), load_tokenizer(folder)
    batches = test.windows(tokenizer)
    scores = compute_taylor_importance(
        model, calibration.batches(tokenizer, BATCH_SIZE), num_samples=None, progress=False
    )
    masks = create_importance_mask(scores, SPARSITIES, progress=False)
    ticket = masks[0]

    def perplexities(groups: Mapping[str, list[str]]) -> dict[str, float]:
        restored = {label: with_dense(ticket, names) for label, names in groups.items()}
        qualities = compute_lottery_ticket_qualities(model, restored, batches, progress=False)
        return {label: quality["perplexity"] for label, quality in qualities.items()}

    tickets = {str(sparsity): mask for sparsity, mask in zip(SPARSITIES, masks, strict=True)}
    plain = compute_lottery_ticket_qualities(model, tickets, batches, progress=False)
    kinds, blocks = grouped(ticket, kind_of), grouped(ticket, neighbourhood)
    by_kind, by_blocks = perplexities(kinds), perplexities(blocks)
    meeting = set(kinds[min(by_kind, key=by_kind.__getitem__)]) & set(
        blocks[min(by_blocks, key=by_blocks.__getitem__)]
    )
    single = {name: [name] for name in ticket if name in meeting}
    sparsities = [mask.layer_sparsity() for mask in masks]
    return {
        "model": "SmolLM2-135M-Instruct, float32",
        "criterion": "taylor",
        "windows": windows,
        "samples": samples,
        "sparsities": list(SPARSITIES),
        "dense": next(iter(plain.values()))["baseline"]["perplexity"],
        "tickets": {label: quality["perplexity"] for label, quality in plain.items()},
        "by_kind": by_kind,
        "by_blocks": by_blocks,
        "by_tensor": perplexities(single),
        "tensor_sparsities": {name: [one[name] for one in sparsities] for name in single},
    }


def table(results: dict[str, Any]) -> Table:
    """Perplexities, by what was made dense."""
    shown = Table(
        title=f"{results['model']}, perplexity by {results['criterion']} scores, {results['sparsities'][0]}"
    )
    shown.add_column("made dense")
    shown.add_column("perplexity", justify="right")
    shown.add_row("everything", f"{results['dense']:.2f}")
    for label, value in results["tickets"].items():
        shown.add_row(f"nothing, at {label}", f"{value:.2f}")
    for part in ("by_kind", "by_blocks", "by_tensor"):
        for label, value in results[part].items():
            shown.add_row(label, f"{value:.2f}")
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/restoring.json."""
    given = benchmark_parser(__doc__, "one window, two samples").parse_args()
    console = Console()
    results = measure(*((1, 2) if given.quick else (6, 16)))
    console.print(table(results))
    console.print(keep("restoring", results, given))


if __name__ == "__main__":
    main()
