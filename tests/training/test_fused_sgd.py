"""FusedSGD against `torch.optim.SGD`, bit for bit, and what it promises beyond it."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lottery_tickets.errors import TrainingError
from lottery_tickets.training import FusedSGD, _weights
from processes import PEAK, run_python


class Awkward(nn.Module):
    """Tied weights, modules used twice, frozen and never; an unusual layout, a scalar, an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 2, 3, padding=1).to(memory_format=torch.channels_last)
        self.twice = nn.Linear(12, 12)
        self.frozen = nn.Linear(12, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.embedding(tokens).unsqueeze(1)).movedim(1, 2).flatten(2)
        hidden = self.twice(torch.tanh(self.twice(hidden))) * self.scale + self.nothing.sum()
        return self.head(self.frozen(hidden))


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small wait more for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    draw = torch.randint(11, (2, 4, 9), generator=generator)
    return draw[0], draw[1]


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    tokens, targets = batch(step)
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    model = Awkward().to(dtype)
    return model, copy.deepcopy(model)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, max_norm: float | None
) -> None:
    """The slow reference: all gradients, each clipped by its own norm, then the step."""
    optimizer.zero_grad()
    loss.backward()
    if max_norm is not None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_([parameter], max_norm)
    optimizer.step()


@pytest.mark.parametrize(("foreach", "max_norm"), [(True, None), (False, None), (True, 0.05)])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.01)])
def test_fifty_steps_equal_torchs(foreach, max_norm, momentum, decay):
    ours, theirs = pair()
    optimizer = FusedSGD(ours.named_parameters(), 0.1, momentum, decay, max_grad_norm=max_norm)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=decay, foreach=foreach)
    for step in range(50):
        optimizer.backward(loss_of(ours, step))
        plain_step(theirs, plain, loss_of(theirs, step), max_norm)
    assert same(ours, theirs)
    assert not same(ours, pair()[0])
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_float64_equals_torchs():
    ours, theirs = pair(torch.float64)
    optimizer = FusedSGD(ours.parameters(), 0.1, 0.9)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, 0.9)
    for step in range(10):
        optimizer.backward(loss_of(ours, step))
        plain_step(theirs, plain, loss_of(theirs, step), None)
    assert same(ours, theirs)


@settings(max_examples=15)
@given(st.sampled_from((1, 7, 64, 1000)), st.sampled_from((0.0, 0.9)), st.sampled_from((0.0, 0.1)))
def test_blocks_do_not_show(size, momentum, decay):
    ours, theirs = pair()
    optimizer = FusedSGD(ours.parameters(), 0.1, momentum, decay, max_grad_norm=0.05)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_weights, "BLOCK", size)
        for step in range(3):
            optimizer.backward(loss_of(ours, step))
            plain_step(theirs, plain, loss_of(theirs, step), 0.05)
    assert same(ours, theirs)


