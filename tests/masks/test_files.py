"""Ticket files: what was saved comes back, and what is not whole is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lottery_tickets import Mask, _atomic
from lottery_tickets.errors import MaskFileError
from lottery_tickets.masks import _files
from processes import run_python

MASK = Mask.from_tensors(
    {
        "fc.weight": torch.tensor([[1, 0, 1], [0, 0, 1]]),
        "scalar": torch.tensor(True),
        "empty": torch.empty(0, 3, dtype=torch.bool),
        "conv.weight": torch.arange(150).reshape(2, 3, 5, 5) % 3 == 0,
    }
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved ticket."""
    MASK.save(tmp_path / "ticket.safetensors", {"criterion": "magnitude", "seed": "0"})
    return tmp_path / "ticket.safetensors"


def parts_of(path: Path) -> tuple[dict, bytes]:
    """Header and body of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: dict | bytes, body: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def with_metadata(path: Path, **changes: object) -> None:
    """Rewrite the file with other metadata; None removes a key."""
    header, body = parts_of(path)
    metadata = {**header["__metadata__"], **changes}
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}
    write(path, header, body)


# --- Round trips ---


def test_round_trip(path):
    found = Mask.load(path)
    assert found == MASK
    assert found.shapes == MASK.shapes
    assert dict(found.metadata) == {"criterion": "magnitude", "seed": "0"}


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        max_size=4,
    ),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda key: key not in _files._RESERVED),
        st.text(st.characters(codec="utf-8")),
    ),
    st.integers(0, 2**32 - 1),
)
def test_any_names_shapes_and_metadata_come_back(tmp_path_factory, shapes, metadata, seed):
    chooser = np.random.default_rng(seed)
    mask = Mask.from_tensors(
        {
            name: torch.from_numpy(np.atleast_1d(chooser.random(shape) < 0.5)).reshape(shape)
            for name, shape in shapes.items()
        }
    )
    path = tmp_path_factory.mktemp("files") / "ticket"
    mask.save(path, metadata)
    found = Mask.load(path)
    assert (found, dict(found.metadata), found.names) == (mask, metadata, mask.names)


def test_what_every_file_says(path):
    header, _ = parts_of(path)
    metadata = header["__metadata__"]
    assert metadata["format"] == "lottery_tickets.mask"
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["shapes"]) == {name: list(shape) for name, shape in MASK.shapes.items()}
    assert (int(metadata["numel"]), int(metadata["kept"])) == (MASK.numel, MASK.kept)
    assert float(metadata["sparsity"]) == MASK.sparsity
    assert metadata["digest"] == MASK.digest()
    assert metadata["library_version"] == "0.1.0"
    assert metadata["criterion"] == "magnitude"


def test_metadata_is_carried_along_and_added_to(path):
    Mask.load(path).save(path, {"seed": "1", "base_model": "net"})
    assert dict(Mask.load(path).metadata) == {"criterion": "magnitude", "seed": "1", "base_model": "net"}


def test_a_file_is_an_eighth_of_a_byte_a_weight_and_a_header(tmp_path):
    names = [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(210)]
    mask = Mask.ones_like({name: torch.empty(576, 576, device="meta") for name in names})
    mask.save(tmp_path / "ticket")
    assert (tmp_path / "ticket").stat().st_size <= mask.numel / 8 + 64 * 1024


def test_paths_may_be_text(tmp_path):
    MASK.save(str(tmp_path / "ticket"))
    assert Mask.load(str(tmp_path / "ticket")) == MASK


def test_any_safetensors_reader_can_open_it(path):
    """The bits in the file are those that numpy packs, so other programs can read tickets."""
    code = (
        "import sys, json, numpy as np; from safetensors import safe_open\n"
        "with safe_open(sys.argv[1], 'numpy') as file:\n"
        "    shape = json.loads(file.metadata()['shapes'])['conv.weight']\n"
        "    bits = np.unpackbits(file.get_tensor('conv.weight'), count=np.prod(shape), bitorder='little')\n"
        "print(np.flatnonzero(bits).tolist())"
    )
    printed = run_python(code, path)
    assert json.loads(printed) == list(range(0, 150, 3))


def test_no_pickle_anywhere():
    assert "pickle" not in Path(_files.__file__).read_text().replace("no pickle", "")


# --- Saving fails ---


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_ticket_and_nothing_else(path, monkeypatch, failure):
    def save_half(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise failure

    before = path.read_bytes()
    monkeypatch.setattr(_files, "save_file", save_half)
    with pytest.raises(type(failure)):
        MASK.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_does_not_sync_leaves_the_old_ticket(path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    before = path.read_bytes()
    monkeypatch.setattr(_atomic, "_sync", fail)
    with pytest.raises(OSError, match="Input/output"):
        (~MASK).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"digest": "mine"}, "'digest' belongs to the format; choose another name"),
        ({"seed": 3}, r"'seed': values are text, got int; use str\(\)"),
        ({3: "seed"}, "3: keys are text, got int"),
    ],
)
def test_metadata_that_cannot_be_saved(path, metadata, message):
    before = path.read_bytes()
    with pytest.raises(MaskFileError, match=message):
        MASK.save(path, metadata)
    assert path.read_bytes() == before


def test_the_name_that_safetensors_keeps_for_itself(tmp_path):
    with pytest.raises(MaskFileError, match=r"__metadata__: .* rename the tensor"):
        Mask.from_tensors({"__metadata__": torch.ones(3)}).save(tmp_path / "ticket")
    assert not any(tmp_path.iterdir())


# --- Loading refuses ---


def test_a_file_cut_anywhere_is_refused(path):
    """Every place: inside the length, the header, the bits of each tensor."""
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(MaskFileError, match=rf"{path.name}: .*truncated or damaged .*get the ticket again"):
            Mask.load(path)


def test_a_bit_flipped_anywhere_is_refused_or_says_the_same(path):
    """A flip in the bits or in what identifies the ticket is found; in free text it may not be."""
    content = path.read_bytes()
    body = len(content) - len(parts_of(path)[1])
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(bytes(flipped))
        if place >= body:
            with pytest.raises(MaskFileError):
                Mask.load(path)
        else:
            with contextlib.suppress(MaskFileError):
                assert Mask.load(path) == MASK


def test_bytes_after_the_end_are_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(MaskFileError, match="damaged"):
        Mask.load(path)


def shape_change(text: str):
    return lambda path: with_metadata(path, shapes=text)


def shapes_with(**changes: object) -> str:
    return json.dumps({**{name: list(shape) for name, shape in MASK.shapes.items()}, **changes})


def set_bit_beyond(path: Path) -> None:
    header, body = parts_of(path)
    place = header["fc.weight"]["data_offsets"][0]
    write(path, header, body[:place] + bytes([body[place] | 0x40]) + body[place + 1 :])


def flip_bit(path: Path) -> None:
    header, body = parts_of(path)
    place = header["conv.weight"]["data_offsets"][0]
    write(path, header, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])


def rename_tensor(path: Path) -> None:
    header, body = parts_of(path)
    header["other"] = header.pop("fc.weight")
    write(path, header, body)


def other_type(path: Path) -> None:
    header, body = parts_of(path)
    header["fc.weight"]["dtype"] = "I8"
    write(path, header, body)


REFUSED = {
    "empty file": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "no safetensors": (lambda path: path.write_bytes(b"PK\x03\x04" * 100), "not a whole safetensors file"),
    "huge header length": (lambda path: path.write_bytes(struct.pack("<Q", 2**63) + b"{}"), "header too large"),
    "header longer than file": (lambda path: path.write_bytes(struct.pack("<Q", 10**7) + b"{}"), "not a whole"),
    "header no JSON": (lambda path: write(path, b"{nonsense", b""), "not a whole safetensors file"),
    "a tensor larger than the file": (
        lambda path: write(path, {"w": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}, b""),
        "not a whole safetensors file",
    ),
    "other safetensors file": (
        lambda path: save_file({"w": np.zeros(3)}, path),
        "no metadata, so this is not a ticket; tickets are written by Mask.save",
    ),
    "other format": (lambda path: with_metadata(path, format="pt"), "format is 'pt', a ticket says"),
    "no format": (lambda path: with_metadata(path, format=None), "format is None, a ticket says"),
    "newer version": (
        lambda path: with_metadata(path, format_version="2"),
        "format version '2' is unknown here, this library reads '1'; update lottery-tickets",
    ),
    "no version": (lambda path: with_metadata(path, format_version=None), "format version None is unknown"),
    "metadata missing": (
        lambda path: with_metadata(path, digest=None, kept=None),
        "missing metadata: digest, kept",
    ),
    "shapes no JSON": (shape_change("{w:"), "'shapes' is not readable JSON"),
    "shapes nested without end": (shape_change("[" * 100_000), "'shapes' is not readable JSON"),
    "shapes with endless digits": (shape_change('{"w":[' + "9" * 5000 + "]}"), "'shapes' is not readable JSON"),
    "shapes no mapping": (shape_change("[]"), "must map names to lists of sizes"),
    "shape no list": (shape_change(shapes_with(scalar=3)), "scalar: shape 3 is not a list of non-negative"),
    "shape of fractions": (shape_change(shapes_with(scalar=[1.0])), r"scalar: shape \[1\.0\] is not a list"),
    "shape of truths": (shape_change(shapes_with(scalar=[True])), r"scalar: shape \[True\] is not a list"),
    "shape negative": (shape_change(shapes_with(scalar=[-1, -1])), r"scalar: shape \[-1, -1\] is not a list"),
    "shape that wraps around": (
        shape_change(shapes_with(empty=[2**32, 2**32])),
        r"empty: shape \[4294967296, 4294967296\] holds more weights than a tensor can",
    ),
    "shape beyond 64 bits": (shape_change(shapes_with(empty=[0, 2**70])), "empty: shape .* more weights than"),
    "shape that does not fit": (
        shape_change(shapes_with(**{"fc.weight": [3, 3]})),
        r"fc\.weight: its shape takes 2 bytes of packed bits, the file holds U8 \[1\]",
    ),
    "shape huge": (
        shape_change(shapes_with(scalar=[2**50])),
        r"scalar: its shape takes .* the file holds U8 \[1\]",
    ),
    "shape turned": (shape_change(shapes_with(**{"fc.weight": [3, 2]})), "wrong digest"),
    "shape for no bits": (shape_change(shapes_with(more=[1])), r"shape without bits: \['more'\]"),
    "bits for no shape": (rename_tensor, r"bits without a shape .*: \['fc\.weight', 'other'\]"),
    "bits of another type": (other_type, r"fc\.weight: .* the file holds I8"),
    "bits beyond the end": (set_bit_beyond, r"fc\.weight: bits are set beyond the last of its 6 weights"),
    "a bit changed": (flip_bit, "wrong digest: the file says [0-9a-f]{64}, its bits give [0-9a-f]{64}"),
    "another digest": (lambda path: with_metadata(path, digest="0" * 64), "wrong digest: the file says 0{64}"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_damaged_files_are_refused(path, damage, message):
    damage(path)
    with pytest.raises(MaskFileError, match=message) as error:
        Mask.load(path)
    assert str(path) in str(error.value)


def test_a_folder_is_no_ticket(tmp_path):
    with pytest.raises(
        MaskFileError, match=r"a folder, not a ticket file; give the path of the \.safetensors file"
    ):
        Mask.load(tmp_path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        Mask.load(tmp_path / "nothing")


def test_equal_tickets_give_equal_files(tmp_path):
    mask = Mask.from_tensors({f"layer.{index}": torch.arange(index) % 2 for index in range(5)})
    metadata = {key: f'{key} \u00e9 " \\ \n \x01' for key in "abcdefgh"}
    for name in ("one", "two", "three"):
        mask.save(tmp_path / name, metadata=metadata)
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two == three
    assert dict(Mask.load(tmp_path / "one").metadata) == metadata
