"""The mask: a mapping of bool tensors, one bit each, with the algebra of sets."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from lottery_tickets import Mask
from lottery_tickets.errors import MaskError, MaskMismatchError
from lottery_tickets.masks import as_mask

SHAPES = {"a.weight": (3, 7), "b.weight": (65,), "scalar": (), "empty": (0, 4), "conv.weight": (2, 3, 1, 5)}


@st.composite
def decisions(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Bool tensors of SHAPES."""
    chooser = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from((0.0, 0.3, 0.5, 1.0)))
    return {
        name: torch.from_numpy(np.atleast_1d(chooser.random(shape) < share)).reshape(shape)
        for name, shape in SHAPES.items()
    }


def tensors_of(mask: Mask) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in mask.items()}


# --- A mapping ---


@given(decisions())
def test_it_gives_back_what_it_was_made_from(kept):
    mask = Mask.from_tensors(kept)
    assert tensors_of(mask) == {name: tensor.tolist() for name, tensor in kept.items()}
    for name, tensor in mask.items():
        assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.bool, kept[name].shape, "cpu")
        assert mask.packed(name).tobytes() == oracles.packed(kept[name])
    assert (mask.names, dict(mask.shapes)) == (tuple(SHAPES), {n: torch.Size(s) for n, s in SHAPES.items()})
    assert (len(mask), list(mask), "scalar" in mask, "other" in mask) == (5, list(SHAPES), True, False)


@given(decisions())
def test_counts(kept):
    mask = Mask.from_tensors(kept)
    values = {name: oracles.flat(tensor) for name, tensor in kept.items()}
    assert mask.numel == sum(len(bits) for bits in values.values())
    assert mask.kept == sum(sum(bits) for bits in values.values())
    assert mask.sparsity == (mask.numel - mask.kept) / mask.numel
    assert mask.layer_kept() == {name: sum(bits) for name, bits in values.items()}
    assert mask.layer_numel() == {name: len(bits) for name, bits in values.items()}
    assert mask.layer_sparsity() == {
        name: (len(bits) - sum(bits)) / len(bits) if bits else 0.0 for name, bits in values.items()
    }


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64]
)
def test_zeros_and_ones_of_any_type_are_decisions(dtype):
    assert Mask.from_tensors({"w": torch.tensor([1, 0, 1], dtype=dtype)})["w"].tolist() == [True, False, True]


