"""Batches of every form against the obvious loss, and against transformers' own."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding

from lottery_tickets._batches import (
    BatchLoss,
    batches_of,
    check_precision,
    evaluating,
    measure,
    measure_mean,
    total,
)
from lottery_tickets._batches._losses import class_loss, plain_loss
from lottery_tickets.errors import BatchError, EvaluationError

VOCABULARY = 60
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def built(name: str, **settings: Any) -> nn.Module:
    """A small random transformers model by the name of its class."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**settings)).eval()


def on(model: nn.Module, batch: Any, **options: Any) -> BatchLoss:
    with evaluating(model):
        return measure(model, batch, **options)


def own_loss(model: nn.Module, **batch: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama() -> nn.Module:
    return built("LlamaForCausalLM", **LLAMA)


# ---------------------------------------------------------------- transformers' conventions


@pytest.mark.parametrize(
    ("name", "settings", "ignored", "units"),
    [
        ("LlamaForCausalLM", LLAMA, 4, 27),
        ("GPT2LMHeadModel", GPT2, 4, 27),
        ("BertLMHeadModel", {**BERT, "is_decoder": True}, 4, 27),
        ("BartForCausalLM", {**BART, "is_decoder": True, "is_encoder_decoder": False}, 4, 29),
        ("BartForConditionalGeneration", BART, 4, 29),
        ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, 4, 29),
        ("BertForMaskedLM", BERT, 4, 29),
    ],
)
def test_token_labels_as_transformers_reads_them(
    name: str, settings: dict[str, Any], ignored: int, units: int, ids: torch.Tensor
) -> None:
    model = built(name, **settings)
    labels = ids.clone()
    labels[0, :ignored] = -100
    part = on(model, {"input_ids": ids, "labels": labels})
    assert part.mean == pytest.approx(own_loss(model, input_ids=ids, labels=labels), rel=1e-6)
    assert (part.units, part.samples, part.correct) == (units, 3, None)
    assert part.tokens


@pytest.mark.parametrize(
    ("name", "settings"),
    [("BertForSequenceClassification", BERT), ("LlamaForSequenceClassification", {**LLAMA, "pad_token_id": 0})],
)
@pytest.mark.parametrize("task", ["single", "multi", "regression", "several regressions"])
def test_sequence_labels_by_problem_type(
    name: str, settings: dict[str, Any], task: str, ids: torch.Tensor
) -> None:
    torch.manual_seed(2)
    classes = 1 if task == "regression" else 5
    model = built(name, **settings, num_labels=classes)
    labels = {
        "single": torch.randint(5, (3,)),
        "multi": torch.randint(2, (3, 5)).float(),
        "regression": torch.randn(3),
        "several regressions": torch.randn(3, 5),
    }[task]
    if task == "several regressions":
        model.config.problem_type = "regression"
    given_type = model.config.problem_type
    part = on(model, {"input_ids": ids, "labels": labels})
    assert model.config.problem_type == given_type  # transformers writes its guess there
    assert part.mean == pytest.approx(own_loss(model, input_ids=ids, labels=labels), rel=1e-6)
    assert part.units == labels.numel()
    assert (part.correct is not None) == (task == "single")
    if task == "single":
        with torch.no_grad():
            assert part.correct == int((model(input_ids=ids).logits.argmax(-1) == labels).sum())


def test_token_classes_have_an_accuracy_and_no_perplexity(ids: torch.Tensor) -> None:
    model = built("BertForTokenClassification", **BERT, num_labels=5)
    labels = torch.randint(5, ids.shape)
    labels[1, :6] = -100
    part = on(model, {"input_ids": ids, "labels": labels})
    assert part.mean == pytest.approx(own_loss(model, input_ids=ids, labels=labels), rel=1e-6)
    with torch.no_grad():
        right = int((model(input_ids=ids).logits.argmax(-1) == labels).sum())
    assert (part.units, part.correct, part.tokens) == (27, right, False)


def test_models_with_a_loss_of_their_own_are_believed(ids: torch.Tensor) -> None:
    positions = torch.tensor([1, 2, 3])
    answering = built("BertForQuestionAnswering", **BERT)
    batch = {"input_ids": ids, "start_positions": positions, "end_positions": positions}
    part = on(answering, batch)
    assert part.mean == pytest.approx(own_loss(answering, **batch))
    assert part.units == 3
    following = built("BertForNextSentencePrediction", **BERT)
    labels = torch.tensor([0, 1, 1])
    part = on(following, {"input_ids": ids, "labels": labels})
    assert part.mean == pytest.approx(own_loss(following, input_ids=ids, labels=labels))
    assert part.correct is not None


