"""A run's folder: whole states only, one owner, one configuration, no measurement twice."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

import lottery_tickets
from lottery_tickets import _atomic
from lottery_tickets.errors import RunFolderError
from lottery_tickets.runs import RunFolder, _folder

CONFIGURATION = {"seed": 0, "learning_rate": 0.1, "sparsities": [0.5]}


def opened(path: Path, **changes: object):
    return RunFolder.open(path, {**CONFIGURATION, **changes})


def save(run: RunFolder, value: int) -> None:
    run.record({"value": value})
    run.save({"value": value}, {"model": {"w": torch.full((3,), float(value))}})


def held(path: Path) -> tuple[list[dict], int | None, list[float] | None]:
    """Measurements, and the state's two values."""
    with opened(path) as run:
        if run.state is None:
            return run.lines, None, None
        return run.lines, run.state.values["value"], run.state.tensors("model")["w"].tolist()


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_the_newest_state_comes_back(tmp_path):
    path = tmp_path / "deep" / "run"
    with opened(path) as run:
        assert run.state is None
        assert run.lines == []
        for value in range(3):
            save(run, value)
            assert run.state.values == {"value": value}
    assert held(path) == ([{"value": value} for value in range(3)], 2, [2.0] * 3)
    assert names(path) == ["config.json", "lock", "metrics.jsonl", "state-00000002"]


def test_measurements_after_the_state_are_made_again(tmp_path):
    with opened(tmp_path) as run:
        save(run, 0)
        run.record({"value": 1})
        run.record({"value": 2})
    assert held(tmp_path)[0] == [{"value": 0}]
    with opened(tmp_path) as run:
        save(run, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"value": 0}\n{"value": 1}\n'
    assert held(tmp_path) == ([{"value": 0}, {"value": 1}], 1, [1.0] * 3)


def test_measurements_without_a_state_do_not_count(tmp_path):
    with opened(tmp_path) as run:
        run.record({"value": 0})
    assert held(tmp_path) == ([], None, None)


def test_a_half_written_line_is_cut_off(tmp_path):
    with opened(tmp_path) as run:
        save(run, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"value"')
    assert held(tmp_path)[0] == [{"value": 0}]


def test_numbers_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1e-300, 1 / 3, 2**60, -0.0]
    with opened(tmp_path) as run:
        run.record({"values": values})
        run.save({"values": values}, {})
        assert run.lines == [{"values": values}]
    with opened(tmp_path) as run:
        assert [value.hex() if isinstance(value, float) else value for value in run.state.values["values"]] == [
            value.hex() if isinstance(value, float) else value for value in values
        ]


def test_tensors_of_any_layout_are_written(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "base": base,
        "same": base,
        "part": base[3:7],
        "turned": base.view(3, 4).t(),
        "channels last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(1, dtype=torch.int64),
        "needs gradients": torch.ones(2, requires_grad=True),
    }
    with opened(tmp_path) as run:
        run.save({}, {"some": tensors, "none": {}})
        for name, tensor in run.state.tensors("some").items():
            assert torch.equal(tensor, tensors[name])
        assert run.state.tensors("none") == {}


# --- Killed, or without room ---


@pytest.mark.parametrize("step", ["write_tensors", "creating_folder", "_sync", "rename"])
def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as run:
        save(run, 0)
        with monkeypatch.context() as patch:
            home, name = {"_sync": (_atomic, step), "rename": (Path, step)}.get(step, (_folder, step))
            patch.setattr(home, name, fail)
            with pytest.raises(
                RunFolderError, match=r"the state could not be written .*No space left.*state-00000000"
            ):
                run.save({"value": 1}, {"model": {"w": torch.ones(3)}})
        assert run.state.values == {"value": 0}
        assert [name for name in names(tmp_path) if name.endswith(".tmp")] == []
    assert held(tmp_path) == ([{"value": 0}], 0, [0.0] * 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_told_of_a_measurement_too(tmp_path):
    with opened(tmp_path) as run:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunFolderError, match=r"a measurement could not be written .*no state yet; make room"):
            run.record({"value": 0})


