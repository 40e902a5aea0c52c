"""Models and batches that scores are tested on, and the slow, obvious scores: one sample at a time by autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Batches = list[Any]
Losses = Callable[[nn.Module, Any], Iterator[torch.Tensor]]
VOCABULARY = 60


class Reused(nn.Module):
    """One layer used twice, and one weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.tied, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.tied.weight = self.head.weight
        self.again.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.again(torch.tanh(self.again(self.first(x)))))
        return self.head(torch.tanh(self.tied(x)))


class Functional(nn.Module):
    """Weights used outside their layers' calls: attention's output layer, and one by hand on top of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.both = nn.Linear(6, 6)
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids).transpose(0, 1)  # positions first
        x = self.attention(x, x, x)[0]
        x = torch.tanh(self.both(x)) @ self.both.weight
        return self.head(x.mean(0))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, (3, 2), groups=4, dilation=2, padding="same", padding_mode="circular"),
        nn.GELU(),
        nn.Conv2d(8, 6, 2, padding="same", groups=2, bias=False),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=2, stride=2, padding_mode="reflect"), nn.Flatten(), nn.Linear(42, 5)
    )


def built(name: str, **settings: Any) -> nn.Module:
    cls = getattr(transformers, name)
    return cls(cls.config_class(vocab_size=VOCABULARY, **settings))


def llama(**settings: Any) -> nn.Module:
    return built(
        "LlamaForCausalLM",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )


def bert() -> nn.Module:
    return built(
        "BertForSequenceClassification",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=4,
    )


def albert() -> nn.Module:
    return built(
        "AlbertForSequenceClassification",
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=4,
    )


def gpt2() -> nn.Module:
    return built("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)


def pairs(*shape: int, classes: int = 5, sizes: tuple[int, ...] = (4, 3)) -> Batches:
    return [(torch.randn(size, *shape), torch.randint(classes, (size,))) for size in sizes]


def token_pairs(sizes: tuple[int, ...] = (4, 3)) -> Batches:
    return [(torch.randint(VOCABULARY, (size, 5)), torch.randint(4, (size,))) for size in sizes]


def texts(sizes: tuple[int, ...] = (3, 2), length: int = 9) -> Batches:
    """Sequences padded on the right to one length."""
    batches = []
    for size in sizes:
        ids = torch.randint(3, VOCABULARY, (size, length))
        mask = torch.ones_like(ids)
        for row in range(size):
            mask[row, length - row :] = 0
        batches.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})
    return batches


def labelled_texts() -> Batches:
    return [{**batch, "labels": torch.randint(4, (len(batch["input_ids"]),))} for batch in texts()]


def class_losses(model: nn.Module, batch: Any) -> Iterator[torch.Tensor]:
    """Of one sample after the other."""
    for x, y in zip(*batch, strict=True):
        yield F.cross_entropy(model(x[None]), y[None])


def text_losses(model: nn.Module, batch: Any) -> Iterator[torch.Tensor]:
    """Of one sequence after the other, the padding cut off: the mean over its tokens."""
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[: int(mask.sum())][None]
        logits = model(input_ids=ids, use_cache=False).logits
        yield F.cross_entropy(logits[0, :-1], ids[0, 1:])


def labelled_losses(model: nn.Module, batch: Any) -> Iterator[torch.Tensor]:
    for row, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids = row[: int(mask.sum())][None]
        yield F.cross_entropy(model(input_ids=ids).logits, label[None])


def gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches, losses: Losses
) -> list[dict[str, torch.Tensor]]:
    """Of each sample's loss, float64, by autograd."""
    flags = [(one, one.requires_grad) for one in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for one, _ in flags:
        one.requires_grad_(True)
    found = []
    for batch in batches:
        for loss in losses(model, batch):
            made = torch.autograd.grad(loss, list(parameters.values()))
            found.append({name: one.double() for name, one in zip(parameters, made, strict=True)})
    for one, flag in flags:
        one.requires_grad_(flag)
    for module, mode in modes:
        module.training = mode
    return found


def grasp(
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches, losses: Losses
) -> dict[str, torch.Tensor]:
    """-w H g of the mean loss, by differentiating the gradient times itself (held constant)."""
    copied = copy.deepcopy(model).double().eval().requires_grad_(True)
    found = prunable(copied, parameters)
    with sdpa_kernel(SDPBackend.MATH):
        each = [loss for batch in batches for loss in losses(copied, _double(batch))]
        gradient = torch.autograd.grad(torch.stack(each).mean(), found, create_graph=True)
        flow = sum((one.detach() * one).sum() for one in gradient)
        product = torch.autograd.grad(flow, found, allow_unused=True)
    return {
        name: -weight.detach() * (torch.zeros_like(weight) if one is None else one)
        for name, weight, one in zip(parameters, found, product, strict=True)
    }


def prunable(model: nn.Module, like: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return [named[name] for name in like]


def _double(batch: Any) -> Any:
    if isinstance(batch, dict):
        return batch
    return tuple(one.double() if one.is_floating_point() else one for one in batch)


def wanda(
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches, losses: Losses
) -> dict[str, torch.Tensor]:
    """|w| times the norm of its inputs, told by the layers' inputs sample by sample; convolutions unfold them."""
    copied = copy.deepcopy(model).double().eval()
    names = {id(one): name for name, one in zip(parameters, prunable(copied, parameters), strict=True)}
    squares = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in parameters.items()}

    def watch(layer: nn.Module, args: Any, _output: Any) -> None:
        x, total = args[0].detach(), squares[names[id(layer.weight)]]
        if isinstance(layer, nn.Linear):
            total += (x.reshape(-1, x.shape[-1]) ** 2).sum(0)
        elif type(layer).__name__ == "Conv1D":
            total += (x.reshape(-1, x.shape[-1]) ** 2).sum(0)[:, None]
        else:
            # The output is linear in the weight: its derivative is what the weight is multiplied with.
            plain = copy.deepcopy(layer)
            plain._forward_hooks.clear()

            def out(weight: torch.Tensor) -> torch.Tensor:
                return torch.func.functional_call(plain, {"weight": weight}, (x,))

            used = torch.autograd.functional.jacobian(out, layer.weight.detach())
            total += (used**2).reshape(-1, *total.shape).sum(0)

    handles = [
        module.register_forward_hook(watch)
        for module in copied.modules()
        if id(getattr(module, "weight", None)) in names
    ]
    with torch.no_grad():
        for batch in batches:
            list(losses(copied, _double(batch)))
    for handle in handles:
        handle.remove()
    return {name: one.detach().double().abs() * squares[name].sqrt() for name, one in parameters.items()}


def ranks(scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Places over all scores as fractions of their number, the smallest first; equal ones share their mean."""
    everything = [value for score in scores.values() for value in score.flatten().tolist()]

    def place(value: float) -> float:
        below = sum(other < value for other in everything)
        equal = sum(other == value for other in everything)
        return (below + (equal + 1) / 2) / len(everything)

    return {
        name: torch.tensor([place(value) for value in score.flatten().tolist()], dtype=torch.float64).view(
            score.shape
        )
        for name, score in scores.items()
    }


def mean(samples: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(samples[0])
    for sample in samples:
        total += sample
    return total / len(samples)


def clipped(samples: list[dict[str, torch.Tensor]], longest: float) -> list[dict[str, torch.Tensor]]:
    """Each sample's gradients scaled so that their joint norm is at most `longest`."""
    scaled = []
    for sample in samples:
        norm = math.sqrt(sum(float((one * one).sum()) for one in sample.values()))
        scaled.append({name: one * min(1.0, longest / norm) for name, one in sample.items()})
    return scaled


def error(scores: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference in a tensor over the largest value of the tensor; scores that are 0 have to be 0."""
    assert list(scores) == list(expected)
    worst = 0.0
    for name, score in scores.items():
        assert score.dtype == torch.float32
        assert score.shape == expected[name].shape
        scale = float(expected[name].abs().max())
        difference = float((score.double().cpu() - expected[name]).abs().max())
        worst = max(worst, difference / scale if scale else difference)
    return worst
