"""Arguments that several commands take, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lottery_tickets.errors import EvaluationError, MaskMismatchError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lottery_tickets.cli._shell import Session
    from lottery_tickets.masks import Mask

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint (safetensors), or a Hugging Face hub id.")
]
TicketArgument = Annotated[Path, typer.Argument(metavar="TICKET", help="A ticket file.", show_default=False)]
OtherWeightsOption = Annotated[
    bool,
    typer.Option(
        "--other-weights", help="Use what was drawn from other weights than MODEL's, fine-tuned ones say."
    ),
]


IncludeOption = Annotated[
    list[str] | None, typer.Option(help="Prune parameters of this name too; * matches any text. Repeatable.")
]
ExcludeOption = Annotated[list[str] | None, typer.Option(help="Leave parameters of this name whole. Repeatable.")]


class Unit(str, Enum):
    """What leaves a network whole."""

    channel = "channel"
    head = "head"
    neuron = "neuron"


class Dtype(str, Enum):
    """Data type to load the weights in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def type(self) -> torch.dtype | None:
        """The type; None for the checkpoint's own."""
        import torch

        return None if self is Dtype.auto else getattr(torch, self.value)

    def for_scoring(self, device: torch.device) -> torch.dtype | None:
        """The type to compute scores in: where none is named, float32 on a CPU, which is slow in narrower ones."""
        import torch

        return torch.float32 if self is Dtype.auto and device.type == "cpu" else self.type


DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype", help="Load the weights as this; auto is the checkpoint's, or float32 for scores from a CPU."
    ),
]

DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to compute; auto is cuda where there is one, else cpu.")
]


def chosen_device(name: str) -> torch.device:
    """The device of this name; `auto` is the GPU if there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
        raise EvaluationError(f"--device {name}: {str(error).splitlines()[0]}") from error


FromDiskOption = Annotated[
    bool,
    typer.Option(
        "--from-disk",
        help="Leave the weights in their files and go block by block on the CPU, each being read once: for models "
        "larger than memory.",
    ),
]


class HiddenStatesName(str, Enum):
    """Where hidden states wait between two blocks."""

    memory = "memory"
    disk = "disk"


HiddenStatesOption = Annotated[
    HiddenStatesName,
    typer.Option("--hidden-states", help="With --from-disk: where those of all windows wait for the next block."),
]


def check_from_disk(device: str) -> None:
    """Refuse to go block by block elsewhere than on the CPU."""
    if device not in ("auto", "cpu"):
        raise typer.BadParameter("--from-disk computes on the CPU", param_hint="--device")


def check_context(model: nn.Module | Path, context: int) -> None:
    """Refuse windows that are longer than what the model, or that of a folder, has positions for."""
    if isinstance(model, Path):
        from lottery_tickets.large_models import read_checkpoint

        positions = (read_checkpoint(model).config() or {}).get("max_position_embeddings")
    else:
        positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise EvaluationError(f"--context {context}: the model was made for at most {positions} tokens.")


def computing_type(model: nn.Module | Path, dtype: Dtype) -> str:
    """Name of the data type that a model, or that of a folder, computes in."""
    if not isinstance(model, Path):
        return str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype is not Dtype.auto:
        return str(dtype.value)
    from lottery_tickets.large_models import read_checkpoint

    config: dict[str, object] = read_checkpoint(model).config() or {}
    return str(config.get("dtype") or config.get("torch_dtype") or dtype.value)


def check_drawn_from(
    session: Session, model: str, digest: str, origins: Mapping[Path, Mapping[str, str]], *, other_weights: bool
) -> None:
    """Refuse tickets and scores that come from other weights than these; what does not say where from passes.

    Args:
        session: For a note where other weights are wanted.
        model: What the user called it.
        digest: Of its weights.
        origins: File to its metadata.
        other_weights: The user says that it is meant.
    """
    for path, origin in origins.items():
        drawn_from = origin.get("weights_digest", digest)
        if drawn_from == digest:
            continue
        difference = (
            f"{path} was drawn from the weights {drawn_from[:12]} of {origin.get('base_model', '?')}; "
            f"{model} holds {digest[:12]}"
        )
        if not other_weights:
            raise MaskMismatchError(f"{difference}. --other-weights uses it all the same.")
        session.note(f"note: {difference}.")


def check_weights(
    session: Session, model: str, digest: str, tickets: Mapping[Path, Mask], *, other_weights: bool
) -> None:
    """Refuse tickets that were drawn from other weights than these; a ticket that does not say passes."""
    origins = {path: ticket.metadata for path, ticket in tickets.items()}
    check_drawn_from(session, model, digest, origins, other_weights=other_weights)


def model_name(model: str) -> str:
    """What to call a model in a ticket: the hub id, or the folder's own name without its path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
