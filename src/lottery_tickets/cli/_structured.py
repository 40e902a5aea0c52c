"""`unit-mask` and `extract`: tickets of whole neurons and heads, and the smaller model without them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import (
    Dtype,
    DtypeOption,
    ModelArgument,
    OtherWeightsOption,
    TicketArgument,
    Unit,
    check_weights,
    model_name,
)
from lottery_tickets.cli._shell import Report, Session, command


class Spread(str, Enum):
    """How removals are spread over layers."""

    uniform = "uniform"
    everywhere = "global"


class Share(str, Enum):
    """What a sparsity is a fraction of."""

    units = "units"
    parameters = "parameters"


class Ranking(str, Enum):
    """What units are ranked by."""

    magnitude = "magnitude"
    l1 = "l1"


@command(
    app,
    "unit-mask",
    "lottery-tickets unit-mask ./my-model --unit neuron --sparsity 0.5 -o neurons.safetensors",
)
def unit_mask(
    session: Session,
    model: ModelArgument,
    unit: Annotated[Unit, typer.Option(help="Neurons of feed-forward layers, or heads with all their queries.")],
    sparsity: Annotated[float, typer.Option("--sparsity", "-s", help="Share to remove, in [0, 1).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    criterion: Annotated[Ranking, typer.Option(help="What units are ranked by.")] = Ranking.magnitude,
    allocation: Annotated[
        Spread, typer.Option(help="As many from every layer, or one ranking for all layers.")
    ] = Spread.uniform,
    count: Annotated[Share, typer.Option(help="What the sparsity is a share of.")] = Share.units,
    min_units: Annotated[int, typer.Option(min=1, help="Every layer keeps at least as many.")] = 1,
    round_to: Annotated[int | None, typer.Option(min=1, help="Every layer keeps a multiple of this.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave layers of this name whole; * matches any text. Repeatable.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
) -> Report:
    """Draw a ticket of whole units: neurons, or heads of attention with everything that belongs to them.

    A model's configuration names one number of neurons and of heads for all layers, so every layer loses as many
    unless asked otherwise.
    """
    from lottery_tickets.large_models import compute_weights_digest, load_model, resolve_model
    from lottery_tickets.structured import create_structured_mask

    folder = resolve_model(model)
    dense = load_model(folder, dtype.type, progress=session.progress)
    mask = create_structured_mask(
        dense,
        sparsity,
        unit=unit.value,
        criterion=criterion.value,
        allocation=allocation.value,
        count=count.value,
        min_units=min_units,
        round_to=round_to,
        exclude=exclude or (),
    )
    told = {
        "base_model": model_name(model),
        "weights_digest": compute_weights_digest(folder),
        "criterion": criterion.value,
        "unit": unit.value,
        "count": count.value,
        "allocation": allocation.value,
        "target_sparsity": str(sparsity),
    }
    mask.save(output, metadata=told)
    assert mask.units is not None
    kept = {name: int(one.sum()) for name, one in mask.units.kept_in(mask).items()}
    data = {
        "path": str(output),
        **told,
        "parameters_removed": mask.numel - mask.kept,
        "layers": {group.name: {"units": group.count, "kept": kept[group.name]} for group in mask.units.groups},
        "digest": mask.digest(),
    }
    return Report(data, lambda console: _show_mask(console, data))


@command(
    app,
    "extract",
    "lottery-tickets extract ./my-model neurons.safetensors -o ./my-smaller-model",
    "lottery-tickets extract ./my-model neurons.safetensors -o ./my-smaller-model --onnx",
)
def extract(
    session: Session,
    model: ModelArgument,
    ticket: TicketArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make; it must not exist.")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write model.onnx too, run and compared with the model beforehand.")
    ] = False,
    dtype: DtypeOption = Dtype.auto,
    other_weights: OtherWeightsOption = False,
) -> Report:
    """Write the smaller dense model that a ticket of whole units leaves: no masks, no zeros, no code of ours.

    The folder opens with from_pretrained and runs wherever the dense model does. Outputs are compared with those
    of the masked model before anything is written.
    """
    from lottery_tickets._atomic import creating_folder
    from lottery_tickets.large_models import compute_weights_digest, copy_companions, load_model, resolve_model
    from lottery_tickets.masks import Mask
    from lottery_tickets.structured import extract_subnetwork, save_onnx

    mask = Mask.load(ticket)
    folder = resolve_model(model)
    check_weights(session, model, compute_weights_digest(folder), {ticket: mask}, other_weights=other_weights)
    dense: Any = load_model(folder, dtype.type, progress=session.progress)
    small: Any = extract_subnetwork(dense, mask)
    with creating_folder(output) as temporary:
        small.save_pretrained(temporary)
        copied = copy_companions(folder, temporary)
        if onnx:
            save_onnx(small, temporary / "model.onnx")
    before, after = (sum(one.numel() for one in model.parameters()) for model in (dense, small))
    data = {
        "model": model_name(model),
        "ticket": str(ticket),
        "output": str(output),
        "parameters_before": before,
        "parameters": after,
        "share_left": after / before,
        "onnx": onnx,
        "copied": copied,
    }
    return Report(data, lambda console: _show_extracted(console, data))


def _show_mask(console: Console, data: Mapping[str, Any]) -> None:
    kept = [layer["kept"] for layer in data["layers"].values()]
    units = sum(layer["units"] for layer in data["layers"].values())
    console.print(
        f"{data['path']}: removes {units - sum(kept):,} of {units:,} {data['unit']}s and with them "
        f"{data['parameters_removed']:,} parameters; layers keep from {min(kept):,} to {max(kept):,}.",
        soft_wrap=True,
    )


def _show_extracted(console: Console, data: Mapping[str, Any]) -> None:
    console.print(
        f"{data['output']}: {data['parameters']:,} of {data['parameters_before']:,} parameters, "
        f"{100 * data['share_left']:.1f}%, and no mask to apply.",
        soft_wrap=True,
    )
    console.print(f"Load it with AutoModelForCausalLM.from_pretrained({data['output']!r}).", soft_wrap=True)
    if data["onnx"]:
        console.print(f"ONNX Runtime runs {data['output']}/model.onnx.", soft_wrap=True)
