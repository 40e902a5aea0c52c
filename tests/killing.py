"""Runs in processes that kill themselves at a chosen moment; run as a script, it waits for orders.

A moment is a number of calls that Python has made since the run began, or of events in one function, so that it
hangs on no clock. Each run is a child forked from this process, which has imported everything beforehand and
computed
nothing: threads that a computation leaves behind do not survive a fork, and what waits for them waits for ever.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import lottery_tickets

Run = Callable[..., Any]
Told = Callable[[Any], Any]


class Killer:
    """The process that takes orders; a context manager."""

    def __enter__(self) -> Killer:
        source = str(Path(lottery_tickets.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(
        self,
        what: str,
        folder: Path,
        seed: int = 0,
        kill_at: int | None = None,
        kill_in: str | None = None,
        count: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        """What a run came to.

        Args:
            what: A name in `RUNS`.
            folder: Of the run.
            seed: Of the model's weights.
            kill_at: The call before which the process is killed.
            kill_in: Name of the only function whose events count; None for all.
            count: If False, calls of a run that is not killed are not counted, which takes most of its time.
            options: Of the run.

        Returns:
            "killed"; if it was not, "results" and the number of "calls" (0 if not counted) too.
        """
        order = {"what": what, "folder": str(folder), "seed": seed, "options": options}
        order |= {"kill_at": kill_at, "kill_in": kill_in, "count": count}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _obey(order: dict[str, Any]) -> dict[str, Any]:
    RUNS[order["what"]]()  # for the imports
    answer = Path(order["folder"]).with_suffix(".json")
    answer.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # answers are written there
        try:
            answer.write_text(json.dumps({"killed": False, **_run(order)}))
            os._exit(0)
        finally:
            sys.stderr.flush()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return {"killed": True}
    assert os.WEXITSTATUS(status) == 0
    return json.loads(answer.read_text())


def _run(order: dict[str, Any]) -> dict[str, Any]:
    from test_early_bird import mlp

    run, told, short = RUNS[order["what"]]()
    run(**short)  # what is imported and compiled when it is first used does not count
    calls, model = count(), mlp(order["seed"])
    kill_at, kill_in = order["kill_at"], order["kill_in"]

    def counted(frame: FrameType, *_: object) -> None:
        if (kill_in is None or frame.f_code.co_name == kill_in) and next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if order["count"]:
        sys.setprofile(counted)
    results = run(model, run_dir=order["folder"], **order["options"])
    sys.setprofile(None)
    return {"results": told(results), "calls": next(calls)}


def _search() -> tuple[Run, Told, dict[str, Any]]:
    from test_early_bird import search, told

    return search, told, {"max_epochs": 1}


def _prune() -> tuple[Run, Told, dict[str, Any]]:
    from test_iterative_pruning import prune, told

    return prune, told, {"num_iterations": 1, "epochs": 1}


def _tune() -> tuple[Run, Told, dict[str, Any]]:
    from trainers import told, tune_to_the_end

    return tune_to_the_end, told, {"steps": 1}


def _fit() -> tuple[Run, Told, dict[str, Any]]:
    from trainers import fit_to_the_end, told

    return fit_to_the_end, told, {"epochs": 1}


RUNS: dict[str, Callable[[], tuple[Run, Told, dict[str, Any]]]] = {
    "search": _search,
    "prune": _prune,
    "tune": _tune,
    "fit": _fit,
}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    import torch._dynamo  # torch's optimizers import it when the first is made

    import test_early_bird  # noqa: F401
    import test_iterative_pruning  # noqa: F401
    from lottery_tickets import _kernels  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_obey(json.loads(line))), flush=True)
