"""Pruned copies that are interrupted: what is finished is kept, what is half done is not."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lottery_tickets import Mask
from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models import _copies, prune_checkpoint, read_checkpoint
from processes import run_python

SHARDS = 3
MASK = {f"layer.{index}.weight": torch.arange(40).view(5, 8) % 3 > 0 for index in range(SHARDS)}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Three shards with a weight each, their index and a configuration."""
    folder = tmp_path / "dense"
    folder.mkdir()
    places = {}
    for index, name in enumerate(MASK):
        file = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: torch.randn(5, 8).bfloat16()}, folder / file)
        places[name] = file
    (folder / "model.safetensors.index.json").write_text(str({"weight_map": places}).replace("'", '"'))
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[str]]:
    """`interrupt(count, error)` lets so many shards be written and half of the next; returns what is written."""
    write = _copies._write_pruned

    def set_up(count: int, error: BaseException) -> list[str]:
        written: list[str] = []

        def write_some(checkpoint, shard, bits, target):
            if len(written) == count:
                target.write_bytes(b"half")
                raise error
            written.append(shard)
            write(checkpoint, shard, bits, target)

        monkeypatch.setattr(_copies, "_write_pruned", write_some)
        return written

    return set_up


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_same_call_goes_on_after_a_failure(tmp_path, dense, interrupt, error):
    before = contents(dense)
    prune_checkpoint(dense, MASK, tmp_path / "expected")
    written = interrupt(2, error)
    with pytest.raises(type(error)):
        prune_checkpoint(dense, MASK, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
    assert len(written) == 2
    again = interrupt(SHARDS, AssertionError())
    prune_checkpoint(dense, MASK, tmp_path / "pruned")
    assert again == [shard for shard in read_checkpoint(dense).shards if shard not in written]
    assert contents(tmp_path / "pruned") == contents(tmp_path / "expected")
    assert contents(dense) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "expected", "pruned"]


def test_a_failure_before_anything_is_finished_leaves_nothing(tmp_path, dense, interrupt):
    (dense / "config.json").unlink()
    (dense / "model.safetensors.index.json").unlink()
    (dense / "model-00001-of-00003.safetensors").rename(dense / "model.safetensors")
    interrupt(0, OSError(28, "No space left on device"))
    mask = {"layer.0.weight": MASK["layer.0.weight"]}
    with pytest.raises(OSError, match="No space left"):
        prune_checkpoint(dense, mask, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_a_kill_left_half_written_is_removed(tmp_path, dense, interrupt):
    interrupt(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(dense, MASK, tmp_path / "pruned")
    interrupt(SHARDS, AssertionError())
    (tmp_path / ".pruned.partial/files/.model.safetensors.x1.tmp").write_bytes(b"half")
    prune_checkpoint(dense, MASK, tmp_path / "pruned")
    assert contents(tmp_path / "pruned").keys() == contents(dense).keys()


@pytest.mark.parametrize("changed", ["mask", "weights"])
def test_what_was_left_for_something_else_is_not_taken(tmp_path, dense, interrupt, changed):
    interrupt(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(dense, MASK, tmp_path / "pruned")
    mask = {name: ~bits for name, bits in MASK.items()} if changed == "mask" else MASK
    if changed == "weights":
        save_file({"layer.0.weight": torch.ones(5, 8).bfloat16()}, dense / "model-00001-of-00003.safetensors")
    written = interrupt(SHARDS, AssertionError())
    prune_checkpoint(dense, mask, tmp_path / "pruned")
    assert written == read_checkpoint(dense).shards
    interrupt(SHARDS, AssertionError())
    prune_checkpoint(dense, mask, tmp_path / "expected")
    assert contents(tmp_path / "pruned") == contents(tmp_path / "expected")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, dense):
    (tmp_path / ".pruned.partial").mkdir()
    (tmp_path / ".pruned.partial/mine").write_text("mine")
    with pytest.raises(CheckpointError, match=r"\.pruned\.partial is in the way, .* move it"):
        prune_checkpoint(dense, MASK, tmp_path / "pruned")
    assert contents(tmp_path / ".pruned.partial") == {"mine": b"mine"}


def test_too_little_room_is_said_before_anything_is_written(tmp_path, dense, monkeypatch):
    total = sum(len(content) for content in contents(dense).values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, total - 1))
    with pytest.raises(CheckpointError, match=rf"{total:,} bytes are to be written, and {total - 1:,} are free"):
        prune_checkpoint(dense, MASK, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, total))
    prune_checkpoint(dense, MASK, tmp_path / "pruned")


def test_a_link_out_of_the_folder_is_not_copied(tmp_path, dense):
    (tmp_path / "secret").write_text("secret")
    (dense / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link to .*secret, outside the checkpoint's folder"):
        prune_checkpoint(dense, MASK, tmp_path / "pruned")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "secret"]


def test_a_shard_that_shrinks_while_it_is_read(tmp_path, dense, monkeypatch):
    write = _copies._write_pruned

    def write_after_cut(checkpoint, shard, bits, target):
        path = dense / shard
        path.write_bytes(path.read_bytes()[:-1])
        write(checkpoint, shard, bits, target)

    monkeypatch.setattr(_copies, "_write_pruned", write_after_cut)
    with pytest.raises(CheckpointError, match="cut short while it was read"):
        prune_checkpoint(dense, MASK, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


KILLER = """
import os, signal, sys
from itertools import count
from pathlib import Path
import numpy as np
from lottery_tickets import Mask, _kernels
from lottery_tickets.large_models import prune_checkpoint

weights = np.zeros(64, np.int16)
_kernels.keep(weights, np.zeros(8, np.uint8), weights)  # loading it takes more calls than all the rest
dense, ticket, home = map(Path, sys.argv[1:4])
moments = int(sys.argv[4])

def prune(moment, output):
    # A child for each, and no computing beforehand: threads that a computation leaves behind survive no fork.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = count()
        def counted(*_):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        mask = Mask.load(ticket)
        sys.setprofile(counted)
        prune_checkpoint(dense, mask, output, progress=False)
        sys.setprofile(None)
        os.write(writer, str(next(calls)).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert status == (0 if moment is None else signal.SIGKILL), status
    with os.fdopen(reader) as told:
        return int(told.read() or 0)

calls = prune(None, home / "undisturbed")
for moment in range(0, calls, calls // moments):
    prune(moment, home / str(moment) / "pruned")
"""


def test_killed_at_any_moment_the_same_call_ends_the_same(tmp_path, dense):
    before, mask = contents(dense), Mask.from_tensors(MASK)
    mask.save(tmp_path / "ticket")
    run_python(KILLER, dense, tmp_path / "ticket", tmp_path / "killed", 40)
    expected = contents(tmp_path / "killed/undisturbed")
    shutil.rmtree(tmp_path / "killed/undisturbed")
    finished = set()
    for home in (tmp_path / "killed").iterdir():
        finished.add(len(list(home.rglob("files/*.safetensors"))))
        if not (home / "pruned").exists():
            prune_checkpoint(dense, mask, home / "pruned")
            assert [path.name for path in home.iterdir()] == ["pruned"]
        assert contents(home / "pruned") == expected
    assert finished >= {0, 1, 2}, "moments between all shards"
    assert contents(dense) == before
