"""Rules of layers: which rows and columns of their weights belong to which inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lottery_tickets._structured._call import Call, Results
from lottery_tickets._structured._indices import Nodes, Value
from lottery_tickets.masks import Kind


def linear(call: Call) -> Results:
    """`x @ weight.T + bias`."""
    x, weight = call.given("input"), call.given("weight")
    if not weight.weight:
        return call.refuse()
    out, into = weight.dims
    call.indices.join(x.dims[-1], into, call.why)
    return Value((*x.dims[:-1], _made(call, out, call.value("bias"), "neuron")))


def addmm(call: Call) -> Results:
    """`bias + x @ weight`, transformers' Conv1D."""
    x, weight = call.given("mat1"), call.given("mat2")
    bias = call.given("self")
    if not weight.weight or len(bias.dims) != 1:
        return call.refuse()
    call.indices.join(x.dims[-1], weight.dims[0], call.why)
    return Value((x.dims[0], _made(call, weight.dims[1], bias, "neuron")))


def convolution(call: Call) -> Results:
    """Channels are dimension 1 of what goes in and comes out; groups of channels see each other only."""
    x, weight = call.given("input"), call.given("weight")
    groups = call.get("groups", 1)
    out, into = weight.dims[:2]
    spatial = len(weight.dims) - 2
    if not weight.weight or len(x.dims) != spatial + 2:
        return call.refuse()
    if groups > 1:
        call.indices.join(x.dims[1], _spread_over_groups(call, out, into, groups), call.why)
    else:
        call.indices.join(x.dims[1], into, call.why)
    _keep_places(call, x)
    made = _made(call, out, call.value("bias"), "channel")
    return Value((x.dims[0], made, *(None,) * spatial))


def _spread_over_groups(call: Call, out: Nodes | None, into: Nodes | None, groups: int) -> Nodes | None:
    """For each input channel of a grouped convolution the node of what it meets.

    Depthwise, a group is one input channel with its outputs, and leaves whole. Otherwise all groups must keep as
    many channels, so those at the same place of each group leave together, and the number of groups stays.
    """
    if out is None:
        call.indices.pin(into, call.why)
        return None
    by_group = out.reshape(groups, -1)
    if into is None:  # one input channel a group
        call.indices.joined.append((by_group[:, :1].repeat(by_group.shape[1], axis=1).reshape(-1), out))
        return by_group[:, 0].copy()
    call.indices.joined.extend((by_group[0], by_group[group]) for group in range(1, groups))
    return np.tile(into, groups)


def transposed_convolution(call: Call) -> Results:
    """As `convolution`, with the weight's first two dimensions the other way round."""
    x, weight = call.given("input"), call.given("weight")
    spatial = len(weight.dims) - 2
    if not weight.weight or call.get("groups", 1) != 1 or len(x.dims) != spatial + 2:
        return call.refuse()
    into, out = weight.dims[:2]
    call.indices.join(x.dims[1], into, call.why)
    _keep_places(call, x)
    return Value((x.dims[0], _made(call, out, call.value("bias"), "channel"), *(None,) * spatial))


