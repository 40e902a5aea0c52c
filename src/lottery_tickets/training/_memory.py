"""How much memory training will take, item by item, before any of it is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from torch import nn

from lottery_tickets.errors import TrainingError
from lottery_tickets.training._passes import Clip
from lottery_tickets.training._weights import BLOCK, BLOCK_ELSEWHERE, HALVES, Precision

Kind = Literal["sgd", "adam", "adamw", "adamw8bit", "torch sgd", "torch adamw"]

_SINGLE = 4  # bytes of a float32
_GIB = 1 << 30
# torchao keeps a scale for every 256 weights and a table of 256 values; smaller or odd tensors stay in float32.
_SCALED, _SMALLEST_8BIT = 256, 4096
# transformers' decoders of this shape: gated feed-forward parts, RMS norms, attention by torch's fused kernels.
_DECODERS = ("llama", "mistral", "phi3", "qwen2")
# Buffers of a block's length that an update takes: numba rounds in place, torch in integers of 8 bytes.
_BUFFERS, _BUFFERS_ELSEWHERE = 5, 16

logger = logging.getLogger(__name__)


class TrainingBytes(TypedDict):
    """Predicted bytes of one training step.

    Attributes:
        throughout: What is there all the time, by name: weights, optimizer state, compensation, accumulated
            micro-batches, activations kept for the way back, and gradients where they are all held.
        at_the_loss: What comes on top at the start of the backward pass: the last norm, logits, their gradient,
            the output layer's gradient.
        in_a_block: What comes on top inside a transformer block: its activations (made again under
            checkpointing), gradients on their way, the largest parameter's gradient.
        at_the_embedding: What comes on top at the end: the gradient of the embedding, that of weights tied to it,
            and the sum of both.
        update: Buffers of one parameter's update.
        peak: All that is there throughout, the largest of the three moments, and the update.
        activations_known: Whether the architecture's sizes were known; else there are no activations in the sums,
            and the peak is a lower bound.
    """

    throughout: dict[str, int]
    at_the_loss: dict[str, int]
    in_a_block: dict[str, int]
    at_the_embedding: dict[str, int]
    update: int
    peak: int
    activations_known: bool


def training_bytes(
    model: nn.Module,
    *,
    batch_size: int,
    sequence_length: int,
    optimizer: Kind = "sgd",
    momentum: float = 0.0,
    precision: Precision = "stochastic",
    clip: Clip = "tensor",
    micro_batches: bool = False,
    checkpointing: bool = True,
    chunked_loss: bool = True,
    device: str | None = None,
) -> TrainingBytes:
    r"""Memory of a training step from shapes alone: no weight is read, so the model may be on the meta device.

    With $P_t$ elements of $b$ bytes in parameter $t$, $n$ tokens, width $h$, $L$ blocks, queries of width $q$ in
    all heads, $m$ of the feed-forward part and $V$ words:

    - weights $\sum b P_t$; gradients $\max b P_t$ where the step is in the backward pass, else $\sum b P_t$;
    - momentum $\sum b P_t$; AdamW two states of 4 bytes (torch's own: of $b$), of 1 byte and a scale every 256 in
      8 bits; compensation $\sum b P_t$ for halves; accumulated micro-batches 4 bytes a trainable weight;
    - activations kept: $L n h b$ under checkpointing, a block's own for each block without;
    - a block's own: $n b (5h + 6q + 4m)$, and $8 n h$ for the norms' float32 copies of halves; on the way back
      $3 n b m$ in gradients;
    - the last norm $3 n h b$, logits and their gradient $2 n V b$; a loss that is not computed in
      chunks adds three copies in float32.

    Attention is taken to keep no matrix of scores, as torch's fused kernels do.

    Args:
        model: On any device. Sizes come from its `config`, if it is one of transformers' decoders that are known
            (Llama, Mistral, Phi-3, Qwen2 and what has their architecture).
        batch_size: Samples of one forward pass.
        sequence_length: Tokens of each.
        optimizer: A name of `make_optimizer`, or "torch sgd" and "torch adamw" stepping after the backward pass.
        momentum: Of SGD.
        precision: See `FusedSGD`.
        clip: See `FusedSGD`; "global" keeps the logits for its second pass.
        micro_batches: Whether gradients are accumulated over several backward passes.
        checkpointing: Whether activations are made again on the way back.
        chunked_loss: Whether the loss is this library's; transformers' own computes in float32 copies.
        device: Type of the device that will train, "cpu" or another; by default the parameters' own, and an
            accelerator if that is "meta".

    Returns:
        The items, named, in bytes.

    Raises:
        TrainingError: Another optimizer, or sizes below 1.

    Example:
        >>> import torch
        >>> from lottery_tickets.training import training_bytes
        >>> model = torch.nn.Linear(1000, 100, bias=False, device="meta")
        >>> predicted = training_bytes(model, batch_size=1, sequence_length=1)
        >>> predicted["throughout"]["weights"], predicted["in_a_block"]["gradients"]
        (400000, 400000)
    """
    if optimizer not in get_args(Kind):
        raise TrainingError(
            f"No prediction for optimizer {optimizer!r}; it knows those of make_optimizer by name."
        )
    if batch_size < 1 or sequence_length < 1:
        raise TrainingError(f"batch_size and sequence_length are at least 1; got {batch_size}, {sequence_length}.")
    parameters = list(model.parameters())
    trainable = [one for one in parameters if one.requires_grad]
    in_backward = not optimizer.startswith("torch")
    throughout = {
        "weights": sum(_bytes(one) for one in [*parameters, *model.buffers()]),
        "optimizer state": sum(_state_bytes(one, optimizer, momentum) for one in trainable),
    }
    if precision == "compensated" and in_backward:
        throughout["compensation"] = sum(_bytes(one) for one in trainable if one.dtype in HALVES)
    if micro_batches and in_backward:
        throughout["micro-batches"] = sum(one.numel() * max(_SINGLE, one.element_size()) for one in trainable)
    if not in_backward:
        throughout["gradients"] = sum(_bytes(one) for one in trainable)
    sizes = decoder_sizes(model)
    tokens, width = batch_size * sequence_length, parameters[0].element_size() if parameters else _SINGLE
    inside = {} if sizes is None else sizes.block(tokens, width)
    at_the_loss: dict[str, int] = {}
    if sizes is not None:
        kept = sizes.hidden * width * tokens if checkpointing else inside["activations"]
        throughout["activations"] = sizes.layers * kept
        if not checkpointing:
            inside["activations"] = 0
        logits = tokens * sizes.words * width
        at_the_loss = {"last norm": sizes.last_norm(tokens, width), "logits": logits, "gradient of logits": logits}
        if not chunked_loss:
            at_the_loss["float32 copies of logits"] = 3 * tokens * sizes.words * _SINGLE
        if clip == "global" and in_backward:
            throughout["logits kept for the second pass"] = at_the_loss.pop("logits")
    moments = {"loss": at_the_loss, "block": inside, "embedding": {}}
    if in_backward:
        for name, held in _gradients_by_moment(model, trainable).items():
            moments[name] = {**moments[name], "gradients": held}
    update = _update_bytes(trainable, optimizer, device)
    highest = max(sum(items.values()) for items in moments.values())
    return {
        "throughout": throughout,
        "at_the_loss": moments["loss"],
        "in_a_block": moments["block"],
        "at_the_embedding": moments["embedding"],
        "update": update,
        "peak": sum(throughout.values()) + highest + update,
        "activations_known": sizes is not None,
    }


def log_training_bytes(predicted: TrainingBytes) -> None:
    """Say at INFO what training will take."""
    items = ", ".join(f"{name} {count / _GIB:.2f}" for name, count in predicted["throughout"].items() if count)
    logger.info(
        "Training will take about %.2f GiB (%s)%s.",
        predicted["peak"] / _GIB,
        items,
        "" if predicted["activations_known"] else ", activations not counted",
    )


@dataclass(frozen=True)
class DecoderSizes:
    """Of a transformer decoder.

    Attributes:
        hidden: Width of a token between blocks.
        layers: Blocks.
        queries: Width of the queries of all heads.
        feed_forward: Width inside the feed-forward part.
        words: Of the vocabulary.
    """

    hidden: int
    layers: int
    queries: int
    feed_forward: int
    words: int

    def last_norm(self, tokens: int, width: int) -> int:
        """Bytes of the norm before the output layer, for so many tokens in numbers of so many bytes."""
        # Input, output and what is between, one of them in float32 for halves.
        return tokens * self.hidden * (2 * width + max(width, _SINGLE))

    def block(self, tokens: int, width: int) -> dict[str, int]:
        """Bytes of one block's activations, and of their gradients on the way back."""
        # Inputs and outputs of two norms and the middle sum (5h); queries, keys and values as attention sees them,
        # its output and their rotations (6q); gate, its activation, the other half and their product (4m).
        own = tokens * width * (5 * self.hidden + 6 * self.queries + 4 * self.feed_forward)
        if width < _SINGLE:
            own += 2 * tokens * _SINGLE * self.hidden
        return {"activations": own, "gradients of activations": 3 * tokens * width * self.feed_forward}


def decoder_sizes(model: nn.Module) -> DecoderSizes | None:
    """Sizes of an architecture whose activations are known; None for any other."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _DECODERS:
        return None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    hidden, layers, heads, feed_forward, words = (getattr(config, name, None) for name in names)
    if hidden is None or layers is None or heads is None or feed_forward is None or words is None:
        return None
    head = getattr(config, "head_dim", None) or hidden // heads
    return DecoderSizes(hidden, layers, heads * head, feed_forward, words)


def _gradients_by_moment(model: nn.Module, trainable: list[nn.Parameter]) -> dict[str, int]:
    """Bytes of the parameters' gradients that are there at one time, where each is used at once."""
    embeddings = {id(one.weight): one.weight for one in model.modules() if isinstance(one, nn.Embedding)}
    outputs = {id(one.weight): one.weight for one in model.modules() if isinstance(one, nn.Linear)}
    words = [one for one in trainable if id(one) in embeddings]
    # A tied output layer's share waits for the embedding's until the end, where autograd makes their sum anew.
    waiting = sum(_bytes(one) for one in words if id(one) in outputs)
    largest_embedding = max((_bytes(one) for one in words), default=0)
    largest_word = max((one.shape[0] for one in words), default=0)
    rest = [one for one in trainable if id(one) not in embeddings]
    head = max((_bytes(one) for one in rest if largest_word and one.shape[:1] == (largest_word,)), default=0)
    block = max((_bytes(one) for one in rest if not largest_word or one.shape[:1] != (largest_word,)), default=0)
    return {"loss": max(head, waiting), "block": block + waiting, "embedding": largest_embedding + 2 * waiting}


def _state_bytes(parameter: nn.Parameter, optimizer: Kind, momentum: float) -> int:
    count, width = parameter.numel(), parameter.element_size()
    if optimizer in {"sgd", "torch sgd"}:
        return count * width if momentum else 0
    if optimizer == "torch adamw":
        return 2 * count * width
    if optimizer == "adamw8bit" and count >= _SMALLEST_8BIT and count % _SCALED == 0:
        return 2 * (count + count // _SCALED * _SINGLE + 256 * _SINGLE)
    return 2 * count * max(width, _SINGLE)


def _update_bytes(trainable: list[nn.Parameter], optimizer: Kind, device: str | None) -> int:
    """What one update needs beside the parameter and its gradient."""
    if not trainable:
        return 0
    largest = max(trainable, key=_bytes)
    if optimizer == "torch sgd":
        return 0
    if optimizer == "sgd":
        on_cpu = (device or largest.device.type) == "cpu"
        block, buffers = (BLOCK, _BUFFERS) if on_cpu else (BLOCK_ELSEWHERE, _BUFFERS_ELSEWHERE)
        return buffers * _SINGLE * min(block, largest.numel())
    # AdamW's denominator where its step is not fused; halves are lent, and their gradients widened, in float32.
    wide = largest.numel() * max(_SINGLE, largest.element_size())
    if optimizer == "torch adamw":
        return wide
    temporaries = 1 if optimizer == "adamw8bit" else 0
    return wide * (temporaries + (2 if largest.dtype in HALVES else 0))


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
