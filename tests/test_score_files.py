"""Files of scores: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lottery_tickets import _score_files
from lottery_tickets._score_files import FORMAT, label_scores, read_scores, write_scores
from lottery_tickets.errors import ScoreFileError
from processes import run_python

SCORES = {
    "fc.weight": torch.rand(3, 5, generator=torch.Generator().manual_seed(0)),
    "columns.weight": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    "none.weight": torch.zeros(0, 4),
}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, SCORES, {"criterion": "fisher", "samples": "16"})
    found, metadata = read_scores(path)
    assert metadata == {"criterion": "fisher", "samples": "16"}
    assert found.keys() == SCORES.keys()
    assert all(
        torch.equal(found[name], score) and found[name].dtype == score.dtype for name, score in SCORES.items()
    )


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 23])
def test_a_label_changes_nothing_but_the_header(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_score_files, "_BLOCK", block)
    path = tmp_path / "sums.safetensors"
    save_file({name: score.contiguous() for name, score in SCORES.items()}, path)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    label_scores(path, {"criterion": "fisher", "samples": "16"})
    found, metadata = read_scores(path)
    assert metadata == {"criterion": "fisher", "samples": "16"}
    assert found.keys() == SCORES.keys()
    assert all(torch.equal(found[name], score) for name, score in SCORES.items())
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8 - start) % 64 == 0


def test_drawing_from_a_file_takes_no_copy_of_its_scores(tmp_path: Path) -> None:
    """Memory of no file, watched while a mask is drawn: mapped pages are the kernel's to take back."""
    code = """
import sys, threading, time, torch
from lottery_tickets import create_importance_mask
from lottery_tickets._score_files import read_scores
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
def watch():
    while not done:
        seen.append(anonymous())
        time.sleep(0.002)
create_importance_mask({"w": torch.rand(64, 64)}, 0.5, scope="row", progress=False)
create_importance_mask({"w": torch.rand(64, 64)}, 0.5, progress=False)
seen, done, before = [], False, anonymous()
watching = threading.Thread(target=watch)
watching.start()
scores, _ = read_scores(sys.argv[1])
for scope in ("global", "row"):
    create_importance_mask(scores, 0.5, scope=scope, progress=False)
done = True
watching.join()
print(max(seen) - before)
"""
    path = tmp_path / "scores.safetensors"
    scores = {f"{index}.weight": torch.rand(1024, 8192) for index in range(8)}
    write_scores(path, scores, {"criterion": "fisher"})
    weights = sum(score.numel() for score in scores.values())
    assert int(run_python(code, path)) < weights  # of 4 bytes a weight; the mask and the blocks in work stay


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, SCORES, {"criterion": "fisher"})
    before = path.read_bytes()

    def half(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(before[:50])
        raise OSError("disk full")

    monkeypatch.setattr(_score_files, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        write_scores(path, {"fc.weight": torch.ones(1)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "format is None"),
        ({"format": "pt"}, "format is 'pt', files of scores say 'lottery_tickets.scores'"),
        ({"format": FORMAT}, "format version None is unknown here"),
        ({"format": FORMAT, "format_version": "2"}, "format version '2' is unknown here, this library reads '1'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, header: dict[str, str] | None, message: str) -> None:
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "other.safetensors", header)
    with pytest.raises(ScoreFileError, match=message):
        read_scores(tmp_path / "other.safetensors")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, SCORES, {})
    whole = path.read_bytes()
    for length in (0, 7, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ScoreFileError, match="not a whole safetensors file"):
            read_scores(path)
    with pytest.raises(ScoreFileError, match="a folder, not a file of scores"):
        read_scores(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_scores(tmp_path / "absent.safetensors")
