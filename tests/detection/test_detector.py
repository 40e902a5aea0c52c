"""The detector against a plain one, over lists of decisions; and what must not fool it."""

from __future__ import annotations

import copy
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_tickets import LotteryTicketError, Mask, create_magnitude_mask
from lottery_tickets.detection import (
    EarlyBirdDetector,
    chance_distance,
    default_threshold,
    detect_early_bird_convergence,
)
from lottery_tickets.errors import DetectionError, MaskMismatchError, SparsityError
from oracles import flat
from strategies import weights

RULES = ("window", "queue")


class PlainDetector:
    """Both mask rules as they are told in words: every mask and figure is kept, every weight looked at."""

    def __init__(self, criterion, threshold=None, window=5):
        self.criterion, self.asked, self.window = criterion, threshold, window
        self.masks, self.moved = [], []

    def update(self, decisions, moved=None):
        """Decisions in the order of the model; True where the verdict is a bird, and the distances."""
        self.masks.append(decisions)
        self.moved.append(moved)
        first = self.masks[0]
        sparsity = Fraction(first.count(False), len(first))
        chance = 2 * sparsity * (1 - sparsity)
        scaled = Fraction("0.1") * min(1, chance / Fraction("0.42"))
        threshold = scaled if self.asked is None else Fraction(str(self.asked))

        def distance(one, other):
            return Fraction(sum(a != b for a, b in zip(one, other, strict=True)), len(one))

        def near(value):
            return value < threshold if self.criterion == "window" else value <= threshold

        if self.criterion == "window":
            steps = [distance(a, b) for a, b in zip(self.masks, self.masks[1:], strict=False)]
            reported, judged = steps[-1:], steps[-self.window :]
            wanted = self.window
        else:
            judged = reported = [
                distance(self.masks[-1], other) for other in self.masks[:-1][-(self.window - 1) :]
            ]
            wanted = self.window - 1
        still = any(moved is not None and near(2 * Fraction(str(moved))) for moved in self.moved[1:][-wanted:])
        bird = len(judged) == wanted and all(near(value) for value in judged) and not still
        return bird, tuple(float(value) for value in reported), still


def decisions_of(mask):
    return [decision for tensor in mask.values() for decision in flat(tensor)]


@st.composite
def histories(draw, most_checks=14):
    """Masks of successive checks that keep as many weights and differ a little, some of them not at all."""
    numel = draw(st.sampled_from((10, 20, 40, 100)))
    removed = draw(st.integers(1, numel - 1))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    swaps = draw(st.lists(st.integers(0, 3), min_size=1, max_size=most_checks))
    decisions = generator.permutation(np.arange(numel) >= removed)
    split = draw(st.integers(0, numel))
    masks = []
    for swap in swaps:
        kept, gone = np.flatnonzero(decisions), np.flatnonzero(~decisions)
        changing = min(swap, kept.size, gone.size)
        decisions = decisions.copy()
        decisions[generator.choice(kept, changing, replace=False)] = False
        decisions[generator.choice(gone, changing, replace=False)] = True
        masks.append(
            Mask.from_tensors({"a": torch.tensor(decisions[:split]), "b": torch.tensor(decisions[split:])})
        )
    return masks


fractions = st.one_of(st.none(), st.sampled_from((0.0, 0.01, 0.05, 0.1, 1.0)), st.floats(0, 1))


@pytest.mark.parametrize("criterion", RULES)
@given(
    masks=histories(), threshold=st.sampled_from((None, 0.02, 0.05, 0.1)), window=st.integers(2, 6), data=st.data()
)
def test_both_rules_equal_the_plain_detector(criterion, masks, threshold, window, data):
    chance = chance_distance(Fraction(masks[0].numel - masks[0].kept, masks[0].numel))
    if threshold is not None and Fraction(str(threshold)) >= chance:
        threshold = None
    moved = data.draw(st.lists(fractions, min_size=len(masks), max_size=len(masks)))
    detector = EarlyBirdDetector(criterion, threshold=threshold, window=window)
    plain = PlainDetector(criterion, threshold, window)
    for mask, fraction in zip(masks, moved, strict=True):
        verdict = detector.update(mask, moved_fraction=fraction)
        bird, distances, still = plain.update(decisions_of(mask), fraction)
        assert (verdict.converged, verdict.distances) == (bird, distances)
        assert verdict.reason.startswith("weights are not moving: ") == still