def dies_at(call: int, path: Path, value: int) -> bool:
    """Save in a child process that kills itself before so many calls that reach the disk; whether it did."""
    child = os.fork()
    if child == 0:
        try:
            calls = count()

            def counted(function):
                def reached(*arguments, **options):
                    if next(calls) == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)

                return reached

            for home, name in DISK:
                setattr(home, name, counted(getattr(home, name)))
            with opened(path) as run:
                save(run, value)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


DISK = (
    *((os, name) for name in ("open", "fsync", "ftruncate", "unlink", "rmdir", "mkdir")),
    *((Path, name) for name in ("open", "rename", "replace", "chmod", "mkdir", "write_text")),
    (_folder, "write_tensors"),
)


def test_a_save_that_is_killed_anywhere_leaves_one_whole_state(tmp_path):
    with opened(tmp_path) as run:
        save(run, 0)
    value, found = 0, []
    for call in count():
        died = dies_at(call, tmp_path, value + 1)
        lines, now, weights = held(tmp_path)
        assert now in (value, value + 1)
        assert weights == [float(now)] * 3
        assert lines == [{"value": each} for each in range(now + 1)]
        assert names(tmp_path) == ["config.json", "lock", "metrics.jsonl", f"state-{now:08d}"]
        found.append(now - value)
        value = now
        if not died:
            break
    assert found[0] == 0
    assert sum(found[:-1]) > 1, "killed after the new state's rename, before the old one is gone"
    assert call > 15


def test_remains_of_killed_writes_go(tmp_path):
    with opened(tmp_path) as run:
        save(run, 0)
    remains = [tmp_path / ".state-00000001.abc.tmp", tmp_path / "masks"]
    for folder in remains:
        folder.mkdir()
    (remains[0] / "model.safetensors").write_bytes(b"half")
    for file in (tmp_path / ".config.json.abc.tmp", tmp_path / "masks" / ".check-3.safetensors.abc.tmp"):
        file.write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("the user's")
    # Killed between the new state's rename and the end of the old one's removal.
    with opened(tmp_path) as run:
        old = tmp_path / "state-00000000"
        kept = {path.name: path.read_bytes() for path in old.iterdir()}
        save(run, 1)
    old.mkdir()
    (old / "state.json").write_bytes(kept["state.json"])
    assert held(tmp_path)[1:] == (1, [1.0] * 3)
    assert names(tmp_path) == ["config.json", "lock", "masks", "metrics.jsonl", "notes.tmp", "state-00000001"]
    assert names(tmp_path / "masks") == []


# --- One owner ---

