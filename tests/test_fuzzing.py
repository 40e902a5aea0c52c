"""Files from strangers: whatever stands in a checkpoint or a ticket, it is read or refused, in little memory.

Valid files are damaged at random: bytes flipped, cut, repeated or inserted, lengths changed, values in the header
exchanged for hostile ones, keys taken away, renamed or repeated. A reader either takes the result or raises an
error of ours. The slow form runs a hundred thousand cases, the one in the gate some hundreds of the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lottery_tickets import Mask, create_magnitude_mask
from lottery_tickets.errors import CheckpointError, LotteryTicketError, MaskFileError
from lottery_tickets.large_models import compute_weights_digest, prune_checkpoint, read_checkpoint

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
SLOW = settings(QUICK, max_examples=50_000, derandomize=False)
# What reading takes whatever the file: buffers, the interpreter's own, and an error's message.
CONSTANT = 128 << 10

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
TENSORS = {UP: torch.arange(48.0).view(6, 8).bfloat16(), DOWN: torch.arange(24.0).view(4, 6)}
CHECKPOINT = save(TENSORS, {"format": "pt"})
MASK = Mask.from_tensors({UP: torch.arange(48).view(6, 8) % 2, DOWN: torch.ones(4, 6)})

NUMBERS = (-1, 0, 1, 2, 7, 8, 96, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)
hostile = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from((None, True, 1.5, 1e308, "", "F32", "BF16", "I8", "F8_E4M3", "INT4", "../x", "\ud800", "\0")),
    st.lists(st.sampled_from(NUMBERS), max_size=4),
    st.just([2] * 100),
    st.just({"w": 1}),
)


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def changed_header(draw: st.DrawFn, content: bytes) -> bytes:
    """The same data behind a header in which a value, a key or a field is another."""
    header, data = parts_of(content)
    name = draw(st.sampled_from(sorted(header)))
    fields = header[name]
    match draw(st.sampled_from(("value", "field", "key", "gone", "twice", "length", "data"))):
        case "value":
            header[name] = draw(hostile)
        case "field":
            fields[draw(st.sampled_from(sorted(fields)))] = draw(hostile)
        case "key":
            header[draw(st.sampled_from((*header, "x", "", "__metadata__", "\ud800")))] = header.pop(name)
        case "gone":
            del header[name]
        case "twice":
            text = json.dumps(header)[:-1] + ", " + json.dumps(name) + ": " + json.dumps(fields) + "}"
            return framed(text.encode(), data)
        case "length":
            text = json.dumps(header).encode()
            return draw(st.sampled_from(NUMBERS[1:12])).to_bytes(8, "little") + text + data
        case "data":
            data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=40))
    return framed(json.dumps(header).encode(), data)


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes other than they were, less or more of them."""
    place = draw(st.integers(0, len(content) - 1))
    match draw(st.sampled_from(("flip", "cut", "insert", "repeat", "many"))):
        case "flip":
            return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + draw(st.binary(min_size=1, max_size=20)) + content[place:]
        case "repeat":
            return content[:place] + content[max(0, place - draw(st.integers(1, 200))) :]
        case _:
            new = draw(st.binary(min_size=1, max_size=30))
            return (content[:place] + new + content[place + len(new) :])[: len(content)]


