"""The trainer against plain PyTorch loops: the same weights, however the batch is split and whatever fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lottery_tickets.errors import NonfiniteLossError, TrainingError, TrainingMemoryError
from lottery_tickets.training import Trainer, make_optimizer, training
from scoring import llama, texts

LEARNING_RATE = 0.1
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def digits(count: int = 5, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def optimizer_for(model: nn.Module, kind: Any = "sgd", **options: Any) -> Any:
    options = {"max_grad_norm": None, "lr": LEARNING_RATE, **options}
    return make_optimizer(kind, model.named_parameters(), **options)


def trained(model: nn.Module, batches: list[Any], kind: Any = "sgd", **options: Any) -> Trainer:
    trainer = Trainer(model, optimizer_for(model, kind), **options)
    with training(model):
        for batch in batches:
            trainer.step(batch)
    return trainer


def plainly(model: nn.Module, batches: list[Any], loss: Callable[..., torch.Tensor], make: Any) -> None:
    """The loop that everybody writes."""
    optimizer = make(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def classes(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def adamw(parameters: Iterator[nn.Parameter], lr: float = LEARNING_RATE) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr)


def close(model: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def equal(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- The update is that of the whole batch ---


@pytest.mark.parametrize("kind", ["sgd", adamw])
@pytest.mark.parametrize("max_batch_size", [None, 1, 3, 4, 8, 100])
def test_pieces_give_the_update_of_the_whole(kind, max_batch_size):
    ours, theirs = mlp(), mlp()
    trained(ours, digits(), kind, max_batch_size=max_batch_size)
    plainly(theirs, digits(), classes, sgd if kind == "sgd" else kind)
    close(ours, theirs)


@pytest.mark.parametrize("max_batch_size", [None, 1, 2])
def test_tokens_weigh_alike_in_whatever_piece_they_are(max_batch_size):
    """Sequences of different lengths: the mean is over the tokens of the whole batch, as transformers has it."""
    batches = []
    for batch in texts((3, 2)):
        labels = batch["input_ids"].clone()
        for row, start in enumerate((0, 5, 2)[: len(labels)]):
            labels[row, :start] = -100
        batches.append({"input_ids": batch["input_ids"], "labels": labels})
    ours = llama()
    theirs = copy.deepcopy(ours)
    trained(ours, batches, max_batch_size=max_batch_size)
    plainly(theirs, batches, lambda model, batch: model(**batch).loss, sgd)
    close(ours, theirs)


@pytest.mark.parametrize("ignored", [[0, 1, 2], [5, 6, 7], [0, 3, 7]])
def test_pieces_without_a_label(ignored):
    inputs, targets = digits(1)[0]
    targets = targets.clone()
    targets[ignored] = -100
    ours, theirs = mlp(), mlp()
    trained(ours, [(inputs, targets)], max_batch_size=1)
    plainly(theirs, [(inputs, targets)], classes, sgd)
    close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_losses_of_ones_own(reduction, max_batch_size):
    def loss_fn(logits, targets):
        return F.l1_loss(logits, F.one_hot(targets, 3).float(), reduction=reduction)

    ours, theirs = mlp(), mlp()
    trained(ours, digits(), loss_fn=loss_fn, max_batch_size=max_batch_size)
    plainly(theirs, digits(), lambda model, batch: loss_fn(model(batch[0]), batch[1]).mean(), sgd)
    close(ours, theirs)


def test_a_loss_is_never_clamped():
    """Huge losses train as plain PyTorch would."""
    batches = [(inputs * 1e4, targets) for inputs, targets in digits(2)]
    ours, theirs = mlp(), mlp()
    trainer = trained(ours, batches)
    plainly(theirs, batches, classes, sgd)
    close(ours, theirs)
    assert trainer.progress.mean_loss > 100


def test_progress_counts_units():
    model = mlp()
    trainer = trained(model, digits(3))
    assert (trainer.progress.steps, trainer.progress.skipped, trainer.progress.units) == (3, 0, 24)
    other, losses = mlp(), []
    plainly(other, digits(3), lambda *given: losses.append(classes(*given)) or losses[-1], sgd)
    assert math.isclose(trainer.progress.mean_loss, sum(loss.item() for loss in losses) / 3, rel_tol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", adamw])
def test_the_schedule_is_stepped_once_a_step(kind):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    ours, theirs = mlp(), mlp()
    trained(ours, digits(), kind, scheduler=schedule)
    optimizer = (sgd if kind == "sgd" else kind)(theirs.parameters())
    scheduler = schedule(optimizer)
    for batch in digits():
        optimizer.zero_grad()
        classes(theirs, batch).backward()
        optimizer.step()
        scheduler.step()
    close(ours, theirs)


# --- Losses that are not finite ---


def poisoned(count: int, *places: int) -> list[Batch]:
    batches = digits(count)
    for place in places:
        batches[place][0][-1] = math.nan
    return batches


@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_a_loss_that_is_not_finite_stops_and_changes_nothing(max_batch_size):
    model = normed()
    trainer = trained(model, digits(2), max_batch_size=max_batch_size)
    before = copy.deepcopy(model.state_dict())
    with (
        training(model),
        pytest.raises(NonfiniteLossError, match=r"Step 3: the loss is nan\. .* nonfinite='skip'"),
    ):
        trainer.step(poisoned(1, 0)[0])
    assert equal(model, before), "BatchNorm's running means included"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_left_out_batches_leave_no_trace(max_batch_size):
    batches = poisoned(8, 3)
    ours, theirs = mlp(), mlp()
    options = {"nonfinite": "skip", "max_batch_size": max_batch_size}
    trainer = trained(ours, batches, **options)
    trained(theirs, batches[:3] + batches[4:], max_batch_size=max_batch_size)
    assert equal(ours, theirs.state_dict())
    assert (trainer.progress.steps, trainer.progress.skipped) == (7, 1)


def test_more_than_the_share_stops():
    model = mlp()
    trainer = Trainer(model, optimizer_for(model), nonfinite="skip", max_skipped=0.2)
    with training(model):
        for batch in poisoned(10, 0, 9):  # one of one is allowed, and two of ten
            trainer.step(batch)
        with pytest.raises(NonfiniteLossError, match=r"3 of 11 batches, .* max_skipped=0\.2"):
            trainer.step(poisoned(1, 0)[0])


class Steep(nn.Module):
    """Its loss is finite; the gradient of one tensor, the first or the last to be reached, is not."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.steep, self.plain = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.first = first

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        root = self.steep.square().sum().sqrt()
        return (self.plain * inputs).sum(1) + root if self.first else (self.plain * (inputs + root)).sum(1)


