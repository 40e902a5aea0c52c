"""The ticket files of a run: one for each round, for users and for the states to come."""

from __future__ import annotations

from pathlib import Path

from lottery_tickets._iterative._settings import Settings
from lottery_tickets.errors import RunFolderError
from lottery_tickets.masks import Mask, ShardedMask
from lottery_tickets.runs import RunFolder


def save_ticket(run: RunFolder, number: int, mask: Mask | ShardedMask, settings: Settings) -> None:
    """Write the mask of a round, from the process that writes in the folder; all make this call.

    Raises:
        RunFolderError: It could not be written.
        DistributedError: Another rank failed or has gone.
    """
    whole = mask.collected() if isinstance(mask, ShardedMask) else mask
    if whole is None or not run.writes:
        return
    path = _path(run, number)
    metadata = {
        "criterion": settings.criterion_name,
        "round": str(number),
        "rounds": str(settings.num_iterations),
        "rewind": settings.rewind,
        "seed": str(settings.seed),
    }
    try:
        path.parent.mkdir(exist_ok=True)
        whole.save(path, metadata=metadata)
    except OSError as error:
        raise RunFolderError(
            f"{path}: the mask could not be written ({error}). The states before it are whole; make room and "
            "call again, and the run goes on from there."
        ) from error


def load_ticket(run: RunFolder, number: int, digest: str) -> Mask:
    """The mask of a round that a state was saved in.

    Raises:
        RunFolderError: It is missing, or another one.
    """
    path = _path(run, number)
    if not path.exists():
        raise RunFolderError(
            f"{path} is missing, and the run was left in that round. Start anew in another folder."
        )
    mask = Mask.load(path)
    if mask.digest() != digest:
        raise RunFolderError(
            f"{path} is not the mask of this run: its digest is {mask.digest()}, expected {digest}. Start anew in "
            "another folder."
        )
    return mask


def _path(run: RunFolder, number: int) -> Path:
    return run.path / "masks" / f"round-{number:02d}.safetensors"