def channel_norm(call: Call) -> Results:
    """Batch and instance normalisation: each channel by itself."""
    x = call.given("input")
    channels = x.dims[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter = call.value(name)
        if parameter is not None:
            channels = call.indices.join(channels, parameter.dims[0], call.why)
    return Value((x.dims[0], channels, *x.dims[2:]))


def layer_norm(call: Call) -> Results:
    """Mean and variance are taken over the last dimensions, so all of these stay."""
    x = call.given("input")
    count = len(call.get("normalized_shape"))
    call.indices.pin_all((Value(x.dims[-count:]),), call.why)
    for name in ("weight", "bias"):
        parameter = call.value(name)
        if parameter is not None:
            call.indices.pin_all((parameter,), call.why)
    return Value((*x.dims[:-count], *(None,) * count))


def embedding(call: Call) -> Results:
    """A row of the weight for each number."""
    weight, numbers = call.given("weight"), call.given("indices")
    call.indices.pin(weight.dims[0], call.why)
    call.indices.pin_all((numbers,), call.why)
    return Value((*(None,) * len(numbers.dims), weight.dims[1]))


def prelu(call: Call) -> Results:
    """A slope for each channel, or one for all."""
    x, weight = call.given("self"), call.given("weight")
    if len(weight.dims) != 1 or call.shape_in("weight") == (1,):
        return x if call.shape_in("weight") == (1,) else call.refuse()
    channels = call.indices.join(x.dims[1], weight.dims[0], call.why)
    return Value((x.dims[0], channels, *x.dims[2:]))


def attention(call: Call) -> Results:
    """Every head by itself; over positions and inside a head everything stays."""
    query, key, value = call.given("query"), call.given("key"), call.given("value")
    if len(query.dims) < 4:
        return call.refuse()
    for one in (query, key, value):
        call.indices.pin_all((Value(one.dims[-2:]),), call.why)
    dims = list(query.dims[:-2])
    heads = len(dims) - 1
    for place in range(len(dims)):
        for name, other in (("key", key), ("value", value)):
            mine, its = call.shape_in("query")[place], call.shape_in(name)[place]
            nodes = other.dims[place]
            if place == heads and its not in (mine, 1):  # grouped queries
                nodes = None if nodes is None else nodes.repeat(mine // its)
            if mine > 1 or its > 1:
                dims[place] = call.indices.join(dims[place], nodes, call.why) if _any(dims[place], nodes) else None
    mask = call.value("attn_mask")
    if mask is not None:
        _meet(call, dims, mask)
    call.indices.make(dims[heads], "head")
    return Value((*dims, None, None))


def matmul(call: Call) -> Results:
    """A layer if the right side is a weight; between activations, as in attention, what is summed over stays."""
    first, second = call.value("self"), call.value("other") or call.value("mat2")
    assert first is not None and second is not None
    if len(first.dims) < 2 or len(second.dims) < 2:
        return call.refuse()
    if second.weight and len(second.dims) == 2:
        call.indices.join(first.dims[-1], second.dims[0], call.why)
        return Value((*first.dims[:-1], _made(call, second.dims[1], None, "neuron")))
    if len(first.dims) != len(second.dims) or first.weight or second.weight:
        return call.refuse()
    call.indices.pin_all((Value((first.dims[-1], second.dims[-2])),), call.why)
    dims = []
    for mine, its in zip(first.dims[:-2], second.dims[:-2], strict=True):
        both = call.indices.join(mine, its, call.why) if _any(mine, its) else None
        call.indices.make(both, "head")
        dims.append(both)
    return Value((*dims, first.dims[-2], second.dims[-1]))


def _made(call: Call, out: Nodes | None, bias: Value | None, kind: Kind) -> Nodes | None:
    call.indices.make(out, kind)
    if bias is not None:
        call.indices.join(out, bias.dims[0], call.why)
    return out


def _keep_places(call: Call, x: Value) -> None:
    call.indices.pin_all((Value(x.dims[2:]),), call.why)


def _meet(call: Call, dims: list[Nodes | None], mask: Value) -> None:
    """What is added to all heads alike leaves with none; what is not stands in their way."""
    shape = call.shape_in("attn_mask")
    call.indices.pin_all((mask,), call.why)
    for place, size in enumerate(shape[:-2]):
        ours = place - (len(shape) - 2 - len(dims))
        if size > 1 and ours >= 0 and dims[ours] is not None:
            call.indices.pin(dims[ours], call.why)


def _any(*nodes: Nodes | None) -> bool:
    return any(one is not None for one in nodes)


RULES: dict[str, Callable[[Call], Results]] = {
    "aten::linear": linear,
    "aten::addmm": addmm,
    "aten::matmul": matmul,
    "aten::mm": matmul,
    "aten::bmm": matmul,
    **dict.fromkeys(("aten::conv1d", "aten::conv2d", "aten::conv3d"), convolution),
    **dict.fromkeys(
        ("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d"), transposed_convolution
    ),
    "aten::batch_norm": channel_norm,
    "aten::instance_norm": channel_norm,
    "aten::layer_norm": layer_norm,
    "aten::rms_norm": layer_norm,
    "aten::embedding": embedding,
    "aten::prelu": prelu,
    "aten::scaled_dot_product_attention": attention,
}
