"""Where the model, the text and the images of the demo, the tests and the benchmarks lie.

`scripts/data.py` (`make data`) fills the folder; everything else only reads it. Standard library only, and
nothing of this package while it is imported: the script runs this file by itself, so as not to load torch.
"""

from __future__ import annotations

import os
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"
TEXT_NAME = "world-english-bible.txt"
IMAGES_NAME = "mnist_5k.csv.gz"


def data_folder() -> Path:
    """The cache: `$LOTTERY_TICKETS_DATA`, else `lottery-tickets` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    if chosen := os.environ.get("LOTTERY_TICKETS_DATA"):
        return Path(chosen).expanduser().absolute()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "lottery-tickets"


def model_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct: bf16 safetensors, config and tokenizer, as transformers saves them."""
    return _present(MODEL_NAME, "config.json")


def text_file() -> Path:
    """The World English Bible: UTF-8, a line for each chapter, a blank line between books."""
    return _present(TEXT_NAME)


def images_file() -> Path:
    """5,000 MNIST digits: gzipped CSV, one image a line, 784 pixels of 0 ... 255 and the digit last."""
    return _present(IMAGES_NAME)


def _present(name: str, witness: str = "") -> Path:
    # scripts/data.py publishes by rename, so what exists is complete.
    path = data_folder() / name
    if not (path / witness).is_file():
        from .errors import CheckpointError  # here, for the reason the module's docstring gives

        raise CheckpointError(
            f"{name} is not in {data_folder()}: run 'make data' in a checkout of lottery-tickets to fetch it, "
            "or set LOTTERY_TICKETS_DATA to the folder that holds it"
        )
    return path
