"""The test suite or a part of it, by the name of what it tests.

    python tests/run_tests.py [--module memory|early_bird|overlap|...] [--verbose] [--failfast]

`--module` can be given several times. Without it everything runs that `pytest` runs, documents and docstrings too.
Slow proofs are left out, as they are from `pytest`; `--slow` runs them as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Patterns under tests/. A file may stand in several.
MODULES: dict[str, tuple[str, ...]] = {
    "masks": ("masks/*", "test_kernels*"),
    "magnitude": ("test_magnitude*", "sparsity/*", "test_kernels*"),
    "importance": (
        "test_importance*",
        "test_every_criterion*",
        "test_score_files*",
        "test_ranks_scoring*",
        "test_scores_of_*",
    ),
    "early_bird": ("test_early_bird*", "test_cli_early_bird*", "detection/*", "structured/test_structured_birds*"),
    "training": ("training/*",),
    "iterative": ("iterative/*", "test_iterative*", "test_cli_imp*", "runs/*", "test_killed*"),
    "stability": ("test_stability*", "test_instability*"),
    "verdict": ("verdict/*",),
    "quality": ("test_evaluation*", "test_robustness*", "test_batches*"),
    "overlap": ("test_overlap*",),
    "inspection": ("test_inspection*",),
    "memory": ("planning/*", "masks/test_memory*", "training/test_training_bytes*", "test_cli_plan*"),
    "large_models": ("large_models/*", "test_safetensors*", "test_fuzzing*"),
    "distributed": ("test_ranks*", "*/*_ranks*", "*/*shard*", "test_cli_ranks*", "sparsity/test_across*"),
    "structured": ("structured/*",),
    "integrations": ("integrations/*", "masks/test_hub*"),
    "reports": ("reports/*",),
    "command_line": ("test_cli*", "test_command_line*", "test_terminal*", "structured/test_cli*"),
    "vision": ("test_vision*", "test_data*"),
    "documents": (
        "test_documents*",
        "test_public_surface*",
        "test_site*",
        "test_troubleshooting*",
        "test_notebooks*",
    ),
    "project": ("release/*", "test_benchmarks*", "test_run_tests*"),
    "errors": ("test_bad_input*", "test_atomic*", "test_logging*"),
}


def files_of(module: str) -> list[Path]:
    """The test files of a module, in the order of their names."""
    found = {path for pattern in MODULES[module] for path in (ROOT / "tests").glob(pattern)}
    return sorted(path for path in found if path.match("test_*.py"))


def arguments_for_pytest(given: argparse.Namespace) -> list[str]:
    """What pytest is called with."""
    files = [str(path) for module in given.module or () for path in files_of(module)]
    options = {"--verbose": given.verbose, "--exitfirst": given.failfast}
    slow = ["-m", ""] if given.slow else []
    return [
        f"--rootdir={ROOT}",
        *(name for name, wanted in options.items() if wanted),
        *slow,
        *dict.fromkeys(files),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and give pytest's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--module", action="append", choices=MODULES, metavar="NAME", help=", ".join(MODULES))
    parser.add_argument("--verbose", action="store_true", help="a line for each test")
    parser.add_argument("--failfast", action="store_true", help="stop at the first failure")
    parser.add_argument("--slow", action="store_true", help="slow proofs too")
    return int(pytest.main(arguments_for_pytest(parser.parse_args(arguments))))


if __name__ == "__main__":
    sys.exit(main())