def test_gradients_that_share_memory_stay_apart():
    """Autograd may hand one gradient's memory to two parameters; the first one's update must not change it."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(12))

        def forward(self) -> torch.Tensor:
            return (self.first.view(12) + self.second).square().sum()

    torch.manual_seed(0)
    ours = Sum()
    theirs = copy.deepcopy(ours)
    optimizer = FusedSGD(ours.parameters(), 0.01, 0.9, 0.1, max_grad_norm=0.5)
    plain = torch.optim.SGD(theirs.parameters(), 0.01, 0.9, weight_decay=0.1)
    for _ in range(5):
        optimizer.accumulate(ours() / 2)
        optimizer.backward(ours() / 2)
        plain_step(theirs, plain, theirs(), 0.5)
    assert same(ours, theirs)


@pytest.mark.parametrize("accumulated", [False, True])
def test_global_clipping_is_that_of_the_whole(accumulated):
    ours, theirs = pair()
    optimizer = FusedSGD(ours.parameters(), 0.5, max_grad_norm=0.1, clip="global")
    plain = torch.optim.SGD(theirs.parameters(), 0.5)
    for step in range(20):
        if accumulated:
            optimizer.accumulate(loss_of(ours, step) * 0.25)
            optimizer.backward(loss_of(ours, step) * 0.75)
        else:
            optimizer.backward(loss_of(ours, step))
        plain.zero_grad()
        loss_of(theirs, step).backward()
        assert float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)) > 0.1
        plain.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_micro_batches_equal_the_batch():
    ours, theirs = pair()
    optimizer = FusedSGD(ours.named_parameters(), 0.1, 0.9)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, 0.9)
    for step in range(10):
        tokens, targets = batch(step)
        for row in range(4):
            loss = F.cross_entropy(ours(tokens[row : row + 1]).flatten(0, 1), targets[row]) / 4
            (optimizer.accumulate if row < 3 else optimizer.backward)(loss)
        plain_step(theirs, plain, loss_of(theirs, step), None)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_the_last_micro_batch_does_not_use_moves():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = FusedSGD([first, second], 0.5)
    optimizer.accumulate(first.sum())
    optimizer.backward(second.sum())
    assert first.tolist() == second.tolist() == [0.5, 0.5]
    assert optimizer.moved == 2


def test_micro_batches_of_halves_add_up_in_float32():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = FusedSGD([weight], 1.0, precision="nearest")
    optimizer.accumulate(weight.sum() * 1.0)
    for _ in range(64):  # each is lost beside 1 in bfloat16
        optimizer.accumulate(weight.sum() * 2.0**-9)
    optimizer.backward(weight.sum() * 2.0**-9 * 0)
    assert weight.item() == -1.125


@pytest.mark.parametrize("clip", ["tensor", "global"])
def test_a_gradient_that_is_not_finite_moves_nothing(clip):
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([("good", good), ("bad", bad)], 0.5, 0.9, 0.1, max_grad_norm=10.0, clip=clip)
    optimizer.backward(good.sum() + (bad * torch.tensor([1.0, float("inf"), 1.0])).sum())
    assert optimizer.nonfinite == ("bad",)
    assert bad.tolist() == [1.0, 1.0, 1.0]
    assert "momentum_buffer" not in optimizer.state[bad]
    assert (good.tolist() == [1.0, 1.0, 1.0]) == (clip == "global")
    assert optimizer.moved == (clip == "tensor")
    optimizer.backward(good.sum() + bad.sum())
    assert optimizer.nonfinite == ()
    assert optimizer.moved == 2


def test_large_but_finite_gradients_are_finite():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = FusedSGD([weight], 1e-30)
    optimizer.backward((weight * 1e30).sum())
    assert weight.tolist() == [-1.0, -1.0]


def test_other_backward_passes_are_the_users():
    model, _ = pair()
    optimizer = FusedSGD(model.named_parameters(), 0.1)
    optimizer.backward(loss_of(model, 0))
    before = copy.deepcopy(model)
    loss_of(model, 1).backward()
    assert same(model, before)
    assert model.twice.weight.grad is not None
    with pytest.raises(TrainingError, match=r"embedding\.weight.*zero_grad"):
        optimizer.backward(loss_of(model, 2))
    optimizer.step()
    expected = before.twice.weight - 0.1 * torch.autograd.grad(loss_of(before, 1), before.twice.weight)[0]
    torch.testing.assert_close(model.twice.weight, expected)
    assert model.twice.weight.grad is None


def test_schedulers_and_loops_that_step():
    ours, theirs = pair()
    optimizer, plain = FusedSGD(ours.parameters(), 0.5), torch.optim.SGD(theirs.parameters(), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, plain)]
        for step in range(5):
            optimizer.zero_grad()
            optimizer.backward(loss_of(ours, step))
            optimizer.step()
            plain_step(theirs, plain, loss_of(theirs, step), None)
            for schedule in schedules:
                schedule.step()
    assert same(ours, theirs)
    assert optimizer.param_groups[0]["lr"] == 0.5**6


def test_groups_have_options_of_their_own():
    fast, slow = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = FusedSGD([{"params": [("fast", fast)], "lr": 0.5}, {"params": [("slow", slow)]}], 0.25)
    optimizer.backward(fast.sum() + slow.sum())
    assert (fast.item(), slow.item()) == (0.5, 0.75)


def test_only_one_gradient_is_there_at_a_time():
    model, _ = pair()
    counts = []

    class Watching(FusedSGD):
        def _update(self, index, gradient, coefficient):
            counts.append(sum(one.grad is not None for one in model.parameters()))
            super()._update(index, gradient, coefficient)

    Watching(model.parameters(), 0.1).backward(loss_of(model, 0))
    assert counts == [0] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_notices_weights_that_change_too_early(dtype):
    """A graph that also holds the weight where autograd does not follow it needs its old value."""
    weight, other = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
    loss = ((other * 3).sum() * 2 + (other * weight.detach()).sum()) + (weight * 1).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        FusedSGD([weight, other], 0.1).backward(loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_are_not_lost(dtype):
    """A thousand steps of a tenth of the spacing."""
    spacing = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    ends = {}
    for precision in ("stochastic", "compensated", "nearest"):
        weight = nn.Parameter(torch.full((2000,), 1.5, dtype=dtype))
        optimizer = FusedSGD([weight], spacing / 10, precision=precision)
        for _ in range(100):
            optimizer.backward(-weight.sum())
        ends[precision] = weight.detach().float()
    assert ends["nearest"].unique().tolist() == [1.5]
    assert ends["compensated"].unique().tolist() == [1.5 + 10 * spacing]
    # A hundred draws of standard deviation 0.3 spacings; 2000 weights.
    assert abs(ends["stochastic"].mean().item() - 1.5 - 10 * spacing) < 5 * 3 * spacing / 2000**0.5
    assert ends["stochastic"].unique().numel() > 3


def test_compensated_weights_follow_those_in_float32():
    torch.manual_seed(0)
    start, gradients = torch.randn(500).bfloat16(), torch.randn(300, 500).bfloat16()
    halves, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours, wide = FusedSGD([halves], 1e-3, 0.5, 0.01, precision="compensated"), FusedSGD([exact], 1e-3, 0.5, 0.01)
    for row in gradients:
        ours.backward((halves * row).sum())
        wide.backward((exact * row.float()).sum())
    spacing = 2.0**-8 * exact.detach().abs() + 1e-3
    assert ((halves.float() - exact).abs() <= spacing).all()


@pytest.mark.parametrize("precision", ["stochastic", "compensated", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_do_not_depend_on_threads_blocks_or_layout(dtype, precision):
    torch.manual_seed(0)
    start, gradient = torch.randn(37, 5).to(dtype), torch.randn(37, 5).to(dtype)
    results = []
    for size, count, turned in ((1 << 20, 2, False), (64, 1, False), (7, 2, True)):
        laid_out = start.t().contiguous().t() if turned else start.clone()
        weight = nn.Parameter(laid_out)
        optimizer = FusedSGD([weight], 0.01, 0.9, 0.1, precision=precision, seed=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_weights, "BLOCK", size)
            torch.set_num_threads(count)
            for _ in range(5):
                optimizer.backward((weight * gradient).sum())
        results.append(weight.detach().contiguous().view(torch.int16))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_halves_clip_by_their_norm_in_float32():
    weight = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    optimizer = FusedSGD([weight], 1.0, max_grad_norm=1.0, precision="nearest")
    optimizer.backward(-weight.sum() * 3)
    assert weight.unique().item() == pytest.approx(0.01, rel=2**-8)


@pytest.mark.parametrize("precision", ["stochastic", "compensated"])
def test_a_run_goes_on_from_its_state(precision):
    def optimizer_of(model: nn.Module, seed: int) -> FusedSGD:
        return FusedSGD(model.named_parameters(), 0.1, 0.9, precision=precision, seed=seed)

    model, _ = pair(torch.bfloat16)
    optimizer = optimizer_of(model, 8)
    for step in range(3):
        optimizer.backward(loss_of(model, step))
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved)
    other, _ = pair(torch.bfloat16)
    other.load_state_dict(weights)
    resumed = optimizer_of(other, 0)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        optimizer.backward(loss_of(model, step))
        resumed.backward(loss_of(other, step))
    assert same(model, other)
    optimizer.accumulate(loss_of(model, 0))
    with pytest.raises(TrainingError, match="between steps"):
        optimizer.state_dict()


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = FusedSGD(embedding.named_parameters(), 0.1)
    with pytest.raises(TrainingError, match=r"weight.*sparse=False"):
        optimizer.backward(embedding(torch.tensor([1])).sum())
    assert embedding.weight.grad is None
    assert not embedding.weight._post_accumulate_grad_hooks


def test_gradients_in_parts_are_refused():
    layer, inputs = nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    optimizer = FusedSGD(layer.named_parameters(), 0.1)
    hidden = checkpoint(layer, checkpoint(layer, inputs, use_reentrant=True), use_reentrant=True)
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        optimizer.backward(hidden.sum())


def test_an_error_in_a_pass_leaves_no_hook_and_says_how_many_moved():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError("no memory left")

    late, early = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = FusedSGD([*early.named_parameters("early"), *late.named_parameters("late")], 0.1)
    optimizer.accumulate(late(early(torch.ones(1, 3))).sum())
    with pytest.raises(MemoryError):
        optimizer.backward(late(Failing.apply(early(torch.ones(1, 3)))).sum())
    assert optimizer.moved == 2
    for module in (late, early):
        assert module.weight.grad is None
        assert not module.weight._post_accumulate_grad_hooks
    kept = early.weight.detach().clone()
    optimizer.step()
    assert torch.equal(early.weight, kept)


def test_parameters_over_the_same_memory_are_refused():
    first = nn.Parameter(torch.ones(6))
    with pytest.raises(TrainingError, match="a and b are two parameters over the same memory"):
        FusedSGD([("a", first), ("b", nn.Parameter(first.data[2:4]))], 0.1)
    halves = torch.ones(6)
    FusedSGD([nn.Parameter(halves[:3]), nn.Parameter(halves[3:])], 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": 1.0, "momentum": -0.1}, "momentum"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": 1.0, "clip": "value"}, "tensor, global"),
        ({"lr": 1.0, "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"lr": 1.0, "precision": "exact"}, "stochastic, compensated, nearest"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(TrainingError, match=message):
        FusedSGD([nn.Parameter(torch.ones(1))], **options)


def test_what_cannot_be_trained():
    weight = nn.Parameter(torch.ones(2))
    optimizer = FusedSGD([weight], 0.1)
    with pytest.raises(TrainingError, match="one number"):
        optimizer.backward(weight * 2)
    with pytest.raises(TrainingError, match="no graph"):
        optimizer.backward(weight.detach().sum())
    with pytest.raises(TrainingError, match="closure"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(TrainingError, match="when it is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(TrainingError, match="meta"):
        FusedSGD([nn.Parameter(torch.ones(2, device="meta"))], 0.1)
    with pytest.raises(TrainingError, match="requires gradients"):
        FusedSGD([nn.Parameter(torch.ones(2), requires_grad=False)], 0.1).backward(weight.sum())


def test_a_step_takes_little_more_memory_than_the_weights():
    code = PEAK + (
        "import torch\n"
        "from lottery_tickets.training import FusedSGD\n"
        "import ctypes; ctypes.CDLL(None).mallopt(-3, 1 << 18)  # what is freed is not resident any more\n"
        "model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(32)])\n"
        "optimizer = FusedSGD(model.parameters(), 0.1, weight_decay=0.1, max_grad_norm=1.0)\n"
        "small = torch.nn.Linear(64, 64)\n"
        "FusedSGD(small.parameters(), 0.1).backward(small(torch.ones(4, 64)).sum())\n"
        "before = peak()\n"
        "optimizer.backward(model(torch.ones(4, 1024)).sum())\n"
        "print((peak() - before) / sum(one.numel() * 4 for one in model.parameters()))"
    )
    assert float(run_python(code)) < 0.2
