"""Distances between the masks of a training, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lottery_tickets._atomic import replacing
from lottery_tickets.cli._plot import figure_class
from lottery_tickets.detection import differing_bits
from lottery_tickets.masks import Mask


def check_matplotlib() -> None:
    """Refuse, before anything is trained, what could not be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_class()


def draw_distances(path: Path, masks: Sequence[Mask], labels: Sequence[str], unit: str, title: str) -> None:
    """The matrix of pairwise mask distances.

    Args:
        path: Its suffix names the format.
        masks: In the order of the checks.
        labels: When each was drawn.
        unit: What the labels count.
        title: Of the picture.

    References:
        You et al., "Drawing Early-Bird Tickets", ICLR 2020, figure 3: the same matrix, there for channel masks.
    """
    count = len(masks)
    distances = np.zeros((count, count))
    for row in range(count):
        for column in range(row):
            differing = sum(differing_bits(masks[row], masks[column]).values())
            distances[row, column] = distances[column, row] = differing / masks[row].numel
    figure = figure_class()(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(distances, cmap="viridis", vmin=0.0)
    step = max(1, -(-count // 12))
    places = range(0, count, step)
    axes.set_xticks(places, [labels[place] for place in places])
    axes.set_yticks(places, [labels[place] for place in places])
    axes.set_xlabel(f"mask at {unit}")
    axes.set_ylabel(f"mask at {unit}")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="mask distance (share of the bits that differ)")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower(), dpi=150)