def test_a_replaced_loss_function_is_believed(llama: nn.Module, ids: torch.Tensor) -> None:
    llama.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7.0
    assert on(llama, {"input_ids": ids, "labels": ids}).mean == pytest.approx(7.0)


def test_wrappers_do_not_hide_the_model(llama: nn.Module, ids: torch.Tensor) -> None:
    wrapped = nn.DataParallel(llama, device_ids=[]) if torch.cuda.is_available() else nn.DataParallel(llama)
    assert on(wrapped, {"input_ids": ids}) == on(llama, {"input_ids": ids})


# ---------------------------------------------------------------- causal language models


def test_forms_of_a_causal_batch_agree(llama: nn.Module, ids: torch.Tensor) -> None:
    parts = [
        on(llama, {"input_ids": ids}),
        on(llama, {"input_ids": ids, "labels": ids}),
        on(llama, BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})),
        on(llama, (ids, ids)),
        on(llama, [ids, F.pad(ids[:, 1:], (0, 1), value=-100)]),
        on(llama, (ids[:, :-1], ids[:, 1:])),
        on(llama, ({"input_ids": ids}, ids)),
    ]
    assert {part.units for part in parts} == {30}
    assert [part.mean for part in parts] == pytest.approx([own_loss(llama, input_ids=ids, labels=ids)] * 7)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(llama: nn.Module, ids: torch.Tensor, side: str) -> None:
    rows = [ids[0], ids[1, :7], ids[2, :2]]
    padded = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        where = slice(0, len(tokens)) if side == "right" else slice(11 - len(tokens), 11)
        padded[row, where] = tokens
        mask[row, where] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for labels in ({}, {"labels": padded}):
        batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions, **labels}
        part = on(llama, batch)
        alone = [own_loss(llama, input_ids=one[None], labels=one[None]) * (len(one) - 1) for one in rows]
        assert part.units == 10 + 6 + 1
        assert part.loss_sum == pytest.approx(sum(alone), rel=1e-5)


def test_a_batch_of_ignored_labels_adds_nothing(llama: nn.Module, ids: torch.Tensor) -> None:
    part = on(llama, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert (part.loss_sum, part.units, part.samples) == (0.0, 0, 3)
    assert math.isnan(part.mean)


def test_smollm2_against_its_own_loss(smollm2: nn.Module, smollm2_tokenizer: Any, english_text: str) -> None:
    batch = smollm2_tokenizer(
        [english_text[2_000_000:2_000_200], english_text[3_000_000:3_000_120]], return_tensors="pt", padding=True
    )
    part = on(smollm2, batch)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert smollm2_tokenizer.padding_side == "right"
    assert part.mean == pytest.approx(own_loss(smollm2, **batch, labels=labels), rel=1e-5)
    assert part.units == int((labels[:, 1:] != -100).sum())


# ---------------------------------------------------------------- plain models


class Returning(nn.Module):
    """Gives what it was told to give."""

    def __init__(self, result: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.result = result

    def forward(self, x: torch.Tensor) -> Any:
        return self.result(x)


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, "cache"),
        lambda x: [x],
        lambda x: SimpleNamespace(logits=x, loss=None),
        lambda x: SimpleNamespace(logits=x),
        lambda x: {"logits": x},
    ],
)
def test_forms_of_an_output(form: Callable[[torch.Tensor], Any]) -> None:
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    expected = float(F.cross_entropy(x, y))
    model = Returning(form)
    for batch in ((x, y), [x, y], ({"x": x}, y), {"x": x, "labels": y}, ([x], y), Point(x, y)):
        part = on(model, batch)
        assert part.mean == pytest.approx(expected)
        assert (part.units, part.samples, part.tokens) == (6, 6, False)
        assert part.correct == int((x.argmax(-1) == y).sum())


def test_a_model_that_takes_labels_and_gives_a_loss() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=(labels.float() * 3).mean(), logits=x)

    labels = torch.tensor([0, 1, 1])
    part = on(Own(), {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), "labels": labels})
    assert (part.mean, part.units, part.correct) == (pytest.approx(2.0), 3, 2)
    tuples = Returning(lambda x: (x.sum(), x))
    assert on(tuples, {"x": torch.ones(2, 3), "labels": torch.tensor([0, 1])}).units == 2


