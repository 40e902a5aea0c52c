"""Models that stay on disk, block by block: the results of the loaded model, each weight read once."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lottery_tickets import (
    Mask,
    compute_lottery_ticket_qualities,
    compute_lottery_ticket_quality,
    create_importance_mask,
    create_magnitude_mask,
)
from lottery_tickets._batches import measure
from lottery_tickets.errors import (
    CheckpointError,
    EvaluationError,
    MaskMismatchError,
    MemoryPlanError,
    MissingExtraError,
    ScoreError,
)
from lottery_tickets.importance_scoring import (
    compute_fisher_importance,
    compute_grasp_importance,
    compute_hybrid_importance,
    compute_magnitude_importance,
    compute_synflow_importance,
    compute_wanda_importance,
)
from lottery_tickets.large_models import load_model, map_model
from lottery_tickets.planning import FreeMemory, _guard

WORDS = 96
Batch = dict[str, torch.Tensor]


def qwen(*, tied: bool = False, layers: int = 3) -> Qwen2ForCausalLM:
    """Biases beside queries, keys and values."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=WORDS,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=24, n_layer=3, n_head=2))


def opt() -> OPTForCausalLM:
    """Embeddings narrower than the blocks, and layers outside of these."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=WORDS,
            hidden_size=24,
            ffn_dim=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        )
    )


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
        )
    )


def t5() -> T5ForConditionalGeneration:
    """Two lists of blocks; in float16 some layers stay in float32."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=24,
            d_kv=12,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], torch.dtype]] = {
    "qwen": (qwen, torch.bfloat16),
    "qwen, tied": (lambda: qwen(tied=True), torch.float32),
    "gpt2": (gpt2, torch.float32),
    "opt": (opt, torch.float16),
    "bert": (bert, torch.float32),
    "t5": (t5, torch.float16),
}


def saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():  # norms and biases too, so that one left out would show
            parameter.data.normal_(std=0.2)
        model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    return folder


def batches(count: int = 3) -> list[Batch]:
    """Of growing length, the first sequence padded on its left."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        tokens = torch.randint(WORDS, (2, 7 + number), generator=generator)
        attention = torch.ones_like(tokens)
        attention[0, : 1 + number] = 0
        found.append({"input_ids": tokens, "attention_mask": attention, "labels": tokens})
    return found


def loaded(folder: Path) -> Any:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype="auto")


def masks_of(model: Any) -> dict[str, Mask]:
    return dict(zip(["some", "most"], create_magnitude_mask(model, [0.3, 0.8]), strict=True))


def assert_same(found: Any, expected: Any) -> None:
    """The same results but for rounding."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            rounded = value is not None and not isinstance(value, str)
            assert found[key] == (pytest.approx(value, rel=1e-5) if rounded else value), key


