"""A verdict at toy size: blobs in a plane of noise, and a mask that keeps what sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lottery_tickets import Mask
from lottery_tickets.verdict import compute_ticket_verdict

INPUTS, HIDDEN, CLASSES = 20, 16, 4


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def blobs(count: int, seed: int) -> TensorDataset:
    """Four classes told apart by the first two inputs alone; the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    inputs = 2 * torch.randn(count, INPUTS, generator=generator)
    centres = 4 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    inputs[:, :2] = centres[labels] + torch.randn(count, 2, generator=generator)
    return TensorDataset(inputs, labels)


def make_dataloaders(_seed: int, *, test: bool = True) -> tuple[Any, ...]:
    parts = [DataLoader(blobs(64, 0), 16, shuffle=True), DataLoader(blobs(64, 1), 64)]
    return (*parts, DataLoader(blobs(256, 2), 256)) if test else tuple(parts)


def seeing_ticket(_seed: int = 0) -> Mask:
    """Of the first layer the two inputs that tell, and the whole second layer."""
    first = torch.zeros(HIDDEN, INPUTS)
    first[:, :2] = 1
    return Mask.from_tensors({"0.weight": first, "2.weight": torch.ones(CLASSES, HIDDEN)})


def blind_ticket(_seed: int = 0) -> Mask:
    """As many weights, of inputs that tell nothing."""
    first = torch.zeros(HIDDEN, INPUTS)
    first[:, 2:4] = 1
    return Mask.from_tensors({"0.weight": first, "2.weight": torch.ones(CLASSES, HIDDEN)})


TOY = {"margin": 0.02, "epochs": 3, "learning_rate": 0.1, "progress": False}


def verdict(
    ticket: Any = seeing_ticket, data: Any = make_dataloaders, model: Any = make_model, **options: Any
) -> Any:
    """Of the toy; every option may be changed."""
    return compute_ticket_verdict(model, data, ticket, **{**TOY, **options})


def told(results: Any) -> Any:
    """Results without what no two runs share."""
    trainings = [{**one, "seconds": 0.0} for one in results["trainings"]]
    return {**results, "trainings": trainings}
