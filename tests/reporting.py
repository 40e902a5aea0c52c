"""A network whose first layer has a name that means harm, and its data."""

from __future__ import annotations

# A part of a module's name is any text without a dot.
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\"'`${7*7}{{7*7}}\u2028\\&amp;"

MODULE = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.add_module({HOSTILE!r}, nn.Linear(6, 12))
        self.add_module("last", nn.Linear(12, 3))

    def forward(self, inputs):
        first, last = self.children()
        return last(torch.relu(first(inputs)))

def loaders():
    inputs = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    labels = inputs[:, :3].argmax(1)
    data = torch.utils.data.TensorDataset(inputs[:48], labels[:48])
    rest = [(inputs[48:64], labels[48:64])], [(inputs[64:], labels[64:])]
    return (torch.utils.data.DataLoader(data, 8, shuffle=True), *rest)
"""
