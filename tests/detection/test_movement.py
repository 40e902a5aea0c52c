"""How much weights moved, and what random movement would have done: against plain counts, and in expectation."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import oracles
from lottery_tickets import create_magnitude_mask
from lottery_tickets.detection import EarlyBirdDetector, MovementProbe
from lottery_tickets.detection._movement import _draw, _sample
from lottery_tickets.errors import DetectionError, SparsityError, WeightsError
from processes import PEAK, run_python
from strategies import weights

finite = weights().map(
    lambda tensors: {name: torch.nan_to_num(tensor, posinf=2.0, neginf=-2.0) for name, tensor in tensors.items()}
)


@st.composite
def moved(draw, tensors):
    """The same tensors with some weights elsewhere; zeros of either sign among the new values."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from((0.0, 0.1, 1.0)))
    after = {}
    for name, tensor in tensors.items():
        values = tensor.clone(memory_format=torch.contiguous_format)
        chosen = np.flatnonzero(generator.random(values.numel()) < share)
        drawn = generator.choice([0.0, -0.0, 0.5, 1.0, -3.0], chosen.size)
        values.view(-1)[chosen] = torch.tensor(drawn, dtype=values.dtype)
        after[name] = values
    return after


def check(before, after, sparsities=(), **settings):
    probe = MovementProbe(before, **settings)
    assert probe.update(before, sparsities) is None
    return probe.update(after, sparsities)


def plain_distance(first, second):
    pairs = [
        pair for name in first for pair in zip(oracles.flat(first[name]), oracles.flat(second[name]), strict=True)
    ]
    return sum(a != b for a, b in pairs) / len(pairs) if pairs else 0.0


@pytest.mark.filterwarnings("ignore::lottery_tickets.LayerCollapseWarning")
@settings(max_examples=60)
@given(finite, st.data())
def test_a_model_that_fits_the_sample_is_measured_exactly(before, data):
    """Moved fraction and distance are those of the whole model and of its true masks."""
    after = data.draw(moved(before))
    sparsities = data.draw(st.lists(st.sampled_from((0.0, 0.3, 0.5, 0.9)), unique=True))
    movement = check(before, after, sparsities)
    assert movement.moved_fraction == plain_distance(before, after)
    assert movement.moved_error == 0.0
    assert movement.sampled == sum(tensor.numel() for tensor in before.values())
    assert list(movement.by_sparsity) == sparsities
    for sparsity, distance in movement.by_sparsity.items():
        masks = [create_magnitude_mask(tensors, sparsity) for tensors in (before, after)]
        assert distance.observed == plain_distance(*masks)
        assert distance.observed_error == 0.0
        if not movement.moved_fraction:
            assert distance.null_distance == distance.null_error == 0.0
        assert distance.null_distance <= 2 * movement.moved_fraction


def test_zeros_of_both_signs_are_the_same_place():
    movement = check({"w": torch.tensor([0.0, -0.0, 1.0, 1.0])}, {"w": torch.tensor([-0.0, 0.0, -1.0, 1.0])})
    assert movement.moved_fraction == 0.25


def test_a_step_that_rounds_away_is_no_movement():
    """In bf16 a weight of 1 does not feel 0.001; the null of no movement is no distance."""
    before = torch.ones(1000, dtype=torch.bfloat16)
    movement = check({"w": before}, {"w": before - 0.001}, [0.5])
    assert (movement.moved_fraction, movement.by_sparsity[0.5].null_distance) == (0.0, 0.0)


def test_the_null_is_the_same_movement_handed_out_at_random():
    """All movements and hand-outs of three weights, beside the mean over many permutations."""
    before, update = [1.0, 2.0, 4.0], [0.0, 0.5, 2.5]
    distances = []
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        after = [value + update[place] for value, place in zip(before, order, strict=True)]
        masks = [oracles.magnitude_mask({"w": torch.tensor(values)}, 1) for values in (before, after)]
        distances.append(plain_distance(*masks))
    tensors = {"w": torch.tensor(before)}
    moved_on = {"w": torch.tensor(before) + torch.tensor(update)}
    found = check(tensors, moved_on, [0.34], permutations=300).by_sparsity[0.34]
    assert found.observed == 0.0
    assert found.null_error < 0.03
    assert found.null_distance == pytest.approx(sum(distances) / 6, abs=5 * found.null_error)


def test_updates_stay_within_their_tensor():
    """A tensor that stands still is not moved by what another one does."""
    before = {"still": torch.arange(1.0, 101), "busy": torch.arange(1.0, 101)}
    after = {"still": before["still"], "busy": before["busy"].flip(0)}
    permuted = MovementProbe(before)._permuted(
        np.concatenate([np.zeros(100), (after["busy"] - before["busy"]).numpy()]), 0
    )
    assert not permuted[:100].any()
    assert sorted(permuted[100:]) == sorted((after["busy"] - before["busy"]).tolist())


