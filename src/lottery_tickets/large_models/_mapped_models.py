"""A model whose weights stay in the files of its checkpoint, computing forward passes block by block."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from lottery_tickets.errors import CheckpointError, EvaluationError, MissingExtraError
from lottery_tickets.large_models._checkpoints import Checkpoint, StoredTensor, read_checkpoint
from lottery_tickets.large_models._hidden_states import HiddenStates, StatesOnDisk
from lottery_tickets.large_models._names import located
from lottery_tickets.large_models._on_demand import WeightsOnDemand
from lottery_tickets.large_models._pages import TYPES, mapped
from lottery_tickets.large_models._skeletons import UnknownArchitectureError, skeletons
from lottery_tickets.masks import Mask, parameter_aliases
from lottery_tickets.training import blocks_of

T = TypeVar("T")


@dataclass(frozen=True)
class MappedModel:
    """A model for forward passes whose weights lie in files.

    Attributes:
        folder: Of the checkpoint.
        module: The model, in evaluation mode. Its layers read their weights from the files as they compute; what
            it lists as parameters has their names, shapes and data types, and no values.
        weights: What its layers read from.
        blocks: The members of its module lists, in the order of the model.
    """

    folder: Path
    module: nn.Module
    weights: WeightsOnDemand
    blocks: Sequence[nn.Module]

    def run(
        self,
        function: Callable[[Any, int], T],
        batches: Iterable[Any],
        tickets: Sequence[Mask | None] = (None,),
        *,
        hidden_states: HiddenStates = "memory",
        released: Callable[[Iterable[str]], object] = lambda names: None,
        progress: str | None = None,
    ) -> list[list[T]]:
        """What a function of the model gives for every batch and ticket; each weight is read once for all of them.

        All forward passes go through one block before any enters the next; until its turn comes, each waits before
        the block, with its hidden states. Weights are masked as they are read.

        Args:
            function: `function(batch, number)` calls the module on a batch, once, with the weights of the ticket
                of that number. Gradients are off.
            batches: Each is asked for once, and kept until the end.
            tickets: None for the dense model.
            hidden_states: Where they wait: "memory", or "disk", in a temporary file in $TMPDIR.
            released: Told the names of weights that all their layers have read, before they are let go.
            progress: What to call it on a bar; None for no bar.

        Returns:
            For each ticket what the function gave for each batch.

        Raises:
            EvaluationError: Hidden states that are to wait elsewhere.
        """
        if hidden_states not in get_args(HiddenStates):
            raise EvaluationError(f"hidden_states is 'memory' or 'disk', got {hidden_states!r}.")
        from lottery_tickets.large_models._conductor import Conductor

        with (
            ExitStack() as files,
            tqdm(desc=progress, unit=" blocks", delay=2, disable=progress is None) as bar,
            torch.no_grad(),
        ):
            states = None
            if hidden_states == "disk":
                file = files.enter_context(tempfile.TemporaryFile(prefix="lottery-tickets-"))
                states = StatesOnDisk(self.module.buffers(), file)
            conductor: Conductor[T] = Conductor(
                self.blocks, self.weights, states=states, released=released, advanced=bar.update
            )
            return conductor.conduct(function, batches, tickets)


@contextmanager
def map_model(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Iterator[MappedModel]:
    """A model for forward passes, for the time of a block, whose weights are read as layers ask for them.

    transformers makes it from `config.json`, without weights; buffers that are not in the files are computed as
    they are when it is loaded. The class is the one that the configuration names.

    Args:
        folder: A checkpoint folder; see `read_checkpoint`.
        dtype: Data type to compute in; None for the one in which the model would be loaded, the checkpoint's.

    Raises:
        CheckpointError: A folder that `read_checkpoint` refuses, or whose model transformers cannot make; a model
            that is stored otherwise than it is loaded, quantized or fused say; tensors that are in the files and
            not in the model, or the other way round; a model without a list of blocks.
        MissingExtraError: transformers, accelerate or greenlet is not installed.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lottery_tickets.large_models import map_model
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
        >>> LlamaForCausalLM(config).save_pretrained("in-blocks")
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> with map_model("in-blocks") as model:
        ...     ((logits,),) = model.run(lambda batch, ticket: model.module(batch).logits, [tokens])
        ...     print(tuple(logits.shape), set(model.weights.reads.values()))
        (1, 3, 32000) {1}
    """
    checkpoint = read_checkpoint(folder)
    structure, found = _structure(checkpoint)
    module = _computing(structure, dtype or _loaded_as(structure, checkpoint))
    blocks = blocks_of(module)
    if not blocks:
        raise CheckpointError(
            f"{folder}: {type(module).__name__} has no list of blocks through which to go one by one; load it."
        )
    _load_buffers(module, checkpoint, found.buffers)
    with mapped(checkpoint.folder, found.parameters) as (tensors, pages):
        yield MappedModel(checkpoint.folder, module, WeightsOnDemand(module, tensors, pages), blocks)


# --- What is stored where ---


class _Stored(NamedTuple):
    """Where a model's tensors lie, by their canonical names."""

    parameters: dict[str, StoredTensor]
    buffers: dict[str, str]


