"""The card of a ticket on the hub, a README made of its metadata.

Names of layers and metadata come from strangers. They stand in blocks of HTML, in which Markdown is not read, and
are escaped there; in the card's own metadata stands only what the hub's rules let pass.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lottery_tickets.masks._mask import Mask

TAG = "lottery-ticket"
_LIBRARY = "lottery-tickets"


def ticket_card(mask: Mask, repo_id: str) -> str:
    """README of a repository that holds this ticket.

    Args:
        mask: The ticket, with the metadata of its file.
        repo_id: "owner/name", which the hub has accepted.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=_hub_id(mask.metadata.get("base_model")),
        library_name=_LIBRARY,
        tags=[TAG, "pruning", "sparsity"],
    )
    facts = {"digest": mask.digest(), **dict(sorted(mask.metadata.items()))}
    kept, sparsity = mask.layer_kept(), mask.layer_sparsity()
    layers = [
        (name, " x ".join(map(str, shape)), f"{shape.numel():,}", f"{kept[name]:,}", f"{sparsity[name]:.4f}")
        for name, shape in mask.shapes.items()
    ]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {repo_id.rpartition('/')[2]}\n",
            "A lottery ticket: which weights of a network to keep, one bit for each. It removes "
            f"{mask.numel - mask.kept:,} of {mask.numel:,} weights, sparsity {mask.sparsity:.6f}. The weights "
            "themselves are not here.\n",
            f'```python\nfrom lottery_tickets import Mask, applied\n\nmask = Mask.from_pretrained("{repo_id}")\n'
            "with applied(model, mask):  # or apply_mask(model, mask), for good\n    ...\n```\n",
            f"## Origin\n\n{_table(('what', 'value'), facts.items())}\n",
            f"## Layers\n\n{_table(('tensor', 'shape', 'weights', 'kept', 'sparsity'), layers)}\n",
        ]
    )


def _hub_id(name: str | None) -> str | None:
    """The name, if it can be one of the hub's models."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name is None or name.count("/") != 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row("th", heads), *(_row("td", row) for row in rows)]
    return "\n".join(["<table>", *lines, "</table>"])


def _row(tag: str, cells: Sequence[str]) -> str:
    # A blank line would end the block of HTML.
    return "<tr>" + "".join(f"<{tag}>{html.escape(' '.join(cell.split()))}</{tag}>" for cell in cells) + "</tr>"