def test_repeated_tokens_as_labels_of_a_plain_language_model_are_shifted() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 20)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)

    model, ids = Bigram(), torch.randint(20, (2, 9))
    expected = F.cross_entropy(model.table(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    for batch in ({"input_ids": ids, "labels": ids}, (ids[:, :-1], ids[:, 1:])):
        part = on(model, batch)
        assert part.tokens
        assert (part.mean, part.units) == (pytest.approx(float(expected.detach())), 16)


def test_plain_targets_by_type_and_shape() -> None:
    torch.manual_seed(0)
    images, classes = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    classes[0, 0] = -100
    segmented = plain_loss(images, classes, high=True)
    assert segmented.mean == pytest.approx(float(F.cross_entropy(images, classes)))
    assert (segmented.units, segmented.samples) == (20, 2)
    outputs, targets = torch.randn(4, 1), torch.randn(4)
    regressed = plain_loss(outputs, targets, high=True)
    assert regressed.mean == pytest.approx(float(F.mse_loss(outputs[:, 0], targets)))
    assert (regressed.units, regressed.correct, regressed.tokens) == (4, None, False)


def test_inputs_take_the_models_dtype_and_targets_keep_theirs() -> None:
    model = nn.Linear(3, 1).bfloat16()
    x, y = torch.randn(8, 3), torch.full((8, 1), 1.0009765625)  # a target bfloat16 cannot hold
    with torch.no_grad():
        expected = F.mse_loss(model(x.bfloat16()).float(), y)
    assert on(model, (x, y)).mean == pytest.approx(float(expected))


def test_high_precision_widens_and_fast_does_not() -> None:
    logits, labels = torch.randn(50, 7).bfloat16(), torch.randint(7, (50,))
    high, fast = (class_loss(logits, labels, high=high).loss_sum for high in (True, False))
    assert high == pytest.approx(float(F.cross_entropy(logits.double(), labels, reduction="sum")), rel=1e-5)
    assert fast == float(F.cross_entropy(logits, labels, reduction="none").double().sum())
    assert high != fast


@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 9),
    chunk=st.integers(1, 400),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_chunks_add_up(rows: int, classes: int, chunk: int, dtype: torch.dtype, strided: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, rows, classes, generator=generator).to(dtype)
    if strided:
        logits = logits.movedim(-1, 1).contiguous().movedim(1, -1)
    labels = torch.randint(-1, classes, (3, rows), generator=generator)
    labels[labels < 0] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lottery_tickets._batches._units._CHUNK_BYTES", chunk)
        part = class_loss(logits, labels, high=True)
    loss, units, correct = 0.0, 0, 0
    for scores, label in zip(logits.reshape(-1, classes), labels.flatten().tolist(), strict=True):
        if label != -100:
            loss += float(torch.logsumexp(scores.double(), 0) - scores[label].double())
            units += 1
            correct += int(scores.argmax()) == label
    assert part.loss_sum == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert (part.units, part.correct, part.samples) == (units, correct, 3)


# ---------------------------------------------------------------- loss_fn


def test_loss_fn_gets_logits_and_labels_as_they_came(llama: nn.Module, ids: torch.Tensor) -> None:
    seen = []

    def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append((logits.shape, labels))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")

    part = on(llama, {"input_ids": ids, "labels": ids}, loss_fn=by_hand)
    assert part.mean == pytest.approx(own_loss(llama, input_ids=ids, labels=ids))
    assert part.units == 30
    assert seen[0][0] == (3, 11, VOCABULARY)
    assert torch.equal(seen[0][1], ids)


def test_a_scalar_of_loss_fn_is_a_mean_over_labels_or_samples() -> None:
    model = nn.Linear(3, 4)
    x, classes = torch.randn(5, 3), torch.tensor([0, 1, -100, 2, 3])
    part = on(model, (x, classes), loss_fn=F.cross_entropy)
    assert part.units == 4
    assert part.mean == pytest.approx(float(F.cross_entropy(model(x), classes).detach()))
    assert on(model, (x, torch.randn(5, 4)), loss_fn=F.l1_loss).units == 5


def test_what_loss_fn_returns_is_checked() -> None:
    model, batch = nn.Linear(3, 4), (torch.randn(5, 3), torch.zeros(5))
    with pytest.raises(
        BatchError, match="loss_fn returns a tensor, the mean loss or one loss per unit; got float"
    ):
        on(model, batch, loss_fn=lambda logits, targets: 1.0)
    with pytest.raises(BatchError, match=r"got a tensor of shape \(\) of torch.int64"):
        on(model, batch, loss_fn=lambda logits, targets: torch.tensor(1))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 3, dtype=torch.long), r"got a tensor of shape \(2, 3\)"),
        ((torch.ones(2, 3, dtype=torch.long),), r"got tuple of 1 \(a tensor of shape \(2, 3\)\)"),
        ("text", r"or a pair \(inputs, targets\) of tensors; got str"),
        (None, "got NoneType"),
        ({"text": "In the beginning"}, r"by name; got dict with keys \['text'\]"),
        ({}, "by name; got dict with keys"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": [1, 2]}, r"labels is list of 2 \(int, int\)"),
        (({"input_ids": torch.ones(1, 3), "labels": torch.ones(1)}, torch.ones(1)), "Labels came twice"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 2, dtype=torch.long)},
            r"Logits \(2, 3, 60\) do not fit labels \(2, 2\)",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.full((2, 3), 60)},
            r"A label is 60, but the model has 60 classes: 0 ... 59",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3)},
            "Class labels are integers, got torch.float32",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
            r"attention_mask \(2, 4\) and labels \(2, 3\) must have one shape",
        ),
        (
            (torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long)),
            "the second is neither the tokens nor the tokens that follow",
        ),
    ],
)
def test_a_causal_model_refuses(llama: nn.Module, batch: Any, message: str) -> None:
    if isinstance(batch, dict) and batch.get("attention_mask") is not None:
        llama.forward = lambda **_: SimpleNamespace(logits=torch.zeros(2, 3, VOCABULARY))
    with pytest.raises(BatchError, match=message):
        on(llama, batch)


