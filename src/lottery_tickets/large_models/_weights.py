"""Prunable weights of a checkpoint, mapped from its files as they are stored."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models._checkpoints import read_checkpoint
from lottery_tickets.large_models._dcp import as_safetensors, is_distributed_checkpoint
from lottery_tickets.large_models._names import located
from lottery_tickets.large_models._pages import TYPES, mapped
from lottery_tickets.large_models._prunable import prunable_tensors
from lottery_tickets.masks import Patterns
from lottery_tickets.sparsity import Layout, Pages


@dataclass(frozen=True)
class MappedWeights:
    """Prunable weights that lie in files.

    Attributes:
        folder: Of the checkpoint.
        tensors: Canonical parameter name to weights in the stored data type, in the order of the model; they are
            read from the files when they are touched, and must not be written to.
        layouts: Name to which dimension runs over the inputs.
        pages: To be told where weights will be read.
    """

    folder: Path
    tensors: Mapping[str, torch.Tensor]
    layouts: Mapping[str, Layout]
    pages: Pages

    def check_layouts(self) -> None:
        """Refuse what depends on rows, if it is not known of every tensor where its rows lie.

        Raises:
            CheckpointError: Of one it is not.
        """
        for name in self.tensors.keys() - self.layouts.keys():
            raise CheckpointError(
                f"{self.folder}: {name} is stored (input, output) by some models and (output, input) by others; "
                "patterns and rows need to know. Put the model's config.json there and install transformers, or "
                "draw the mask from the loaded model."
            )


@contextmanager
def map_weights(
    folder: str | os.PathLike[str],
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    only_weights: bool = True,
) -> Iterator[MappedWeights]:
    """Map the prunable weights of a checkpoint into memory for the time of a block, without loading the model.

    Names and order are those of `prunable_parameters` of the loaded model. They come from the architecture, which
    transformers makes from `config.json` without weights; where either is missing, from what tensors are called
    (see the guide "Models on disk").

    A checkpoint of `torch.distributed.checkpoint` is first copied into a temporary folder, tensor by tensor (see
    the guide "Masks of sharded models").

    Args:
        folder: A checkpoint folder; see `read_checkpoint`. Or one that `torch.distributed.checkpoint.save` wrote.
        include: See `prunable_parameters`; predicates are given parameters on the meta device.
        exclude: Likewise.
        only_weights: Likewise.

    Raises:
        CheckpointError: A folder that `read_checkpoint` refuses; a model that is stored otherwise than it is
            loaded, quantized or fused say; names that no rule knows, where there is no architecture to ask.
        ParameterSelectionError: A pattern that matches nothing, or nothing left to prune.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lottery_tickets.large_models import map_weights
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> LlamaForCausalLM(config).bfloat16().save_pretrained("mapped")
        >>> with map_weights("mapped", exclude="lm_head.weight") as weights:
        ...     print(len(weights.tensors), weights.tensors["model.layers.0.mlp.up_proj.weight"].dtype)
        7 torch.bfloat16
    """
    folder = Path(folder)
    with as_safetensors(folder) if is_distributed_checkpoint(folder) else nullcontext(folder) as readable:
        checkpoint = read_checkpoint(readable)
        found = prunable_tensors(checkpoint, include, exclude, only_weights=only_weights)
        with mapped(checkpoint.folder, found.stored) as (tensors, pages):
            yield MappedWeights(folder, tensors, found.layouts, pages)


@contextmanager
def map_parameters(folder: str | os.PathLike[str], names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Map parameters of a checkpoint into memory for the time of a block, those of these names that it stores.

    Args:
        folder: A checkpoint folder; see `read_checkpoint`.
        names: Of the model's parameters; a checkpoint saved with or without the prefix of the base model is
            understood.

    Raises:
        CheckpointError: A folder that `read_checkpoint` refuses.
    """
    checkpoint = read_checkpoint(folder)
    keys = located(list(names), checkpoint.tensors)
    stored = {name: checkpoint.tensors[key] for name, key in keys.items() if key in checkpoint.tensors}
    known = {name: tensor for name, tensor in stored.items() if tensor.dtype in TYPES}
    with mapped(checkpoint.folder, known) as (tensors, _):
        yield tensors
