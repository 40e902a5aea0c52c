"""Advice about mapped weights: each run asked for once, not too far ahead, by a thread that ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lottery_tickets.large_models import _pages, read_checkpoint
from lottery_tickets.large_models._pages import mapped

ROWS, WIDTH = 64, 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": torch.randn(ROWS, WIDTH), "empty": torch.empty(0, 3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Places that were asked for, in their order, at most eight rows ahead."""
    monkeypatch.setattr(_pages, "_AHEAD", 8 * 4 * WIDTH)
    places: list[tuple[int, int]] = []
    monkeypatch.setattr(_pages._Place, "fetch", lambda place: places.append((place.start, place.size)))
    return places


def wait_until(condition: Callable[[], bool]) -> None:
    """For what another thread does; forever is ten seconds."""
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("the other thread did not do it")


def read_ahead_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.mark.parametrize("backwards", [False, True])
def test_every_run_is_asked_for_once_and_in_turn(
    folder: Path, asked: list[tuple[int, int]], backwards: bool
) -> None:
    stored = read_checkpoint(folder).tensors
    starts = [stored["w"].start + 4 * WIDTH * row for row in range(ROWS)]
    expected = [(start, 4 * WIDTH) for start in (starts[::-1] if backwards else starts)]
    with mapped(folder, stored) as (tensors, pages):
        rows = list(tensors["w"])[:: -1 if backwards else 1]
        with pages.reading(rows) as reading:
            for turn in range(ROWS):
                wait_until(lambda turn=turn: len(asked) > turn)
                with reading(turn):
                    assert torch.isfinite(rows[turn]).all()
                    assert len(asked) <= turn + 8
    assert asked == expected
    assert not read_ahead_threads()


def test_runs_whose_turn_has_come_are_not_asked_for(
    folder: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The readers may be faster than the thread: it goes on from where they are."""
    begin = threading.Event()
    fetch_ahead = _pages._Turns.fetch_ahead
    monkeypatch.setattr(_pages._Turns, "fetch_ahead", lambda turns: begin.wait(10) and fetch_ahead(turns))
    stored = read_checkpoint(folder).tensors
    with mapped(folder, stored) as (tensors, pages), pages.reading(list(tensors["w"])) as reading:
        for turn in range(20):
            with reading(turn):
                pass
        begin.set()
        wait_until(lambda: len(asked) == 8)
    assert [start for start, _ in asked] == [stored["w"].start + 4 * WIDTH * row for row in range(20, 28)]


def test_an_error_while_reading_ends_the_thread(folder: Path, asked: list[tuple[int, int]]) -> None:
    with mapped(folder, read_checkpoint(folder).tensors) as (tensors, pages):
        with pytest.raises(ZeroDivisionError), pages.reading(list(tensors["w"])) as reading, reading(0):
            raise ZeroDivisionError
        assert not read_ahead_threads()
        assert len(asked) < ROWS


def test_a_run_larger_than_the_allowance(folder: Path, asked: list[tuple[int, int]]) -> None:
    with mapped(folder, read_checkpoint(folder).tensors) as (tensors, pages):
        runs = [tensors["w"], tensors["empty"], tensors["w"]]
        with pages.reading(runs) as reading:
            for turn in range(3):
                with reading(turn):
                    assert torch.isfinite(runs[turn]).all()


@pytest.mark.parametrize("available", [True, False])
def test_gathered_rows_are_those_of_the_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    if not available:
        monkeypatch.delattr(_pages.os, "preadv")
        monkeypatch.delattr(_pages.os, "posix_fadvise")
    with mapped(folder, read_checkpoint(folder).tensors) as (tensors, pages):
        views = [tensors["w"].view(-1, 64)[::7, 3:35], tensors["w"].view(1, -1)[:, :5]]
        for view, copy in zip(views, pages.gather(views), strict=True):
            assert torch.equal(copy, view.reshape(-1))
