"""ONNX files that ONNX Runtime computes alike with, for any number of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lottery_tickets import create_structured_mask, extract_subnetwork
from lottery_tickets.errors import StructureError
from lottery_tickets.structured import save_onnx
from unit_networks import Residual, bert, image, llama, scattered

onnxruntime = pytest.importorskip("onnxruntime")


def computed(path, *arrays):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: one.numpy() for name, one in zip(names, arrays, strict=True)})[0]


def check(found, expected):
    assert np.abs(found - expected.detach().numpy()).max() <= 1e-5 * expected.abs().max()


def test_a_smaller_network(tmp_path):
    model = scattered(Residual())
    small = extract_subnetwork(model, create_structured_mask(model, 0.4, example_inputs=image()))
    assert save_onnx(small, tmp_path / "small.onnx", example_inputs=image()) < 1e-5
    more = torch.cat([image(), 2 * image(), -image()])
    check(computed(tmp_path / "small.onnx", more), small(more))


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, bert])
def test_a_smaller_transformer(make, tmp_path):
    model = make()
    options = {"allocation": "uniform", "count": "units"} | ({} if make is llama else {"exclude": "*pooler*"})
    small = extract_subnetwork(model, create_structured_mask(model, 0.5, unit="neuron", **options))
    assert save_onnx(small, tmp_path / "small.onnx") < 1e-5
    longer = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(0))
    check(computed(tmp_path / "small.onnx", longer), small(longer).logits)


def test_nothing_is_left_behind(tmp_path):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(StructureError, match="Branching cannot be exported to ONNX"):
        save_onnx(Branching(4, 4), tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())
