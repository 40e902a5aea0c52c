"""Checkpoints of torch.distributed.checkpoint: masks without a process group, and metadata from strangers."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lottery_tickets import create_magnitude_mask
from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models import map_weights
from lottery_tickets.large_models._dcp import _MetadataUnpickler


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"q_proj": nn.Linear(12, 10), "o_proj": nn.Linear(10, 13), "embed_tokens": nn.Embedding(8, 12)}
    return nn.ModuleDict(layers).bfloat16()


def save(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    spread = model()
    for number, (name, parameter) in enumerate(list(spread.named_parameters())):
        module, attribute = name.split(".")
        placements = [[Shard(0), Shard(0)], [Shard(0), Shard(parameter.dim() - 1)], [Replicate(), Shard(0)]][
            number % 3
        ]
        part = distribute_tensor(parameter.detach(), mesh, placements)
        setattr(spread[module], attribute, nn.Parameter(part))
    state = {**spread.state_dict(), "optim.state.q_proj.weight.exp_avg": torch.ones(3, 3), "step": 3}
    dcp.save(state, checkpoint_id=folder)


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint") / "step-3"
    ranks(4).run(save, str(made))
    return made


@pytest.mark.parametrize(
    "options", [{}, {"scope": "row"}, {"allocation": "lamp"}, {"pattern": "1:2", "pattern_remainder": "dense"}]
)
def test_the_mask_is_that_of_the_model(folder, options):
    asked = None if "pattern" in options else [0.3, 0.9]
    expected = create_magnitude_mask(model(), asked, progress=False, **options)
    assert create_magnitude_mask(folder, asked, progress=False, **options) == expected
    assert create_magnitude_mask(str(folder), 0.5, include="embed_tokens.*").names == (
        *("embed_tokens.weight", "q_proj.weight", "o_proj.weight"),
    )


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_are_read_whatever_python_wrote_them(module):
    """Python 3.13 calls their module otherwise."""
    stored = f"c{module}\nPosixPath\n(Vfolder\ntR.".encode()
    assert _MetadataUnpickler(io.BytesIO(stored)).load() == PurePosixPath("folder")


def test_the_copy_is_gone_afterwards(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with map_weights(folder) as weights:
        assert len(list(tmp_path.iterdir())) == 1
        assert weights.folder == folder
        assert weights.tensors["o_proj.weight"].equal(model()["o_proj"].weight)
    assert not list(tmp_path.iterdir())


def damaged(folder: Path, tmp_path: Path, change: Any) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    changed = change(metadata)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))
    return copy


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def lead_out(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../step-3/" + place.relative_path


def lie_outside(metadata: Any) -> None:
    metadata.state_dict_metadata["q_proj.weight"].chunks[0].offsets = torch.Size([9, 9])


def leave_a_piece_out(metadata: Any) -> None:
    del metadata.state_dict_metadata["q_proj.weight"].chunks[0]


def go_beyond_the_file(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = 1 << 40


def hide_a_command(metadata: Any) -> None:
    metadata.planner_data = Hostile()


def lose_the_storage(metadata: Any) -> None:
    metadata.storage_data = None


def keep_no_weights(metadata: Any) -> None:
    metadata.state_dict_metadata = {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (hide_a_command, r"it asks for (posix|nt)\.system, which is no part of checkpoint metadata"),
        (lead_out, r"'\.\./step-3/__\d_\d\.distcp' is not the name of a file in this folder"),
        (lie_outside, "pieces of q_proj.weight do not make up a tensor"),
        (leave_a_piece_out, "pieces of q_proj.weight do not make up a tensor"),
        (go_beyond_the_file, "cut short, or damaged"),
        (lose_the_storage, "no tables of tensors"),
        (keep_no_weights, "no floating-point tensors"),
        (lambda metadata: 3, "not the metadata of a distributed checkpoint"),
    ],
)
def test_metadata_that_is_not_to_be_trusted_is_refused(folder, tmp_path, change, told):
    with pytest.raises(CheckpointError, match=told):
        create_magnitude_mask(damaged(folder, tmp_path, change), 0.5)


def test_damaged_files_are_refused(folder, tmp_path):
    copy = damaged(folder, tmp_path, lambda metadata: None)
    file = next(iter(sorted(copy.glob("*.distcp"))))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"q_proj.weight cannot be read from its files"):
        create_magnitude_mask(copy, 0.5)
    file.unlink()
    with pytest.raises(CheckpointError, match="the metadata names this file and it is not there"):
        create_magnitude_mask(copy, 0.5)