def step(mask, flips):
    """The next mask: so many of the kept weights go, and as many of the removed come."""
    decisions = mask["w"].clone()
    decisions[decisions.nonzero()[:flips]] = False
    decisions[(~mask["w"]).nonzero()[:flips]] = True
    return Mask.from_tensors({"w": decisions})


@pytest.mark.parametrize(("criterion", "bird"), [("window", False), ("queue", True)])
def test_a_distance_of_just_the_threshold(criterion, bird):
    """100 of 1000 bits differ: not below 0.1, but within it, although 0.1 is no binary fraction."""
    mask = Mask.from_tensors({"w": torch.arange(1000) < 500})
    other = step(mask, 50)
    detector = EarlyBirdDetector(criterion, window=2)
    detector.update(mask)
    verdicts = [detector.update(one) for one in (other, mask, other)]
    assert [verdict.distances for verdict in verdicts] == [(0.1,)] * 3
    assert [verdict.converged for verdict in verdicts] == [bird] * 3


def test_one_bit_less_is_below():
    mask = Mask.from_tensors({"w": torch.arange(1000) < 500})
    detector = EarlyBirdDetector(window=1)
    detector.update(mask)
    assert detector.update(step(mask, 49)).converged


def test_the_window_forgets_the_masks_and_the_queue_does_not():
    """Small steps in one direction: neighbours are close, the ends are far apart."""
    masks = [Mask.from_tensors({"w": torch.arange(100).roll(4 * turn) < 50}) for turn in range(8)]
    assert detect_early_bird_convergence(masks, criterion="window")["convergence_check"] == 5
    assert detect_early_bird_convergence(masks, criterion="queue")["convergence_check"] is None


def test_defaults_are_those_of_paper_and_code():
    same = [Mask.from_tensors({"w": torch.arange(10) < 5})] * 9
    assert detect_early_bird_convergence(same, criterion="window")["convergence_check"] == 5
    assert detect_early_bird_convergence(same, criterion="queue")["convergence_check"] == 4
    correlations = [None, 0.95, 0.95, 0.9499, 0.95, 1.0, 0.95, 0.95]
    found = detect_early_bird_convergence(same[:8], criterion="rank_correlation", correlations=correlations)
    assert found["convergence_check"] == 6


def test_distances_by_layer_are_to_the_mask_before():
    detector = EarlyBirdDetector("queue")
    first = {"a": torch.tensor([1, 1, 0, 0]), "b": torch.tensor([1, 0]), "empty": torch.ones(0)}
    second = {"a": torch.tensor([0, 1, 1, 0]), "b": torch.tensor([1, 0]), "empty": torch.ones(0)}
    assert detector.update(first).layer_distances == {}
    verdict = detector.update(second)
    assert verdict.layer_distances == {"a": 0.5, "b": 0.0, "empty": 0.0}
    assert verdict.distances == (2 / 6,)
    assert detector.update(second).distances == (2 / 6, 0.0)


# ---------------------------------------------------------------- not fooled by chance


@given(st.fractions(0, 1, max_denominator=1000))
def test_the_default_threshold_is_a_share_of_chance(sparsity):
    threshold, chance = default_threshold(sparsity), chance_distance(sparsity)
    assert threshold <= Fraction(1, 10)
    assert threshold <= chance / Fraction("4.2")
    if Fraction(3, 10) <= sparsity <= Fraction(7, 10):
        assert threshold == Fraction(1, 10)
    else:
        assert threshold == chance / Fraction("4.2")


def test_two_random_masks_are_that_far_apart():
    ones = Mask.from_tensors({"w": torch.arange(1_000_000) < 100_000})
    detector = EarlyBirdDetector("queue", sparsity=0.9)
    detector.update(Mask.random_like(ones, 0))
    (distance,) = detector.update(Mask.random_like(ones, 1)).distances
    assert distance == pytest.approx(float(chance_distance(0.9)), abs=1e-3)


