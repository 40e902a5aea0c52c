"""Tickets on the Hugging Face hub: one ticket file a repository, and a card that says what it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lottery_tickets.errors import HubError, MissingExtraError
from lottery_tickets.masks._card import TAG, ticket_card

if TYPE_CHECKING:
    from lottery_tickets.masks._mask import Mask

TICKET_FILE = "ticket.safetensors"
CARD_FILE = "README.md"


def push(
    mask: Mask,
    repo_id: str,
    *,
    metadata: Mapping[str, str] | None,
    private: bool | None,
    revision: str | None,
    token: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Upload a ticket and its card in one commit; the address of that commit."""
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        ticket, card = Path(folder) / TICKET_FILE, Path(folder) / CARD_FILE
        mask.save(ticket, metadata=metadata)
        with _our_errors(f"{repo_id}: the hub did not take the ticket"):
            api = hub.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            files = [ticket]
            if _may_write_card(hub, repo_id, revision=revision, token=token):
                card.write_text(ticket_card(type(mask).load(ticket), repo_id), encoding="utf-8")
                files.append(card)
            commit = api.create_commit(
                repo_id,
                [hub.CommitOperationAdd(path.name, path) for path in files],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
    return str(commit.pr_url or commit.commit_url)


def fetch(
    name: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """Path of a ticket: in a folder here, or of a repository, downloaded once."""
    if Path(name).is_dir():
        path = Path(name) / TICKET_FILE
        if not path.is_file():
            raise HubError(f"{path}: no such file. Of a ticket under another name, Mask.load takes the path.")
        return path
    hub = _hub()
    with _our_errors(f"{name} is neither a folder here nor to be had from the Hugging Face hub"):
        found = hub.hf_hub_download(
            str(name),
            TICKET_FILE,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    return Path(found)


def _may_write_card(hub: ModuleType, repo_id: str, *, revision: str | None, token: str | None) -> bool:
    """Whether there is no card, or one that we wrote: a model's own is left alone."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = hub.hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
    except EntryNotFoundError:
        return True
    tags: Any = hub.ModelCard.load(path, ignore_metadata_errors=True).data.tags
    return isinstance(tags, list) and TAG in tags


@contextmanager
def _our_errors(what: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    # Where there is no way to the hub its HTTP library raises its own, and that is whatever these derive from.
    except (OSError, *HfHubHTTPError.__bases__, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HubError(f"{what}: {reason} `hf auth login` logs in; HF_ENDPOINT names another hub.") from error


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf") from error
    return huggingface_hub  # type: ignore[no-any-return]
