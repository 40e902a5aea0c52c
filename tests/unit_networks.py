"""Small networks whose units are coupled in every way that the library knows."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """Plain, residual, depthwise, grouped and flattened, with normalisation; channels and neurons."""

    def __init__(self, channels: int = 8, inner: int = 12, hidden: int = 10, side: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, inner, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, 2 * inner, 3, padding=1, groups=inner)
        self.slope = nn.PReLU(2 * inner)
        self.grouped = nn.Conv2d(2 * inner, channels, 3, padding=1, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(channels * (side // 2) ** 2, hidden)
        self.out = nn.Linear(hidden, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        kept = torch.relu(self.stem_norm(self.stem(images)))
        inner = torch.relu(self.expand_norm(self.expand(kept)))
        added = kept + self.grouped(self.slope(self.depthwise(inner)))
        return self.out(torch.sigmoid(self.hidden(self.pool(added).flatten(1))))


def llama(kv_heads: int = 4, hidden: int = 24, inner: int = 20, attention: str = "sdpa") -> nn.Module:
    """A Llama of two layers, two queries to a head of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=4,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    return scattered(LlamaForCausalLM(config))


def bert() -> nn.Module:
    """A BERT of two layers with a pooler and a head for classes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return scattered(BertForSequenceClassification(config))


def scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, no parameter or statistic of it at a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or not tensor.is_floating_point():
                continue
            uniform = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(uniform + 0.5 if tensor.dim() == 1 else uniform - 0.5)
    return model.eval()


def image(side: int = 8) -> torch.Tensor:
    """Two images."""
    return torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(1))


def tokens() -> dict[str, torch.Tensor]:
    """Two short texts."""
    return {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(2))}
