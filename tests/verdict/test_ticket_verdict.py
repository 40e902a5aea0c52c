"""Verdicts from beginning to end: known answers, same batches for all, and what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import nn

import lottery_tickets
from lottery_tickets import Mask, create_magnitude_mask
from lottery_tickets.early_bird import compute_early_bird_tickets
from lottery_tickets.errors import (
    MaskMismatchError,
    NonfiniteLossError,
    TrainingError,
    VerdictError,
)
from lottery_tickets.runs import RandomState
from lottery_tickets.training import DataOrder, digest_of, tensors_of
from lottery_tickets.verdict import compute_verdict_from_scores
from scoring import llama
from verdicts import (
    CLASSES,
    HIDDEN,
    INPUTS,
    blind_ticket,
    blobs,
    make_dataloaders,
    make_model,
    seeing_ticket,
    verdict,
)

FEW: dict[str, Any] = {"seeds": (0, 1), "controls": ("dense",)}


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def seeing():
    return verdict(seeing_ticket)


def trained_from(seed: int, steps: int = 60) -> dict[str, torch.Tensor]:
    """Weights that have seen the data: a ticket on them has something to lose."""
    model, data = make_model(seed), blobs(256, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    return {name: one.clone() for name, one in tensors_of(model).items()}


def magnitude_ticket(weights: dict[str, torch.Tensor]) -> Mask:
    return create_magnitude_mask({name: weights[name] for name in ("0.weight", "2.weight")}, 0.8, progress=False)


# ---------------------------------------------------------------- known answers


def test_a_mask_that_sees_with_any_weights_is_matching(seeing):
    """It beats the dense network, and random masks; but other weights do as well under it."""
    assert seeing["verdict"] == "matching"
    shown = {test["control"]: test["shown"] for test in seeing["tests"]}
    assert shown == {"dense": True, "random_reinit": False, "random_mask": True, "layer_shuffled": True}
    assert "undecided whether better than random_reinit" in seeing["reason"]


def test_a_blind_mask_is_no_ticket():
    results = verdict(blind_ticket, controls=("dense", "random_reinit", "random_mask"))
    assert results["verdict"] == "not a ticket"
    assert results["tests"][0]["refuted"]
    assert "shown to be worse than dense by more than 0.02" in results["reason"]


@pytest.mark.parametrize("one", [True, False])
def test_a_mask_whose_weights_know_the_data_is_winning(one):
    """A ticket of trained weights: the mask alone, or as many other weights, do not do what it does."""
    if one:
        weights = trained_from(7)
        ticket, initial = magnitude_ticket(weights), weights
    else:
        ticket, initial = lambda seed: magnitude_ticket(trained_from(seed)), trained_from
    results = verdict(
        ticket, initial=initial, epochs=1, controls=("dense", "random_reinit", "random_mask", "layer_shuffled")
    )
    assert results["verdict"] == "winning", results["reason"]
    assert ("for one ticket on one set of weights" in results["population"]) == one
    assert len({row["weights"] for row in results["trainings"] if row["network"] != "random_reinit"}) == (
        1 if one else 5
    )


# ---------------------------------------------------------------- what is trained


def trained_by_hand(mask: Mask | None, seed: int, weights_seed: int, epochs: int) -> list[dict[str, float]]:
    """A plain loop that multiplies by the mask after every step: loss and accuracy of the epochs' ends."""
    model = make_model(weights_seed)
    train, validation, test = make_dataloaders(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def prune() -> None:
        for name, parameter in model.named_parameters():
            if mask is not None and name in mask:
                parameter.data *= mask[name]

    prune()
    found, order = [], DataOrder(train, seed)
    for epoch in range(epochs):
        for inputs, labels in order.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            prune()
        with torch.no_grad():
            ((inputs, labels),), ((tests, test_labels),) = validation, test
            found.append(
                {
                    "loss": float(nn.functional.cross_entropy(model(inputs), labels)),
                    "accuracy": float((model(inputs).argmax(1) == labels).float().mean()),
                    "test_accuracy": float((model(tests).argmax(1) == test_labels).float().mean()),
                }
            )
    return found


def test_every_network_is_what_a_plain_loop_makes_of_it():
    def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)

    results = verdict(
        [seeing_ticket(), blind_ticket()], seeds=(3, 8), optimizer=sgd, controls=("dense", "random_reinit")
    )
    tickets = {3: seeing_ticket(), 8: blind_ticket()}
    assert len(results["trainings"]) == 6
    for one in results["trainings"]:
        mask = None if one["network"] == "dense" else tickets[one["seed"]]
        expected = trained_by_hand(mask, one["seed"], one["weights_seed"], 3)
        least = float("inf")
        for found, by_hand in zip(one["evaluations"], expected, strict=True):
            assert found["loss"] == pytest.approx(by_hand["loss"], rel=1e-5)
            assert found["accuracy"] == pytest.approx(by_hand["accuracy"])
            if by_hand["loss"] < least or found is one["evaluations"][-1]:
                assert found["test_accuracy"] == pytest.approx(by_hand["test_accuracy"])
            least = min(least, by_hand["loss"])