@pytest.fixture(scope="module", params=MODELS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, dtype = MODELS[request.param]
    return saved(make(), tmp_path_factory.mktemp("model"), dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(qwen(), tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


# --- The quality of the loaded model ---


@pytest.mark.parametrize("hidden_states", ["memory", "disk"])
def test_the_quality_of_the_loaded_model(stored: Path, hidden_states: Any, temporary: Path) -> None:
    model = loaded(stored)
    masks = masks_of(model)
    expected = compute_lottery_ticket_qualities(model, masks, batches())
    found = compute_lottery_ticket_qualities(stored, masks, batches(), hidden_states=hidden_states)
    assert_same(found, expected)
    assert found["some"]["loss"] != found["most"]["loss"] != found["most"]["baseline"]["loss"]
    assert not list(temporary.iterdir())


def test_every_weight_is_read_once(stored: Path) -> None:
    masks = masks_of(loaded(stored))
    with map_model(stored) as model:
        losses = model.run(lambda batch, _: measure(model.module, batch).mean, batches(4), [None, *masks.values()])
        assert [len(row) for row in losses] == [4, 4, 4]
        assert model.weights.reads == dict.fromkeys(dict(model.module.named_parameters()), 1)
        assert not model.weights.here()


def test_every_weight_is_masked_once_for_all_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lottery_tickets.large_models import _on_demand

    shapes: list[torch.Size] = []
    copy = _on_demand.masked_copy
    monkeypatch.setattr(
        _on_demand, "masked_copy", lambda weight, packed: shapes.append(weight.shape) or copy(weight, packed)
    )
    mask = masks_of(loaded(folder))["most"]
    compute_lottery_ticket_quality(folder, mask, batches(4))
    assert sorted(shapes) == sorted(mask.shapes.values())


def test_copies_are_of_one_block_at_a_time(folder: Path) -> None:
    mask = masks_of(loaded(folder))["most"]
    alive: list[int] = []
    with map_model(folder, torch.float64) as model:
        handles = [
            module.register_forward_hook(lambda *_: alive.append(len(model.weights._copies)))
            for module in model.module.modules()
        ]
        model.run(lambda batch, _: measure(model.module, batch).mean, batches(2), [None, mask])
        for handle in handles:
            handle.remove()
        most = max(len(model.weights.names_in(block)) for block in model.blocks)
    assert max(alive) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_type_to_compute_in(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved(qwen(layers=2), tmp_path / "model", torch.bfloat16)
    masks = masks_of(folder)
    expected = compute_lottery_ticket_qualities(load_model(folder, dtype), masks, batches())
    assert_same(compute_lottery_ticket_qualities(folder, masks, batches(), dtype=dtype), expected)


def test_options_mean_what_they_mean_in_memory(folder: Path) -> None:
    model = loaded(folder)
    mask = masks_of(model)["most"]

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")

    for options in (
        {"precision_mode": "fast"},
        {"loss_fn": loss_fn},
        {"max_batches": 2},
        {"baseline_performance": 3.0},
        {"confidence": 0.5},
    ):
        expected = compute_lottery_ticket_quality(model, mask, batches(), **options)  # type: ignore[arg-type]
        found = compute_lottery_ticket_quality(folder, mask, batches(), **options)  # type: ignore[arg-type]
        assert_same(found, expected)


def test_each_batch_is_asked_for_once(folder: Path) -> None:
    asked = []

    def generated() -> Iterator[Batch]:
        for batch in batches():
            asked.append(batch)
            yield batch

    mask = masks_of(folder)["most"]
    compute_lottery_ticket_quality(folder, mask, generated(), max_batches=2)
    assert len(asked) == 2
    with pytest.raises(EvaluationError, match="no batches"):
        compute_lottery_ticket_quality(folder, mask, iter([]))


def test_a_loss_that_is_not_finite(folder: Path, tmp_path: Path) -> None:
    spoiled = saved(qwen(layers=2), tmp_path / "spoiled")
    for shard in spoiled.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][0] = torch.inf
            save_file(tensors, shard, {"format": "pt"})
    mask = masks_of(spoiled)["most"]
    with pytest.raises(EvaluationError, match=r"Batch 0: the loss of the dense model is nan\. nonfinite='skip'"):
        compute_lottery_ticket_quality(spoiled, mask, batches())


def test_random_state_is_left_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    compute_lottery_ticket_quality(folder, masks_of(folder)["most"], batches(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_of_the_batch_stay_where_they_are(folder: Path) -> None:
    model = loaded(folder)
    embedded = torch.randn(2, 6, 40)
    batch = {"inputs_embeds": embedded, "labels": torch.randint(WORDS, (2, 6))}
    before, mask = embedded.clone(), masks_of(model)["most"]
    expected = compute_lottery_ticket_quality(model, mask, batch)
    assert_same(compute_lottery_ticket_quality(folder, mask, batch, hidden_states="disk"), expected)
    assert torch.equal(embedded, before)


def test_hidden_states_on_disk_are_not_in_memory(folder: Path) -> None:
    with map_model(folder) as model:
        waiting: list[int] = []
        states: dict[int, torch.Tensor] = {}

        def keep(_block: Any, args: Any) -> None:
            states[len(states)] = args[0]
            waiting.append(sum(bool(state.untyped_storage().nbytes()) for state in states.values()))

        handle = model.blocks[1].register_forward_pre_hook(keep)
        model.run(lambda batch, _: measure(model.module, batch).mean, batches(4), hidden_states="disk")
        handle.remove()
    assert len(states) == 4
    assert waiting == [1, 1, 1, 1]  # that of the forward pass that goes on


def test_buffers_are_computed(folder: Path) -> None:
    with map_model(folder) as model:
        expected = dict(loaded(folder).named_buffers())
        found = dict(model.module.named_buffers())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_of_the_inner_model(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    whole = loaded(tmp_path)
    masks = masks_of(whole)
    expected = compute_lottery_ticket_qualities(whole, masks, batches())
    assert_same(compute_lottery_ticket_qualities(tmp_path, masks, batches()), expected)


@pytest.mark.slow
def test_smollm2(smollm2_folder: Path, smollm2_tokenizer: Any, english_text: str) -> None:
    """Two batches, the first with padding; the head is tied to the embedding."""
    smollm2_tokenizer.padding_side = "left"
    texts = [english_text[start : start + length] for start, length in ((0, 60), (9000, 90))]
    rows = [
        smollm2_tokenizer(texts, return_tensors="pt", padding=True),
        smollm2_tokenizer(texts[:1], return_tensors="pt"),
    ]
    masks = masks_of(smollm2_folder)
    found = compute_lottery_ticket_qualities(smollm2_folder, masks, rows, dtype=torch.float32)
    expected = compute_lottery_ticket_qualities(load_model(smollm2_folder, torch.float32), masks, rows)
    assert_same(found, expected)


# --- What is left behind ---


@pytest.mark.parametrize("hidden_states", ["memory", "disk"])
def test_an_exception_leaves_nothing_behind(folder: Path, temporary: Path, hidden_states: Any) -> None:
    ended = []

    def function(batch: Batch, ticket: int) -> float:
        try:
            loss = measure(model.module, batch).mean
            if ticket:
                raise KeyError("of the user's own")
            return loss
        finally:
            ended.append(ticket)

    mask = masks_of(folder)["most"]
    with map_model(folder) as model:
        with pytest.raises(KeyError, match="of the user's own"):
            model.run(function, batches(), [None, mask], hidden_states=hidden_states)
        assert sorted(ended) == [0, 0, 0, 1, 1, 1]  # those that had not come to their end, too
        assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks)
        assert not model.weights.here()
        losses = model.run(lambda batch, _: measure(model.module, batch).mean, batches())
    assert len(losses[0]) == 3
    gc.collect()
    assert not list(temporary.iterdir())


# --- What is refused ---


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """One file that holds all tensors, some of them changed."""
    tensors = {key: one for shard in folder.glob("*.safetensors") for key, one in load_file(shard).items()}
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight, which is not stored"),
        (
            lambda tensors: tensors.pop("lm_head.weight"),
            "Qwen2ForCausalLM has lm_head.weight, which is not stored",
        ),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "no extra, which is stored"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 40)}),
            r"lm_head.weight as \(96, 40\), stored as \(3, 40\)",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(96, 40, dtype=torch.int8)}),
            "lm_head.weight stored as I8",
        ),
    ],
)
def test_files_that_do_not_fit_the_model(tmp_path: Path, change: Any, message: str) -> None:
    folder = changed(saved(qwen(layers=2), tmp_path), change)
    with pytest.raises(CheckpointError, match=message), map_model(folder):
        raise AssertionError("mapped")