def test_training_that_keeps_its_ticket_is_told_from_wandering():
    """Weights that grow as they are large keep their mask; the same updates at random would not."""
    before = {"w": torch.randn(20_000, generator=torch.Generator().manual_seed(0))}
    growing = check(before, {"w": 1.5 * before["w"]}, [0.5]).by_sparsity[0.5]
    assert growing.observed == 0.0
    assert growing.null_distance > 0.1
    noise = 0.3 * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    wandering = check(before, {"w": before["w"] + noise}, [0.5]).by_sparsity[0.5]
    assert wandering.observed == pytest.approx(wandering.null_distance, abs=0.01)


def test_steps_of_one_size_in_each_tensor():
    """At several sparsities, each as if asked for alone."""
    generator = torch.Generator().manual_seed(0)
    before = {"a": torch.randn(500, generator=generator), "b": torch.randn(40, 30, generator=generator)}
    after = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in before.items()
    }
    together = check(before, after, [0.2, 0.5, 0.9]).by_sparsity
    assert together == {
        sparsity: check(before, after, [sparsity]).by_sparsity[sparsity] for sparsity in (0.2, 0.5, 0.9)
    }


# ---------------------------------------------------------------- sampling


def test_a_sample_estimates_within_its_errors():
    """Of 40 samples of a model, the estimates miss the exact figures by their standard errors, as they should."""
    generator = torch.Generator().manual_seed(0)
    before = {"a": torch.randn(300, 100, generator=generator), "b": torch.randn(10_000, generator=generator)}
    after = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in before.items()
    }
    after["b"][:4000] = before["b"][:4000]
    exact = check(before, after, [0.5], permutations=20)
    misses = {"moved": [], "observed": [], "null": []}
    for seed in range(40):
        found = check(before, after, [0.5], size=8000, seed=seed)
        truth, guess = exact.by_sparsity[0.5], found.by_sparsity[0.5]
        misses["moved"].append((found.moved_fraction - exact.moved_fraction) / found.moved_error)
        misses["observed"].append((guess.observed - truth.observed) / guess.observed_error)
        misses["null"].append((guess.null_distance - truth.null_distance) / guess.null_error)
    for scores in misses.values():
        assert abs(np.mean(scores)) < 0.6
        assert np.std(scores) < 1.4


def test_errors_know_that_the_population_is_finite():
    before = {"w": torch.arange(1.0, 1001)}
    after = {"w": torch.where(torch.arange(1000) % 2 == 0, before["w"], -before["w"])}
    most = check(before, after, size=999)
    assert most.moved_error == pytest.approx(math.sqrt(0.25 / 998 * 0.001), rel=1e-3)
    assert check(before, after, size=1000).moved_error == 0.0


@settings(max_examples=60)
@given(st.lists(st.integers(0, 200), max_size=6), st.integers(2, 300), st.integers(0, 5))
def test_the_sample_is_in_proportion_and_without_repeats(numels, size, seed):
    shapes = {str(index): torch.Size([numel]) for index, numel in enumerate(numels)}
    total = sum(numels)
    sample = _sample(shapes, size, seed)
    assert sum(positions.size for positions in sample.values()) == min(size, total)
    for (name, positions), numel in zip(sample.items(), numels, strict=True):
        assert (np.diff(positions) > 0).all()
        assert not positions.size or 0 <= positions[0] <= positions[-1] < numel
        if total > size:
            assert abs(positions.size - size * numel / total) < 1, name


