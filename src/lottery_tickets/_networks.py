"""Modules of the small networks in `vision` that are more than a chain of torch's."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """Two convolutions whose output is added to what went in, with batch normalisation.

    Args:
        channels: What goes in.
        out: What comes out; where it differs, or places are skipped, a convolution of 1 x 1 fits what went in.
        stride: Of the first convolution.
    """

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        fits = channels == out and stride == 1
        shortcut = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
        self.shortcut = nn.Identity() if fits else nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of (n, channels, height, width)."""
        inner = torch.relu(self.first_norm(self.first(images)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(images))
