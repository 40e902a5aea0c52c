"""Tickets pushed to a hub and read from it, by the hub's own client over real HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import lottery_tickets
from hub_server import TOKEN, Hub, serving
from lottery_tickets import Mask
from lottery_tickets.errors import HubError, MaskFileError
from lottery_tickets.masks._card import ticket_card

CHILD = """
import json, sys
from lottery_tickets import Mask
from lottery_tickets.errors import LotteryTicketError
for line in sys.stdin:
    call = json.loads(line)
    try:
        if call["do"] == "push":
            answer = Mask.load(call["ticket"]).push_to_hub(call["repo"], **call["options"])
        else:
            found = Mask.from_pretrained(call["repo"], **call["options"])
            answer = {"digest": found.digest(), "metadata": dict(found.metadata)}
    except LotteryTicketError as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process in which the hub's client is not offline."""

    def __init__(self, url: str, folder: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **environment,
                "PYTHONPATH": str(Path(lottery_tickets.__file__).parents[1]),
                "HF_ENDPOINT": url,
                "HF_HOME": str(folder / "home"),
                "HF_HUB_DISABLE_XET": "1",  # the server takes large files by git-lfs
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
        )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def push(self, ticket: Path, repo: str, **options: Any) -> Any:
        return self._call(
            {"do": "push", "ticket": str(ticket), "repo": repo, "options": {"token": TOKEN, **options}}
        )

    def fetch(self, repo: str, **options: Any) -> Any:
        return self._call({"do": "fetch", "repo": repo, "options": options})

    def _call(self, order: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as started:
        yield started


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    started = Client(hub.url, tmp_path_factory.mktemp("hub"))
    yield started
    started.close()


def made(**metadata: str) -> Mask:
    torch.manual_seed(0)
    tensors = {"a.weight": torch.rand(9, 7) < 0.5, "b.weight": torch.rand(300) < 0.1}
    packed = Mask.from_tensors(tensors)
    bits = {name: packed.packed(name) for name in packed}
    return Mask.from_packed(bits, packed.shapes, metadata=metadata)


def saved(folder: Path, **metadata: str) -> Path:
    path = folder / "ticket.safetensors"
    made(**metadata).save(path)
    return path


def test_a_ticket_comes_back_from_the_hub_with_its_metadata(hub, client, tmp_path):
    ticket = saved(tmp_path, criterion="magnitude")
    address = client.push(ticket, "me/first", metadata={"base_model": "me/model", "seed": "3"})
    assert address == f"{hub.url}/me/first/commit/{hub.commit_of('me/first')}"
    assert set(hub.files("me/first")) == {"ticket.safetensors", "README.md"}
    assert len(hub.repositories["me/first"]) == 2, "one commit"
    (tmp_path / "there.safetensors").write_bytes(hub.files("me/first")["ticket.safetensors"])
    assert Mask.load(tmp_path / "there.safetensors") == made()
    there = {"criterion": "magnitude", "base_model": "me/model", "seed": "3"}
    expected = {"digest": made().digest(), "metadata": there}
    assert client.fetch("me/first") == expected
    assert client.fetch("me/first", revision=hub.commit_of("me/first")) == expected
    asked = len(hub.requests)
    assert client.fetch("me/first", local_files_only=True) == expected
    assert len(hub.requests) == asked, "from the cache"


def test_a_ticket_is_pushed_again_and_its_card_with_it(hub, client, tmp_path):
    ticket = saved(tmp_path)
    client.push(ticket, "me/again")
    client.push(ticket, "me/again", metadata={"round": "2"})
    assert client.fetch("me/again")["metadata"] == {"round": "2"}
    assert "<td>round</td><td>2</td>" in hub.files("me/again")["README.md"].decode()


def test_the_card_of_a_model_is_left_alone(hub, client, tmp_path):
    card = b"---\nlicense: mit\ntags:\n- llama\n---\nA model."
    hub.repositories["me/model"] = [{"README.md": card, "model.safetensors": b"weights"}]
    client.push(saved(tmp_path), "me/model")
    assert hub.files("me/model")["README.md"] == card
    assert set(hub.files("me/model")) == {"README.md", "model.safetensors", "ticket.safetensors"}
    assert client.fetch("me/model")["digest"] == made().digest()


def test_a_private_repository_asks_for_the_token(hub, client, tmp_path):
    client.push(saved(tmp_path), "me/secret", private=True)
    assert "me/secret" in hub.private
    assert client.fetch("me/secret").startswith("HubError: me/secret is neither a folder here nor")
    assert client.fetch("me/secret", token=TOKEN)["digest"] == made().digest()


def test_what_the_hub_refuses_is_told(hub, client, tmp_path):
    ticket = saved(tmp_path)
    assert client.push(ticket, "me/first", token="hf_wrong").startswith("HubError: me/first: the hub did not take")
    assert client.push(ticket, "no such/../id").startswith("HubError: no such/../id")
    assert client.fetch("me/nothing").startswith("HubError: me/nothing is neither")
    client.push(ticket, "me/told")
    assert client.fetch("me/told", revision="v9").startswith("HubError: me/told is neither")
    reserved = client.push(ticket, "me/told", metadata={"digest": "mine"})
    assert reserved.startswith("MaskFileError: Metadata key 'digest'")


def test_a_damaged_ticket_is_refused(hub, client, tmp_path):
    client.push(saved(tmp_path), "me/damaged")
    content = bytearray(hub.files("me/damaged")["ticket.safetensors"])
    content[-1] ^= 1
    hub.files("me/damaged")["ticket.safetensors"] = bytes(content)
    assert client.fetch("me/damaged").startswith("MaskFileError")


def test_a_hub_that_is_not_there_is_told(monkeypatch):
    with pytest.raises(HubError, match=r"me/first: the hub did not take .*offline"):
        made().push_to_hub("me/first")  # as all of this process
    with pytest.raises(HubError, match="me/first is neither a folder here nor"):
        Mask.from_pretrained("me/first")
    with serving() as gone:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=r"me/first: the hub did not take .*(refused|offline)"):
        made().push_to_hub("me/first")


