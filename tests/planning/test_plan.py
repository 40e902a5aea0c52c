"""Bytes of every operation against arithmetic by hand, and what must hold of them whatever the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lottery_tickets import importance_scoring
from lottery_tickets._batches import _units, measure
from lottery_tickets.cli._criteria import CRITERIA
from lottery_tickets.detection import _movement
from lottery_tickets.errors import ParameterSelectionError, PlanError
from lottery_tickets.gradients import _ranks
from lottery_tickets.large_models import plan_memory
from lottery_tickets.planning import ITEMS, OPERATIONS, _items
from lottery_tickets.planning._items import TRAINING
from lottery_tickets.planning._models import in_dtype
from lottery_tickets.sparsity import _blocks, _selection
from lottery_tickets.training import LEARNING_RATES, training_bytes

HIDDEN, INSIDE, LAYERS, HEADS, PAIRS, WORDS = 64, 160, 6, 4, 2, 96
TOKENS = 2 * 50
# A block: queries and output (h x h), keys and values (h x h/2), three of the feed-forward part. Then the head.
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INSIDE) + WORDS * HIDDEN
OTHERS = WORDS * HIDDEN + (2 * LAYERS + 1) * HIDDEN
LARGEST = HIDDEN * INSIDE
BUFFERS = 2 * (HIDDEN // HEADS // 2) * 4  # frequencies of rotary positions, and their originals, in float32
BLOCK = 5 * HIDDEN + 6 * HIDDEN + 4 * INSIDE  # numbers that a block keeps for each token
CHUNKS = 2 * TOKENS * WORDS * 4  # of the loss: all tokens fit into one, and one comes from it


def llama(dtype: torch.dtype = torch.float32, device: str = "meta", **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": INSIDE, "num_hidden_layers": LAYERS}
    config = LlamaConfig(
        **{**sizes, **options}, num_attention_heads=HEADS, num_key_value_heads=PAIRS, tie_word_embeddings=False
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype)


def plan(operation: str, **options: Any):
    given = {"batch_size": 2, "sequence_length": 50, "device": "cpu", **options}
    return plan_memory(given.pop("model", None) or llama(), operation, **given)


def items(found: Any) -> dict[str, int]:
    return {name: count for name, count in found.items() if count and name != "total"}


# --- By hand ---


def test_weights_are_all_parameters_and_buffers():
    assert plan("mask")["weights"] == 4 * (LINEAR + OTHERS) + BUFFERS
    assert plan("mask", dtype="bfloat16")["weights"] in {
        2 * (LINEAR + OTHERS) + BUFFERS,
        2 * (LINEAR + OTHERS) + BUFFERS // 2,  # a model that is turned to a type turns its buffers too
    }


def test_a_mask_is_a_bit_a_weight():
    found = plan("mask", masks=3)
    assert found["mask"] == 3 * LINEAR // 8
    assert found["temporaries"] == 0
    assert plan("mask", device="cuda")["temporaries"] == found["weights"]  # blocks: not more than there is
    assert plan("mask", use_histogram=False)["temporaries"] == 20 * LINEAR


def test_a_sample_and_what_lies_between_its_guesses():
    model = nn.Linear(1 << 13, 1 << 13, bias=False, device="meta")
    count = 1 << 26
    sample = count // 800
    found = plan("mask", model=model)["temporaries"]
    assert found == 12 * sample + 4 * round(count * 2 * 6 * 0.5 / sample**0.5)


def test_weights_that_stay_on_disk_take_nothing():
    found = plan("mask", from_disk=True)
    assert items(found) == {"mask": LINEAR // 8}
    knobs = dict(plan("mask").knobs)
    assert knobs["from_disk=True"] == plan("mask")["weights"]


def test_quality_from_disk_holds_a_masked_block_and_what_waits_for_it():
    block = (LINEAR - WORDS * HIDDEN) // LAYERS
    inside, state = TOKENS * 4 * (2 * HIDDEN + 3 * INSIDE), TOKENS * 4 * HIDDEN
    found = plan("quality", from_disk=True, masks=2, batches=5)
    assert items(found) == {
        "mask": 2 * LINEAR // 8,
        "activations": inside + 3 * 5 * state,
        "temporaries": 4 * block,
    }
    assert plan("quality", from_disk=True, masks=2, batches=0)["activations"] == inside
    large = llama(vocab_size=1 << 14)  # its head is larger than a block
    assert plan("quality", from_disk=True, model=large)["temporaries"] >= 4 * (HIDDEN << 14)


def test_wanda_from_disk():
    found, loaded = plan("wanda", from_disk=True, batches=5), plan("wanda")
    assert found["weights"] == 0
    assert found["scores"] == loaded["scores"]
    assert found["activations"] == loaded["activations"] + 5 * TOKENS * 4 * HIDDEN
    assert plan("wanda", from_disk=True, store="disk")["scores"] == 4 * LARGEST


def test_the_loss_holds_back_chunks_of_long_batches():
    chunk, words = 16 << 20, 1 << 16
    model = llama(vocab_size=words)

    def held(chunks: int, device: str) -> int:
        tokens = chunks * chunk // (4 * words)
        sizes = {"batch_size": 1, "sequence_length": tokens, "device": device}
        found = plan("quality", model=model, exclude="lm_head.weight", **sizes)
        return found["temporaries"] // chunk  # a masked copy is smaller than a chunk

    assert [held(chunks, "cpu") for chunks in (1, 3, 30)] == [2, 4, 5]
    assert [held(chunks, "cuda") for chunks in (1, 3, 30)] == [2, 3, 3]


def test_quality():
    found = plan("quality")
    shared = {"weights": 4 * (LINEAR + OTHERS) + BUFFERS, "mask": LINEAR // 8}
    block = TOKENS * 4 * (2 * HIDDEN + 3 * INSIDE)  # more than the logits of so few words
    assert items(found) == {**shared, "activations": block, "temporaries": LARGEST * 4}
    many = 1000
    found = plan("quality", model=llama(vocab_size=many), exclude="lm_head.weight")
    assert items(found) == {
        "weights": shared["weights"] + 2 * 4 * HIDDEN * (many - WORDS),
        "activations": 2 * TOKENS * HIDDEN * 4,
        "logits": TOKENS * many * 4,
        "mask": (LINEAR - WORDS * HIDDEN) // 8,
        "temporaries": LARGEST * 4 + 2 * TOKENS * many * 4,
    }


def test_gradient_scores_hold_one_gradient_and_one_sum_a_weight():
    for operation in ("fisher", "taylor", "grad_norm", "obd", "snip"):
        assert items(plan(operation)) == {
            "weights": 4 * (LINEAR + OTHERS) + BUFFERS,
            "gradients": LARGEST * 4,
            "activations": LAYERS * TOKENS * 4 * BLOCK + TOKENS * HIDDEN * 12,
            "logits": 2 * TOKENS * WORDS * 4,
            "scores": 4 * LINEAR,
            "temporaries": CHUNKS if operation in ("fisher", "grad_norm") else max(CHUNKS, 4 * LARGEST),
        }
        end = 4 * LINEAR + (0 if operation in ("fisher", "grad_norm") else 4 * LARGEST)  # magnitudes of weights
        at_the_loss = LAYERS * TOKENS * 4 * BLOCK + TOKENS * (HIDDEN * 12 + 8 * WORDS) + CHUNKS
        loaded = 4 * (LINEAR + OTHERS) + BUFFERS + 4 * LARGEST
        assert plan(operation, device="cuda", store="device")["total"] == loaded + max(end, at_the_loss)
        turns = plan(operation, device="cuda", store="device").turns
        assert plan(operation)["total"] == loaded + max(end, at_the_loss) + turns // 3


def test_sums_in_a_file_are_there_tensor_by_tensor():
    assert plan("fisher", store="disk")["scores"] == 4 * LARGEST


def test_checkpoints_keep_the_input_of_each_block():
    found = plan("fisher", gradient_checkpointing=True)
    block = TOKENS * 4 * (BLOCK + 3 * INSIDE)
    at_the_loss = TOKENS * (HIDDEN * 12 + 8 * WORDS) + CHUNKS
    assert block > at_the_loss
    assert found["activations"] == LAYERS * TOKENS * 4 * HIDDEN + block
    assert found["logits"] == 0


def test_magnitudes_are_a_copy_in_float32():
    assert items(plan("magnitude", dtype="bfloat16"))["scores"] == 4 * LINEAR
    assert set(items(plan("magnitude"))) == {"weights", "scores"}


def test_wanda_makes_scores_in_float64_tensor_by_tensor():
    found = plan("wanda")
    assert found["scores"] == 4 * LINEAR
    in_float64 = max(LARGEST * (4 + 8 + 8 + 4), 2 * 8 * TOKENS * INSIDE)
    block = TOKENS * 4 * (2 * HIDDEN + max(3 * INSIDE, 6 * HIDDEN))
    assert items(found) == {
        "weights": 4 * (LINEAR + OTHERS) + BUFFERS,
        "activations": block,
        "scores": 4 * LINEAR,
        "temporaries": in_float64,
    }


def test_grasp_lends_two_bytes_as_four():
    found = plan("grasp", model=llama(torch.bfloat16))
    assert found["weights"] >= 6 * (LINEAR + OTHERS)
    assert found["gradients"] == 2 * 4 * LINEAR
    assert found["scores"] == 2 * 4 * LINEAR
    assert not found.complete


def test_synflow_at_least():
    found = plan("synflow")
    assert found["scores"] == 12 * LINEAR
    assert not found.complete


def test_hybrid_adds_ranks():
    assert plan("hybrid")["scores"] == plan("fisher")["scores"] + 4 * LINEAR


@pytest.mark.parametrize("criterion", ["window", "queue", "rank_correlation"])
def test_early_bird_is_training_and_what_checks_keep(criterion):
    found = plan("early-bird", criterion=criterion)
    step = training_bytes(llama(), batch_size=2, sequence_length=50, device="cpu")
    assert found["mask"] == {"window": 1, "queue": 4, "rank_correlation": 1}[criterion] * (LINEAR // 8)
    assert found["scores"] == (LINEAR if criterion == "rank_correlation" else 0)
    assert found["weights"] == step["throughout"]["weights"]
    probe = 16 * min(LINEAR, 1 << 20)
    heap = CHUNKS + TOKENS * 4 * (BLOCK + 3 * INSIDE)  # what comes and goes in small pieces
    block = step["in_a_block"]["gradients"]
    moments = [sum(step["at_the_loss"].values()), block, sum(step["at_the_embedding"].values())]
    training = sum(step["throughout"].values()) + max(moments) + step["update"] + heap
    assert found["total"] == training + found["mask"] + found["scores"] + probe


def test_adamw_and_micro_batches():
    found = plan("early-bird", optimizer="adamw", max_batch_size=1)
    assert found["optimizer"] == 8 * (LINEAR + OTHERS)
    assert found["gradients"] >= 4 * (LINEAR + OTHERS)
    assert found.batch_size == 1


def test_iterative_keeps_the_rewinding_point_unless_a_folder_does():
    found = plan("iterative", optimizer="adamw", rewind_later=True)
    assert found["rewind"] == found["weights"] + found["optimizer"]
    assert plan("iterative")["rewind"] == found["weights"]
    assert plan("iterative", run_dir=True)["rewind"] == 0
    assert found["mask"] == LINEAR // 8


def test_loading_and_copying():
    assert items(plan("load", dtype="bfloat16")) == {"weights": plan("mask", dtype="bfloat16")["weights"]}
    assert items(plan("apply")) == {"mask": LINEAR // 8, "temporaries": 8 << 20}


def test_a_curve_draws_its_tickets_and_judges_them():
    quality, found = plan("quality"), plan("robustness", masks=2)
    assert found["mask"] == 2 * LINEAR // 8
    assert found["temporaries"] == quality["temporaries"]  # of so few weights no sample is drawn
    assert plan("robustness", use_histogram=False)["temporaries"] == quality["temporaries"] + 20 * LINEAR


def test_a_path_has_weights_to_come_back_to():
    found, quality = plan("connectivity"), plan("quality")
    assert found["rewind"] == found["weights"]
    assert found["activations"] == quality["activations"]
    assert found["mask"] == 0


def test_a_verdict_trains_with_its_mask():
    found, iterative = plan("verdict", optimizer="adamw"), plan("iterative", optimizer="adamw", run_dir=True)
    assert dict(found) | {"temporaries": 0, "total": 0} == dict(iterative) | {"temporaries": 0, "total": 0}
    assert found["mask"] == LINEAR // 8


def test_instability_holds_the_first_sibling_and_the_trunk():
    weights = plan("mask")["weights"]
    path = plan("instability", batch_size=1, sequence_length=1)
    assert path["rewind"] == 3 * weights
    training = plan("instability", optimizer="adamw")
    assert training["rewind"] == 2 * weights + training["optimizer"]


def test_on_an_accelerator_masks_and_sums_lie_in_the_machine():
    for operation, item, count in (
        ("mask", "mask", LINEAR // 8),
        ("quality", "mask", LINEAR // 8),
        ("fisher", "scores", 4 * LINEAR),
        ("early-bird", "mask", LINEAR // 8),
    ):
        found = plan(operation, device="cuda")
        assert (found[item], found.host[item]) == (0, count)
    assert plan("fisher", device="cuda", store="device")["scores"] == 4 * LINEAR


def test_of_an_unknown_architecture_only_what_is_certain():
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False)).to("meta")
    found = plan("fisher", model=model)
    assert items(found) == {"weights": 1200, "gradients": 800, "scores": 1200}
    assert plan("taylor", model=model)["temporaries"] == 800
    assert not found.complete
    assert plan("mask", model=model).complete


def test_what_is_left_out_of_the_mask_is_not_counted():
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 8, bias=False)).to("meta")
    assert plan("mask", model=model, exclude="1.*")["mask"] == 16
    with pytest.raises(ParameterSelectionError):
        plan("mask", model=model, exclude="*")


# --- Constants that stand for others ---


def test_constants_are_those_of_what_they_stand_for():
    assert _items._LOSS_CHUNK == _units._CHUNK_BYTES
    assert _items._BLOCKS == _blocks._SCRATCH_BYTES
    assert (_items._SAMPLE_FROM, _items._SAMPLE_SHARE, _items._SAMPLE_MOST, _items._BETWEEN) == (
        _selection._BRACKET_FROM,
        _selection._SAMPLE_SHARE,
        _selection._SAMPLE_MOST,
        _selection._BRACKET_BYTES,
    )
    assert _items._PROBE_MOST == _movement._SAMPLE
    assert _items._RANKING == (_ranks._SLOTS << 16) * 28


def test_every_criterion_has_a_plan():
    assert set(get_args(importance_scoring.GradientImportance)) <= set(OPERATIONS)
    assert set(CRITERIA) <= set(OPERATIONS)


def test_every_optimizer_has_a_plan():
    for optimizer in LEARNING_RATES:
        assert plan("early-bird", optimizer=optimizer)["total"] > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_activations_of_the_known_decoders_are_what_autograd_keeps(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": INSIDE, "num_hidden_layers": LAYERS}
    config = AutoConfig.for_model(
        family, **sizes, num_attention_heads=HEADS, num_key_value_heads=PAIRS, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(TOKENS).remainder(WORDS).view(2, 50)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        rows = measure(model, {"input_ids": ids, "labels": ids}).rows
    assert rows is not None
    found = plan("fisher", model=model)
    assert found.complete
    assert sum(kept.values()) == pytest.approx(found["activations"] + found["logits"] // 2, rel=0.15)


# --- What holds of all ---


@dataclass(frozen=True)
class Call:
    operation: str
    options: dict[str, Any]


calls = st.builds(
    Call,
    st.sampled_from(list(OPERATIONS)),
    st.fixed_dictionaries(
        {
            "batch_size": st.integers(1, 300),
            "sequence_length": st.integers(1, 3000),
            "optimizer": st.sampled_from(["sgd", "adamw", "adamw8bit", "torch sgd", "torch adamw"]),
            "device": st.sampled_from(["cpu", "cuda"]),
            "store": st.sampled_from(["cpu", "disk", "device"]),
            "gradient_checkpointing": st.sampled_from([None, True, False]),
            "max_batch_size": st.none() | st.integers(1, 10),
            "momentum": st.sampled_from([0.0, 0.9]),
            "masks": st.integers(1, 3),
        }
    ),
)
MODEL = llama()


@given(calls)
@settings(max_examples=25, deadline=None)
def test_items_add_up_and_grow_with_what_they_hang_on(call):
    found = plan_memory(MODEL, call.operation, **call.options)
    assert found["total"] + found.turns == sum(found[name] for name in ITEMS)
    assert 0 <= found.turns <= found["total"]
    assert all(count >= 0 for count in found.values())
    assert list(found) == [*ITEMS, "total"]
    for name in ("batch_size", "sequence_length", "masks"):
        more = plan_memory(MODEL, call.operation, **{**call.options, name: 2 * call.options[name]})
        assert more["total"] >= found["total"]
    narrow = plan_memory(MODEL, call.operation, dtype="bfloat16", **call.options)
    # Training and GraSP lend halves in float32; a copy of a checkpoint holds no weights.
    if call.operation not in (*TRAINING, "grasp", "apply"):
        assert narrow["weights"] < found["weights"]


@given(calls)
@settings(max_examples=12, deadline=None)
def test_knobs_save_what_they_say_and_the_largest_batch_is_the_largest(call):
    options = {**call.options, "max_batch_size": None}
    found = plan_memory(MODEL, call.operation, **options)
    saved = [knob.saved for knob in found.knobs]
    assert saved == sorted(saved, reverse=True)
    assert all(0 < count < found["total"] for count in saved)
    limited = plan_memory(MODEL, call.operation, device_memory=max(1, found["total"]), **options)
    assert limited.fits in (True, None)
    if limited.largest_batch is not None:
        assert limited.largest_batch >= options["batch_size"]
        size = {"batch_size": limited.largest_batch}
        assert plan_memory(MODEL, call.operation, **{**options, **size})["total"] <= found["total"]
        if limited.largest_batch < 1 << 20:
            size = {"batch_size": limited.largest_batch + 1}
            assert plan_memory(MODEL, call.operation, **{**options, **size})["total"] > found["total"]


def test_knobs_are_those_of_the_operation():
    def names(operation, **options):
        return {knob.setting for knob in plan(operation, batch_size=8, sequence_length=200, **options).knobs}

    assert names("fisher") == {"checkpoint_activations=True", "store='disk'", "batch_size=1", "dtype='bfloat16'"}
    assert "store='disk'" not in names("fisher", device="cuda")  # there sums are in the machine's memory
    assert {"optimizer='sgd'", "optimizer='adamw8bit'"} <= names("early-bird", optimizer="adamw")
    assert "run_dir='...'" in names("iterative")
    assert "gradient_checkpointing=True" in names("early-bird", gradient_checkpointing=False)
    assert names("mask") == {"from_disk=True", "dtype='bfloat16'"}
    assert "use_histogram=True" in names("mask", use_histogram=False)


def test_a_knob_saves_what_planning_with_it_says():
    given = {"batch_size": 1, "sequence_length": 10}
    wide = plan("fisher", **given)
    knobs = dict(wide.knobs)
    assert knobs["store='disk'"] == wide["total"] - plan("fisher", **given, store="disk")["total"]
    narrow = plan("fisher", **given, dtype=torch.bfloat16)
    assert knobs["dtype='bfloat16'"] == wide["total"] - narrow["total"]


def test_nothing_fits_into_one_byte():
    found = plan("early-bird", device_memory=1)
    assert (found.largest_batch, found.fits) == (0, False)


# --- How it is asked, and what it says ---


def test_a_model_of_the_user_is_not_touched():
    model = llama(torch.float32, "cpu")
    before = [(one.dtype, one.device.type, one.data_ptr()) for one in model.parameters()]
    plan("fisher", model=model, dtype="bfloat16")
    assert [(one.dtype, one.device.type, one.data_ptr()) for one in model.parameters()] == before
    twin = in_dtype(model, torch.bfloat16)
    assert {one.device.type for one in twin.parameters()} == {"meta"}
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_tied_weights_stay_tied_in_another_type():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INSIDE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config)
    twin = in_dtype(model, torch.float16)
    assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_config_path_folder_name_and_module_say_the_same(tmp_path):
    model = llama(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    found = [
        dict(plan("early-bird", model=one))
        for one in (model, model.config, tmp_path, tmp_path / "config.json", str(tmp_path))
    ]
    assert all(one == found[0] for one in found)
    assert plan_memory("SmolLM2-135M", "mask")["weights"] >= 2 * 134_515_008


def test_operations_by_their_other_names():
    assert dict(plan("imp")) == dict(plan("iterative"))
    assert plan("early_bird").operation == "early-bird"


def test_where_it_computes():
    assert plan_memory(llama(), "mask").device == "cpu"
    assert plan_memory(llama(), "mask", device_memory="1GB").device == "cuda"
    assert plan_memory(llama(torch.float32, "cpu"), "mask", device_memory="1GB").device == "cpu"
    assert plan_memory(llama(), "mask", device_memory="1GB", device="cpu").device == "cpu"


def test_what_is_printed():
    found = plan("early-bird", optimizer="adamw", device_memory="1MB")
    text = str(found)
    assert text.splitlines()[0] == "early-bird of LlamaForCausalLM in float32 on cpu, 2 x 50 tokens at a time"
    for item in items(found):
        assert f"  {item}" in text
    assert "1 MB  does not fit" in text
    assert "Largest batch that fits: 0." in text
    assert "optimizer='sgd'" in text
    unknown = str(plan("fisher", model=nn.Linear(4, 4).to("meta"), device_memory="1GB"))
    assert "  at least" in unknown
    assert "activations are not known" in unknown
    assert "In the machine's memory: mask" in str(plan("mask", device="cuda"))


def test_it_is_json():
    found = plan("fisher", device_memory="1GB")
    told = json.loads(json.dumps(found.as_dict()))
    assert told["bytes"] == dict(found) == json.loads(json.dumps(dict(found)))
    assert told["limit"] == 10**9
    assert told["fits"] is True
    assert told["knobs"][0]["saved"] == found.knobs[0].saved


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"operation": "prune"}, "operation is one of load, mask"),
        ({"optimizer": "lion"}, "optimizer is one of sgd"),
        ({"store": "tape"}, "store is one of"),
        ({"criterion": "luck"}, "criterion is one of"),
        ({"precision": "exact"}, "precision is one of"),
        ({"dtype": "int4"}, "dtype is one of"),
        ({"dtype": torch.int8}, "dtype is one of"),
        ({"batch_size": 0}, "batch_size is a positive integer"),
        ({"sequence_length": True}, "sequence_length is a positive integer"),
        ({"max_batch_size": -1}, "max_batch_size is a positive integer"),
        ({"masks": 1.5}, "masks is a positive integer"),
        ({"device_memory": "much"}, "amount of memory"),
        ({"model": 7}, "Expected a module"),
        ({"model": "Qwen9"}, "no shipped configuration"),
        ({"model": {"hidden_size": 3}}, "no model_type"),
        ({"model": {"model_type": "no such"}}, "transformers cannot read it"),
    ],
)
def test_bad_questions(options, said):
    with pytest.raises(PlanError, match=said):
        plan(options.get("operation", "early-bird"), **{k: v for k, v in options.items() if k != "operation"})


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_files_that_are_no_config(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=r"config\.json"):
        plan("mask", model=file)
