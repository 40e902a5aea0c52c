"""Real material for tests: SmolLM2-135M, English text, MNIST digits (fetched by `make data`); and a browser.

A test that asks for what is not there fails where the environment variable CI is set, and is skipped
elsewhere.
"""

from __future__ import annotations

import csv
import gzip
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

from lottery_tickets._data import images_file, model_folder, text_file
from lottery_tickets.errors import CheckpointError
from ranks import Worlds

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}

BROWSER_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if IN_CI else "dev"))


def found(find: Callable[[], Path]) -> Path:
    """The path that `find` returns, or the end of the test that asked for it."""
    try:
        return find()
    except CheckpointError as error:
        reason = str(error)
    if IN_CI:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Worlds]:
    """`ranks(4).run(function)`: the function on each of four ranks; see tests/ranks.py."""
    with Worlds() as worlds:
        yield worlds


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Checkpoint folder of SmolLM2-135M-Instruct (bf16); read it, do not write into it."""
    return found(model_folder)


@pytest.fixture(scope="session")
def load_smollm2(smollm2_folder: Path) -> Callable[..., LlamaForCausalLM]:
    """`load_smollm2(dtype=torch.float32)`: a fresh model in evaluation mode, the caller's to change."""
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=dtype)

    return load


@pytest.fixture
def smollm2(load_smollm2: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """SmolLM2-135M in float32, loaded anew for each test."""
    return load_smollm2()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="session")
def english_text() -> str:
    """The World English Bible, a line for each chapter."""
    return found(text_file).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def mnist() -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 MNIST digits: images, float32 (5000, 1, 28, 28) in [0, 1], and digits, int64 (5000,)."""
    with gzip.open(found(images_file), "rt", newline="") as file:
        rows = torch.tensor([[int(cell) for cell in row] for row in csv.reader(file)])
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].clone()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, which asks nobody for anything by itself."""
    chromium = shutil.which("chromium")
    if chromium is None:
        problem = "chromium is not installed; `make browser` does that on Debian, as root"
        if IN_CI:
            pytest.fail(problem)
        pytest.skip(problem)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, headless=True, args=list(BROWSER_FLAGS))
        yield opened
        opened.close()
