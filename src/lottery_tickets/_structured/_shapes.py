"""Rules of operations that move, cut or put together tensors, and of those that work weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from lottery_tickets._structured._call import Call, Results, dim_of
from lottery_tickets._structured._indices import Dims, Indices, Nodes, Value

Rule = Callable[[Call], Results]


def elementwise(call: Call) -> Results:
    """Every operand broadcast; indices that meet leave together."""
    shape = call.shape
    operands = list(call.operands())
    dims: list[Nodes | None] = []
    for behind in range(-len(shape), 0):
        met = [
            value.dims[behind]
            for value, sizes in operands
            if -behind <= len(sizes) and sizes[behind] == shape[behind]
        ]
        dims.append(_joined(call.indices, met, call.why))
    return Value(tuple(dims))


def _joined(indices: Indices, nodes: Sequence[Nodes | None], why: str) -> Nodes | None:
    tracked = [one for one in nodes if one is not None]
    if not tracked:
        return None
    if len(tracked) < len(nodes):
        for one in tracked:
            indices.pin(one, why)
        return None
    for first, second in pairwise(tracked):
        indices.join(first, second, why)
    return tracked[0]


def reshape(call: Call) -> Results:
    """Row-major, so the dimensions fall into runs of the same number of elements before and after."""
    x, before, after = call.given("self"), call.shape_in("self"), call.shape
    if 0 in before:
        return call.refuse()
    dims: list[Nodes | None] = []
    for into, out in _runs(before, after):
        dims.extend(_reshaped(call, x.dims[into[0] : into[1]], before[into[0] : into[1]], after[out[0] : out[1]]))
    return Value(tuple(dims), weight=x.weight)


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Shortest runs of dimensions that hold as many elements before as after."""
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        runs.append(((first, i), (second, j)))
    return runs


def _reshaped(call: Call, dims: Dims, before: Sequence[int], after: Sequence[int]) -> list[Nodes | None]:
    tracked = [place for place, nodes in enumerate(dims) if nodes is not None]
    nothing: list[Nodes | None] = [None] * len(after)
    if not tracked:
        return nothing
    if len(tracked) > 1:
        call.indices.pin_all((Value(dims),), call.why)
        return nothing
    (place,) = tracked
    nodes = dims[place]
    assert nodes is not None
    along = nodes.reshape((-1,) + (1,) * (len(before) - place - 1))
    flat = np.broadcast_to(along, tuple(before)).reshape(tuple(after))
    for axis, size in enumerate(after):
        line = np.moveaxis(flat, axis, 0).reshape(size, -1)
        if size > 1 and (line == line[:, :1]).all():
            nothing[axis] = line[:, 0].copy()
            return nothing
    # Indices are spread over several dimensions: those at one place of the first leave together.
    outer = next(axis for axis, size in enumerate(after) if size > 1)
    line = np.moveaxis(flat, outer, 0).reshape(after[outer], -1)
    call.indices.joined.append((np.repeat(line[:, 0], line.shape[1]), line.reshape(-1).copy()))
    nothing[outer] = line[:, 0].copy()
    return nothing


def permute(call: Call) -> Results:
    """Dimensions in another order."""
    x = call.given("self")
    order = [dim_of(dim, x.dims) for dim in call.get("dims")]
    return Value(tuple(x.dims[dim] for dim in order), x.weight)


def transpose(call: Call) -> Results:
    """Two dimensions changed for each other."""
    x = call.given("self")
    dims = list(x.dims)
    first, second = dim_of(call.get("dim0"), x.dims), dim_of(call.get("dim1"), x.dims)
    dims[first], dims[second] = dims[second], dims[first]
    return Value(tuple(dims), x.weight)


def transpose_last(call: Call) -> Results:
    """`t`, `mT`, `numpy_T` of matrices."""
    x = call.given("self")
    return Value((*x.dims[:-2], *reversed(x.dims[-2:])), x.weight)


def expand(call: Call) -> Results:
    """Dimensions of size 1 repeated: no index of them leaves."""
    x = call.given("self")
    return Value((*(None,) * (len(call.shape) - len(x.dims)), *x.dims))


def passes(call: Call) -> Results:
    """A copy, a cast, or a function of each number alone."""
    return next(call.tensors())


def untracked(call: Call) -> Results:
    """Something new of the shape of what goes in."""
    return call.unknown()


def cut(call: Call) -> Results:
    """Slices, selections, padding: what is cut along must stay."""
    x = call.given("self")
    dim = dim_of(call.get("dim"), x.dims)
    size = call.shape_in("self")[dim]
    if len(call.shape) == len(x.dims) and call.shape[dim] == size:
        return x
    call.indices.pin(x.dims[dim], call.why)
    kept = () if len(call.shape) < len(x.dims) else (None,)
    return Value((*x.dims[:dim], *kept, *x.dims[dim + 1 :]))