def test_weights_are_shared_by_all_but_the_reinitialised(seeing):
    for seed in range(5):
        own = {one["network"]: one for one in seeing["trainings"] if one["seed"] == seed}
        others = {one["weights"] for name, one in own.items() if name != "random_reinit"}
        assert len(others) == 1
        assert own["random_reinit"]["weights"] not in others
        assert own["random_reinit"]["mask"] == own["ticket"]["mask"]
        assert len({one["mask"] for one in own.values()}) == 5, "ticket, three other masks, and none"
        sparse = {one["sparsity"] for name, one in own.items() if name != "dense"}
        assert sparse == {seeing_ticket().sparsity}
    seeds = [one["weights_seed"] for one in seeing["trainings"] if one["network"] == "random_reinit"]
    assert len(set(seeds)) == 5
    assert not set(seeds) & set(range(5))


def test_pruned_weights_stay_zero_to_the_end():
    made = []

    def remembered(seed: int) -> nn.Module:
        made.append(make_model(seed))
        return made[-1]

    verdict(model=remembered, optimizer="sgd", momentum=0.9, weight_decay=0.1, **FEW)
    ticket, dense = made[0], made[1]
    pruned = ~seeing_ticket()["0.weight"]
    assert not ticket[0].weight[pruned].any()
    assert dense[0].weight[pruned].all()


def test_the_callers_random_state_is_its_own():
    before = RandomState.now()
    verdict(**FEW)
    assert torch.equal(RandomState.now().torch, before.torch)
    assert RandomState.now().numpy == before.numpy


