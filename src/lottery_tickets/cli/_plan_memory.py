"""`plan`: what memory an operation takes, before it starts."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lottery_tickets.cli._app import app
from lottery_tickets.cli._shell import Report, Session, command, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from lottery_tickets.planning import MemoryPlan


class PlanDtype(str, Enum):
    """Data type of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@command(
    app,
    "plan",
    "lottery-tickets plan Qwen2.5-14B --operation early-bird --device-memory 80GB",
    "lottery-tickets plan ./my-model/config.json --operation mask --operation fisher --batches",
)
def plan(
    session: Session,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, the folder it is in, or a name: Qwen2.5-14B, Llama-3.1-8B, GPT-2.",
        ),
    ],
    operation: Annotated[
        list[str],
        typer.Option(
            "--operation",
            help="mask, quality, a criterion of scores (magnitude, fisher, wanda, ...), early-bird or iterative. "
            "Repeatable.",
        ),
    ],
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", help="What there is, 80GB say; default: what is free in this machine."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; default: cuda with --device-memory, else cpu.")
    ] = None,
    dtype: Annotated[
        PlanDtype, typer.Option("--dtype", help="Of the weights; auto is the config's.")
    ] = PlanDtype.auto,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens in a sample.")] = 512,
    optimizer: Annotated[
        str, typer.Option(help="sgd, adam, adamw, adamw8bit, or torch's own: 'torch sgd', 'torch adamw'.")
    ] = "sgd",
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Make activations again on the way back; default: yes for training, no for scores.",
        ),
    ] = None,
    store: Annotated[str, typer.Option(help="Where sums of scores lie: cpu, disk or device.")] = "cpu",
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples that go through the model together at most.")
    ] = None,
    from_disk: Annotated[
        bool,
        typer.Option(
            "--from-disk", help="Masks, quality or wanda from a checkpoint's folder, whose weights stay on disk."
        ),
    ] = False,
    batches: Annotated[bool, typer.Option("--batches", help="Add the largest batch for each context.")] = False,
) -> Report:
    """Show what memory an operation takes, item by item, and what would take less.

    Nothing is loaded: shapes come from the configuration. Exit code 0 says that it was planned, not that it fits;
    --json has "fits".
    """
    from lottery_tickets.errors import PlanError
    from lottery_tickets.planning import free_memory, plan_memory

    limit: int | str | None = device_memory
    if limit is None:
        free = free_memory()
        limit = None if free is None else free.bytes
        if free is not None:
            session.note(
                f"{free.limit}: {free.bytes / 1e9:.1f} GB are free; --device-memory plans for another device"
            )
    given: dict[str, Any] = {
        "dtype": None if dtype is PlanDtype.auto else dtype.value,
        "batch_size": batch_size,
        "sequence_length": context,
        "optimizer": optimizer,
        "gradient_checkpointing": checkpointing,
        "store": store,
        "max_batch_size": max_batch_size,
        "from_disk": from_disk,
        "device_memory": limit,
        "device": device or ("cpu" if device_memory is None else "cuda"),
    }
    if batches and limit is None:
        raise PlanError("--batches needs --device-memory here, for the system does not say what is free.")
    plans = [plan_memory(model, one, **given) for one in operation]
    largest = {one: _by_context(model, one, given) for one in operation} if batches else {}
    data = {"plans": [one.as_dict() for one in plans], "largest_batches": largest}
    return Report(data, lambda console: _show(console, plans, largest))


_CONTEXTS = (128, 512, 2048, 8192)


def _by_context(model: str, operation: str, given: dict[str, Any]) -> dict[str, int | None]:
    from lottery_tickets.planning import plan_memory

    options = {**given, "batch_size": 1}
    return {
        str(length): plan_memory(model, operation, **{**options, "sequence_length": length}).largest_batch
        for length in _CONTEXTS
    }


def _show(console: Console, plans: list[MemoryPlan], largest: dict[str, dict[str, int | None]]) -> None:
    for plan in plans:
        console.print(str(plan))
    if not largest:
        return
    table = new_table(title="Largest batch, by tokens")
    table.add_column("operation")
    for length in _CONTEXTS:
        table.add_column(str(length), justify="right")
    for operation, found in largest.items():
        table.add_row(operation, *("-" if one is None else str(one) for one in found.values()))
    console.print(table)
