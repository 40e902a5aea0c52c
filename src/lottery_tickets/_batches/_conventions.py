"""What the labels of a transformers model mean: shifted or not, tokens or classes.

Told from the class, without importing transformers. Where a convention is not known for certain, it is "own": the
model gets the labels and its loss is taken as it comes.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import nn

Convention = Literal[
    "next token",  # labels at t + 1 belong to logits at t
    "decoder",  # an encoder-decoder: labels belong to logits at t, and make the decoder's inputs
    "token",  # a masked language model: labels belong to logits at t
    "token class",
    "sequence class",  # one label or one row of labels a sample; config.problem_type says which
    "own",
]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

_SEQUENCE_CLASSES = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))
_LANGUAGE_MODEL_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, data-parallel and PEFT wrappers."""
    inner: Any = model
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif callable(getattr(type(inner), "get_base_model", None)):
            inner = inner.get_base_model()
        else:
            break
    assert isinstance(inner, nn.Module)
    return inner


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a model of the transformers library."""
    kind: Any = type(model)
    return _is_transformers_class(kind)


@lru_cache(maxsize=128)
def _is_transformers_class(kind: Any) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.") for base in kind.__mro__
    )


def is_causal_language_model(model: nn.Module) -> bool:
    """Whether logits at t predict input_ids at t + 1, so that a batch needs no labels."""
    # The masked class of XLNet and the encoders among the encoder-decoders carry other names.
    name = type(model).__name__
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return name.endswith(_LANGUAGE_MODEL_SUFFIXES) and not name.startswith("XLNet") and not encoder_decoder


def convention_of(model: nn.Module) -> Convention:
    """How an unwrapped model reads its labels."""
    if not is_transformers(model):
        return "own"
    kind = getattr(model, "loss_type", None)
    if kind in _SEQUENCE_CLASSES:
        return "sequence class"
    if kind == "ForTokenClassification":
        return "token class"
    config: Any = model.config
    if config.is_encoder_decoder:
        shifts_itself = _has_named_loss(model) and kind != "ForMaskedLM"
        makes_inputs = hasattr(model, "prepare_decoder_input_ids_from_labels")
        return "decoder" if makes_inputs and not shifts_itself else "own"
    if kind == "ForMaskedLM":
        return "token"
    shifting = kind in ("ForCausalLM", "ForConditionalGeneration") or is_causal_language_model(model)
    return "next token" if shifting and _has_named_loss(model) else "own"


def problem_type(config: Any, labels: torch.Tensor) -> ProblemType:
    """What transformers takes a sequence classifier's task for, without writing the guess to the config."""
    given = config.problem_type
    if given in get_args(ProblemType):
        chosen: ProblemType = given
        return chosen
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether `forward` names this argument."""
    return argument in inspect.signature(type(model).forward).parameters


def _has_named_loss(model: nn.Module) -> bool:
    """Whether `forward` computes its loss by transformers' function for the class, replaced by nobody.

    The exceptions, such as BartForCausalLM, whose labels are not shifted, compute it themselves.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names and "_loss_function" not in vars(model)