def test_models_that_draw_without_seeding_are_seeded():
    def unseeded(_seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    first, second = (verdict(model=unseeded, **FEW) for _ in range(2))
    assert first["networks"] == second["networks"]


def test_one_mask_speaks_of_one_set_of_weights():
    results = verdict(seeing_ticket(), seeds=(4, 5), controls=("dense", "random_reinit"))
    assert {one["weights_seed"] for one in results["trainings"] if one["network"] != "random_reinit"} == {4}
    assert results["population"].startswith("orders of the data")
    values = results["networks"]["dense"]["loss"]["values"]
    assert values[0] != values[1], "the order of the data differs"


def test_an_initial_file_is_the_same_as_its_tensors(tmp_path):
    weights = trained_from(7)
    save_file(weights, tmp_path / "initial.safetensors")
    found = [
        verdict(seeing_ticket(), initial=initial, **FEW)["networks"]
        for initial in (weights, tmp_path / "initial.safetensors", str(tmp_path / "initial.safetensors"))
    ]
    assert found[0] == found[1] == found[2]


def test_a_state_dict_will_do_for_initial_weights():
    """It lists tied tensors twice and leaves some buffers out."""
    batches = [{"input_ids": torch.arange(12).reshape(2, 6)}]

    def tiny(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return llama(tie_word_embeddings=True)

    given = tiny(9).state_dict()
    assert given.keys() != tensors_of(tiny(9)).keys()
    ticket = create_magnitude_mask(tiny(9), 0.2, progress=False)
    results = verdict(
        ticket, data=lambda seed: (batches, batches), model=tiny, initial=given, **{**FEW, "epochs": 1}
    )
    assert {one["weights"] for one in results["trainings"]} == {digest_of(tensors_of(tiny(9)))}


# ---------------------------------------------------------------- what comes back


def test_differences_are_scipys_paired_tests(seeing):
    ticket = seeing["networks"]["ticket"]
    for control, named in seeing["differences"].items():
        for name, difference in named.items():
            pair = ticket[name]["values"], seeing["networks"][control][name]["values"]
            if len({a - b for a, b in zip(*pair, strict=True)}) == 1:
                continue
            better = "greater" if name.endswith("accuracy") else "less"
            expected = stats.ttest_rel(*pair, alternative=better)
            assert difference["p_better"] == pytest.approx(expected.pvalue, rel=1e-6)
            assert difference["p_worse"] == pytest.approx(1 - expected.pvalue, rel=1e-6)
            interval = stats.ttest_rel(*pair).confidence_interval(0.95)
            assert difference["interval"] == pytest.approx((interval.low, interval.high))


def test_numbers_are_those_of_the_trainings(seeing):
    assert seeing["measured_on"] == "test"
    assert seeing["score"] == "early_stopping_accuracy"
    for name, named in seeing["networks"].items():
        own = [one for one in seeing["trainings"] if one["network"] == name]
        assert [one["seed"] for one in own] == [0, 1, 2, 3, 4]
        best = [min(one["evaluations"], key=lambda each: each["loss"]) for one in own]
        last = [one["evaluations"][-1] for one in own]
        assert named["early_stopping_step"]["values"] == [one["step"] for one in best]
        assert named["early_stopping_accuracy"]["values"] == [one["test_accuracy"] for one in best]
        assert named["early_stopping_validation_loss"]["values"] == [one["loss"] for one in best]
        assert named["loss"]["values"] == [one["test_loss"] for one in last]
        assert named["accuracy"]["values"] == [one["test_accuracy"] for one in last]
        assert named["validation_loss"]["values"] == [one["loss"] for one in last]


def test_the_verdict_is_that_of_its_scores(seeing):
    scores = {name: named[seeing["score"]]["values"] for name, named in seeing["networks"].items()}
    judgement = compute_verdict_from_scores(scores, margin=0.02)
    assert {key: seeing[key] for key in judgement} == judgement


def test_without_test_data_validation_data_counts():
    results = verdict(data=lambda seed: make_dataloaders(seed, test=False), **FEW)
    assert results["measured_on"] == "validation"
    named = results["networks"]["ticket"]
    assert named["loss"] == named["validation_loss"]
    assert all(one["evaluations"][-1]["test_loss"] is None for one in results["trainings"])


def test_judged_at_the_end_or_by_the_loss():
    results = verdict(judged_at="end", metric="loss", margin=0.5, **FEW)
    assert results["score"] == "loss"
    gain = results["tests"][0]["mean_gain"]
    assert gain == pytest.approx(-results["differences"]["dense"]["loss"]["mean"])


def test_data_without_classes_is_judged_by_its_loss():
    def regression(_seed: int) -> Any:
        inputs = blobs(64, 0).tensors[0]
        batch = inputs, inputs[:, :CLASSES].clone()
        return [batch], batch

    results = verdict(data=regression, learning_rate=0.01, **FEW)
    assert results["score"] == "early_stopping_loss"
    assert not any("accuracy" in name for name in results["networks"]["ticket"])
    with pytest.raises(VerdictError, match="no classes to be right about"):
        verdict(data=regression, learning_rate=0.01, metric="accuracy", **FEW)


def test_a_language_model_is_judged_by_its_loss():
    """Tokens that follow a pattern, a tiny Llama in bfloat16, and a margin in nats per token."""

    def tiny(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return llama().bfloat16()

    def texts(_seed: int) -> Any:
        tokens = (torch.arange(8)[:, None] + torch.arange(12)[None]) % 16
        batches = [{"input_ids": part} for part in tokens.split(4)]
        return batches, batches[:1], batches[1:]

    def ticket(seed: int) -> Mask:
        return create_magnitude_mask(tiny(seed), 0.2, progress=False)

    results = verdict(
        ticket,
        data=texts,
        model=tiny,
        seeds=(0, 1, 2),
        controls=("dense", "random_mask", "early_bird"),
        optimizer="adamw",
        learning_rate=0.01,
        epochs=4,
        margin=2.0,
    )
    assert results["verdict"] == "matching", results["reason"]
    assert results["score"] == "early_stopping_loss"
    assert results["measured_on"] == "test"
    for one in results["trainings"]:
        assert one["evaluations"][-1]["test_loss"] < one["evaluations"][0]["test_loss"], "it learns"
        assert one["sparsity"] == pytest.approx(0 if one["network"] == "dense" else 0.2, abs=1e-3)


def test_one_network_is_in_memory_at_a_time():
    made: list[weakref.ref[nn.Module]] = []

    def remembered(seed: int) -> nn.Module:
        gc.collect()
        assert [one for one in made if one() is not None] == []
        model = make_model(seed)
        made.append(weakref.ref(model))
        return model

    verdict(model=remembered, seeds=(0, 1), optimizer="adam", learning_rate=0.01)
    assert len(made) == 2 * (6 + 1), "and one more for each early bird"


def test_evaluations_come_as_often_as_asked():
    results = verdict(eval_every_steps=2, **FEW)
    assert [one["step"] for one in results["trainings"][0]["evaluations"]] == [2, 4, 6, 8, 10, 12]


def test_the_early_bird_is_the_one_that_the_search_finds():
    results = verdict(seeds=(0, 1), controls=("dense", "early_bird"), epochs=8, learning_rate=0.01)
    for one in results["trainings"]:
        assert one["network"] == "early_bird" or one["settled_epoch"] is None
    for one in results["trainings"]:
        if one["network"] == "early_bird":
            train, _, _ = make_dataloaders(one["seed"])
            expected = compute_early_bird_tickets(
                make_model(one["seed"]),
                train,
                max_epochs=8,
                target_sparsity=seeing_ticket().sparsity,
                learning_rate=0.01,
                max_grad_norm=None,
                seed=one["seed"],
                progress=False,
            )
            assert one["mask"] == expected["final_mask"].digest()
            assert one["settled_epoch"] == expected["convergence_epoch"] is not None


def test_the_first_import_is_that_of_the_package():
    assert lottery_tickets.compute_ticket_verdict is lottery_tickets.verdict.compute_ticket_verdict


# ---------------------------------------------------------------- refusals


def constant(_seed: int) -> nn.Module:
    return make_model(0)


class Drifting:
    """Other weights at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _seed: int) -> nn.Module:
        self.calls += 1
        return make_model(self.calls)


def mixed_data(seed: int) -> Any:
    return make_dataloaders(seed, test=seed == 0)


def mixed_labels(seed: int) -> Any:
    train, (batch,) = make_dataloaders(seed, test=False)
    inputs, labels = batch
    return train, (inputs, nn.functional.one_hot(labels, CLASSES).float() if seed else labels)


def blank_validation(seed: int) -> Any:
    train, (batch,) = make_dataloaders(seed, test=False)
    return train, (torch.full_like(batch[0], torch.nan), batch[1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seeds": (0,)}, "1 seed: .* Give two at the very least"),
        ({"seeds": ()}, "0 seeds"),
        ({"seeds": (1, 1)}, "comes twice"),
        ({"seeds": 5}, "seeds is several of them"),
        ({"controls": "dense"}, "controls is several of them"),
        ({"controls": ("random_mask",)}, "lacks 'dense'"),
        ({"controls": ("dense", "lucky")}, "controls are different ones of dense, random_reinit"),
        ({"controls": ("dense", "dense")}, "controls are different ones"),
        ({"margin": -1}, "margin"),
        ({"confidence": 0.3}, "confidence"),
        ({"metric": "perplexity"}, "metric is one of None, 'accuracy', 'loss'"),
        ({"judged_at": "peak"}, "judged_at is one of"),
        ({"ticket": [seeing_ticket()]}, "ticket is one for all seeds, a list .* got 1 for 2 seeds"),
        ({"ticket": Mask.ones_like(make_model(0))}, "keeps 384 of 384"),
        ({"ticket": seeing_ticket(), "initial": [{}, {}]}, "initial gives several"),
        ({"ticket": seeing_ticket, "initial": {}}, "initial is one set of weights"),
        ({"ticket": seeing_ticket(), "initial": "nowhere.safetensors"}, "no weights can be read"),
        ({"data": lambda seed: [1]}, "it gave list of 1"),
        ({"data": lambda seed: None}, "it gave NoneType"),
        ({"data": mixed_data}, "for some seeds and not for others"),
        ({"data": mixed_labels}, "classes for some seeds and not for others"),
        ({"data": blank_validation}, "ticket, seed 0: its validation loss was never a number"),
        ({"model": lambda seed: None}, "it gave NoneType"),
        ({"model": make_model(0)}, "make_model is a function of a seed"),
        ({"data": make_dataloaders(0)}, "make_dataloaders is a function of a seed, .* got tuple"),
        ({"model": constant}, "gave the same weights"),
        ({"model": Drifting()}, "gave other weights than it had given before"),
    ],
)
def test_what_cannot_be_judged_is_refused(options, match):
    with pytest.raises(VerdictError, match=match):
        verdict(**{**FEW, **options})


def test_a_constant_model_has_no_reinitialisation():
    with pytest.raises(VerdictError, match="as `initial`, with one ticket"):
        verdict(seeing_ticket(), model=constant, seeds=(0, 1), controls=("dense", "random_reinit"))


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(MaskMismatchError):
        verdict(Mask.from_tensors({"0.weight": torch.eye(3)}), **FEW)


@pytest.mark.parametrize(
    "options", [{"seeds": (0, -1)}, {"epochs": 0}, {"eval_every_steps": 0}, {"learning_rate": -1}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(TrainingError):
        verdict(**{**FEW, **options})


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(TrainingError, match="initial does not fit what make_model gives"):
        verdict(seeing_ticket(), initial={"0.weight": torch.ones(2)}, **FEW)


def test_a_training_that_diverges_is_named():
    with pytest.raises(NonfiniteLossError, match=r"^ticket, seed 0: .* leave out the control"):
        verdict(learning_rate=1e30, **FEW)
