"""Callbacks in trainers that shard by FSDP2: zeros in checkpoints, birds of whole models, resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from lottery_tickets import Mask, create_magnitude_mask, validate_pruning_correctness
from lottery_tickets.errors import RunFolderError, TrainingError
from lottery_tickets.integrations import compute_filled_zeros, lightning
from lottery_tickets.integrations._adapters import uncompiled
from lottery_tickets.integrations._folder import StateFolder
from lottery_tickets.integrations._ranks import Saved
from lottery_tickets.integrations._watching import WatchingCallback
from lottery_tickets.integrations.transformers import EarlyBirdCallback, HoldMaskCallback
from lottery_tickets.masks import is_sharded
from lottery_tickets.training import digest_of
from test_early_bird import TIMES, mlp, one_thread  # noqa: F401
from trainers import LitClassifier, fitted, tuned

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(33, (32, 6), generator=torch.manual_seed(0))]
SHARDED = {
    "fsdp": True,
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    "use_cpu": False,
    "dataloader_pin_memory": False,
}
CHECKS = {"check_every_steps": 1, "stability_window": 99, "stop": False}


def tiny_llama() -> LlamaForCausalLM:
    """With rows that two ranks cannot share evenly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=33,
        hidden_size=12,
        intermediate_size=25,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@contextmanager
