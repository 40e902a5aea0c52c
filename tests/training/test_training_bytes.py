"""The predicted bytes against arithmetic by hand and against what autograd really keeps."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lottery_tickets._batches import measure
from lottery_tickets.errors import TrainingError
from lottery_tickets.training import checkpointed, log_training_bytes, make_optimizer, training_bytes
from lottery_tickets.training._optimizers import InBackward

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6}


def llama(*, dtype: torch.dtype = torch.float32, tied: bool = False, device: str = "cpu") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).train()


def predict(model: nn.Module, **options):
    return training_bytes(model, **{"batch_size": 2, "sequence_length": 50, **options})


def weights_of(model: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())


def test_items_by_hand():
    model = llama(dtype=torch.bfloat16, device="meta")
    weights, count = weights_of(model), sum(one.numel() for one in model.parameters())
    found = predict(model, momentum=0.9, precision="compensated", micro_batches=True)
    buffers = sum(one.numel() * one.element_size() for one in model.buffers())
    assert found["throughout"] == {
        "weights": weights + buffers,
        "optimizer state": weights,
        "compensation": weights,
        "micro-batches": 4 * count,
        "activations": 6 * 100 * 64 * 2,
    }
    assert found["at_the_loss"] == {
        "last norm": 100 * 64 * 8,
        "logits": 100 * 96 * 2,
        "gradient of logits": 100 * 96 * 2,
        "gradients": 96 * 64 * 2,
    }
    assert found["in_a_block"]["gradients"] == 64 * 160 * 2
    assert found["at_the_embedding"] == {"gradients": 96 * 64 * 2}
    moments = [sum(found[name].values()) for name in ("at_the_loss", "in_a_block", "at_the_embedding")]
    assert found["peak"] == sum(found["throughout"].values()) + max(moments) + found["update"]


def test_tied_weights_wait_for_the_end():
    found = predict(llama(tied=True))
    one = 96 * 64 * 4
    assert found["at_the_embedding"]["gradients"] == 3 * one
    assert found["at_the_loss"]["gradients"] == one
    assert found["in_a_block"]["gradients"] == one + 64 * 160 * 4


@pytest.mark.parametrize(("optimizer", "states"), [("torch sgd", 0), ("torch adamw", 2)])
def test_torchs_own_hold_every_gradient(optimizer, states):
    model = llama()
    found = predict(model, optimizer=optimizer)["throughout"]
    assert found["gradients"] == weights_of(model)
    assert found["optimizer state"] == states * weights_of(model)


def test_states_in_eight_bits():
    model = nn.Sequential(nn.Linear(256, 64, bias=False), nn.Linear(10, 10, bias=False)).to("meta")
    found = predict(model, optimizer="adamw8bit")["throughout"]["optimizer state"]
    assert found == 2 * (256 * 64 + 64 * 4 + 1024) + 2 * 4 * 100


def test_frozen_parameters_only_lie_there():
    model = llama()
    for one in model.parameters():
        one.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    found = predict(model, optimizer="torch adamw")["throughout"]
    assert found["gradients"] * 2 == found["optimizer state"] == 2 * 96 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_what_autograd_keeps(dtype, checkpointing):
    model = llama(dtype=dtype)
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(100).remainder(96).view(2, 50)
    with checkpointed(model, checkpointing), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        rows = measure(model, {"input_ids": ids, "labels": ids}).rows
    assert rows is not None
    found = predict(model, checkpointing=checkpointing)
    predicted = found["throughout"]["activations"] + found["at_the_loss"]["logits"]
    predicted += found["at_the_loss"]["last norm"]
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(predicted, rel=0.15)


def test_states_are_as_large_as_predicted():
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(dtype=dtype)
        optimizer = make_optimizer("adamw", model.named_parameters(), lr=0.1)
        assert isinstance(optimizer, InBackward)
        ids = torch.arange(10)[None]
        optimizer.backward(model(input_ids=ids, labels=ids).loss)
        states = [part for one in optimizer.optimizer.state.values() for part in one.values() if part.dim()]
        assert (
            sum(part.nbytes for part in states)
            == predict(model, optimizer="adamw")["throughout"]["optimizer state"]
        )


def test_models_of_unknown_architecture():
    found = predict(nn.Linear(10, 10))
    assert not found["activations_known"]
    assert "activations" not in found["throughout"]


def test_what_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="lottery_tickets"):
        log_training_bytes(predict(llama()))
    assert "Training will take about" in caplog.text
    assert "weights" in caplog.text


def test_bad_arguments():
    with pytest.raises(TrainingError, match="lion"):
        predict(llama(), optimizer="lion")
    with pytest.raises(TrainingError, match="at least 1"):
        predict(llama(), batch_size=0)