@pytest.mark.parametrize("kind", ["sgd", "adamw", adamw])
def test_a_gradient_that_is_not_finite_is_named_and_moves_nothing_of_its_own(kind):
    model = Steep(first=True)
    trainer = Trainer(model, optimizer_for(model, kind))
    with training(model), pytest.raises(NonfiniteLossError, match="Step 1: the gradient of steep is not finite"):
        trainer.step((torch.ones(2, 3), torch.ones(2)))
    assert model.steep.tolist() == [0, 0, 0]
    if kind is adamw:  # which sees all gradients before it moves
        assert model.plain.tolist() == [1, 1, 1]


@pytest.mark.parametrize("max_batch_size", [None, 1])
def test_gradients_that_are_not_finite_are_left_out(max_batch_size):
    model = Steep(first=False)
    trainer = Trainer(
        model, optimizer_for(model), nonfinite="skip", max_skipped=1.0, max_batch_size=max_batch_size
    )
    with training(model):
        assert trainer.step((torch.ones(2, 3), torch.ones(2))) is None
    assert (trainer.progress.steps, trainer.progress.skipped, trainer.progress.units) == (0, 1, 0)
    assert model.steep.tolist() == [0, 0, 0]


def test_gradients_from_before_do_not_count():
    ours, theirs = mlp(), mlp()
    classes(ours, digits()[0]).backward()
    trained(ours, digits())
    trained(theirs, digits())
    assert equal(ours, theirs.state_dict())


def test_a_batch_of_no_samples_has_no_loss():
    model = mlp()
    trainer = Trainer(model, optimizer_for(model))
    with training(model), pytest.raises(NonfiniteLossError, match="Step 1: the batch holds no samples"):
        trainer.step((torch.ones(0, 6), torch.zeros(0, dtype=torch.int64)))


def test_a_batch_of_ignored_labels_has_no_loss():
    model = mlp()
    trainer = Trainer(model, optimizer_for(model))
    with training(model), pytest.raises(NonfiniteLossError, match=r"Step 1: .*every label .* ignored"):
        trainer.step((torch.ones(4, 6), torch.full((4,), -100)))


# --- Memory that runs out ---


