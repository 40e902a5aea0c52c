"""Which stored tensors are prunable, told by their names alone, where nobody here knows the architecture.

A tensor of at least two dimensions is looked up by the last word of its name that says what it is ("q_proj" of
"model.layers.0.self_attn.q_proj.weight"): layers are prunable, embeddings and norms are not, and an output head is
unless the same bytes are stored as an embedding. Other words are not guessed at. Files are sorted by name and not
by the model's order, so the order is told by names too: numbers as numbers, attention before what follows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

Kind = Literal["layer", "head", "embedding", "other"]

# In the order in which a block holds them.
_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "o_proj", "out_proj"),
    *("query", "key", "value", "dense", "q_lin", "k_lin", "v_lin", "out_lin", "wq", "wk", "wv", "wo"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h"),
    *("fc1", "fc2", "fc_in", "fc_out", "c_fc", "c_proj", "w1", "w2", "w3", "lin1", "lin2"),
)
_HEADS = ("lm_head", "embed_out", "output")
# Stored (input, output) by some models and the other way round by others.
_EITHER_WAY = ("c_attn", "c_fc", "c_proj")
_EMBEDDING = re.compile(r"(^|_)(emb|embed|embeddings?|embd|wte|wpe|shared|tok|tokens)(_|$)")
_NORM = re.compile(r"(norm|^ln)")
_BUFFERS = ("bias", "masked_bias", "inv_freq")
_PARTS = (
    *("embed_tokens", "self", "self_attn", "attn", "attention", "self_attention", "mlp", "feed_forward"),
    *("intermediate", "output"),
)


def kind_of(name: str, dimensions: int) -> Kind | None:
    """What a stored tensor is; None for a matrix that no rule knows."""
    *words, attribute = name.split(".")
    if dimensions < 2:
        return "other"
    word = words[-1] if words else attribute
    if _EMBEDDING.search(word):
        return "embedding"
    if _NORM.search(word):
        return "other"
    if attribute != "weight":
        return "other" if attribute in _BUFFERS else None
    if word in _HEADS and len(words) <= 2:
        return "head"
    return "layer" if word in _LAYERS or dimensions > 2 else None


def has_either_layout(name: str) -> bool:
    """Whether models that use this name differ in which dimension is the input."""
    return name.split(".")[-2] in _EITHER_WAY


def in_model_order(names: Iterable[str]) -> list[str]:
    """Names as most models hold them."""
    return sorted(names, key=lambda name: list(_place(name)))


def _place(name: str) -> Iterator[tuple[int, int, str]]:
    words = name.split(".")
    for word in words:
        if word.isdigit():
            yield 1, int(word), ""
        elif word in _HEADS and len(words) <= 3:
            yield 2, 0, word
        else:
            known = [ranks.index(word) for ranks in (_PARTS, _LAYERS) if word in ranks]
            yield 1, known[0] if known else len(_LAYERS), word
