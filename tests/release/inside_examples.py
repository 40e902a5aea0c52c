"""Run in the bare environment: the examples of all public names, each in an empty folder.

Prints as JSON, for each name with an example, the error that ended it, or an empty string.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import json
import os
import pkgutil
import sys
import tempfile
from collections.abc import Iterator

import lottery_tickets

FINDER = doctest.DocTestFinder(exclude_empty=True)


class Runner(doctest.DocTestRunner):
    """Ends an example at its first error."""

    error = ""

    def report_unexpected_exception(self, out, test, example, exc_info):
        self.error = self.error or f"{exc_info[0].__name__}: {exc_info[1]}"

    def report_failure(self, out, test, example, got):
        self.error = self.error or f"expected {example.want!r}, got {got!r}"


def modules() -> Iterator[str]:
    """All that are public but the command line, which has no examples."""
    yield "lottery_tickets"
    for module in pkgutil.iter_modules(lottery_tickets.__path__):
        if not module.name.startswith("_") and module.name != "cli":
            yield f"lottery_tickets.{module.name}"


def things() -> Iterator[tuple[str, object]]:
    """Functions and classes, each once, under the first of its names."""
    seen = set()
    for name in modules():
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing not in seen:
                seen.add(thing)
                yield f"{name}.{public}", thing


def outcomes() -> Iterator[tuple[str, str]]:
    for name, thing in things():
        for test in FINDER.find(thing, name, module=inspect.getmodule(thing)):
            if test.examples:
                runner = Runner(optionflags=doctest.ELLIPSIS | doctest.FAIL_FAST)
                with tempfile.TemporaryDirectory() as folder:
                    os.chdir(folder)
                    runner.run(test)
                    os.chdir("/")
                yield test.name, runner.error


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = dict(outcomes())
    print(json.dumps(found))