def test_random_masks_never_settle_by_default():
    """At sparsity 0.97 they are 0.058 apart, and a threshold of 0.1 would take them for a bird."""
    ones = Mask.from_tensors({"w": torch.arange(10_000) < 300})
    randoms = [Mask.random_like(ones, seed) for seed in range(12)]
    for criterion in RULES:
        assert not detect_early_bird_convergence(randoms, criterion=criterion)["converged"]


@pytest.mark.parametrize("threshold", [0.18, 0.3])
def test_a_threshold_that_chance_meets_is_refused(threshold):
    with pytest.raises(DetectionError, match=r"by chance.*0\.18.*0\.0428571"):
        EarlyBirdDetector(sparsity=0.9, threshold=threshold)
    detector = EarlyBirdDetector(threshold=threshold)
    mask = Mask.from_tensors({"w": torch.arange(100) < 10})
    with pytest.raises(DetectionError, match="by chance"):
        detector.update(mask)
    assert detector.checks == 0
    assert EarlyBirdDetector(sparsity=0.9, threshold=0.17).threshold == 0.17


# ---------------------------------------------------------------- not fooled by stillness


@pytest.mark.filterwarnings("ignore::lottery_tickets.LayerCollapseWarning")
@given(before=weights(), sparsity=st.floats(0, 0.99), data=st.data())
def test_masks_differ_in_at_most_two_bits_for_each_weight_that_moved(before, sparsity, data):
    """The bound by which stillness is judged, for masks of one threshold."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    share = data.draw(st.sampled_from((0.0, 0.02, 0.2, 1.0)))
    after, moved = {}, 0
    for name, tensor in before.items():
        values = tensor.clone(memory_format=torch.contiguous_format)
        positions = np.flatnonzero(generator.random(tensor.numel()) < share)
        drawn = generator.choice([0.0, -0.0, 1e-3, 0.5, 1.0, 3.0], positions.size)
        values.view(-1)[positions] = torch.tensor(drawn, dtype=tensor.dtype)
        moved += int((values != tensor).sum())  # 0.0 and -0.0 are the same magnitude
        after[name] = values
    first, second = create_magnitude_mask(before, sparsity), create_magnitude_mask(after, sparsity)
    differing = sum(a != b for a, b in zip(decisions_of(first), decisions_of(second), strict=True))
    assert differing <= 2 * moved


@pytest.mark.parametrize("criterion", [*RULES, "rank_correlation"])
def test_a_model_that_stands_still_is_no_bird(criterion):
    mask = Mask.from_tensors({"w": torch.arange(100) < 50})
    detector = EarlyBirdDetector(criterion)
    detector.update(mask)
    for _ in range(20):
        verdict = detector.update(mask, correlation=1.0, moved_fraction=0.0)
        assert not verdict.converged
        assert verdict.reason.startswith("weights are not moving: a fraction of 0 moved since the last check")


@pytest.mark.parametrize(("criterion", "judged"), [("window", 5), ("queue", 4), ("rank_correlation", 3)])
def test_one_still_check_counts_as_long_as_it_is_judged(criterion, judged):
    mask = Mask.from_tensors({"w": torch.arange(100) < 50})
    detector = EarlyBirdDetector(criterion)
    for _ in range(8):
        assert not (last := detector.update(mask, correlation=1.0, moved_fraction=0.01)).converged
    for _ in range(judged - 1):
        last = detector.update(mask, correlation=1.0, moved_fraction=0.9)
        assert not last.converged
        assert last.reason.startswith("weights are not moving: ")
    assert detector.update(mask, correlation=1.0, moved_fraction=0.9).converged


@pytest.mark.parametrize(("criterion", "bird"), [("window", True), ("queue", False)])
def test_movement_that_just_reaches_the_threshold(criterion, bird):
    """2 * 0.05 keeps distances within 0.1 by itself, but not below it."""
    mask = Mask.from_tensors({"w": torch.arange(100) < 50})
    found = detect_early_bird_convergence([mask] * 7, criterion=criterion, moved_fractions=[0.05] * 7)
    assert found["converged"] is bird


# ---------------------------------------------------------------- rank correlation


def test_a_correlation_that_is_not_defined_never_converges():
    mask = Mask.from_tensors({"w": torch.arange(100) < 50})
    detector = EarlyBirdDetector("rank_correlation")
    detector.update(mask)
    for rho in (1.0, 1.0, None, 1.0, 1.0):
        verdict = detector.update(mask, correlation=rho)
        assert not verdict.converged
        assert ("not defined" in verdict.reason) == (rho is None)
    assert detector.update(mask, correlation=1.0).converged


def test_a_missing_correlation_is_an_error():
    mask = Mask.from_tensors({"w": torch.arange(100) < 50})
    detector = EarlyBirdDetector("rank_correlation")
    detector.update(mask)
    with pytest.raises(DetectionError, match="MagnitudeRanks"):
        detector.update(mask)
    with pytest.raises(DetectionError, match="correlations="):
        detect_early_bird_convergence([mask], criterion="rank_correlation")


def test_correlation_does_not_ask_for_masks_that_can_change():
    """Distances are told beside it, but decide nothing."""
    dense = Mask.from_tensors({"w": torch.ones(4)})
    found = detect_early_bird_convergence(
        [dense] * 4, criterion="rank_correlation", correlations=[None, 1.0, 1.0, 1.0]
    )
    assert found["converged"]
    assert found["distances"] == [(), (0.0,), (0.0,), (0.0,)]


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "windows"}, "criterion is one of window, queue, rank_correlation"),
        ({"window": 0}, "at least 1"),
        ({"window": 2.0}, "integer"),
        ({"criterion": "queue", "window": 1}, "at least 2"),
        ({"threshold": 0}, "above 0"),
        ({"threshold": 1.0}, "below 1"),
        ({"threshold": float("nan")}, "above 0"),
        ({"threshold": "0.1"}, "above 0"),
        ({"sparsity": 0.0}, "cannot differ"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(DetectionError, match=message):
        EarlyBirdDetector(**settings)


def test_a_sparsity_that_cannot_be():
    with pytest.raises(SparsityError):
        EarlyBirdDetector(sparsity=90)


@pytest.mark.parametrize("decisions", [torch.ones(4), torch.zeros(4), torch.ones(0)])
def test_a_mask_that_cannot_change(decisions):
    with pytest.raises(DetectionError, match="all weights or none"):
        EarlyBirdDetector().update({"w": decisions})


@pytest.mark.parametrize(
    "figures", [{"correlation": 1.1}, {"correlation": float("nan")}, {"moved_fraction": -0.1}]
)
def test_figures_out_of_range(figures):
    with pytest.raises(DetectionError, match="lies in"):
        EarlyBirdDetector().update({"w": torch.tensor([0, 1])}, **figures)


@pytest.mark.parametrize(
    "other",
    [{"v": torch.tensor([0, 1])}, {"w": torch.tensor([0, 1, 1])}, {"w": torch.ones(2), "v": torch.ones(1)}],
)
def test_masks_of_other_tensors(other):
    detector = EarlyBirdDetector()
    detector.update({"w": torch.tensor([0, 1])})
    before = copy.deepcopy(detector.state_dict())
    with pytest.raises(MaskMismatchError, match=r"v|\(2,\)"):
        detector.update(other)
    assert detector.state_dict() == before


def test_a_mask_of_another_sparsity_than_the_detector_was_set_up_for():
    with pytest.raises(MaskMismatchError, match="removes 5 of 10"):
        EarlyBirdDetector(sparsity=0.9).update({"w": torch.arange(10) < 5})


# ---------------------------------------------------------------- kept and taken up again


def through_json(detector, folder):
    """A new detector with the state of another, by way of files."""
    state = detector.state_dict()
    record = json.loads(json.dumps(state["record"], allow_nan=False))
    masks = []
    for index, mask in enumerate(state["masks"]):
        mask.save(folder / f"{index}.safetensors")
        masks.append(Mask.load(folder / f"{index}.safetensors"))
    loaded = EarlyBirdDetector(detector.criterion, threshold=0.1, window=3)
    loaded.load_state_dict({"record": record, "masks": masks})
    return loaded


@pytest.mark.parametrize("criterion", [*RULES, "rank_correlation"])
@given(masks=histories(8), stop=st.integers(0, 8), data=st.data())
def test_a_detector_loaded_midway_says_the_same(tmp_path_factory, criterion, masks, stop, data):
    if chance_distance(Fraction(masks[0].numel - masks[0].kept, masks[0].numel)) <= Fraction("0.1"):
        masks = [Mask.from_tensors({"a": torch.arange(10) < 5})] * len(masks)
    rho = st.one_of(st.none(), st.sampled_from((0.1, 0.05)), st.floats(-1, 1))
    figures = data.draw(st.lists(st.tuples(rho, fractions), min_size=len(masks), max_size=len(masks)))
    whole = EarlyBirdDetector(criterion, threshold=0.1, window=3)
    halved = EarlyBirdDetector(criterion, threshold=0.1, window=3)
    for check, (mask, (correlation, moved)) in enumerate(zip(masks, figures, strict=True)):
        if check == stop:
            halved = through_json(pickle.loads(pickle.dumps(halved)), tmp_path_factory.mktemp("run"))
        verdicts = [one.update(mask, correlation=correlation, moved_fraction=moved) for one in (whole, halved)]
        assert verdicts[0] == verdicts[1]
    assert whole.state_dict() == halved.state_dict()


def test_only_what_the_next_check_needs_is_kept():
    masks = [Mask.random_like(Mask.from_tensors({"w": torch.arange(100) < 50}), seed) for seed in range(9)]
    for criterion, kept in (("window", 1), ("queue", 4), ("rank_correlation", 1)):
        detector = EarlyBirdDetector(criterion)
        for mask in masks:
            detector.update(mask, correlation=0.5)
        assert detector.masks == tuple(masks[-kept:])
        assert detector.checks == 9


def test_a_state_of_other_settings():
    state = EarlyBirdDetector("queue").state_dict()
    with pytest.raises(DetectionError, match="same settings"):
        EarlyBirdDetector("window").load_state_dict(state)
    with pytest.raises(DetectionError, match="same settings"):
        EarlyBirdDetector("queue", window=6).load_state_dict(state)
    with pytest.raises(DetectionError, match="0 masks, the state has 1"):
        EarlyBirdDetector("queue").load_state_dict({**state, "masks": [{"w": torch.ones(1)}]})
    state["record"]["version"] = 0
    with pytest.raises(DetectionError, match="version 0"):
        EarlyBirdDetector("queue").load_state_dict(state)


# ---------------------------------------------------------------- somebody's own loop


def test_masks_are_drawn_only_until_the_ticket_has_settled():
    drawn = []

    def masks():
        for check in range(100):
            drawn.append(check)
            yield {"w": torch.arange(10) < 5}

    found = detect_early_bird_convergence(masks())
    assert found["converged"]
    assert drawn == list(range(6))
    assert found["reason"].startswith("settled: 5 of 5")


def test_without_convergence_the_last_mask_is_returned():
    masks = [Mask.from_tensors({"w": torch.arange(10).roll(5 * check) < 5}) for check in range(7)]
    found = detect_early_bird_convergence(masks)
    assert not found["converged"]
    assert found["convergence_check"] is None
    assert found["final_mask"] == masks[-1]
    assert found["distances"] == [(), *[(1.0,)] * 6]


@pytest.mark.parametrize("count", [0, 2, 4])
@pytest.mark.parametrize("what", ["correlations", "moved_fractions"])
def test_figures_are_one_for_each_mask(what, count):
    masks = [{"w": torch.arange(10) < 5}] * 3
    with pytest.raises(DetectionError, match=f"{what}.*one for each mask"):
        detect_early_bird_convergence(masks, **{what: [0.5] * count})


def test_no_masks():
    with pytest.raises(DetectionError, match="no masks"):
        detect_early_bird_convergence([])


def test_errors_are_ours():
    assert issubclass(DetectionError, LotteryTicketError)
    assert issubclass(DetectionError, ValueError)
