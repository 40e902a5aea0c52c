"""Optimizers by name: the same weights as torch's, whenever the step is made."""

from __future__ import annotations

import copy
import shutil
import sys

import pytest
import torch
from torch import nn

from lottery_tickets.errors import MissingExtraError, TrainingError
from lottery_tickets.training import AfterBackward, FusedSGD, InBackward, _optimizers, make_optimizer


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small wait more for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, params=["together", "one by one"])
def _whole_networks(request, monkeypatch):
    """Small networks are stepped once after the pass, large ones parameter by parameter: the same bits."""
    if request.param == "one by one":
        monkeypatch.setattr(_optimizers, "_SMALL", 0)


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)).to(dtype)
    return model, copy.deepcopy(model)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    draw = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    return model(draw.to(model[0].weight.dtype)).float().square().mean()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_names_and_functions():
    model, _ = pair()
    for kind, expected in (("sgd", FusedSGD), ("adamw", InBackward), (torch.optim.Adagrad, AfterBackward)):
        assert type(make_optimizer(kind, model.named_parameters(), lr=0.1)) is expected
    for kind, options, message in (
        ("lion", {}, "sgd, adam, adamw, adamw8bit"),
        ("adamw", {"momentum": 0.9}, "momentum"),
        (torch.optim.Adagrad, {"clip": "tensor"}, "clip"),
        (torch.optim.Adagrad, {"weight_decay": 0.1}, "weight_decay"),
        ("adamw", {"precision": "exact"}, "precision"),
    ):
        with pytest.raises(TrainingError, match=message):
            make_optimizer(kind, model.named_parameters(), lr=0.1, **options)


@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_adamw_in_the_backward_pass_equals_torchs(max_norm):
    ours, theirs = pair()
    optimizer = make_optimizer("adamw", ours.named_parameters(), lr=0.01, weight_decay=0.1, max_grad_norm=max_norm)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (optimizer.optimizer, plain)]
    for step in range(20):
        optimizer.backward(loss_of(ours, step))
        plain.zero_grad()
        loss_of(theirs, step).backward()
        if max_norm is not None:
            for parameter in theirs.parameters():
                nn.utils.clip_grad_norm_([parameter], max_norm)
        plain.step()
        for schedule in schedules:
            schedule.step()
    assert same(ours, theirs)
    assert optimizer.moved == 4
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("kind", ["adamw", torch.optim.Adagrad])
def test_global_clipping(kind):
    ours, theirs = pair()
    options = {"clip": "global", "max_grad_norm": 0.01}
    optimizer = make_optimizer(kind, ours.named_parameters(), lr=0.01, **options)
    plain = (torch.optim.AdamW if kind == "adamw" else kind)(theirs.parameters(), lr=0.01)
    if kind == "adamw":
        plain.param_groups[0]["weight_decay"] = 0.0
    for step in range(5):
        optimizer.backward(loss_of(ours, step))
        plain.zero_grad()
        loss_of(theirs, step).backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.01) > 0.01
        plain.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["sgd", "adamw", torch.optim.SGD])
def test_micro_batches(kind):
    ours, theirs = pair()
    optimizers = [make_optimizer(kind, one.named_parameters(), lr=0.01) for one in (ours, theirs)]
    for step in range(3):
        optimizers[0].accumulate(loss_of(ours, step) / 2)
        optimizers[0].backward(loss_of(ours, step) / 2)
        optimizers[1].backward(loss_of(theirs, step))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", torch.optim.SGD])
def test_a_gradient_that_is_not_finite_moves_nothing(kind):
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(kind, [("good", good), ("bad", bad)], lr=0.5)
    optimizer.backward(good.sum() + (bad * float("nan")).sum())
    assert optimizer.nonfinite == ("bad",)
    assert bad.tolist() == [1.0, 1.0]
    assert optimizer.moved == (kind == "adamw")
    assert good.grad is None


@pytest.mark.parametrize("kind", ["adam", torch.optim.SGD])
def test_large_gradients_are_finite(kind):
    """Their sum is not."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = make_optimizer(kind, [("weight", weight)], lr=1e-30)
    optimizer.backward((weight * 3e38).sum() / 2 + (weight * 2e38).sum() / 2)
    assert optimizer.nonfinite == ()
    assert optimizer.moved == 1


@pytest.mark.parametrize("precision", ["stochastic", "compensated", "nearest"])
def test_adamw_steps_of_halves(precision):
    """Steps of a tenth of the spacing; AdamW's are lr times the gradient's sign."""
    weight = nn.Parameter(torch.full((1000,), 1.5, dtype=torch.bfloat16))
    optimizer = make_optimizer("adamw", [("weight", weight)], lr=2**-7 / 10, precision=precision)
    for _ in range(50):
        optimizer.backward(-weight.sum())
    moved = (weight.detach().float() - 1.5) * 2**7
    assert moved.mean().item() == pytest.approx(0 if precision == "nearest" else 5, abs=0.5)
    assert (moved.unique().numel() > 2) == (precision == "stochastic")
    assert optimizer.optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["adamw", torch.optim.Adagrad])
@pytest.mark.parametrize("precision", ["stochastic", "compensated"])
def test_a_run_goes_on_from_its_state(kind, precision):
    model, _ = pair(torch.bfloat16)
    optimizer = make_optimizer(kind, model.named_parameters(), lr=0.01, precision=precision, seed=3)
    for step in range(3):
        optimizer.backward(loss_of(model, step))
    other = copy.deepcopy(model)
    resumed = make_optimizer(kind, other.named_parameters(), lr=0.01, precision=precision)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        optimizer.backward(loss_of(model, step))
        resumed.backward(loss_of(other, step))
    assert same(model, other)


def test_eight_bits_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MissingExtraError, match=r"lottery-tickets\[lean\]"):
        make_optimizer("adamw8bit", pair()[0].named_parameters(), lr=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torchao compiles its step, on CPUs with a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_follow_adamw_and_go_on_from_their_state(dtype):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 4)).to(dtype)
    theirs, start = copy.deepcopy(ours), ours[0].weight.detach().float().clone()
    optimizer = make_optimizer("adamw8bit", ours.named_parameters(), lr=0.01, weight_decay=0.1)
    plain = make_optimizer("adamw", theirs.named_parameters(), lr=0.01, weight_decay=0.1)
    for step in range(10):
        optimizer.backward(loss_of(ours, step))
        plain.backward(loss_of(theirs, step))
    moved, apart = theirs[0].weight.float() - start, theirs[0].weight.float() - ours[0].weight.float()
    assert apart.norm() < 0.2 * moved.norm()
    state = optimizer.state_dict()
    tensors = [part for one in state["optimizer"]["state"].values() for part in one.values()]
    assert {type(part) for part in tensors} == {torch.Tensor, dict}
    assert next(part for part in tensors if isinstance(part, dict))["codes"].dtype == torch.uint8
    other = copy.deepcopy(ours)
    resumed = make_optimizer("adamw8bit", other.named_parameters(), lr=0.01, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(state))
    for step in range(3):
        optimizer.backward(loss_of(ours, step))
        resumed.backward(loss_of(other, step))
    assert same(ours, other)
