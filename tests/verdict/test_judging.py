"""Verdicts with known answers: planted winners and losers, ties, and errors at the stated rate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lottery_tickets.errors import VerdictError
from lottery_tickets.verdict import compute_verdict_from_scores

MARGIN = 0.01
SEEDS = 5
EXPERIMENTS = 200
NETWORKS = ("dense", "random_reinit", "random_mask", "layer_shuffled")


def simulated(stream, gains, seeds=SEEDS, noise=0.005):
    """Scores whose ticket beats each control by its gain on average, around a level of each seed's own."""
    level = stream.normal(0.9, 0.03, seeds)
    ticket = level + stream.normal(0, noise, seeds)
    controls = {name: level - gain + stream.normal(0, noise, seeds) for name, gain in gains.items()}
    return {"ticket": list(ticket), **{name: list(values) for name, values in controls.items()}}


def verdicts(gains, *, seed, experiments=EXPERIMENTS, margin=MARGIN, confidence=0.95, **options):
    stream = np.random.default_rng(seed)
    return [
        compute_verdict_from_scores(simulated(stream, gains, **options), margin=margin, confidence=confidence)
        for _ in range(experiments)
    ]


def share(found, verdict):
    return sum(one["verdict"] == verdict for one in found)


def assert_at_most(count, rate, trials=EXPERIMENTS):
    """A count that a rate of at most this would seldom exceed: once in a thousand."""
    assert stats.binomtest(count, trials, rate, alternative="greater").pvalue > 1e-3, (count, trials, rate)


WINNING = {"dense": 0.0, "random_reinit": 0.05, "random_mask": 0.05, "layer_shuffled": 0.05}


# ---------------------------------------------------------------- known answers


def test_a_planted_winner_is_found():
    found = verdicts({**WINNING, "dense": 0.01}, seed=1)
    assert share(found, "winning") >= 0.95 * EXPERIMENTS


def test_a_planted_loser_is_not():
    found = verdicts({**WINNING, "dense": -0.05}, seed=2)
    assert share(found, "not a ticket") == EXPERIMENTS
    assert all("shown to be worse than dense by more than 0.01" in one["reason"] for one in found[:5])


def test_a_ticket_as_good_as_random_masks_is_matching():
    gains = dict.fromkeys(NETWORKS, 0.0)
    found = verdicts(gains, seed=3, margin=0.03)
    assert_at_most(share(found, "winning"), 0.05)
    assert share(found, "matching") >= 0.9 * EXPERIMENTS


def test_ties_are_matching():
    scores = {name: [0.9, 0.8, 0.85, 0.9, 0.95] for name in ("ticket", *NETWORKS)}
    found = compute_verdict_from_scores(scores, margin=0.01)
    assert found["verdict"] == "matching"
    assert [test["p_value"] for test in found["tests"]] == [0.5**5, 1.0, 1.0, 1.0]


# ---------------------------------------------------------------- false positives, at the edge of each null


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_ticket_worse_by_the_margin_wins_no_more_often_than_stated(confidence):
    gains = {**WINNING, "dense": -MARGIN}
    found = verdicts(gains, seed=4, confidence=confidence)
    assert_at_most(share(found, "winning"), 1 - confidence)
    assert_at_most(share(found, "winning") + share(found, "matching"), 1 - confidence)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("control", NETWORKS[1:])
def test_a_ticket_equal_to_a_control_wins_no_more_often_than_stated(control, confidence):
    gains = {**WINNING, "dense": 0.02, control: 0.0}
    found = verdicts(gains, seed=5, confidence=confidence)
    assert_at_most(share(found, "winning"), 1 - confidence)
    assert share(found, "matching") >= 0.75 * confidence * EXPERIMENTS, "the null of this control alone holds"


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_rate_holds_for_any_number_of_seeds(seeds):
    found = verdicts({**WINNING, "dense": 0.05, "random_reinit": 0.0}, seed=6, seeds=seeds)
    assert_at_most(share(found, "winning"), 0.05)


def test_at_the_edge_of_one_null_the_rate_is_reached():
    """The test is not only cautious: far from the other nulls, it errs as often as it says."""
    found = verdicts({**WINNING, "dense": 0.05, "random_reinit": 0.0}, seed=7, experiments=2000)
    wins = share(found, "winning")
    assert_at_most(wins, 0.05, 2000)
    assert stats.binomtest(wins, 2000, 0.05, alternative="less").pvalue > 1e-3


def test_scores_of_few_samples_do_not_win_by_being_equal():
    """Accuracies on 20 samples are often the same for all seeds, and so may be their differences."""
    stream = np.random.default_rng(8)
    wins = 0
    for _ in range(EXPERIMENTS):
        accuracies = stream.binomial(20, 0.97, (4, 3)) / 20
        names = ("ticket", "dense", "random_reinit", "random_mask")
        scores = dict(zip(names, accuracies.tolist(), strict=True))
        wins += compute_verdict_from_scores(scores, margin=1.0)["verdict"] == "winning"
    assert_at_most(wins, 0.05)


# ---------------------------------------------------------------- what is said


def test_worse_is_told_from_not_enough_seeds():
    stream = np.random.default_rng(9)
    worse = compute_verdict_from_scores(simulated(stream, {**WINNING, "dense": -0.2}), margin=MARGIN)
    unsure = compute_verdict_from_scores(
        simulated(stream, {**WINNING, "dense": 0.0}, seeds=2, noise=0.05), margin=MARGIN
    )
    assert worse["verdict"] == unsure["verdict"] == "not a ticket"
    assert worse["tests"][0]["refuted"]
    assert "shown to be worse than dense" in worse["reason"]
    assert not unsure["tests"][0]["refuted"]
    assert "2 seeds cannot tell" in unsure["reason"]


