"""Networks and images: what they are said to be."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from lottery_tickets import prunable_parameters, vision
from lottery_tickets.errors import CheckpointError
from lottery_tickets.vision import FASHION, NETWORKS, fashion_mnist
from lottery_tickets.vision import mnist as split_digits


@pytest.mark.parametrize(("name", "weights"), [("lenet-300-100", 266_200), ("batchnorm-cnn", 70_064)])
def test_networks_have_the_weights_they_are_said_to_have(name: str, weights: int) -> None:
    network = NETWORKS[name]()
    assert sum(one.numel() for one in prunable_parameters(network).values()) == weights
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_digits_are_parted_by_class_and_scaled(mnist: tuple[torch.Tensor, torch.Tensor]) -> None:
    images = split_digits()
    assert images.train_inputs.shape == (4000, 1, 28, 28)
    assert images.test_labels.bincount().tolist() == [100] * 10
    assert float(images.train_inputs.mean()) == pytest.approx(0, abs=1e-4)
    assert float(images.train_inputs.std()) == pytest.approx(1, abs=1e-4)
    pixels, labels = mnist
    kept = torch.arange(5000) % 5 != 0
    spread = pixels[kept].std(correction=0)
    assert torch.allclose(images.train_inputs, (pixels[kept] - pixels[kept].mean()) / spread, atol=1e-4)
    assert torch.equal(images.train_labels, labels[kept])


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_idx_files_are_read_and_damaged_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", 7), ("t10k", 3)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count))
    monkeypatch.setattr(vision, "FASHION", tmp_path)
    images = fashion_mnist()
    assert images.train_inputs.shape == (7, 1, 28, 28)
    assert images.test_labels.tolist() == [0, 1, 2]
    damaged = tmp_path / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(gzip.compress(gzip.decompress(damaged.read_bytes())[:-1]))
    with pytest.raises(CheckpointError, match="train-images"):
        fashion_mnist()
    monkeypatch.setattr(vision, "FASHION", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="dataset-fashion-mnist"):
        fashion_mnist()


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_its_sixty_thousand() -> None:
    images = fashion_mnist()
    assert images.train_labels.bincount().tolist() == [6000] * 10
    assert images.test_labels.bincount().tolist() == [1000] * 10
