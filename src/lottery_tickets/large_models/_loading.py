"""From the name a user gives to a folder, a model and a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lottery_tickets.errors import CheckpointError, MissingExtraError
from lottery_tickets.large_models._checkpoints import Checkpoint, read_checkpoint
from lottery_tickets.large_models._dcp import is_distributed_checkpoint
from lottery_tickets.large_models._pages import TYPES
from lottery_tickets.planning import Shapes, refuse_if_too_large

# Weights as transformers reads them, configuration and tokenizer; not the same weights in other formats.
_HUB_FILES = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """Folder of a checkpoint: the folder itself, or the local copy of a model on the Hugging Face hub.

    Args:
        model: A folder saved by `save_pretrained` or by `torch.distributed.checkpoint.save`, or a hub id such as
            "HuggingFaceTB/SmolLM2-135M", which is downloaded once and then taken from the cache.

    Raises:
        CheckpointError: Neither a folder here nor a model that the hub gives; or a folder without safetensors
            weights.
        MissingExtraError: A hub id without huggingface_hub installed.

    Example:
        >>> from pathlib import Path
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lottery_tickets.large_models import resolve_model
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> LlamaForCausalLM(config).save_pretrained("my-model")
        >>> resolve_model("my-model") == Path("my-model")
        True
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _downloaded(str(model))
    if not is_distributed_checkpoint(folder):
        read_checkpoint(folder)
    return folder


def load_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    check_memory: bool = True,
) -> nn.Module:
    """Causal language model of a checkpoint folder, in evaluation mode.

    Args:
        folder: A checkpoint folder; see `resolve_model`.
        dtype: Data type of the weights; None keeps the checkpoint's.
        device: Where to.
        progress: Show transformers' bar.
        check_memory: Refuse before anything is done if more memory is needed than is free. Weights that keep
            their data type need none: they are mapped from the files, and the system takes pages back.

    Raises:
        CheckpointError: transformers cannot load it, or weights of the model are not in the files.
        MemoryPlanError: More memory is needed than is free.
        MissingExtraError: transformers is not installed.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lottery_tickets.large_models import load_model
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> LlamaForCausalLM(config).bfloat16().save_pretrained("half")
        >>> load_model("half").dtype, load_model("half", torch.float32).dtype
        (torch.bfloat16, torch.float32)
    """
    transformers = _transformers()
    if dtype is not None:
        _refuse_if_too_large(read_checkpoint(folder), dtype, check=check_memory)
    try:
        with _bars(transformers, shown=progress):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", output_loading_info=True
            )
    except Exception as error:  # a damaged configuration raises whatever it happens to run into
        raise CheckpointError(f"{folder}: transformers cannot load it: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of {type(model).__name__} are not in the files, {missing[0]} for "
            "one; they would be random numbers. Get the checkpoint again."
        )
    loaded: nn.Module = model.eval().to(device)
    return loaded


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: transformers cannot load it.
        MissingExtraError: transformers is not installed.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from lottery_tickets.large_models import load_tokenizer
        >>> words = Tokenizer(models.WordLevel({"the": 0, "word": 1}, unk_token="the"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> _ = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained("words")
        >>> load_tokenizer("words")("word the word").input_ids
        [1, 0, 1]
    """
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: transformers cannot load its tokenizer: {_first_line(error)}") from error


def _refuse_if_too_large(checkpoint: Checkpoint, dtype: torch.dtype, *, check: bool) -> None:
    """Ask for the memory of weights that are turned to another type."""
    turned = {
        name: one.shape.numel() for name, one in checkpoint.tensors.items() if TYPES.get(one.dtype, dtype) != dtype
    }
    refuse_if_too_large("load", Shapes.of_sizes(turned, dtype.itemsize), check=check)


def _downloaded(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf") from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    # Not found here and no network, refused by the hub, or a path that cannot be a hub id.
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{model} is neither a folder here nor to be had from the Hugging Face hub ({_first_line(error)}). "
            "Give the folder of a checkpoint, or fetch it where there is a network: hf download "
            f"{model} --local-dir FOLDER (after hf auth login, where the model asks for it)."
        ) from error


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    return transformers  # type: ignore[no-any-return]


@contextmanager
def _bars(transformers: ModuleType, *, shown: bool) -> Iterator[None]:
    settings = transformers.utils.logging
    silence = not shown and settings.is_progress_bar_enabled()
    if silence:
        settings.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            settings.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