def test_a_folder_is_read_without_a_hub(tmp_path):
    with pytest.raises(HubError, match=r"ticket\.safetensors: no such file"):
        Mask.from_pretrained(tmp_path)
    saved(tmp_path)
    assert Mask.from_pretrained(tmp_path) == made()
    (tmp_path / "ticket.safetensors").write_bytes(b"no")
    with pytest.raises(MaskFileError, match="truncated"):
        Mask.from_pretrained(str(tmp_path))


def test_without_the_client_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: Mask.from_pretrained("me/first"), lambda: made().push_to_hub("me/first")):
        with pytest.raises(ImportError, match=r"lottery-tickets\[hf\]"):
            call()


# --- The card ---


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not attrs
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


HOSTILE = '</td></table>\n\n<script>alert("x")</script> ![](http://evil/x.png) | `a` **b** ---'


def blocks_of(card: str) -> list[str]:
    """The tables, each of which ends at the first blank line as Markdown has it."""
    return ["<table>" + part.partition("\n\n")[0] for part in card.split("<table>")[1:]]


def test_a_card_says_what_the_ticket_is():
    text = ticket_card(made(base_model="me/model", criterion="magnitude"), "me/first")
    card = ModelCard(text)
    assert card.data.base_model == "me/model"
    assert card.data.library_name == "lottery-tickets"
    assert "lottery-ticket" in card.data.tags
    assert 'Mask.from_pretrained("me/first")' in card.text
    mask = made()
    assert f"removes {mask.numel - mask.kept} of {mask.numel} weights" in card.text
    origin, layers = (Reader(), Reader())
    for reader, block in zip((origin, layers), blocks_of(text), strict=True):
        reader.feed(block)
    assert [cell.strip() for cell in origin.cells] == [
        *("what", "value", "digest", mask.digest(), "base_model", "me/model", "criterion", "magnitude"),
    ]
    assert [cell.strip() for cell in layers.cells[5:10]] == [
        *("a.weight", "9 x 7", "63", str(mask.layer_kept()["a.weight"])),
        f"{mask.layer_sparsity()['a.weight']:.4f}",
    ]


def test_what_strangers_wrote_stays_text():
    tensors = {HOSTILE: torch.ones(8), "b": torch.zeros(8)}
    packed = Mask.from_tensors(tensors)
    metadata = {HOSTILE: HOSTILE, "base_model": f"me/model\nlicense: mit\n{HOSTILE}"}
    mask = Mask.from_packed({name: packed.packed(name) for name in packed}, packed.shapes, metadata=metadata)
    text = ticket_card(mask, "me/first")
    outside = text
    cells = []
    for block in blocks_of(text):
        reader = Reader()
        reader.feed(block)
        assert reader.tags == {"table", "tr", "th", "td"}
        cells += [cell.strip() for cell in reader.cells]
        outside = outside.replace(block, "")
    assert cells.count(" ".join(HOSTILE.split())) == 3
    assert "evil" not in outside
    assert "script" not in outside
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"library_name", "tags"}
