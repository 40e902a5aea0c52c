"""Tickets in training: zeros that stay, whoever steps, and nothing left behind."""

from __future__ import annotations

import copy
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks

import oracles
from lottery_tickets import Mask, applied, create_magnitude_mask, held
from lottery_tickets.errors import MaskAppliedError, MaskMismatchError
from processes import run_python
from strategies import DTYPES

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "sgd momentum decay": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd foreach": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1, weight_decay=0.1),
    "adamw amsgrad": lambda ps: torch.optim.AdamW(ps, lr=0.1, amsgrad=True),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.5),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.1),  # rows share what they know
    "muon": lambda ps: torch.optim.Muon([one for one in ps if one.dim() == 2], lr=0.1),  # mixes all elements
}


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Mask]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).to(dtype)
    return model, create_magnitude_mask(model, 0.6)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x = torch.randn(5, 6, generator=generator).to(weight)
    y = torch.randint(3, (5,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def nonzero_where_pruned(model: nn.Module, mask: Mask) -> list[str]:
    """Names whose pruned weights, or their gradients, are something else than +0."""
    found = []
    for name in mask:
        weight = model.get_parameter(name)
        for one in (weight.detach(), weight.grad):
            if one is not None and one[~mask[name]].contiguous().view(torch.uint8).any():
                found.append(name)
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_and_their_state_are_zero_after_every_step(kind: str) -> None:
    model, mask = made()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    one_step(model, optimizer, 0)  # state from before the ticket
    with held(model, mask) as inside:
        assert inside is model
        assert not nonzero_where_pruned(model, mask)
        for seed in range(1, 5):
            before = model.state_dict()["0.weight"].clone()
            one_step(model, optimizer, seed)
            assert not nonzero_where_pruned(model, mask)
            assert not torch.equal(model.state_dict()["0.weight"], before)
            for name in mask:
                for value in optimizer.state[model.get_parameter(name)].values():
                    if value.shape == mask[name].shape:
                        assert not value[~mask[name]].any()
    one_step(model, optimizer, 9)
    assert nonzero_where_pruned(model, mask), "the block is over"


@pytest.mark.parametrize("kind", ["sgd momentum decay", "adam", "adamw foreach"])
def test_the_kept_weights_train_as_those_of_a_network_without_the_others(kind: str) -> None:
    """The oracle multiplies by the mask in the forward pass, so that autograd itself sees the smaller network."""
    model, mask = made(torch.float64)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for name in mask:
            bare.get_parameter(name).mul_(mask[name])
    optimizers = [OPTIMIZERS[kind](list(one.parameters())) for one in (model, bare)]
    with held(model, mask):
        for seed in range(5):
            one_step(model, optimizers[0], seed)
            with applied(bare, mask):
                one_step(bare, optimizers[1], seed)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, bare.get_parameter(name))


@given(st.sampled_from(DTYPES), st.floats(0, 0.99), st.booleans())
def test_every_type_and_layout_is_zeroed_bit_for_bit(
    dtype: torch.dtype, sparsity: float, transposed: bool
) -> None:
    weight = torch.randn(7, 11).to(dtype)
    layer = nn.Linear(7, 11, bias=False)
    layer.weight = nn.Parameter((weight.t().contiguous().t() if transposed else weight).t())
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    mask = create_magnitude_mask(layer, sparsity)
    expected = oracles.bytes_of(torch.where(mask["weight"], layer.weight, torch.zeros((), dtype=dtype)))
    with held(layer, mask):
        assert oracles.bytes_of(layer.weight.detach()) == expected
        assert not layer.weight.grad[~mask["weight"]].any()
        assert layer.weight.grad[mask["weight"]].isnan().all()


def test_on_another_device_bits_unpack_as_on_the_cpu() -> None:
    from lottery_tickets.masks._bits import pack, unpack_there

    for numel in (0, 1, 7, 8, 9, 1000):
        kept = torch.rand(numel) < 0.5
        assert torch.equal(unpack_there(torch.from_numpy(pack(kept)), kept.shape), kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_ticket_is_held_on_a_gpu() -> None:
    model, mask = made()
    model.cuda()
    optimizer = OPTIMIZERS["adamw fused"](list(model.parameters()))
    with held(model, mask):
        for seed in range(3):
            one_step(model, optimizer, seed)
            assert not nonzero_where_pruned(model.cpu(), mask)
            model.cuda()


# --- Loops of other people ---


def test_a_loop_without_an_optimizer_sees_masked_gradients() -> None:
    model, mask = made()
    with held(model, mask):
        for _ in range(2):
            model(torch.ones(4, 6)).square().sum().backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.sub_(0.1 * weight.grad)
            assert not nonzero_where_pruned(model, mask)


def test_gradients_written_after_the_backward_pass_are_masked_before_the_step() -> None:
    model, mask = made()
    optimizer = OPTIMIZERS["adam"](list(model.parameters()))
    with held(model, mask):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert not nonzero_where_pruned(model, mask)


def test_tied_weights_and_layers_used_twice_are_held() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = nn.Parameter(self.first.weight.detach())  # another object over the same memory

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.first(x)))[:, :3]

    torch.manual_seed(0)
    model = Tied()
    mask = create_magnitude_mask(model, 0.5)
    optimizer = OPTIMIZERS["sgd momentum decay"](list(model.parameters()))
    with held(model, mask):
        for seed in range(3):
            one_step(model, optimizer, seed)
            assert not nonzero_where_pruned(model, mask)
            assert not model.second.weight.grad[~mask["first.weight"]].any()