def test_the_reason_estimates_how_many_seeds_it_would_take():
    scores = {"ticket": [0.91, 0.92, 0.90], "dense": [0.90, 0.93, 0.90]}
    found = compute_verdict_from_scores(scores, margin=0.01)
    needed = found["tests"][0]["seeds_needed"]
    assert f"it would take about {needed - 3} more (an estimate" in found["reason"]


def test_a_mean_on_the_wrong_side_promises_nothing():
    scores = {"ticket": [0.9, 0.8, 0.7], "dense": [0.8, 0.9, 0.85]}
    found = compute_verdict_from_scores(scores, margin=0.01)
    assert found["tests"][0]["seeds_needed"] is None
    assert "more like these would not show it" in found["reason"]


@pytest.mark.parametrize("missing", ["random_reinit", "random_mask"])
def test_what_was_not_trained_is_not_claimed(missing):
    scores = simulated(np.random.default_rng(10), {**WINNING, "dense": 0.05})
    assert compute_verdict_from_scores(scores, margin=MARGIN)["verdict"] == "winning"
    del scores[missing]
    found = compute_verdict_from_scores(scores, margin=MARGIN)
    assert found["verdict"] == "matching"
    assert f"{missing} not trained, so winning cannot be claimed" in found["reason"]


def test_the_early_bird_is_a_companion_and_decides_nothing():
    scores = simulated(np.random.default_rng(11), {**WINNING, "dense": 0.05, "early_bird": -0.2})
    found = compute_verdict_from_scores(scores, margin=MARGIN)
    assert found["verdict"] == "winning"
    assert [test["control"] for test in found["tests"]] == list(NETWORKS)


def test_of_losses_less_is_better():
    stream = np.random.default_rng(12)
    scores = simulated(stream, {**WINNING, "dense": 0.05})
    losses = {name: [3 - value for value in values] for name, values in scores.items()}
    found = compute_verdict_from_scores(losses, margin=MARGIN, higher_is_better=False)
    expected = compute_verdict_from_scores(scores, margin=MARGIN)
    assert found["verdict"] == expected["verdict"] == "winning"
    for one, other in zip(found["tests"], expected["tests"], strict=True):
        assert one["p_value"] == pytest.approx(other["p_value"], rel=1e-6)


NAMES = ("ticket", *NETWORKS)
SCORES = st.integers(2, 6).flatmap(
    lambda seeds: st.fixed_dictionaries(
        {
            name: st.lists(st.integers(0, 20).map(lambda one: one / 20), min_size=seeds, max_size=seeds)
            for name in NAMES
        }
    )
)


@given(SCORES, st.sampled_from([0.0, 0.05, 0.3]))
def test_the_verdict_is_what_its_tests_say(scores, margin):
    found = compute_verdict_from_scores(scores, margin=margin)
    dense, *others = found["tests"]
    if found["verdict"] == "winning":
        assert dense["shown"]
        assert all(test["shown"] for test in others)
    elif found["verdict"] == "matching":
        assert dense["shown"]
        assert not all(test["shown"] for test in others)
    else:
        assert not dense["shown"]
    assert not any(test["shown"] and test["refuted"] for test in found["tests"])


@given(SCORES, st.permutations(range(6)))
def test_the_order_of_seeds_is_of_no_account(scores, order):
    count = len(scores["ticket"])
    places = [place for place in order if place < count]
    turned = {name: [values[place] for place in places] for name, values in scores.items()}
    found, again = (compute_verdict_from_scores(one, margin=0.05) for one in (scores, turned))
    assert found["verdict"] == again["verdict"]


@given(SCORES)
def test_a_wider_margin_never_takes_a_verdict_away(scores):
    ranks = {"not a ticket": 0, "matching": 1, "winning": 2}
    found = [ranks[compute_verdict_from_scores(scores, margin=margin)["verdict"]] for margin in (0, 0.1, 0.5, 2)]
    assert all(one <= other for one, other in itertools.pairwise(found))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("scores", "options", "match"),
    [
        ({"ticket": [0.9], "dense": [0.9]}, {}, "1 seed: .* Give two at the very least"),
        ({"ticket": [], "dense": []}, {}, "0 seeds"),
        ({"ticket": [0.9, 0.8]}, {}, "lacks dense"),
        ({"dense": [0.9, 0.8]}, {}, "lacks ticket"),
        ({"ticket": [0.9, 0.8], "dense": [0.9]}, {}, "paired by seed"),
        ({"ticket": [0.9, float("nan")], "dense": [0.9, 0.8]}, {}, r"scores\['ticket'\] holds nan"),
        ({"ticket": [0.9, None], "dense": [0.9, 0.8]}, {}, "holds None"),
        ({"ticket": [0.9, 0.8], "dense": [0.9, 0.8]}, {"margin": -0.1}, "margin"),
        ({"ticket": [0.9, 0.8], "dense": [0.9, 0.8]}, {"margin": float("nan")}, "margin"),
        ({"ticket": [0.9, 0.8], "dense": [0.9, 0.8]}, {"confidence": 95}, "between 0.5 and 1"),
        ({"ticket": [0.9, 0.8], "dense": [0.9, 0.8]}, {"confidence": 1.0}, "between 0.5 and 1"),
    ],
)
def test_what_cannot_be_judged_is_refused(scores, options, match):
    with pytest.raises(VerdictError, match=match):
        compute_verdict_from_scores(scores, **{"margin": 0.01, **options})