@pytest.mark.parametrize(
    ("output", "targets", "message"),
    [
        (torch.ones(4, 3), torch.zeros(4, dtype=torch.bool), "got torch.bool"),
        (torch.ones(4, 4, 4), torch.zeros(4, 4, dtype=torch.long), "in the last or in the second dimension"),
        (torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.long), "they do not fit"),
        (torch.ones(4), torch.zeros(4, dtype=torch.long), "they do not fit"),
        (torch.ones(4, 3), torch.zeros(4), r"shapes must be equal: outputs \(4, 3\), targets \(4,\)"),
        (torch.ones(4, 3), torch.full((4,), -1), "A label is -1, but the model has 3 classes"),
        ("words", torch.zeros(4), "gave neither logits nor a loss to compare: str"),
        (None, torch.zeros(4), "NoneType"),
    ],
)
def test_a_plain_model_refuses(output: Any, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        on(Returning(lambda x: output), (torch.ones(4, 2), targets))


def test_missing_labels_are_refused_where_they_are_needed(ids: torch.Tensor) -> None:
    with pytest.raises(BatchError, match=r"no 'labels', BertForMaskedLM is not known for a causal language model"):
        on(built("BertForMaskedLM", **BERT), {"input_ids": ids})


def test_a_loss_of_many_numbers_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=x, logits=x)

    with pytest.raises(BatchError, match=r"The model's loss has shape \(4, 2\)"):
        on(Own(), {"x": torch.ones(4, 2), "labels": torch.zeros(4)})


# ---------------------------------------------------------------- modes, loaders, sums


def test_evaluating_gives_every_flag_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()


def test_evaluating_does_not_call_train() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("train() merges adapters")

    model = Merging(2, 2)
    with evaluating(model):
        assert not model.training
    assert model.training


def test_a_batch_or_a_loader() -> None:
    x, y = torch.ones(2, 2), torch.zeros(2)
    for batch in ({"x": x}, (x, y), [x, y], ({"x": x}, y), ((x, x), y), BatchEncoding({"x": x})):
        assert batches_of(batch) == [batch]
    for loader in ([(x, y)], [{"x": x}, {"x": x}], iter([(x, y)]), [], [(x, y), (x, y)]):
        assert batches_of(loader) is loader
    for neither in (x, 3, None):
        with pytest.raises(BatchError, match="Expected a batch or an iterable of batches, got"):
            batches_of(neither)