def test_strides_gradients_and_negative_zero_do_not_matter():
    values = torch.tensor([[1.0, -0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    assert Mask.from_tensors({"w": values.t()})["w"].tolist() == [[True, False, True], [False, True, True]]


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match="other"):
        Mask.from_tensors({"w": torch.ones(2)})["other"]


def test_masks_over_nothing():
    nothing = Mask.from_tensors({})
    assert (nothing.numel, nothing.kept, nothing.sparsity, len(nothing)) == (0, 0, 0.0, 0)
    assert nothing == ~nothing == nothing & {}


# --- Immutable, and nothing unpacked ---


def test_changing_what_went_in_or_came_out_changes_nothing():
    kept = torch.tensor([True, False, True])
    mask = Mask.from_tensors({"w": kept})
    digest = mask.digest()
    kept[0] = False
    mask["w"][1] = True
    assert mask["w"].tolist() == [True, False, True]
    assert mask.digest() == digest


def test_its_parts_refuse_writes():
    mask = Mask.from_tensors({"w": torch.ones(9)})
    with pytest.raises(ValueError, match="read-only"):
        mask.packed("w")[0] = 0
    with pytest.raises(TypeError):
        mask.shapes["w"] = torch.Size([1])
    with pytest.raises(TypeError):
        mask.metadata["seed"] = "0"
    with pytest.raises(TypeError):
        mask["w"] = torch.zeros(9)
    with pytest.raises(TypeError, match=r"Mask\.from_tensors"):
        Mask()


def test_no_attribute_holds_an_unpacked_tensor():
    numel = 1 << 20
    mask = Mask.from_tensors({"w": torch.ones(numel, dtype=torch.bool)})
    _ = mask["w"], mask.digest(), mask.kept, list(mask.items()), mask == ~mask, mask & mask
    assert not hasattr(mask, "__dict__")
    held, seen = [mask], set()
    size = 0
    while held:
        thing = held.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, torch.Tensor)
        size += thing.nbytes if isinstance(thing, np.ndarray) else 0
        held += gc.get_referents(thing) if not isinstance(thing, np.ndarray) else []
    assert size == numel // 8


# --- Identity ---


@given(decisions(), decisions())
def test_equal_masks_have_equal_digests_and_hashes(first, second):
    one, other = Mask.from_tensors(first), Mask.from_tensors(second)
    same = all(torch.equal(first[name], second[name]) for name in SHAPES)
    assert (one == other) == same == (one.digest() == other.digest())
    if same:
        assert hash(one) == hash(other)


def test_the_order_of_names_is_no_part_of_the_identity():
    kept = {"a": torch.ones(3), "b": torch.zeros(3)}
    one, other = Mask.from_tensors(kept), Mask.from_tensors(dict(reversed(kept.items())))
    assert (one == other, one.digest() == other.digest(), hash(one) == hash(other)) == (True, True, True)


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.tensor([1, 0, 1, 0, 1, 0])},
        {"w": torch.tensor([[1, 0, 1], [0, 1, 0]])},
        {"w": torch.tensor([1, 0, 1, 0, 1, 1])},
        {"w": torch.tensor([1, 0, 1, 0, 1, 0]), "v": torch.ones(1)},
        {"w": torch.tensor([1, 0, 1, 0, 1])},
        {},
    ],
)
def test_names_shapes_and_bits_are_the_identity(other):
    mask, other = Mask.from_tensors({"w": torch.tensor([1, 0, 1, 0, 1, 0])}), Mask.from_tensors(other)
    assert mask != other
    assert mask.digest() != other.digest()


def test_digest_stays_what_it_is():
    """Tickets are cited by their digest: another release must compute the same."""
    mask = Mask.from_tensors({"fc.weight": torch.tensor([[1, 0, 1], [0, 0, 1]]), "b": torch.ones(9)})
    assert mask.digest() == "994efe1370de9ed0358e4736f2bb1e754660f99b43ca115f73328e6ce710e53b"


def test_a_mask_is_no_dict():
    mask = Mask.from_tensors({"w": torch.ones(2)})
    assert mask != {"w": torch.ones(2)}
    assert mask != "mask"


