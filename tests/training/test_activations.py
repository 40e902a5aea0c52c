"""Checkpointing by the model's own means or around its blocks: the same gradients, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lottery_tickets.errors import TrainingError
from lottery_tickets.training import FusedSGD, blocks_of, checkpointed


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)) for _ in range(3))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = torch.tanh(layer(values))
        return values


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).train()


def loss_of(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(7)
    if isinstance(model, Stack):
        return model(torch.ones(2, 5)).square().sum()
    ids = torch.arange(8)[None]
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def saved_bytes(model: nn.Module) -> int:
    """What autograd keeps between the passes, parameters aside."""
    own = {one.data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    return sum(kept.values())


def attributes(model: nn.Module) -> list[list[str]]:
    return [[*sorted(vars(module)), str(len(module._forward_hooks))] for module in model.modules()]


@pytest.mark.parametrize("make", [Stack, llama])
@pytest.mark.parametrize("how", ["auto", True])
def test_gradients_are_the_same_and_the_model_comes_back(make, how):
    model = make()
    before, kept = attributes(model), saved_bytes(model)
    loss_of(model).backward()
    expected = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    with checkpointed(model, how) as active:
        assert active
        assert saved_bytes(model) < kept
        loss_of(model).backward()
    assert all(torch.equal(one.grad, other) for one, other in zip(model.parameters(), expected, strict=True))
    assert attributes(model) == before
    assert saved_bytes(model) == kept


@pytest.mark.parametrize("make", [Stack, llama])
@pytest.mark.parametrize("clip", ["tensor", "global"])
def test_steps_are_the_same(make, clip):
    """Weights change during the very pass that makes activations again from them."""
    model = make()
    other = copy.deepcopy(model)
    for one, how in ((model, True), (other, False)):
        optimizer = FusedSGD(one.named_parameters(), 0.1, max_grad_norm=0.1, clip=clip)
        with checkpointed(one, how):
            for _ in range(3):
                optimizer.backward(loss_of(one))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_an_error_inside_leaves_the_model_as_it_was():
    for model in (Stack(), llama()):
        before = attributes(model)
        with pytest.raises(KeyError), checkpointed(model):
            raise KeyError
        assert attributes(model) == before


def test_what_the_user_switched_on_stays_on():
    model = llama()
    name = (
        "activation" if hasattr(model, "is_activation_checkpointing") else "gradient"
    )  # as transformers calls it
    getattr(model, f"{name}_checkpointing_enable")()
    before = attributes(model)
    with checkpointed(model) as active:
        assert active
    assert getattr(model, f"is_{name}_checkpointing")
    assert attributes(model) == before


def test_running_statistics_count_a_batch_once():
    torch.manual_seed(0)
    model, ids = Stack(), torch.randn(6, 5)
    model.layers.append(nn.BatchNorm1d(5))
    other = copy.deepcopy(model)
    with checkpointed(model) as active:
        assert active
        torch.manual_seed(1)  # of dropout
        model(ids).sum().backward()
    torch.manual_seed(1)
    other(ids).sum().backward()
    assert torch.equal(model.layers[3].running_mean, other.layers[3].running_mean)
    only = nn.ModuleDict({"norms": nn.ModuleList([nn.BatchNorm1d(5)])})
    with pytest.raises(TrainingError, match="twice"), checkpointed(only, True):
        pass


def test_models_without_blocks():
    model = nn.Linear(2, 2)
    assert blocks_of(model) == []
    with checkpointed(model) as active:
        assert not active
    with checkpointed(Stack(), False) as active:
        assert not active
    with pytest.raises(TrainingError, match="no module list"), checkpointed(model, True):
        pass
    with pytest.raises(TrainingError, match="'auto', True or False"), checkpointed(model, "always"):
        pass