def framed(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Damage of either kind, or text of any kind as header, or anything at all."""
    return st.one_of(
        changed_header(content),
        changed_bytes(content),
        changed_header(content).flatmap(changed_bytes),
        st.recursive(hostile, lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3)).map(
            lambda thing: framed(json.dumps(thing).encode(), b"\0" * 16)
        ),
        st.binary(max_size=60),
    )


@contextmanager
def little_memory(size: int) -> Iterator[None]:
    """Refuse more than twice the bytes that are read, and a constant."""
    tracemalloc.start(1)
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 2 * size + CONSTANT, peak


def read_damaged_checkpoint(home: Path, content: bytes) -> None:
    """Read, draw a mask by names, and make a pruned copy, as far as each is possible."""
    folder, pruned = home / "checkpoint", home / "pruned"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    try:
        with little_memory(len(content)):
            read_checkpoint(folder)
    except CheckpointError:
        return
    compute_weights_digest(folder)
    try:
        mask = create_magnitude_mask(folder, 0.5, progress=False)
    except LotteryTicketError:
        return
    try:
        prune_checkpoint(folder, mask, pruned, progress=False)
        assert read_checkpoint(pruned).tensors == read_checkpoint(folder).tensors
    finally:
        shutil.rmtree(pruned, ignore_errors=True)


def read_damaged_ticket(home: Path, content: bytes) -> None:
    """Load it; what loads says the truth about itself."""
    path = home / "ticket"
    path.write_bytes(content)
    try:
        with little_memory(len(content)):
            mask = Mask.load(path)
    except MaskFileError:
        return
    assert mask.numel >= mask.kept >= 0
    mask.save(path)
    assert Mask.load(path) == mask


@st.composite
def damaged_indexes(draw: st.DrawFn) -> str:
    """An index of shards, with names that lead elsewhere, values that are none, or broken as text."""
    places: Any = {UP: "a.safetensors", DOWN: "b.safetensors"}
    names = st.sampled_from(
        ("a.safetensors", "b.safetensors", "c", "..", "../a.safetensors", "/dev/zero", "x" * 300)
    )
    places[draw(st.sampled_from((UP, DOWN, "other", "\ud800")))] = draw(st.one_of(names, hostile))
    index = draw(st.sampled_from(({"weight_map": places}, places, [places], {"weight_map": [places]})))
    text = json.dumps(index)
    cut = draw(st.one_of(st.none(), st.integers(0, len(text))))
    return text if cut is None else text[:cut]


def read_damaged_index(home: Path, text: str) -> None:
    """Read it, beside shards that are whole."""
    folder = home / "shards"
    if not folder.is_dir():
        folder.mkdir()
        for file, key in (("a", UP), ("b", DOWN)):
            (folder / f"{file}.safetensors").write_bytes(save({key: TENSORS[key]}))
    (folder / "model.safetensors.index.json").write_text(text)
    try:
        with little_memory(len(text) + len(CHECKPOINT)):
            checkpoint = read_checkpoint(folder)
    except CheckpointError:
        return
    assert checkpoint.tensors.keys() <= TENSORS.keys()


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder in memory, where the system has one: a disk takes milliseconds for each of so many files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("ticket") / "ticket"
    MASK.save(path, metadata={"criterion": "magnitude"})
    return path.read_bytes()


def runs(
    setting: settings, strategy: st.SearchStrategy[Any], read: Callable[[Path, Any], None], home: Path
) -> None:
    """Read what the strategy draws, so many times as the setting says."""

    @setting
    @given(strategy)
    def read_one(content: Any) -> None:
        read(home, content)

    read_one()


@pytest.mark.filterwarnings("ignore::lottery_tickets.LayerCollapseWarning")
@pytest.mark.parametrize("setting", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
class TestDamage:
    """Each reader, in its quick and its slow form."""

    def test_of_a_checkpoint(self, setting: settings, home: Path) -> None:
        runs(setting, damaged(CHECKPOINT), read_damaged_checkpoint, home)

    def test_of_a_ticket(self, setting: settings, home: Path, ticket: bytes) -> None:
        runs(setting, damaged(ticket), read_damaged_ticket, home)

    def test_of_an_index(self, setting: settings, home: Path) -> None:
        fewer = settings(setting, max_examples=setting.max_examples // 5)
        runs(fewer, damaged_indexes(), read_damaged_index, home)


BOMBS = {
    "a shape of a million": b'{"w":{"dtype":"U8","shape":[' + b"1," * 1_000_000 + b'1],"data_offsets":[0,1]}}',
    "a million tensors": b"{" + b",".join(b'"%d":{}' % number for number in range(200_000)) + b"}",
    "lists in lists": b'{"w":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "digits": b'{"w":' + b"7" * 1_000_000 + b"}",
    "a million escapes": b'{"' + rb"\u00e9" * 200_000 + b'":1}',
    "objects in a list": b'{"w":[' + b'{"":1},' * 200_000 + b"1]}",
    "one letter of four bytes": ('{"' + "a" * 1_000_000 + "\N{GRINNING FACE}" + '":1}').encode(),
}
# What a header may take as objects where it is all there is to a file, beside twice the file.
ALLOWED = 64 << 20


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_headers_that_are_all_there_is_to_a_file(tmp_path: Path, text: bytes) -> None:
    """JSON takes many times its text as objects: within a bound where it is short, else it is not parsed."""
    (tmp_path / "model.safetensors").write_bytes(framed(text, b"\0"))
    tracemalloc.start(1)
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
            read_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(text) + ALLOWED
    finally:
        tracemalloc.stop()


def test_a_header_that_could_take_more_is_not_parsed(tmp_path: Path) -> None:
    described = b",".join(
        b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(40_000)
    )
    for file, message in (
        ("model.safetensors", "bytes of JSON"),
        ("model.safetensors.index.json", "bytes of JSON"),
    ):
        folder = tmp_path / file.replace(".", "-")
        folder.mkdir()
        text = b"{" + described + b"}"
        (folder / file).write_bytes(framed(text, b"") if file == "model.safetensors" else text)
        with little_memory(len(text)), pytest.raises(CheckpointError, match=message):
            read_checkpoint(folder)


def test_a_long_header_of_a_large_file_is_read(tmp_path: Path) -> None:
    """Where the data are many times the header, as they are in files that models are saved in."""
    entries = {f"t{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(40_000)}
    data = 40 << 20
    entries["w"] = {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}
    text = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(framed(text, b""))
        file.truncate(8 + len(text) + data)
    assert len(read_checkpoint(tmp_path).tensors) == 40_001