def test_tensors_that_loading_passes_over(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(saved(qwen(layers=2), tmp_path), lambda tensors: tensors.update({key: torch.ones(5)}))
    assert (
        compute_lottery_ticket_quality(folder, masks_of(folder)["most"], batches(1))["num_batches_evaluated"] == 1
    )


def test_a_model_without_blocks(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="Qwen2ForCausalLM has no list of blocks"),
        map_model(saved(qwen(layers=0), tmp_path)),
    ):
        raise AssertionError("mapped")


def test_without_its_configuration(tmp_path: Path) -> None:
    folder = saved(qwen(layers=2), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be told: there is no config\.json"), map_model(folder):
        raise AssertionError("mapped")


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"lottery-tickets\[hf\]"), map_model(folder):
        raise AssertionError("mapped")


def test_a_mask_of_another_model(folder: Path) -> None:
    with pytest.raises(MaskMismatchError, match="Qwen2ForCausalLM"):
        compute_lottery_ticket_quality(folder, {"fc.weight": torch.ones(2, 2)}, batches(1))


def test_options_of_folders_are_refused_for_modules() -> None:
    model = torch.nn.Linear(2, 2)
    batch = (torch.eye(2), torch.tensor([0, 1]))
    mask = {"weight": torch.ones(2, 2)}
    for options in ({"dtype": torch.float32}, {"hidden_states": "disk"}):
        with pytest.raises(EvaluationError, match="for a checkpoint's folder"):
            compute_lottery_ticket_quality(model, mask, batch, **options)  # type: ignore[arg-type]
        with pytest.raises(ScoreError, match="for a checkpoint's folder"):
            compute_wanda_importance(model, batch, **options)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="'memory' or 'disk'"):
        compute_lottery_ticket_quality(model, mask, batch, hidden_states="gpu")  # type: ignore[arg-type]


