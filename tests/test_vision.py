"""Networks and images: what they are said to be."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from lottery_tickets import prunable_parameters, vision
from lottery_tickets.errors import BatchError, CheckpointError
from lottery_tickets.training import DataOrder
from lottery_tickets.vision import FASHION, NETWORKS, Images, TensorBatches, fashion_mnist, lenet_300_100
from lottery_tickets.vision import mnist as split_digits


@pytest.mark.parametrize(("name", "weights"), [("lenet-300-100", 266_200), ("batchnorm-cnn", 70_064)])
def test_networks_have_the_weights_they_are_said_to_have(name: str, weights: int) -> None:
    network = NETWORKS[name]()
    assert sum(one.numel() for one in prunable_parameters(network).values()) == weights
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_digits_are_parted_by_class_and_scaled(
    mnist: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOTTERY_TICKETS_MNIST", raising=False)
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
    """Gzipped if its name says so."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    whole = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)


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


def test_mnist_is_read_whole_by_a_user_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    pixels = {"train": draw.integers(0, 256, (7, 28, 28)), "t10k": draw.integers(0, 256, (3, 28, 28))}
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels["train"])
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(7))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels["t10k"])
    with pytest.raises(CheckpointError, match="t10k-labels-idx1-ubyte"):
        split_digits(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(3))
    images = split_digits(tmp_path)
    scaled = (pixels["t10k"] - pixels["train"].mean()) / pixels["train"].std()
    assert torch.allclose(images.test_inputs, torch.from_numpy(scaled).float().view(3, 1, 28, 28), atol=1e-5)
    assert images.train_labels.tolist() == list(range(7))
    monkeypatch.setenv("LOTTERY_TICKETS_MNIST", str(tmp_path))
    assert torch.equal(split_digits().train_inputs, images.train_inputs)


def test_glorot_weights_have_their_variance_and_biases_are_zero() -> None:
    torch.manual_seed(0)
    network = lenet_300_100(init="glorot")
    for layer in (network[1], network[3]):
        outputs, inputs = layer.weight.shape
        assert float(layer.weight.detach().var()) == pytest.approx(2 / (inputs + outputs), rel=0.02)
        assert not layer.bias.any()
    assert float(network[1].weight.detach().abs().max()) > 4 * (2 / 1084) ** 0.5, "normal, not uniform"
    with pytest.raises(ValueError, match="glorot"):
        lenet_300_100(init="he")


def numbered(count: int) -> Images:
    """Images that say their number in every pixel."""
    labels = torch.arange(count)
    inputs = labels.float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    return Images(inputs, labels, inputs[:2], labels[:2])


def test_validation_images_are_set_aside_by_seed() -> None:
    images = numbered(50)
    rest, validation = images.split(10, seed=3)
    assert sorted([*rest.train_labels.tolist(), *validation.labels.tolist()]) == list(range(50))
    assert torch.equal(rest.train_inputs[:, 0, 0, 0].long(), rest.train_labels)
    assert torch.equal(validation.inputs[:, 0, 0, 0].long(), validation.labels)
    assert torch.equal(images.split(10, seed=3)[1].labels, validation.labels)
    assert not torch.equal(images.split(10, seed=4)[1].labels, validation.labels)
    for count in (0, 50):
        with pytest.raises(BatchError, match="50 images"):
            images.split(count)


def test_batches_of_tensors_hold_every_sample_once_in_an_order_by_seed_and_epoch() -> None:
    images = numbered(25)
    batches = TensorBatches(images.train_inputs, images.train_labels, 10, shuffle=True)
    assert len(batches) == 3

    def epoch(number: int, seed: int = 0) -> list[int]:
        labels = []
        for inputs, part in DataOrder(batches, seed).epoch(number):
            assert torch.equal(inputs[:, 0, 0, 0].long(), part)
            labels += part.tolist()
        return labels

    assert sorted(epoch(0)) == list(range(25))
    assert epoch(0) == epoch(0)
    assert len({tuple(epoch(0)), tuple(epoch(1)), tuple(epoch(0, seed=1))}) == 3
    assert [len(labels) for _, labels in batches] == [10, 10, 5]
    for wrong in ((images.train_inputs[:3], 4), (images.train_inputs, 0)):
        with pytest.raises(BatchError, match="TensorBatches"):
            TensorBatches(wrong[0], images.train_labels, wrong[1])
