"""How scores are computed, as options say it: what bounds memory, and what changes the estimate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from lottery_tickets.cli._criteria import Criterion


class StoreName(str, Enum):
    """Where sums over gradients lie."""

    cpu = "cpu"
    disk = "disk"
    device = "device"


StoreOption = Annotated[
    StoreName,
    typer.Option(
        "--store",
        help="Where sums over gradients lie, four bytes a weight: in memory, in a mapped file (the scores' own, "
        "else one in $TMPDIR), or beside the weights.",
    ),
]
ChunkSizeOption = Annotated[
    int | None,
    typer.Option(
        "--chunk-size",
        min=1,
        help="Weights scored at a time, each chunk at a pass over the text of its own; bounds what --store device "
        "takes there.",
    ),
]
CheckpointOption = Annotated[
    bool,
    typer.Option(
        "--checkpoint-activations",
        help="Keep activations between the model's layers only; compute the others again in the backward pass.",
    ),
]
ClipOption = Annotated[
    float | None,
    typer.Option(
        "--gradient-clip", metavar="NORM", help="Scale longer gradients of single sequences down to this norm."
    ),
]
RoundsOption = Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds of synflow. Default: 100.")]


@dataclass(frozen=True)
class Computing:
    """What scorers are told beside the model and the data.

    Attributes:
        seed: Of criteria that draw at random.
        store: "cpu", "disk" or "device", or the file to map.
        chunk_size: Weights at a time.
        checkpoint_activations: Trade time for the memory of activations.
        gradient_clip: Largest norm of a sample's gradient.
        rounds: Of synflow.
        from_disk: Block by block, the model staying in its folder.
        dtype: What to compute in then.
    """

    seed: int = 0
    store: str | Path = "cpu"
    chunk_size: int | None = None
    checkpoint_activations: bool = False
    gradient_clip: float | None = None
    rounds: int | None = None
    from_disk: bool = False
    dtype: torch.dtype | None = None

    def for_blocks(self) -> dict[str, Any]:
        """Keyword arguments of functions that go through a folder block by block."""
        return {"store": self.store, "dtype": self.dtype} if self.from_disk else {}

    def for_gradients(self) -> dict[str, Any]:
        """Keyword arguments of functions that sum over gradients."""
        return {
            "store": self.store,
            "chunk_size": self.chunk_size,
            "checkpoint_activations": self.checkpoint_activations,
            "gradient_clip": self.gradient_clip,
        }

    def for_rounds(self) -> dict[str, Any]:
        """Keyword arguments of functions that go in rounds."""
        return {} if self.rounds is None else {"rounds": self.rounds}

    def described(self, criterion: Criterion) -> dict[str, str]:
        """What scores say of it: what changes them, not what they cost."""
        told = {}
        if criterion.by_gradients and self.gradient_clip is not None:
            told["gradient_clip"] = str(self.gradient_clip)
        if criterion.in_rounds and self.rounds is not None:
            told["rounds"] = str(self.rounds)
        return told

    def check(self, criteria: Iterable[Criterion]) -> None:
        """Refuse options that no criterion takes, or that contradict each other.

        Raises:
            BadParameter: Naming the option.
        """
        listed = list(criteria)
        names = ", ".join(one.name for one in listed)
        backward = [one.name for one in listed if one.family != "wanda"]
        if self.from_disk and backward:
            raise typer.BadParameter(
                f"{', '.join(backward)} needs more than forward passes, and so the whole model in memory; wanda "
                "goes from disk",
                param_hint="--from-disk",
            )
        told = {
            "--store": self.store != "cpu",
            "--chunk-size": self.chunk_size is not None,
            "--checkpoint-activations": self.checkpoint_activations,
            "--gradient-clip": self.gradient_clip is not None,
        }
        for option in (option for option, given in told.items() if given):
            if not any(one.by_gradients for one in listed):
                raise typer.BadParameter(f"{names} sums over no gradients of single samples", param_hint=option)
        if self.rounds is not None and not any(one.in_rounds for one in listed):
            raise typer.BadParameter(f"{names} does not go in rounds; synflow does", param_hint="--rounds")
        if self.chunk_size is not None and self.store == "disk":
            raise typer.BadParameter("sums on disk are in no memory to be bounded", param_hint="--chunk-size")
        if self.gradient_clip is not None:
            if not 0 < self.gradient_clip < float("inf"):
                raise typer.BadParameter(
                    f"a positive norm, got {self.gradient_clip}", param_hint="--gradient-clip"
                )
            unclipped = [one.name for one in listed if one.looks_at_batches]
            if unclipped:
                raise typer.BadParameter(
                    f"{', '.join(unclipped)} never looks at the gradient of a single sequence",
                    param_hint="--gradient-clip",
                )