def _structure(checkpoint: Checkpoint) -> tuple[Any, _Stored]:
    """The model on the meta device that the files hold, and where."""
    misfits = []
    try:
        for model in skeletons(checkpoint, named_first=True):
            stored, problems = _stored_of(model, checkpoint)
            if not problems:
                return model, stored
            misfits.append((len(problems), f"{type(model).__name__} has {'; '.join(problems[:3])}"))
            if type(model).__name__ in (model.config.architectures or ()):
                break  # another class might take what is there, and would compute something else
    except UnknownArchitectureError as error:
        if isinstance(error.__cause__, ImportError):
            raise MissingExtraError("transformers", "hf") from error
        raise CheckpointError(
            f"{checkpoint.folder}: what to compute cannot be told: {error}. Give a checkpoint saved by "
            "transformers, or load the model yourself."
        ) from error
    raise CheckpointError(
        f"{checkpoint.folder} is not stored as its model is loaded: {min(misfits)[1]}. Load the model instead."
    )


def _stored_of(model: Any, checkpoint: Checkpoint) -> tuple[_Stored, list[str]]:
    """Where the tensors of a model on the meta device lie, and what does not fit."""
    shapes = {name: one.shape for name, one in (*model.named_parameters(), *model.named_buffers())}
    aliases = {names[0]: names for names in parameter_aliases(model).values()}
    # A tied tensor may be stored under any of its names.
    spelled = {
        name: next((alias for alias in names if alias in checkpoint.tensors), name)
        for name, names in aliases.items()
    }
    lasting = model.state_dict().keys()
    spelled |= {name: name for name, _ in model.named_buffers() if name in lasting}
    keys = located(list(spelled.values()), checkpoint.tensors)
    places = {name: keys[alias] for name, alias in spelled.items() if alias in keys}
    problems = [f"{name}, which is not stored" for name in spelled if name not in places]
    for name, key in places.items():
        stored = checkpoint.tensors[key]
        if stored.shape != shapes[name]:
            problems.append(f"{name} as {tuple(shapes[name])}, stored as {tuple(stored.shape)}")
        elif name in aliases and stored.dtype not in TYPES:
            problems.append(f"{name} stored as {stored.dtype}, which is no type to compute in")
    known = [alias for names in aliases.values() if len(names) > 1 for alias in names]
    for key in checkpoint.tensors.keys() - set(places.values()):
        tied = any(key == alias or alias.endswith(f".{key}") or key.endswith(f".{alias}") for alias in known)
        if not tied and not any(re.search(pattern, key) for pattern in _left_alone(model)):
            problems.append(f"no {key}, which is stored")
    parameters = {name: checkpoint.tensors[key] for name, key in places.items() if name in aliases}
    return _Stored(parameters, {name: key for name, key in places.items() if name not in aliases}), problems


def _left_alone(model: Any) -> list[str]:
    """Patterns of keys that loading passes over: buffers that used to be stored."""
    return [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]


# --- What computes ---


def _computing(structure: Any, dtype: torch.dtype) -> nn.Module:
    """The same model with parameters on the meta device, and buffers computed."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise MissingExtraError("accelerate", "hf") from error
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        module: Any = type(structure)._from_config(structure.config, dtype=dtype)
    module.tie_weights()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if _stays_wide(module, name, dtype):
            parameter.data = parameter.data.float()
    computing: nn.Module = module.eval()
    return computing


def _stays_wide(module: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps this parameter in float32 when it loads the others in a type of two bytes."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return dtype.itemsize < torch.float32.itemsize and any(
        re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in kept
    )


def _loaded_as(structure: Any, checkpoint: Checkpoint) -> torch.dtype:
    """What loading in the checkpoint's own type means: the configuration's, else that of the first tensor."""
    named: torch.dtype | None = structure.config.dtype
    first = (TYPES[tensor.dtype] for tensor in checkpoint.tensors.values() if tensor.dtype in TYPES)
    return named or next(first, torch.float32)


def _load_buffers(module: nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str]) -> None:
    """Copy those that are in the files."""
    for name, key in keys.items():
        with safe_open(checkpoint.folder / checkpoint.tensors[key].file, framework="pt") as file:
            module.get_buffer(name).copy_(file.get_tensor(key))