def test_copies_are_held_from_their_first_forward_pass_and_let_go_with_the_rest() -> None:
    model, mask = made()
    with held(model, mask):
        copied = copy.deepcopy(model)
        optimizer = OPTIMIZERS["adam"](list(copied.parameters()))
        for seed in range(3):
            one_step(copied, optimizer, seed)
            assert not nonzero_where_pruned(copied, mask)
        assert torch.equal(copied[0].weight == 0, model[0].weight == 0)
    one_step(copied, optimizer, 5)
    assert nonzero_where_pruned(copied, mask)


def test_a_pickled_model_holds_nothing() -> None:
    model, mask = made()
    file = io.BytesIO()
    with held(model, mask):
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    one_step(loaded, OPTIMIZERS["sgd"](list(loaded.parameters())), 0)
    assert nonzero_where_pruned(loaded, mask)


@pytest.mark.slow
def test_a_compiled_model_is_held_without_a_break_in_its_graph() -> None:
    model, mask = made()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = OPTIMIZERS["adam"](list(model.parameters()))
    with held(model, mask):
        for seed in range(3):
            one_step(compiled, optimizer, seed)
            assert not nonzero_where_pruned(model, mask)


def test_data_parallel_gradients_are_masked(tmp_path: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, mask = made()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = OPTIMIZERS["sgd momentum decay"](list(model.parameters()))
        with held(model, mask):
            for seed in range(3):
                one_step(parallel, optimizer, seed)
                assert not nonzero_where_pruned(model, mask)
                momentum = optimizer.state[model[0].weight]["momentum_buffer"]
                assert not momentum[~mask["0.weight"]].any()
    finally:
        dist.destroy_process_group()


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from lottery_tickets import create_magnitude_mask, held

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
mask = create_magnitude_mask(model, 0.6)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
with held(model, mask):
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=sys.argv[3] == "views")
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        optimizer.zero_grad()
        x, y = torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        for name in mask:
            weight, pruned = model.get_parameter(name), ~mask[name]
            averages = [one for one in optimizer.state[weight].values() if one.shape == weight.shape]
            assert len(averages) == 2
            for one in (weight.detach(), weight.grad, *averages):
                assert not one[pruned].view(torch.uint8).any(), name
print(torch.cat([one.detach().flatten() for one in model.parameters()]).view(torch.uint8).tolist())
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["views", "copies"])
def test_two_processes_hold_the_same_ticket(tmp_path: Any, gradients: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with ThreadPoolExecutor(2) as pool:
        printed = pool.map(lambda rank: run_python(TWO_PROCESSES, rank, tmp_path / "store", gradients), range(2))
        first, second = printed
    assert first == second, "both stepped by the mean of their gradients"


# --- What stays and what goes ---


def test_nothing_is_left_behind_also_after_an_exception() -> None:
    model, mask = made()
    hooks = _global_optimizer_post_hooks
    before = len(hooks)
    with pytest.raises(KeyboardInterrupt), held(model, mask):
        with torch.no_grad():
            model[0].weight.fill_(3.0)
        raise KeyboardInterrupt
    assert not nonzero_where_pruned(model, mask)
    assert len(hooks) == before
    assert not model._forward_pre_hooks
    assert all(not (weight._post_accumulate_grad_hooks or {}) for weight in model.parameters())


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    model, mask = made()
    before = oracles.bytes_of(model[0].weight.detach())
    with pytest.raises(MaskMismatchError, match="no such parameter"), held(model, {"other": torch.ones(2)}):
        pass
    with held(model, Mask.ones_like(mask)), pytest.raises(MaskAppliedError, match="already"), held(model, mask):
        pass
    with applied(model, mask), pytest.raises(MaskAppliedError, match="already"), held(model, mask):
        pass
    assert oracles.bytes_of(model[0].weight.detach()) == before
    assert not model._forward_pre_hooks


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    mask = Mask.ones_like({"0.weight": model[0].weight})
    with held(model, mask), pytest.raises(MaskAppliedError, match=r"0\.weight.*sparse=False"):
        model(torch.tensor([1])).sum().backward()