def launched(rank: int, *, accelerated: bool) -> Iterator[None]:
    """As torchrun starts a rank.

    Args:
        rank: Of two.
        accelerated: Whether accelerate is to believe that the device is an accelerator. It shards on none but
            those: on CPUs it leaves fsdp=True out and takes DDP.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            patch.setenv(name, str(value))
        for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            patch.setenv(name, "false")  # trainers set them, and are not to be heard of afterwards
        if accelerated:
            patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
            told = ("gloo", DistributedType.MULTI_GPU)
            patch.setattr(PartialState, "_prepare_backend", lambda *_, **__: told)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


class Seen(TrainerCallback):
    """The whole weights, where birds look at them."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        assert all(is_sharded(parameter) for parameter in model.parameters())
        self.weights.append(whole(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append(whole(model))


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    named = uncompiled(model).named_parameters()
    return {name: one.full_tensor().detach().clone() for name, one in named}


class Told(NamedTuple):
    """What a rank tells of its training."""

    lines: list[dict[str, Any]]
    ticket: str
    weights: list[dict[str, torch.Tensor]]


def train(rank: int, way: str, folder: Path, steps: int = 4, *, resume: bool = False, **options: Any) -> Told:
    """Both callbacks at once: a sparser ticket looked for within the one that is held."""
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", **options}
    model = tiny_llama()
    mask = create_magnitude_mask(model, 0.3)
    if way == "transformers":
        model = LlamaForCausalLM.from_pretrained(
            folder.parent / "model", distributed_config=DistributedConfig(fsdp_size=2)
        )
        options["save_only_model"] = True
    else:
        options |= SHARDED
    bird, seen = EarlyBirdCallback(0.6, **CHECKS), Seen()
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "rows": ROWS}
    with launched(rank, accelerated=way == "accelerate"):
        tuned(model, folder, HoldMaskCallback(mask), bird, seen, max_steps=steps, resume=resume, **options)
    return Told(bird._lines(), bird.ticket.digest(), seen.weights)


def seen_in(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What hangs on the weights alone."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def looked_at(weights: list[dict[str, torch.Tensor]], state: Saved | None = None) -> WatchingCallback:
    """A bird of one process that has looked at these weights, after what the state has seen."""
    model = tiny_llama()
    bird = EarlyBirdCallback(0.6, **CHECKS)
    bird._begin(model)
    bird._go_on(lambda: state)
    for step, values in enumerate(weights, bird._last_step + 1):
        model.load_state_dict(values)
        bird._check(model, epoch=-(-step // 4), step=step)
    return bird


@pytest.mark.parametrize("way", ["accelerate", "transformers"])
def test_both_callbacks_in_the_trainers_own_sharding(ranks, tmp_path, way):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    mask = create_magnitude_mask(model, 0.3)
    first, second = ranks(2).run(train, way, tmp_path / "run")
    assert (seen_in(first.lines), first.ticket) == (seen_in(second.lines), second.ticket)
    for step in (2, 4):
        assert validate_pruning_correctness(tmp_path / "run" / f"checkpoint-{step}", mask)["problems"] == []
    trained = first.weights[-1]["model.layers.1.mlp.down_proj.weight"]
    assert not torch.equal(trained, first.weights[0]["model.layers.1.mlp.down_proj.weight"])
    alone = looked_at(first.weights)
    assert seen_in(first.lines) == seen_in(alone._lines())
    assert first.ticket == alone.ticket.digest()
    assert Mask.load(tmp_path / "run" / "held" / "ticket.safetensors") == mask


def test_a_resumed_training_ends_as_an_undisturbed_one(ranks, tmp_path):
    undisturbed, _ = ranks(2).run(train, "accelerate", tmp_path / "undisturbed", 4)
    ranks(2).run(train, "accelerate", tmp_path / "run", 2)
    state = StateFolder(tmp_path / "run" / "early-bird").read(2)
    alone = looked_at(undisturbed.weights[3:], state)
    assert seen_in(alone._lines()) == seen_in(undisturbed.lines), "one process goes on from the state of two"
    resumed = ranks(2).run(resume, tmp_path / "run")
    for told in resumed:
        assert seen_in(told.lines) == seen_in(undisturbed.lines)
        assert told.ticket == undisturbed.ticket
        assert digest_of(told.weights[-1]) == digest_of(undisturbed.weights[-1])
        assert len(told.weights) == 3, "at the checkpoint and after two steps"


def resume(rank: int, folder: Path) -> Told:
    return train(rank, "accelerate", folder, 4, resume=True)


@pytest.mark.slow
def test_a_compiled_model_that_is_sharded(ranks, tmp_path):
    mask = create_magnitude_mask(tiny_llama(), 0.3)
    first, _ = ranks(2).run(train_compiled, tmp_path / "run")
    assert validate_pruning_correctness(tmp_path / "run" / "checkpoint-2", mask)["problems"] == []
    assert seen_in(first.lines) == seen_in(looked_at(first.weights)._lines())


def train_compiled(rank: int, folder: Path) -> Told:
    return train(rank, "accelerate", folder, 2, torch_compile=True)


def adapt(rank: int, folder: Path) -> tuple[dict[str, int], bool]:
    """What is not zero beneath the adapters after training, and whether these have moved."""
    model = tiny_llama()
    mask = create_magnitude_mask(model, 0.3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    before = {name: one.detach().clone() for name, one in adapted.named_parameters() if one.requires_grad}
    with launched(rank, accelerated=True):
        tuned(adapted, folder, HoldMaskCallback(mask), rows=ROWS, max_steps=2, **SHARDED)
    after = whole(adapted)
    moved = all(not torch.equal(after[name], one) for name, one in before.items())
    return compute_filled_zeros(adapted, mask), moved


@pytest.mark.slow
def test_weights_beneath_adapters_are_held_where_they_are_sharded(ranks, tmp_path):
    assert ranks(2).run(adapt, tmp_path) == [({}, True)] * 2


def stumble(rank: int, folder: Path) -> None:
    model = fully_shard(tiny_llama(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TrainingError, match=r"'rank_correlation' ranks whole tensors, and .* sharded"):
        EarlyBirdCallback(criterion="rank_correlation")._begin(model)
    args, state, control = TrainingArguments(str(folder), use_cpu=True), TrainerState(), TrainerControl()
    pair = [EarlyBirdCallback(**CHECKS), EarlyBirdCallback(**CHECKS)]
    for bird in pair:
        bird.on_train_begin(args, state, control, model=model)
    state.global_step = 1
    for bird in pair:
        bird.on_step_end(args, state, control, model=model)


def test_what_rank_0_cannot_write_is_an_error_on_all(ranks, tmp_path):
    for error in ranks(2).attempt(stumble, tmp_path):
        assert isinstance(error, RunFolderError), error
        assert "give each callback a folder of its own" in str(error)


# --- Lightning ---


class LitSharded(LitClassifier):
    """Sharded by the hook that Lightning has for it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[3], self.net):
            if not isinstance(layer, FSDPModule):
                fully_shard(layer, mesh=mesh)


def fit(rank: int, folder: Path, epochs: int, ckpt: Path | None = None) -> Any:
    first, model = mlp(0), LitSharded(mlp(1))
    bird = lightning.EarlyBirdCallback(0.6, stability_window=99, stop=False, module="net")
    hold = lightning.HoldMaskCallback(
        create_magnitude_mask(first, 0.3), rewind_to=first.state_dict(), module="net"
    )
    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    with launched(rank, accelerated=False):
        fitted(model, folder, hold, bird, keep, ckpt=ckpt, strategy=strategy, devices=2, max_epochs=epochs)
    return bird._lines(), bird.ticket.digest(), whole(model.net)


def test_both_callbacks_in_lightnings_sharding_and_resume(ranks, tmp_path):
    mask = create_magnitude_mask(mlp(0), 0.3)
    (lines, ticket, weights), second = ranks(2).run(fit, tmp_path / "run", 4)
    assert (seen_in(lines), ticket) == (seen_in(second[0]), second[1])
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    trained = mlp(1)
    trained.load_state_dict(weights)
    assert validate_pruning_correctness(trained, mask)["problems"] == []
    assert ticket == create_magnitude_mask(trained, 0.6).digest()
    again, *_ = ranks(2).run(fit, tmp_path / "again", 4, tmp_path / "run" / "epoch=1.ckpt")
    assert seen_in(again[0]) == seen_in(lines)
    assert digest_of(again[2]) == digest_of(weights)
