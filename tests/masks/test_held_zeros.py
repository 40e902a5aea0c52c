"""Zero means zero: hundreds of steps of every optimizer, looked at after each of them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lottery_tickets import Mask, create_magnitude_mask, held
from lottery_tickets.training import _optimizers, make_optimizer

STEPS = 200
SHAPES = ((), (1,), (5,), (0, 3), (3, 7), (9, 8), (2, 3, 3, 1))
Parameters = list[nn.Parameter]

TORCHS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "sgd momentum decay": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd nesterov foreach": lambda ps: torch.optim.SGD(
        ps, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True
    ),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adam decay": lambda ps: torch.optim.Adam(ps, lr=0.05, weight_decay=0.1, foreach=False),
    "adam maximize": lambda ps: torch.optim.Adam(ps, lr=0.01, maximize=True),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=0.05, amsgrad=True, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.05, fused=True),
    "adam without eps": lambda ps: torch.optim.Adam(ps, lr=0.05, eps=0.0),  # 0 / 0 where pruned
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05, initial_accumulator_value=0.5, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "rmsprop without eps": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, eps=0.0),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.05),  # keeps eps where the gradient is zero
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.05),  # keeps a step size everywhere
}


@dataclass
class Subject:
    """Weights of any shape, a ticket of them, and losses whose gradients are zero nowhere."""

    model: nn.ParameterDict
    mask: Mask
    generator: torch.Generator

    def loss(self, rows: list[str] | None = None) -> torch.Tensor:
        """A bowl at a place of its own at each call; without the parameters not asked for."""
        parts = []
        for name in rows or list(self.model):
            weight = self.model[name]
            place = torch.randn(weight.shape, generator=self.generator).to(weight.dtype)
            parts.append((weight - place).square().sum())
        return torch.stack(parts).sum()


@st.composite
def subjects(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], *, plain: bool = False) -> Subject:
    """Plain ones are contiguous and hold something."""
    dtype = draw(st.sampled_from(dtypes))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    shapes += [(4, 2)] if plain else []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weights = {f"w{index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}
    density = draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    turned = not plain and draw(st.booleans())
    parameters = {
        name: nn.Parameter((weight.transpose(0, 1) if turned and weight.dim() > 1 else weight).to(dtype))
        for name, weight in weights.items()
    }
    # One parameter is left out of the ticket if there are several.
    names = list(parameters)[: max(1, len(parameters) - 1)]
    mask = {name: torch.rand(parameters[name].shape, generator=generator) < density for name in names}
    return Subject(nn.ParameterDict(parameters), Mask.from_tensors(mask), generator)


def bits_set(tensor: torch.Tensor, pruned: torch.Tensor) -> bool:
    """Whether a bit is set where pruned: -0.0 has one."""
    return bool(tensor.detach()[pruned].contiguous().view(-1).view(torch.uint8).any())


def states_of(optimizer: Any, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """What it keeps for each element of a weight; L-BFGS keeps vectors over all weights, looked at elsewhere."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    named, lent = getattr(optimizer, "_named", ()), getattr(optimizer, "_lent", ())  # of two-byte weights
    known_as = {one: other for (_, one), other in zip(named, lent, strict=False)}
    for key, value in inner.state[known_as.get(weight, weight)].items():
        if key != "step" and isinstance(value, torch.Tensor) and value.shape == weight.shape:
            yield value


def check(subject: Subject, optimizer: Any, step: int, names: list[str] | None = None) -> None:
    """Weights, gradients and states of these parameters are zero where pruned."""
    for name in subject.mask.keys() & (names or subject.mask.keys()):
        weight, pruned = subject.model[name], ~subject.mask[name]
        assert not bits_set(weight, pruned), (name, step)
        assert weight.grad is None or not bits_set(weight.grad, pruned), (name, step)
        for value in states_of(optimizer, weight):
            assert not value[pruned].any(), (name, step)


def disturbed(subject: Subject, step: int) -> None:
    """What a user's loop may do between the backward pass and the step, or between steps."""
    weight = subject.model["w0"]
    with torch.no_grad():
        if step % 50 == 10 and weight.grad is not None:
            weight.grad.add_(1.0)
        if step % 50 == 20:
            weight.add_(1.0)
        if step % 50 == 30:
            weight.data.add_(1.0)  # not counted by torch
        if step % 50 == 40 and weight.grad is not None:
            weight.grad = torch.ones_like(weight)


