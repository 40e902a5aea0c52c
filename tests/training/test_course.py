"""One training, left at any batch and gone on with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import oracles
from lottery_tickets._batches import measure_mean
from lottery_tickets.training import (
    Course,
    DataOrder,
    Evaluation,
    Judge,
    Point,
    Trainer,
    early_stopping,
    make_optimizer,
    restore_tensors,
    tensors_of,
)
from test_early_bird import blobs, loader, mlp

LENGTH = 4


def course(model: torch.nn.Module, data: Any = None, **options: Any) -> Course:
    optimizer = make_optimizer("sgd", model.named_parameters(), lr=0.1, momentum=0.9)
    order = DataOrder(loader() if data is None else data, 0)
    return Course(model, Trainer(model, optimizer), order, **{"epochs": 3, **options})


def bits_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: oracles.bytes_of(tensor) for name, tensor in tensors_of(model).items()}


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("stop", [1, 3, 4, 7, 11])
def test_it_goes_on_where_it_was_left(stop: int, every: int | None) -> None:
    options = {"judge": Judge(loader()), "eval_every_steps": every}
    whole, model = mlp(), mlp()
    undisturbed = course(whole, **options)
    undisturbed.run()
    first = course(model, **options)
    for step in first.batches():
        if step == stop:
            break
    state = copy.deepcopy(first.state())
    tensors = {name: one.clone() for name, one in tensors_of(model).items()}
    other = mlp(seed=1)
    restore_tensors(other, tensors)
    second = course(other, **options)
    second.load(state)
    torch.manual_seed(99)
    second.run()
    assert bits_of(other) == bits_of(whole)
    assert second.evaluations == undisturbed.evaluations
    assert second.train_loss == undisturbed.train_loss
    assert (second.step, second.epoch) == (3 * LENGTH, 3)


def test_it_begins_in_the_middle():
    model = mlp()
    seen = list(course(model, start=Point(epoch=1, batch=2, step=6)).batches())
    assert seen == [7, 8, 8, 9, 10, 11, 12, 12]
    assert Point.of(Point(epoch=1).state()) == Point(epoch=1)


@pytest.mark.parametrize(("every", "steps"), [(None, [4, 8, 12]), (5, [5, 10, 12]), (4, [4, 8, 12]), (50, [12])])
@pytest.mark.parametrize("sized", [True, False])
def test_evaluations_are_made_on_the_way_and_at_the_end(every: int | None, steps: list[int], sized: bool) -> None:
    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(DataLoader(blobs(), 16))

    model, held_out = mlp(), loader(shuffle=False)
    one = course(model, None if sized else Unsized(), judge=Judge(held_out, held_out), eval_every_steps=every)
    one.run()
    assert [found["step"] for found in one.evaluations] == steps
    expected = measure_mean(model, held_out)
    last = one.evaluations[-1]
    assert (last["loss"], last["accuracy"]) == (expected.mean, expected.accuracy)
    assert (last["test_loss"], last["test_accuracy"]) == (expected.mean, expected.accuracy)


def test_the_loss_is_that_of_the_latest_epoch():
    model = mlp()
    one = course(model, epochs=2)
    losses: list[float] = []
    step = one.trainer.step
    one.trainer.step = lambda batch: losses.append(part.mean) or part if (part := step(batch)) else None
    for number in one.batches():
        if number == 2 and one.epoch == 0:
            assert one.train_loss == pytest.approx(sum(losses) / 2)
    assert one.train_loss == pytest.approx(sum(losses[-LENGTH:]) / LENGTH)


def evaluation(step: int, loss: float) -> Evaluation:
    return Evaluation(step=step, loss=loss, accuracy=None, test_loss=None, test_accuracy=None)


@given(st.lists(st.sampled_from([0.5, 0.25, math.nan, math.inf, 1.0])))
def test_the_first_of_the_least_losses_is_where_to_stop(losses: list[float]) -> None:
    best = early_stopping([evaluation(step, loss) for step, loss in enumerate(losses)])
    numbers = [loss for loss in losses if not math.isnan(loss)]
    if not numbers:
        assert best is None
    else:
        assert best is not None
        assert best["step"] == losses.index(min(numbers))
