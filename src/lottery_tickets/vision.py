"""Small networks and images to try tickets on: what the demo, the guides and the benchmarks train.

`NETWORKS` and `DATASETS` list them by the names that the command line knows. torch is imported when something is
asked for, so that the names can be listed without it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lottery_tickets._data import images_file
from lottery_tickets.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "DATASETS",
    "NETWORKS",
    "Images",
    "batchnorm_cnn",
    "fashion_mnist",
    "lenet_300_100",
    "mnist",
]

CLASSES = 10
SIDE = 28
# Where Debian's package dataset-fashion-mnist puts it.
FASHION = Path("/usr/share/datasets/fashion-mnist")


class Images(NamedTuple):
    """Images of ten classes, in two parts that share none.

    Attributes:
        train_inputs: (n, 1, 28, 28), float32, mean 0 and variance 1 over the training part.
        train_labels: (n,), int64.
        test_inputs: (m, 1, 28, 28), scaled as the training part.
        test_labels: (m,).
    """

    train_inputs: torch.Tensor
    train_labels: torch.Tensor
    test_inputs: torch.Tensor
    test_labels: torch.Tensor


def lenet_300_100() -> nn.Module:
    """The fully connected network of LeCun et al. 1998: 266,200 weights and 410 biases.

    Returns:
        A new network, initialised by torch's defaults; takes (n, 1, 28, 28), gives (n, 10).

    Example:
        >>> from lottery_tickets import get_model_size
        >>> from lottery_tickets.vision import lenet_300_100
        >>> get_model_size(lenet_300_100())["parameters"]
        266610

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 2 and appendix G.
    """
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, CLASSES),
    )


def batchnorm_cnn() -> nn.Module:
    """Four convolutions with batch normalisation, two strides, global average pooling: 70,064 weights to prune.

    Returns:
        A new network, initialised by torch's defaults; takes (n, 1, 28, 28), gives (n, 10).

    Example:
        >>> from lottery_tickets import prunable_parameters
        >>> from lottery_tickets.vision import batchnorm_cnn
        >>> sum(weight.numel() for weight in prunable_parameters(batchnorm_cnn()).values())
        70064
    """
    from torch import nn

    def block(channels: int, out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 1),
        *block(16, 32, 2),
        *block(32, 64, 2),
        *block(64, 80, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(80, CLASSES),
    )


def mnist() -> Images:
    """5,000 MNIST digits, every fifth for testing.

    Returns:
        4,000 images to train on and 1,000 to test on.

    Raises:
        CheckpointError: They have not been fetched (`make data`).
    """
    with gzip.open(images_file(), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    test = np.arange(len(table)) % 5 == 0  # digits stand in order, so each has as many
    pixels, labels = table[:, :-1], table[:, -1]
    return _scaled(pixels[~test], labels[~test], pixels[test], labels[test])


def fashion_mnist() -> Images:
    """Fashion-MNIST, where Debian's package dataset-fashion-mnist put it.

    Returns:
        60,000 images to train on and 10,000 to test on.

    Raises:
        CheckpointError: It is not installed.

    References:
        Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
        Algorithms", 2017, arXiv 1708.07747.
    """
    if not FASHION.is_dir():
        raise CheckpointError(f"{FASHION} is not there: install Debian's package dataset-fashion-mnist.")
    parts = [_idx(FASHION / f"{part}-{what}.gz") for part in ("train", "t10k") for what in _IDX]
    return _scaled(*parts)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "batchnorm-cnn": batchnorm_cnn}
DATASETS: dict[str, Callable[[], Images]] = {"mnist": mnist, "fashion-mnist": fashion_mnist}
_IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of an IDX file, by its first dimension."""
    with gzip.open(path, "rb") as file:
        header = file.read(4)
        shape = [int.from_bytes(file.read(4), "big") for _ in range(header[3])]
        values = np.frombuffer(file.read(), np.uint8)
    if header[:3] != b"\0\0\x08" or values.size != np.prod(shape):
        raise CheckpointError(f"{path}: expected an IDX file of {shape} bytes, found {values.size}.")
    return values.reshape(shape[0], -1).squeeze()


def _scaled(
    train: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    train_labels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    test: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    test_labels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> Images:
    import torch

    mean, deviation = float(train.mean()), float(train.std())

    def inputs(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> torch.Tensor:
        return torch.from_numpy(pixels.copy()).float().sub_(mean).div_(deviation).view(-1, 1, SIDE, SIDE)

    return Images(
        inputs(train),
        torch.from_numpy(train_labels.astype(np.int64)),
        inputs(test),
        torch.from_numpy(test_labels.astype(np.int64)),
    )