def chunk(call: Call) -> Results:
    """As many equal pieces whatever the size: indices at the same place of each leave together."""
    x, pieces = call.given("self"), call.unknown()
    assert isinstance(pieces, tuple)
    dim = dim_of(call.get("dim"), x.dims)
    nodes = x.dims[dim]
    if nodes is not None and len(nodes) % len(pieces):
        call.indices.pin(nodes, call.why)
        nodes = None
    if nodes is not None:
        by_piece = nodes.reshape(len(pieces), -1)
        call.indices.joined.extend((by_piece[0], other) for other in by_piece[1:])
        nodes = by_piece[0]
    return tuple(Value((*x.dims[:dim], nodes, *x.dims[dim + 1 :])) for _ in pieces)


def split(call: Call) -> Results:
    """Pieces of given sizes: what is cut along must stay."""
    x, pieces = call.given("self"), call.unknown()
    assert isinstance(pieces, tuple)
    dim = dim_of(call.get("dim"), x.dims)
    call.indices.pin(x.dims[dim], call.why)
    return tuple(Value((*x.dims[:dim], None, *x.dims[dim + 1 :])) for _ in pieces)


def concatenate(call: Call) -> Results:
    """End to end in one dimension; in the others indices meet."""
    values = call.listed("tensors")
    dim = dim_of(call.get("dim"), values[0].dims)
    sizes = [node.meta["val"].shape[dim] for node in call.get("tensors")]
    dims: list[Nodes | None] = []
    for place in range(len(call.shape)):
        nodes = [value.dims[place] for value in values]
        if place != dim:
            dims.append(_joined(call.indices, nodes, call.why))
        elif all(one is None for one in nodes):
            dims.append(None)
        else:
            dims.append(np.concatenate([_or_pinned(call, *one) for one in zip(nodes, sizes, strict=True)]))
    return Value(tuple(dims))


def _or_pinned(call: Call, nodes: Nodes | None, size: int) -> Nodes:
    if nodes is not None:
        return nodes
    new = call.indices.new(size)
    call.indices.pin(new, call.why)
    return new


def reduce(call: Call) -> Results:
    """Means, sums, softmax: what is gone over must stay."""
    x = call.given("self")
    given = call.get("dim")
    listed = range(len(x.dims)) if given is None or given == [] else given if isinstance(given, list) else [given]
    over = {dim_of(dim, x.dims) for dim in listed}
    call.indices.pin_all((Value(tuple(x.dims[dim] for dim in over)),), call.why)
    whole = call.unknown()
    if not isinstance(whole, Value):
        return (
            whole if all(x.dims[dim] is None for dim in range(len(x.dims)) if dim not in over) else call.refuse()
        )
    if len(whole.dims) == len(x.dims):
        return Value(tuple(None if dim in over else nodes for dim, nodes in enumerate(x.dims)))
    return Value(tuple(nodes for dim, nodes in enumerate(x.dims) if dim not in over))


def over_places(call: Call) -> Results:
    """Pooling and resampling: samples and channels as they were, places anew."""
    x = call.given("self") if call.get("self") is not None else call.given("input")
    shape = call.shape
    if len(x.dims) != len(shape) or len(shape) < 3:
        return call.refuse()
    call.indices.pin_all((Value(x.dims[2:]),), call.why)
    return Value((*x.dims[:2], *(None,) * (len(shape) - 2)))


def pad(call: Call) -> Results:
    """Dimensions that grow must stay."""
    x = call.given("self")
    dims = list(x.dims)
    for place, (before, after) in enumerate(zip(call.shape_in("self"), call.shape, strict=True)):
        if before != after:
            call.indices.pin(dims[place], call.why)
            dims[place] = None
    return Value(tuple(dims))


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    """The same rule for several operations, also where they write into their argument."""
    return {f"aten::{name}{inplace}": rule for name in names.split() for inplace in ("", "_")}


RULES: dict[str, Rule] = {
    **_named(
        """abs acos add addcdiv addcmul alpha_dropout bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max
        clamp_min cos div dropout elu eq erf exp expm1 feature_dropout floor ge gelu gt hardsigmoid hardswish
        hardtanh isinf isnan le leaky_relu log log1p log_sigmoid logical_and logical_not logical_or lt masked_fill
        maximum minimum mish mul ne neg pow reciprocal relu relu6 round rsqrt rsub selu sigmoid sign silu sin
        softplus softsign sqrt square sub tanh threshold true_divide where __and__ __or__""",
        elementwise,
    ),
    **_named("alias clone contiguous detach lift_fresh_copy to _to_copy type_as", passes),
    **_named("view reshape _unsafe_view flatten unflatten squeeze unsqueeze", reshape),
    **_named("full_like new_full new_ones new_zeros ones_like rand_like randn_like zeros_like", untracked),
    **_named(
        """all amax amin any argmax argmin cumsum log_softmax logsumexp max mean min norm prod softmax std sum var
        var_mean""",
        reduce,
    ),
    **_named(
        """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d
        avg_pool3d max_pool1d max_pool2d max_pool3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d""",
        over_places,
    ),
    **_named("t mT numpy_T", transpose_last),
    **_named("slice select narrow", cut),
    **_named("split split_with_sizes", split),
    **_named("pad constant_pad_nd", pad),
    "aten::_assert_tensor_metadata": untracked,
    "aten::permute": permute,
    "aten::transpose": transpose,
    "aten::expand": expand,
    "aten::chunk": chunk,
    "aten::cat": concatenate,
}