class Small(nn.Module):
    """Has memory for so many rows in the forward pass, and then in the backward pass."""

    def __init__(self, forward: int = 100, backward: int = 100, error: Exception | None = None) -> None:
        super().__init__()
        self.inner = normed()
        self.inner[2] = nn.Identity()
        self.forward_rows, self.backward_rows = forward, backward
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        self.calls: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(inputs))
        first = self.inner[1](self.inner[0](inputs))
        if len(inputs) > self.forward_rows:
            raise self.error
        if len(inputs) > self.backward_rows:
            first.register_hook(self.fail)
        return self.inner[3](first)

    def fail(self, _: torch.Tensor) -> None:
        raise self.error


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "cpu, other words": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_memory_that_runs_out_in_the_forward_pass_halves_the_pieces(error):
    model = Small(forward=3, error=error)
    trainer = trained(model, digits(3))
    assert model.calls == [8, 4, 2, 2, 2, 2, *[2] * 8], "8 and 4 do not fit; remembered afterwards"
    plain = Small()
    trained(plain, digits(3), max_batch_size=2)
    assert equal(model, plain.state_dict()), "what failed left no trace, in BatchNorm's running means neither"
    assert trainer.progress.steps == 3


def test_memory_that_runs_out_after_some_pieces():
    """The pieces before have left gradients, which go."""
    batches = digits(2)
    model = Small()
    trainer = Trainer(model, optimizer_for(model), max_batch_size=4)
    with training(model):
        trainer.step(batches[0])
        model.calls.clear()
        model.forward_rows = 3
        calls = iter([100, 3])
        model.register_forward_pre_hook(lambda *_: setattr(model, "forward_rows", next(calls, 3)))
        trainer.step(batches[1])
    assert model.calls == [4, 4, 2, 2, 2, 2]
    plain = Small()
    trainer = Trainer(plain, optimizer_for(plain), max_batch_size=4)
    with training(plain):
        trainer.step(batches[0])
        trainer = Trainer(plain, optimizer_for(plain), max_batch_size=2)
        trainer.step(batches[1])
    assert equal(model, plain.state_dict())


def test_memory_that_runs_out_before_a_weight_moved_in_the_backward_pass_is_no_end():
    model = Small(backward=4)
    model.inner[3].requires_grad_(False)  # whose update would come first
    trained(model, digits(1))
    assert model.calls == [8, 4, 4]


def test_memory_that_runs_out_when_weights_have_moved_is_told():
    model = Small(backward=4)
    trainer = Trainer(model, optimizer_for(model))
    with (
        training(model),
        pytest.raises(
            TrainingMemoryError, match=r"Step 1: memory ran out in the backward pass, when some weights"
        ),
    ):
        trainer.step(digits(1)[0])


def test_memory_that_runs_out_before_an_optimizer_of_torchs_steps_is_no_end():
    model = Small(backward=4)
    trained(model, digits(1), adamw)
    assert model.calls == [8, 4, 4]


def test_memory_for_less_than_a_sample_is_told():
    model = Small(forward=0)
    model.inner[1] = nn.Identity()  # BatchNorm itself takes no single sample
    trainer = Trainer(model, optimizer_for(model))
    with training(model), pytest.raises(TrainingMemoryError, match="does not suffice for a single sample"):
        trainer.step(digits(1)[0])
    assert model.calls == [8, 4, 2, 1]


def test_other_errors_are_the_users():
    model = Small(forward=3, error=RuntimeError("shapes cannot be multiplied"))
    trainer = Trainer(model, optimizer_for(model))
    with training(model), pytest.raises(RuntimeError, match="shapes cannot"):
        trainer.step(digits(1)[0])
    assert model.calls == [8]


# --- The model comes back as it was, but for its weights ---


def test_modes_come_back_and_no_gradient_stays():
    model = normed()
    model.eval()
    model[1].train()
    flags = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="inside"), training(model), torch.no_grad():
        assert all(module.training for module in model.modules())
        raise ValueError("inside")
    assert [module.training for module in model.modules()] == flags
    trained(model, digits(2), adamw)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_stay():
    model = mlp()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    bias = model[0].bias.clone()
    trained(model, digits(3))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[0].bias, bias)
    assert not model[0].weight.requires_grad


# --- State ---


@pytest.mark.parametrize("kind", ["sgd", adamw])
def test_state_goes_on_where_it_stood(kind):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, 20)

    batches, options = digits(6), {"scheduler": schedule, "max_batch_size": 3}
    whole = mlp()
    expected = trained(whole, batches, kind, **options)
    model = mlp()
    half = trained(model, batches[:3], kind, **options)
    again = mlp()
    again.load_state_dict(model.state_dict())
    trainer = Trainer(again, optimizer_for(again, kind), **options)
    trainer.load(copy.deepcopy(half.state()))
    with training(again):
        for batch in batches[3:]:
            trainer.step(batch)
    assert equal(again, whole.state_dict())
    assert trainer.progress == expected.progress


def test_a_scheduler_that_is_none_is_told():
    model = mlp()
    with pytest.raises(TrainingError, match=r"scheduler is a function .* it returned int"):
        Trainer(model, optimizer_for(model), scheduler=lambda optimizer: 3)