HOLDER = """
import os, sys, time
from lottery_tickets.runs import RunFolder
with RunFolder.open(sys.argv[1], {"seed": 0, "learning_rate": 0.1, "sparsities": [0.5]}):
    if sys.argv[2] == "with a child" and os.fork() == 0:
        os.close(1)
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path, how: str = "alone") -> subprocess.Popen:
    source = str(Path(lottery_tickets.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), how],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
        start_new_session=True,
    )
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.parametrize("how", ["alone", "with a child"])
def test_another_process_is_refused_until_the_first_is_dead(tmp_path, how):
    process = holder(tmp_path, how)
    try:
        with (
            pytest.raises(RunFolderError, match=rf"{tmp_path} is in use by process {process.pid}"),
            opened(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
        if how == "with a child":
            os.killpg(process.pid, 0)  # raises if nobody is left
        # A forked child, as data loaders have them, lives on, and has no part in the lock.
        with opened(tmp_path) as run:
            save(run, 0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_same_process_is_refused_and_does_not_lose_the_lock(tmp_path):
    code = HOLDER.replace("time.sleep(60)", "")
    environment = {**os.environ, "PYTHONPATH": str(Path(lottery_tickets.__file__).parents[1])}
    with opened(tmp_path):
        with pytest.raises(RunFolderError, match="in use by this process already"), opened(tmp_path):
            pass
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), "alone"], env=environment, capture_output=True, check=False
        )
        assert f"is in use by process {os.getpid()}".encode() in done.stderr
    with opened(tmp_path):
        pass


# --- One configuration ---


def test_another_configuration_is_refused_key_by_key(tmp_path):
    with opened(tmp_path) as run:
        save(run, 0)
    with (
        pytest.raises(RunFolderError) as caught,
        opened(tmp_path, learning_rate=0.01, sparsities=[0.5, 0.9], new=1),
    ):
        pass
    message = str(caught.value)
    assert str(tmp_path) in message
    assert (
        "learning_rate: 0.1 there, 0.01 now; sparsities: [0.5] there, [0.5, 0.9] now; new: nothing there"
        in message
    )
    assert "seed" not in message
    assert held(tmp_path)[1] == 0


def test_a_run_that_saved_nothing_has_no_configuration_to_keep(tmp_path):
    with opened(tmp_path) as run:
        run.record({"value": 0})
    with opened(tmp_path, learning_rate=0.01) as run:
        assert run.lines == []
        save(run, 0)
    with pytest.raises(RunFolderError, match=r"learning_rate: 0\.01 there, 0\.1 now"), opened(tmp_path):
        pass


def test_a_run_is_not_started_anew_over_another(tmp_path):
    with RunFolder.open(tmp_path, CONFIGURATION, resume=False) as run:
        run.record({"value": 0})
    with RunFolder.open(tmp_path, CONFIGURATION, resume=False) as run:  # nothing was saved in it
        save(run, 0)
    with (
        pytest.raises(RunFolderError, match=r"holds a run already\. With resume=True"),
        RunFolder.open(tmp_path, CONFIGURATION, resume=False),
    ):
        pass
    assert held(tmp_path)[1] == 0


# --- Damage ---

DAMAGE = {
    "no configuration": (lambda path: (path / "config.json").unlink(), "config.json is missing"),
    "broken configuration": (lambda path: (path / "config.json").write_text("{"), "config.json: cannot be read"),
    "another format": (lambda path: (path / "config.json").write_text('{"format": "x"}'), "format 'x'"),
    "broken state": (lambda path: (path / "state-00000000/state.json").write_text("[]"), "not what a run writes"),
    "lost measurements": (lambda path: (path / "metrics.jsonl").unlink(), "0 lines, but .* saved after 1"),
    "lost tensors": (
        lambda path: (path / "state-00000000/model.safetensors").write_bytes(b"x"),
        "model.safetensors: damaged or missing",
    ),
    "a file": (
        lambda path: ([entry.unlink() for entry in path.rglob("*") if entry.is_file()], make_file(path)),
        "no folder can be made there",
    ),
}


def make_file(path: Path) -> None:
    (path / "state-00000000").rmdir()
    path.rmdir()
    path.write_text("")


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_told(tmp_path, damage, message):
    path = tmp_path / "run"
    with opened(path) as run:
        save(run, 0)
    damage(path)
    with pytest.raises(RunFolderError, match=message):
        held(path)


def test_configurations_are_compared_as_json(tmp_path):
    with RunFolder.open(tmp_path, {"range": (1, 2)}) as run:
        run.save({}, {})
    with RunFolder.open(tmp_path, {"range": [1, 2]}) as run:
        assert run.state is not None
    assert json.loads((tmp_path / "config.json").read_text())["configuration"] == {"range": [1, 2]}


def test_what_is_kept_stays_beside_the_states(tmp_path):
    with opened(tmp_path) as run:
        run.keep("first", {"at": 1}, {"model": {"w": torch.ones(2)}})
        save(run, 1)
        run.keep("first", {"at": 2}, {"model": {"w": torch.full((2,), 2.0)}})
        save(run, 2)
    with opened(tmp_path) as run:
        kept = run.kept("first")
        assert kept.values == {"at": 2}
        assert kept.tensors("model")["w"].tolist() == [2.0, 2.0]
        with pytest.raises(RunFolderError, match="cannot be read"):
            run.kept("second")
    assert names(tmp_path) == ["config.json", "first", "lock", "metrics.jsonl", "state-00000001"]