@pytest.mark.parametrize("kind", TORCHS)
@settings(max_examples=8)
@given(st.data())
def test_after_every_step_of_torchs_optimizers(kind: str, data: st.DataObject) -> None:
    fp16 = () if "fused" in kind else (torch.bfloat16,)
    subject = data.draw(subjects((torch.float32, torch.float64, *fp16)))
    optimizer = TORCHS[kind](list(subject.model.values()))
    names = list(subject.model)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        # Sometimes one of several parameters takes no part and has no gradient.
        subject.loss(names[number % len(names) :] if number % 3 == 0 else None).backward()
        disturbed(subject, number)
        optimizer.step()

    for number in range(1, 3):  # state from before the ticket
        step(number)
    with held(subject.model, subject.mask):
        for number in range(STEPS):
            # A copy, as loading from a file gives: other tensors, which may hold anything.
            if number == 100:
                saved = optimizer.state_dict()
                for state in saved["state"].values():
                    for key, value in state.items():
                        if key != "step" and isinstance(value, torch.Tensor):
                            state[key] = value + 1
                optimizer.load_state_dict(saved)
            step(number)
            stepped = [name for name in names if subject.model[name].grad is not None]
            check(subject, optimizer, number, stepped)


@settings(max_examples=10)
@given(st.data(), st.sampled_from((None, "strong_wolfe")))
def test_after_every_step_of_lbfgs_and_at_each_of_its_evaluations(data: st.DataObject, search: str | None) -> None:
    subject = data.draw(subjects((torch.float32, torch.float64), plain=True))  # torch's L-BFGS takes no other
    optimizer = torch.optim.LBFGS(
        list(subject.model.values()), lr=0.5, max_iter=4, history_size=5, line_search_fn=search
    )
    inside, evaluations = False, 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = subject.loss()
        loss.backward()
        for name in subject.mask if inside else ():
            weight, pruned = subject.model[name], ~subject.mask[name]
            assert not weight[pruned].any()
            assert not bits_set(weight.grad, pruned)
        return loss

    for _ in range(2):  # directions and their history from before the ticket
        optimizer.step(closure)
    with held(subject.model, subject.mask):
        inside, evaluations = True, 0
        for number in range(STEPS // 4):
            optimizer.step(closure)
            check(subject, optimizer, number)
            assert not bits_of_history(optimizer, subject)
        assert evaluations >= STEPS // 4


def bits_of_history(optimizer: torch.optim.LBFGS, subject: Subject) -> list[str]:
    """Vectors over all parameters that are something else than zero where pruned."""
    kept = [subject.mask.get(name, torch.ones_like(one, dtype=torch.bool)) for name, one in subject.model.items()]
    pruned = ~torch.cat([one.reshape(-1) for one in kept])
    state = next(iter(optimizer.state.values()))
    vectors = {"d": state["d"], "prev_flat_grad": state["prev_flat_grad"]}
    vectors |= {f"{key} {index}": one for key in ("old_dirs", "old_stps") for index, one in enumerate(state[key])}
    return [key for key, vector in vectors.items() if vector is not None and vector[pruned].any()]


@pytest.fixture
def _one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large networks are stepped."""
    monkeypatch.setattr(_optimizers, "_SMALL", 0)


@pytest.mark.usefixtures("_one_by_one")
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(("stochastic", "compensated", "nearest")))
def test_after_every_step_inside_the_backward_pass(kind: str, data: st.DataObject, precision: Any) -> None:
    subject = data.draw(subjects((torch.float32, torch.float64, torch.bfloat16, torch.float16)))
    options = {"momentum": 0.9} if kind == "sgd" else {}
    optimizer = make_optimizer(
        kind, subject.model.items(), lr=0.02, weight_decay=0.1, precision=precision, **options
    )
    for _ in range(2):  # state from before the ticket
        optimizer.backward(subject.loss())
    with held(subject.model, subject.mask):
        for number in range(STEPS):
            if number % 20 == 7:
                optimizer.accumulate(subject.loss())
            optimizer.backward(subject.loss())
            check(subject, optimizer, number)
            if number % 50 == 30:
                subject.model["w0"].data.add_(1.0)


@pytest.mark.usefixtures("_one_by_one")
def test_a_layered_network_trains_inside_the_backward_pass() -> None:
    """Weights whose gradients are still to come are in use: zeroing them would break the pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    mask = create_magnitude_mask(model, 0.5)
    optimizer = make_optimizer("adamw", model.named_parameters(), lr=0.1)
    with held(model, mask):
        for _ in range(5):
            optimizer.backward(model(torch.randn(4, 6)).square().sum())
            for name in mask:
                assert not bits_set(model.get_parameter(name), ~mask[name])
