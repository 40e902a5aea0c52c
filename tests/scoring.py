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
        yield F.cross_entropy(_wide(model(x[None])), y[None])


def text_losses(model: nn.Module, batch: Any) -> Iterator[torch.Tensor]:
    """Of one sequence after the other, the padding cut off: the mean over its tokens."""
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[: int(mask.sum())][None]
        logits = _wide(model(input_ids=ids, use_cache=False).logits)
        yield F.cross_entropy(logits[0, :-1], ids[0, 1:])


def labelled_losses(model: nn.Module, batch: Any) -> Iterator[torch.Tensor]:
    for row, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids = row[: int(mask.sum())][None]
        yield F.cross_entropy(_wide(model(input_ids=ids).logits), label[None])


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype == torch.bfloat16 else logits


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


def layer_gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches, losses: Losses
) -> list[dict[str, torch.Tensor]]:
    """Of each sample's loss, float64, from each layer's input and output gradient as the model computed them."""
    names = {id(one): name for name, one in parameters.items()}
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # would put its own output in the place of the layer's
    found = []
    for batch in batches:
        for sample in range(rows(batch)):
            seen: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
            handles = [
                module.register_forward_hook(
                    lambda layer, args, out, seen=seen: seen.append((layer, args[0], out))
                )
                for module in model.modules()
                if id(getattr(module, "weight", None)) in names
            ]
            (loss,) = losses(model, row(batch, sample))
            for handle in handles:
                handle.remove()
            above = torch.autograd.grad(loss, [out for _, _, out in seen])
            total: dict[str, torch.Tensor] = {}
            for (layer, x, out), gradient in zip(seen, above, strict=True):
                wide = copy.deepcopy(layer).double()
                made = wide(x.detach().double())
                assert made.shape == out.shape
                total[names[id(layer.weight)]] = torch.autograd.grad(made, wide.weight, gradient.double())[0]
            found.append(total)
    return found


def rows(batch: Any) -> int:
    return len(batch["input_ids"]) if isinstance(batch, dict) else len(batch[1])


def row(batch: Any, index: int) -> Any:
    """One sample of a batch, as a batch; of a padded text, what is not padding."""
    if not isinstance(batch, dict):
        return tuple(one[index : index + 1] for one in batch)
    length = int(batch["attention_mask"][index].sum())
    return {
        name: one[index : index + 1, :length] if one.dim() > 1 else one[index : index + 1]
        for name, one in batch.items()
    }


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
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches, losses: Losses, *, wide: bool = True
) -> dict[str, torch.Tensor]:
    """|w| times the norm of its inputs, told by the layers' inputs sample by sample; convolutions unfold them.

    The inputs are those of the model in float64, or as it computes them itself.
    """
    copied = copy.deepcopy(model).double().eval() if wide else copy.deepcopy(model).eval()
    names = {id(one): name for name, one in zip(parameters, prunable(copied, parameters), strict=True)}
    squares = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in parameters.items()}

    def watch(layer: nn.Module, args: Any, _output: Any) -> None:
        x, total = args[0].detach().double(), squares[names[id(layer.weight)]]
        if isinstance(layer, nn.Linear):
            total += (x.reshape(-1, x.shape[-1]) ** 2).sum(0)
        elif type(layer).__name__ == "Conv1D":
            total += (x.reshape(-1, x.shape[-1]) ** 2).sum(0)[:, None]
        else:
            # The output is linear in the weight: its derivative is what the weight is multiplied with.
            plain = copy.deepcopy(layer).double()
            plain._forward_hooks.clear()

            def out(weight: torch.Tensor) -> torch.Tensor:
                return torch.func.functional_call(plain, {"weight": weight}, (x,))

            used = torch.autograd.functional.jacobian(out, layer.weight.detach().double())
            total += (used**2).reshape(-1, *total.shape).sum(0)

    handles = [
        module.register_forward_hook(watch)
        for module in copied.modules()
        if id(getattr(module, "weight", None)) in names
    ]
    with torch.no_grad():
        for batch in batches:
            list(losses(copied, _double(batch) if wide else batch))
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


def emptied(module: nn.Module) -> None:
    for one in module.parameters(recurse=False):
        nn.init.zeros_(one)


def synflow_masks(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    shape: tuple[int, ...],
    *,
    rounds: int,
    final_density: float,
) -> list[torch.Tensor]:
    """Algorithm 1: what is kept after each round, all tensors flattened into one."""
    linear = copy.deepcopy(model).double().eval()
    for name, child in linear.named_children():
        if isinstance(child, (nn.ReLU, nn.Tanh, nn.GELU)):
            setattr(linear, name, nn.Identity())
    for module in linear.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)
    for one in linear.parameters():
        one.data.abs_()
    weights = prunable(linear, parameters)
    whole = [weight.detach().clone() for weight in weights]
    kept = torch.ones(sum(weight.numel() for weight in weights), dtype=torch.bool)
    masks = []
    for turn in range(1, rounds + 1):
        masks_by_weight = kept.split([weight.numel() for weight in weights])
        for weight, mask, values in zip(weights, masks_by_weight, whole, strict=True):
            weight.data = values * mask.view_as(values)
        total = linear(torch.ones(1, *shape, dtype=torch.float64)).sum()
        made = torch.autograd.grad(total, weights)
        saliency = torch.cat([(weight * one).flatten() for weight, one in zip(weights, made, strict=True)])
        saliency = torch.where(kept, saliency.detach(), -1.0)
        keep = round(len(kept) * final_density ** (turn / rounds))
        survivors = saliency.argsort(stable=True)[len(kept) - keep :]
        kept = torch.zeros_like(kept).index_fill_(0, survivors, True)
        masks.append(kept)
    return masks


def llama_flow(model: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """|w| dR/d|w| / R of a Llama with one token, written out."""
    w = {
        name: (weight.detach().double().abs() * kept.get(name, torch.ones(()))).requires_grad_()
        for name, weight in model.named_parameters()
    }

    def one(x: torch.Tensor) -> torch.Tensor:
        return x / x.detach()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[name] * x / (x.detach() ** 2).mean().sqrt()

    heads, keys = model.config.num_attention_heads, model.config.num_key_value_heads
    x = torch.ones(model.config.hidden_size, dtype=torch.float64)
    for index in range(model.config.num_hidden_layers):
        layer = f"model.layers.{index}."
        h = norm(x, layer + "input_layernorm.weight")
        q = (w[layer + "self_attn.q_proj.weight"] @ h).view(heads, -1)
        k, v = (
            (w[f"{layer}self_attn.{part}_proj.weight"] @ h).view(keys, -1).repeat_interleave(heads // keys, 0)
            for part in "kv"
        )
        mixed = one((q * k).sum(1, keepdim=True)) * v
        x = x + w[layer + "self_attn.o_proj.weight"] @ mixed.flatten()
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = w[layer + "mlp.gate_proj.weight"] @ h, w[layer + "mlp.up_proj.weight"] @ h
        x = x + w[layer + "mlp.down_proj.weight"] @ ((gate * up).detach().sqrt() * one(gate) * one(up))
    total = (w["lm_head.weight"] @ norm(x, "model.norm.weight")).sum()
    made = torch.autograd.grad(total / total.detach(), [w[name] for name in kept])
    return {name: (w[name] * gradient).detach() for name, gradient in zip(kept, made, strict=True)}


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
