"""Files appear whole or not at all."""

from __future__ import annotations

import stat

import pytest

from lottery_tickets import _atomic
from lottery_tickets._atomic import replacing


@pytest.fixture
def target(tmp_path):
    return tmp_path / "ticket.safetensors"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, b"old"])
def test_success_replaces(target, before):
    if before is not None:
        target.write_bytes(before)
    with replacing(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_bytes(b"new")
        assert (target.read_bytes() if target.exists() else None) == before
    assert target.read_bytes() == b"new"
    assert names(target.parent) == [target.name]


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failure_leaves_what_was_there(target, before, failure):
    if before is not None:
        target.write_bytes(before)
    with pytest.raises(failure), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise failure
    assert (target.read_bytes() if target.exists() else None) == before
    assert names(target.parent) == ([] if before is None else [target.name])


@pytest.mark.parametrize("step", ["_sync", "_umask"])
def test_a_failure_on_the_way_to_the_disk_leaves_what_was_there(target, step, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    target.write_bytes(b"old")
    monkeypatch.setattr(_atomic, step, fail)
    with pytest.raises(OSError, match="No space"), replacing(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert names(target.parent) == [target.name]


def test_the_file_is_on_the_disk_before_it_has_its_name(target, monkeypatch):
    """Fsync of the file, then rename, then fsync of the folder: a power cut leaves the old file or the new."""
    steps = []
    sync, replace = _atomic._sync, type(target).replace
    monkeypatch.setattr(_atomic, "_sync", lambda path: (steps.append(path), sync(path)))
    monkeypatch.setattr(
        type(target), "replace", lambda self, other: (steps.append("rename"), replace(self, other))[1]
    )
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
    assert steps == [temporary, "rename", target.parent]


def test_permissions_are_those_of_a_file_made_plainly(target, tmp_path):
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), replacing(tmp_path / "nowhere" / "ticket"):
        pass
