"""What `early-bird` trains: a small network on images, by name, or a language model on a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lottery_tickets.errors import EvaluationError
from lottery_tickets.vision import DATASETS, NETWORKS

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        name: What to call it.
        model: With its initial weights.
        train_data: Batches, gone through once an epoch.
        test_data: Batches of classes; None where there is no accuracy to test.
        origin: What a ticket says of the weights it is meant for.
    """

    name: str
    model: nn.Module
    train_data: Iterable[Any]
    test_data: Iterable[Any] | None
    origin: Mapping[str, str]


@dataclass(frozen=True)
class TextOptions:
    """How a text becomes batches."""

    context: int
    samples: int | None
    start: int


def subject_of(
    model: str,
    data: str,
    *,
    batch_size: int,
    seed: int,
    text: TextOptions,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: bool,
) -> Subject:
    """The model and the data of these names.

    Raises:
        EvaluationError: A network without images, or a language model without a text.
    """
    if model in NETWORKS:
        if data not in DATASETS:
            raise EvaluationError(f"--data {data}: {model} takes images, one of {', '.join(DATASETS)}.")
        return _vision(model, data, batch_size=batch_size, seed=seed, device=device)
    if data in DATASETS:
        raise EvaluationError(f"--data {data}: images are for {', '.join(NETWORKS)}; {model} takes a text file.")
    return _language(
        model,
        Path(data),
        batch_size=batch_size,
        seed=seed,
        text=text,
        dtype=dtype,
        device=device,
        progress=progress,
    )


def described_names() -> str:
    """The networks and the images that there are."""
    return f"{', '.join(NETWORKS)}; images: {', '.join(DATASETS)}"


def check_names(model: str, data: str) -> None:
    """Refuse, before torch is loaded, what is neither a name nor a file.

    Raises:
        BadParameter: No such file.
    """
    if data not in DATASETS and not Path(data).is_file():
        raise typer.BadParameter(f"{data}: neither a file nor one of {', '.join(DATASETS)}", param_hint="--data")
    if model not in NETWORKS and data in DATASETS:
        raise typer.BadParameter(f"images are for {', '.join(NETWORKS)}", param_hint="--data")


def _vision(name: str, data: str, *, batch_size: int, seed: int, device: torch.device) -> Subject:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name]().to(device)
    images = DATASETS[data]()
    train = TensorDataset(images.train_inputs, images.train_labels)
    test = TensorDataset(images.test_inputs, images.test_labels)
    return Subject(
        name=name,
        model=model,
        train_data=DataLoader(train, batch_size, shuffle=True),
        test_data=DataLoader(test, 1000),
        origin={"base_model": name, "initial_seed": str(seed), "data": data},
    )


def _language(
    model: str,
    path: Path,
    *,
    batch_size: int,
    seed: int,
    text: TextOptions,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: bool,
) -> Subject:
    from torch.utils.data import DataLoader

    from lottery_tickets.cli._arguments import check_context, model_name
    from lottery_tickets.cli._windows import text_windows
    from lottery_tickets.large_models import compute_weights_digest, load_model, load_tokenizer, resolve_model

    folder = resolve_model(model)
    windows = text_windows(load_tokenizer(folder), path, text.context, count=text.samples, start=text.start)
    rows: Any = [{"input_ids": window["input_ids"][0]} for window in windows]
    loaded = load_model(folder, dtype, device=device, progress=progress)
    check_context(loaded, text.context)
    return Subject(
        name=model_name(model),
        model=loaded,
        train_data=DataLoader(rows, batch_size, shuffle=True, drop_last=len(rows) >= batch_size),
        test_data=None,
        origin={
            "base_model": model_name(model),
            "weights_digest": compute_weights_digest(folder),
            "data": path.name,
            "context": str(text.context),
            "data_start": str(text.start),
        },
    )
