"""Shipped shapes against the published numbers of parameters, on the meta device."""

from __future__ import annotations

import pytest
import torch

from lottery_tickets.planning import shipped_config, shipped_names
from lottery_tickets.planning._models import shapes_of


@pytest.mark.parametrize("name", shipped_names())
def test_parameters_are_as_many_as_published(name):
    shipped = shipped_config(name)
    assert shipped is not None
    assert shipped["source"].startswith("https://huggingface.co/")
    model = shapes_of(name, None)
    assert sum(one.numel() for one in model.parameters()) == shipped["parameters"]
    assert {one.device.type for one in model.parameters()} == {"meta"}
    assert {one.dtype for one in model.parameters()} == {getattr(torch, shipped["config"]["dtype"])}


def test_names_may_end_as_files_do_and_case_does_not_matter():
    assert shipped_config("qwen2.5-14b-config.json") == shipped_config("Qwen2.5-14B")
    assert shipped_config("Qwen2.5-14B.json") is not None
    assert shipped_config("Qwen9-14B") is None


def test_names_are_sorted_and_many():
    names = shipped_names()
    assert names == sorted(names)
    assert {"SmolLM2-135M", "Qwen2.5-14B", "Llama-3.1-70B", "GPT-2", "BERT-base"} <= set(names)