def test_measure_mean_weighs_units(llama: nn.Module, ids: torch.Tensor) -> None:
    batches = [{"input_ids": ids}, {"input_ids": ids[:1, :4]}]
    whole = measure_mean(llama, iter(batches))
    singles = [own_loss(llama, input_ids=row[None], labels=row[None]) for row in ids]
    expected = sum(10 * loss for loss in singles) + 3 * own_loss(llama, input_ids=ids[:1, :4], labels=ids[:1, :4])
    assert whole.units == 33
    assert whole.mean == pytest.approx(expected / 33, rel=1e-6)
    with pytest.raises(EvaluationError, match="no batches came"):
        measure_mean(llama, [])
    with pytest.raises(EvaluationError, match="every label is ignored"):
        measure_mean(llama, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])


def test_total_of_mixed_parts() -> None:
    parts = [BatchLoss(2.0, 4, 2, correct=3), BatchLoss(1.0, 2, 2, correct=0)]
    assert total(parts) == BatchLoss(3.0, 6, 4, correct=3)
    assert total(parts).accuracy == 0.5
    assert total([*parts, BatchLoss(1.0, 1, 1)]).accuracy is None
    assert total([]).units == 0


def test_unknown_precision() -> None:
    with pytest.raises(EvaluationError, match=r"precision_mode is 'high'.*got 'double'"):
        check_precision("double")


# ---------------------------------------------------------------- losses to train by


class Constant(nn.Module):
    """Gives its one parameter, whatever comes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(shape))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.logits


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(
    ("name", "settings", "ignored"),
    [
        ("LlamaForCausalLM", LLAMA, 4),
        ("BartForConditionalGeneration", BART, 4),
        ("BertForMaskedLM", BERT, 4),
        ("BertForTokenClassification", {**BERT, "num_labels": VOCABULARY}, 4),
        ("BartForCausalLM", {**BART, "is_decoder": True, "is_encoder_decoder": False}, 4),
    ],
)
def test_the_graph_over_the_units_is_transformers_loss(
    name: str, settings: dict[str, Any], ignored: int, ids: torch.Tensor
) -> None:
    model, labels = built(name, **settings), ids.clone()
    labels[1, :ignored] = -100
    ours = measure(model, {"input_ids": ids, "labels": labels})
    theirs = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(ours.graph / ours.units, theirs)
    found, expected = gradients_of(model, ours.graph / ours.units), gradients_of(model, theirs)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "targets", "expected", "loss_fn"),
    [
        ((6, 3), torch.tensor([0, 1, 2, -100, 1, 0]), F.cross_entropy, None),
        ((2, 3, 4), torch.tensor([[0, 1, 2, -100], [1, 1, 0, 0]]), F.cross_entropy, None),
        ((6, 3), torch.ones(6, 3), F.mse_loss, None),
        ((6, 3), torch.ones(6, 3), F.l1_loss, F.l1_loss),
        ((6, 3), torch.ones(6, 3), F.l1_loss, lambda a, b: F.l1_loss(a, b, reduction="none")),
        (
            (6, 3),
            torch.tensor([0, 1, 2, -100, 1, 0]),
            lambda a, b: F.cross_entropy(a, b, label_smoothing=0.1),
            lambda a, b: F.cross_entropy(a, b, label_smoothing=0.1),
        ),
    ],
)
def test_the_graph_over_the_units_is_torchs_mean(
    logits: tuple[int, ...], targets: torch.Tensor, expected: Any, loss_fn: Any
) -> None:
    torch.manual_seed(0)
    model, inputs = Constant(logits), torch.zeros(len(targets), 1)
    part = measure(model, (inputs, targets), loss_fn=loss_fn)
    theirs = expected(model(inputs), targets)
    torch.testing.assert_close(part.graph / part.units, theirs)
    found, wanted = gradients_of(model, part.graph / part.units), gradients_of(model, theirs)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_half_precision_loss_of_many_units_does_not_overflow() -> None:
    model = nn.Linear(3, 2).half()
    part = measure(
        model,
        (torch.ones(5000, 3), torch.zeros(5000, dtype=torch.int64)),
        loss_fn=lambda logits, _: logits.float().square().mean().half() + 60.0,
    )
    assert part.graph.dtype == torch.float32
    assert math.isclose(part.graph.item(), part.loss_sum)
    assert part.graph.item() > 70_000


def test_a_batch_of_ignored_labels_has_nothing_to_train_by(llama: nn.Module, ids: torch.Tensor) -> None:
    part = measure(llama, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert part.units == 0
    assert part.graph.item() == 0