def test_more_memory_than_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_guard, "_SMALL", 0)
    monkeypatch.setattr(_guard, "free_memory", lambda device: FreeMemory(1000, "a made-up limit"))
    mask = create_magnitude_mask(folder, 0.5, check_memory=False)

    def asked_for(*_: Any) -> Iterator[Batch]:
        raise AssertionError("a batch was asked for")
        yield {}

    with pytest.raises(MemoryPlanError, match=r"quality needs .*a made-up limit"):
        compute_lottery_ticket_quality(folder, mask, asked_for())
    with pytest.raises(MemoryPlanError, match="wanda needs"):
        compute_wanda_importance(folder, asked_for())
    compute_lottery_ticket_quality(folder, mask, batches(1), check_memory=False)


# --- Wanda ---


def test_the_scores_of_the_loaded_model(stored: Path) -> None:
    expected = compute_wanda_importance(loaded(stored), batches(), 5)
    found = compute_wanda_importance(stored, batches(), 5)
    assert list(found) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0)
    drawn = create_importance_mask(found, 0.5, scope="row")
    assert drawn.intersect_count(create_importance_mask(expected, 0.5, scope="row")) / drawn.kept > 0.99


def test_scores_on_disk(folder: Path, tmp_path: Path, temporary: Path) -> None:
    expected = compute_wanda_importance(folder, batches())
    place = tmp_path / "scores.safetensors"
    for store in ("disk", place):
        found = compute_wanda_importance(folder, batches(), store=store)  # type: ignore[arg-type]
        assert all(torch.equal(score, expected[name]) for name, score in found.items())
        in_memory = compute_wanda_importance(loaded(folder), batches(), store=store)  # type: ignore[arg-type]
        torch.testing.assert_close(in_memory, expected, rtol=1e-5, atol=0)
    assert load_file(place).keys() == expected.keys()
    assert list(temporary.iterdir()) == [place]


def test_scores_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lottery_tickets.gradients import _wanda

    whole = compute_wanda_importance(folder, batches())
    monkeypatch.setattr(_wanda, "_AT_A_TIME", 100)
    assert all(
        torch.equal(score, whole[name]) for name, score in compute_wanda_importance(folder, batches()).items()
    )


def test_the_scores_of_a_tied_head_are_of_all_its_uses(tmp_path: Path) -> None:
    folder = saved(qwen(tied=True, layers=2), tmp_path)
    options: dict[str, Any] = {"include": "model.embed_tokens.weight"}
    expected = compute_wanda_importance(loaded(folder), batches(), **options)
    found = compute_wanda_importance(folder, batches(), hidden_states="disk", **options)
    assert "model.embed_tokens.weight" in found
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_wanda_of_smollm2(smollm2_folder: Path, smollm2_tokenizer: Any, english_text: str) -> None:
    batch = smollm2_tokenizer([english_text[:60], english_text[5000:5060]], return_tensors="pt", padding=True)
    rows = [batch, smollm2_tokenizer(english_text[9000:9040], return_tensors="pt")]
    expected = compute_wanda_importance(load_model(smollm2_folder), rows)
    found = compute_wanda_importance(smollm2_folder, rows)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (compute_fisher_importance, "gradients need backward passes"),
        (compute_grasp_importance, "GraSP needs backward passes"),
        (lambda folder, _: compute_synflow_importance(folder), "SynFlow needs backward passes"),
        (lambda folder, rows: compute_hybrid_importance(folder, rows, {"wanda": 1.0}), "sums of ranks"),
        (lambda folder, _: compute_magnitude_importance(folder), "create_magnitude_mask"),
    ],
)
def test_other_criteria_need_the_model(folder: Path, score: Any, reason: str) -> None:
    with pytest.raises(ScoreError, match=rf"{reason}.*compute_wanda_importance|{reason}"):
        score(folder, batches(1))