def test_every_choice_is_as_likely():
    """All ten pairs of five positions."""
    counts: dict[tuple[int, ...], int] = {}
    source = np.random.Philox(key=0)
    for _ in range(4000):
        drawn = tuple(_draw(5, 2, source).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 10
    assert max(abs(count - 400) for count in counts.values()) < 5 * math.sqrt(400)


def test_the_seed_chooses_the_sample():
    before = {"w": torch.randn(10_000, generator=torch.Generator().manual_seed(0))}
    after = {"w": torch.where(torch.arange(10_000) < 3000, before["w"], before["w"] + 1)}
    figures = [check(before, after, [0.5], size=500, seed=seed) for seed in (0, 0, 1)]
    assert figures[0] == figures[1] != figures[2]


def test_strides_do_not_matter():
    before = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    after = before + torch.linspace(0, 1, 3000).view(60, 50)
    turned = [values.t().contiguous().t() for values in (before, after)]
    assert not turned[0].is_contiguous()
    expected = check({"w": before}, {"w": after}, [0.5], size=700)
    assert check({"w": turned[0]}, {"w": turned[1]}, [0.5], size=700) == expected


def test_the_number_of_threads_changes_no_bit():
    before = {"w": torch.randn(100_000, generator=torch.Generator().manual_seed(0))}
    after = {"w": before["w"] + 0.1}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(check(before, after, [0.3, 0.9]))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_memory_does_not_grow_with_the_model():
    code = f"""{PEAK}
import torch
from lottery_tickets.detection import MovementProbe
small = {{"w": torch.randn(1000)}}
warm = MovementProbe(small); warm.update(small, [0.5]); warm.update(small, [0.5])
weights = {{str(index): torch.ones(4 << 20) for index in range(int(__import__("sys").argv[1]))}}
before = peak()
probe = MovementProbe(weights)
probe.update(weights, [0.5]); probe.update(weights, [0.5])
print(peak() - before)
"""
    peaks = [int(run_python(code, count)) for count in (1, 8)]
    assert max(peaks) < 120 << 20
    assert peaks[1] < peaks[0] + (16 << 20)


# ---------------------------------------------------------------- kept and taken up again


@pytest.mark.parametrize("size", [50, 1 << 20])
@settings(max_examples=20)
@given(before=finite, stop=st.integers(0, 2), data=st.data())
def test_a_probe_loaded_midway_says_the_same(tmp_path_factory, size, before, stop, data):
    history = [before, data.draw(moved(before)), data.draw(moved(before))]
    whole, halved = (MovementProbe(before, size=size, seed=3) for _ in range(2))
    for turn, tensors in enumerate(history):
        if turn == stop:
            state = halved.state_dict()
            path = tmp_path_factory.mktemp("run") / "movement.safetensors"
            save_file(state["tensors"], path)
            halved = MovementProbe(before, size=size, seed=3)
            record = json.loads(json.dumps(state["record"], allow_nan=False))
            halved.load_state_dict({"record": record, "tensors": load_file(path)})
        assert halved.update(tensors, [0.5]) == whole.update(tensors, [0.5])


def test_a_state_of_other_settings_or_tensors():
    probe = MovementProbe({"w": torch.arange(10.0)})
    probe.update({"w": torch.arange(10.0)}, [])
    state = probe.state_dict()
    for other in (
        MovementProbe({"w": torch.arange(10.0)}, seed=1),
        MovementProbe({"w": torch.arange(10.0)}, permutations=2),
        MovementProbe({"w": torch.arange(11.0)}),
        MovementProbe({"v": torch.arange(10.0)}),
    ):
        with pytest.raises(DetectionError, match="same settings"):
            other.load_state_dict(copy.deepcopy(state))
    with pytest.raises(DetectionError, match="same settings"):
        MovementProbe({"w": torch.arange(10.0)}).load_state_dict({"record": state["record"], "tensors": {}})


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("settings", [{"size": 1}, {"size": 2.5}, {"seed": -1}, {"permutations": 1}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(DetectionError, match=f"{next(iter(settings))} is an integer of at least"):
        MovementProbe({"w": torch.zeros(3)}, **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_whose_movement_has_no_size(value):
    probe = MovementProbe({"w": torch.zeros(3)})
    probe.update({"w": torch.zeros(3)}, [])
    with pytest.raises(WeightsError, match="w holds NaN or inf"):
        probe.update({"w": torch.tensor([0.0, value, 1.0])}, [])
    assert probe.update({"w": torch.ones(3)}, []).moved_fraction == 1.0


def test_other_tensors_and_sparsities():
    probe = MovementProbe({"w": torch.zeros(3)})
    with pytest.raises(WeightsError, match="w"):
        probe.update({"w": torch.zeros(2)}, [])
    with pytest.raises(SparsityError):
        probe.update({"w": torch.zeros(3)}, [50])
    with pytest.raises(WeightsError, match="meta"):
        MovementProbe({"w": torch.zeros(3, device="meta")})


def test_nothing_to_look_at():
    assert check({}, {}, [0.5]).by_sparsity[0.5].null_distance == 0.0
    assert check({"w": torch.zeros(0)}, {"w": torch.zeros(0)}).moved_fraction == 0.0


def test_its_fraction_is_what_the_detector_judges_by():
    """A model with one weight in a thousand moving: masks agree, and that is said."""
    before = {"w": torch.randn(5000, generator=torch.Generator().manual_seed(0))}
    probe, detector = MovementProbe(before), EarlyBirdDetector()
    for turn in range(8):
        before["w"][turn * 5 : turn * 5 + 5] += 1
        movement = probe.update(before, [])
        verdict = detector.update(
            create_magnitude_mask(before, 0.5),
            moved_fraction=None if movement is None else movement.moved_fraction,
        )
        assert not verdict.converged
    assert verdict.reason.startswith("weights are not moving: a fraction of 0.001 moved")