@pytest.mark.parametrize(
    "twin",
    [copy.copy, copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_and_pickles(twin):
    mask = Mask.from_packed({"w": np.array([5], np.uint8)}, {"w": torch.Size([3])}, metadata={"seed": "1"})
    found = twin(mask)
    assert (found, found.metadata, found.digest()) == (mask, {"seed": "1"}, mask.digest())
    with pytest.raises(ValueError, match="read-only"):
        found.packed("w")[0] = 0


# --- Algebra ---


@given(decisions(), decisions())
def test_algebra_is_that_of_sets(first, second):
    one, other = Mask.from_tensors(first), Mask.from_tensors(second)
    for peer in (other, second):
        assert tensors_of(one & peer) == {name: (first[name] & second[name]).tolist() for name in SHAPES}
        assert tensors_of(one | peer) == {name: (first[name] | second[name]).tolist() for name in SHAPES}
        assert one.intersect_count(peer) == sum(int((first[name] & second[name]).sum()) for name in SHAPES)
    assert tensors_of(~one) == {name: (~first[name]).tolist() for name in SHAPES}
    assert (~~one, (one & ~one).kept, (one | ~one).kept) == (one, 0, one.numel)
    assert ~(one & other) == ~one | ~other


@pytest.mark.parametrize("operation", [Mask.__and__, Mask.__or__, Mask.intersect_count])
def test_masks_of_different_tensors_do_not_combine(operation):
    mask = Mask.from_tensors({"w": torch.ones(2, 3), "mine": torch.ones(2)})
    other = {"w": torch.ones(3, 2), "yours": torch.ones(2)}
    with pytest.raises(MaskMismatchError, match=r"\['mine', 'yours'\].*'w \(2, 3\) against \(3, 2\)'"):
        operation(mask, other)


def test_ones_like():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    whole = Mask.ones_like(model)
    assert (whole.names, whole.kept, whole.sparsity) == (("0.weight",), 15, 0.0)
    assert Mask.ones_like(whole) == whole == Mask.ones_like({"0.weight": torch.empty(5, 3, device="meta")})


# --- What is refused ---


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([0.0, 0.5]), r"fc\.weight: a mask holds only 0 and 1 \(or bool\), found 0\.5"),
        (torch.tensor([0, 2]), r"fc\.weight: .* found 2"),
        (torch.tensor([1, -1]), r"fc\.weight: .* found -1"),
        (torch.tensor([1.0, float("nan")]), r"fc\.weight: .* found nan"),
        (torch.tensor([1.0, float("inf")]), r"fc\.weight: .* found inf"),
        (torch.ones(2, device="meta"), r"fc\.weight: .* meta device"),
        (torch.ones(2).to_sparse(), r"fc\.weight: expected a dense tensor, got layout torch\.sparse_coo"),
        (torch.ones(2).bool().to_sparse(), r"fc\.weight: expected a dense tensor"),
        (np.ones(2), r"fc\.weight: expected a tensor of 0 and 1, got ndarray"),
        ([1, 0], r"fc\.weight: expected a tensor of 0 and 1, got list"),
        (None, r"fc\.weight: expected a tensor of 0 and 1, got NoneType"),
    ],
)
def test_what_is_no_decision_is_refused(tensor, message):
    with pytest.raises(MaskError, match=message):
        Mask.from_tensors({"ok": torch.ones(1), "fc.weight": tensor})


def test_names_are_text():
    with pytest.raises(MaskError, match="Mask names are strings; got 3 of type int"):
        Mask.from_tensors({3: torch.ones(1)})


@pytest.mark.parametrize("make", [as_mask, Mask.from_tensors])
@pytest.mark.parametrize(
    "given", ["ticket.safetensors", [torch.ones(2)], None, torch.ones(2), torch.nn.Linear(1, 1)]
)
def test_what_is_no_mapping_is_refused(make, given):
    with pytest.raises(MaskError, match=rf"dict of tensors .* got {type(given).__name__}.*Mask\.load\(path\)"):
        make(given)


@pytest.mark.parametrize(
    ("packed", "shape", "message"),
    [
        (np.zeros(2, np.uint8), (8,), r"w: shape \(8,\) takes 1 bytes of packed bits, got uint8 \(2,\)"),
        (np.zeros(0, np.uint8), (1,), r"takes 1 bytes .* got uint8 \(0,\)"),
        (np.zeros((1, 1), np.uint8), (8,), r"got uint8 \(1, 1\)"),
        (np.zeros(1, np.int8), (8,), r"got int8"),
        (b"\0", (8,), r"got bytes"),
        (np.array([8], np.uint8), (3,), "w: bits are set beyond the last of its 3 weights"),
        (np.zeros(0, np.uint8), (2**32, 2**32), "takes 2305843009213693952 bytes"),
    ],
)
def test_packed_bits_that_do_not_fit_are_refused(packed, shape, message):
    with pytest.raises(MaskError, match=message):
        Mask.from_packed({"w": packed}, {"w": torch.Size(shape)})


def test_packed_bits_and_shapes_name_the_same_tensors():
    with pytest.raises(MaskError, match=r"name different tensors: \['v', 'w'\]"):
        Mask.from_packed({"w": np.zeros(1, np.uint8)}, {"v": torch.Size([1])})


def test_packed_bits_may_lie_scattered():
    scattered = np.arange(16, dtype=np.uint8)[::2]
    mask = Mask.from_packed({"w": scattered}, {"w": torch.Size([64])})
    assert mask.digest() == Mask.from_packed({"w": scattered.copy()}, {"w": torch.Size([64])}).digest()
