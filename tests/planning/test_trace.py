"""Activations of any architecture, told by a run without numbers: against arithmetic and against real runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lottery_tickets.large_models import plan_memory
from lottery_tickets.planning._trace import Trace, _first, _Live

HIDDEN, INSIDE, WORDS, ROWS, LENGTH = 8, 64, 16, 3, 5
TOKENS = ROWS * LENGTH


class Words(nn.Module):
    """Embedding, a wide layer, a head."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.up = nn.Linear(HIDDEN, INSIDE, bias=False)
        self.head = nn.Linear(INSIDE, WORDS, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(self.words(input_ids))))


class Moody(Words):
    """Looks at its numbers."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * input_ids.max().item()


def traced(model: nn.Module, what: Any, rows: int = ROWS, length: int = LENGTH) -> int:
    names = [name for name, _ in model.named_parameters() if "words" not in name]
    found = Trace(model, names).peak(rows, length, what)
    assert found is not None
    return found.bytes


def test_a_forward_pass_holds_two_of_the_widest():
    assert traced(Words(), "forward") == 4 * TOKENS * 2 * INSIDE


def test_a_way_back_holds_what_it_needs():
    """Of one row the most comes at the head, with the gradient of its weights; of many, where they are no more."""
    kept, output, wide = 4 * LENGTH * (HIDDEN + INSIDE), 4 * LENGTH * WORDS, 4 * LENGTH * INSIDE
    assert traced(Words(), "scores", 1) == kept + 2 * output + wide + 4 * INSIDE * WORDS
    assert traced(Words(), "scores", 900) == 900 * (kept + 2 * output + 2 * wide)


def test_where_weights_outweigh_activations_rows_do_not_tell():
    model = Words()
    model.words = nn.Embedding(10_000, HIDDEN)
    most = 4 * 10_000 * HIDDEN
    few, more = traced(model, "training", 1, 1), traced(model, "training", 2, 1)
    assert most <= few == more < 1.1 * most
    assert traced(model, "training", 2000) > 10 * most


def test_the_model_is_not_touched():
    model = Words().eval()
    before = [(one.data_ptr(), one.requires_grad, one.device.type) for one in model.parameters()]
    traced(model, "training")
    assert [(one.data_ptr(), one.requires_grad, one.device.type) for one in model.parameters()] == before
    assert not model.training
    assert all(one.grad is None for one in model.parameters())


def test_what_cannot_run_without_numbers_is_not_known():
    assert Trace(Moody(), []).peak(1, 1, "forward") is None
    assert Trace(nn.Linear(2, 2), []).peak(1, 1, "forward") is None
    assert not plan_memory(Moody(), "quality").complete


def small(name: str) -> nn.Module:
    import transformers

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    made, own = {
        "GPT-2": ("GPT2LMHeadModel", {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 96}),
        "BERT": ("BertForMaskedLM", {**sizes, "vocab_size": 96}),
        "ViT": ("ViTForImageClassification", {**sizes, "image_size": 32, "patch_size": 8}),
        "Gemma-2": ("Gemma2ForCausalLM", {**sizes, "vocab_size": 96, "num_key_value_heads": 1, "head_dim": 16}),
    }[name]
    architecture = getattr(transformers, made)
    torch.manual_seed(0)
    return architecture._from_config(architecture.config_class(**own), dtype=torch.float32).eval()


def batch(model: Any) -> dict[str, Any]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.zeros(2, 3, 32, 32)}
    return {"input_ids": torch.arange(2 * 24).view(2, 24), "use_cache": False}


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "ViT", "Gemma-2"])
@pytest.mark.parametrize("what", ["forward", "scores"])
def test_real_tensors_take_as_much(name, what):
    model = small(name)
    scored = {name for name, one in model.named_parameters() if one.dim() > 1}
    for parameter_name, one in model.named_parameters():
        one.requires_grad_(what == "scores" and parameter_name in scored)
        if one.requires_grad:
            one.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    given = batch(model)
    given.pop("use_cache") if name in ("BERT",) else None
    live = _Live()
    with live, torch.no_grad() if what == "forward" else nullcontext():
        output = _first(model(**given))
        if what == "scores":
            output.backward(torch.empty_like(output))
    found = Trace(model, scored).peak(2, 24, what)
    assert found is not None
    assert found.bytes == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("name", ["GPT-2", "ViT"])
@pytest.mark.parametrize("operation", ["quality", "fisher", "early-bird", "iterative"])
def test_plans_of_other_architectures_are_whole_and_say_that_they_are_estimates(name, operation):
    found = plan_memory(small(name), operation, batch_size=2, sequence_length=24)
    assert found.complete
    assert found.traced
    assert found["activations"] > 0
    assert "estimate from a run on the meta device" in str(found)
    more = plan_memory(small(name), operation, batch_size=400, sequence_length=24)
    assert more["total"] > found["total"]
