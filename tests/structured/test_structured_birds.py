"""Early birds of whole channels: watched, settled, resumed, and trained with a penalty on their scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lottery_tickets import Mask, create_structured_mask, extract_subnetwork
from lottery_tickets.early_bird import compute_early_bird_tickets
from lottery_tickets.errors import StructureError, TrainingError
from lottery_tickets.training import Recipe
from unit_networks import Residual, image, llama, scattered


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 3),
    )


def batches():
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(3)
    ]


OPTIONS = {"target_sparsity": [0.3, 0.5, 0.7], "structure": "channel", "bn_l1": 1e-2, "learning_rate": 0.05}


def test_three_sparsities_of_channels_at_once():
    model = network()
    results = compute_early_bird_tickets(model, batches(), max_epochs=3, **OPTIONS)
    for result, gone in zip(results, (4, 7, 10), strict=True):
        mask = result["final_mask"]
        kept = mask.units.kept_in(mask)
        assert sum(int((~one).sum()) for one in kept.values()) == gone
        extract_subnetwork(model, mask, example_inputs=image())
        first, *later = result["checkpoints"]
        assert first["distances"] == []
        # Distances count channels: 14 of them, and a mask differs from the next in an even number.
        for look in later:
            assert all(abs(one * 14 - round(one * 14)) < 1e-9 for one in look["distances"])
            assert set(look["layer_distances"]) == {"0", "3"}
    assert all(result["final_mask"].units.groups[0].name == "0" for result in results)


def test_the_last_mask_is_what_the_trained_scales_give():
    model = network()
    result = compute_early_bird_tickets(
        model, batches(), max_epochs=2, target_sparsity=0.5, structure="channel", learning_rate=0.05
    )
    assert not result["converged"]
    again = create_structured_mask(model, 0.5, criterion="bn_scale", count="units", example_inputs=image())
    assert result["final_mask"] == again


def test_a_killed_run_goes_on(tmp_path):
    whole = compute_early_bird_tickets(network(), batches(), max_epochs=2, **OPTIONS)
    model = network()
    seen = 0

    class KilledError(Exception):
        pass

    class Killing(list):
        def __iter__(self):
            nonlocal seen
            seen += 1
            if seen == 3:  # the first is to trace the model with
                raise KilledError
            return super().__iter__()

    with pytest.raises(KilledError):
        compute_early_bird_tickets(model, Killing(batches()), max_epochs=2, run_dir=tmp_path, **OPTIONS)
    resumed = compute_early_bird_tickets(
        network(), Killing(batches()), max_epochs=2, run_dir=tmp_path, save_masks=True, **OPTIONS
    )
    assert [one["final_mask"] for one in resumed] == [one["final_mask"] for one in whole]
    saved = Mask.load(next((tmp_path / "masks").glob("check-0002-0.3*")))
    assert saved.units is not None
    assert saved.metadata["criterion"] == "bn_scale"


def test_heads_without_normalisation_by_magnitude():
    model = llama(hidden=16).train()
    tokens = [{"input_ids": torch.randint(0, 40, (2, 6)), "labels": torch.randint(0, 40, (2, 6))}]
    result = compute_early_bird_tickets(
        model, tokens, max_epochs=1, target_sparsity=0.5, structure="head", learning_rate=0.01
    )
    again = create_structured_mask(model, 0.5, unit="head", count="units")
    assert result["final_mask"] == again


def test_the_penalty_is_the_gradient_of_l1():
    """One step by SGD moves each scale by rate * (gradient + strength * sign); no told loss knows of it."""
    losses, scales = [], []
    for strength in (0.0, 0.5):
        model = network()
        trainer = Recipe(learning_rate=0.1, bn_l1=strength).trainer(model, seed=0)
        losses.append(trainer.step(batches()[0]).mean)
        scales.append(torch.cat([model[1].weight, model[4].weight]).detach())
    assert losses[0] == losses[1]
    torch.testing.assert_close(scales[0] - scales[1], torch.full((14,), 0.1 * 0.5))


def test_random_units_for_control():
    model = scattered(Residual())
    mask = create_structured_mask(model, 0.4, example_inputs=image())
    controls = [Mask.random_like(mask, seed) for seed in range(6)]
    for control in controls:
        assert control.layer_kept() == mask.layer_kept()
        extract_subnetwork(model, control, example_inputs=image())
    assert len({control.digest() for control in controls}) > 1
    assert Mask.random_like(mask, 3) == controls[3]
    assert Mask.random_like(mask, 0, per_layer=False).units is None


def test_what_cannot_be_watched():
    with pytest.raises(StructureError, match="structure is 'channel'"):
        compute_early_bird_tickets(network(), batches(), structure="layer")
    with pytest.raises(TrainingError, match="include and exclude choose single parameters"):
        compute_early_bird_tickets(network(), batches(), structure="channel", exclude="0.weight")
    with pytest.raises(StructureError, match="no head that can leave"):
        compute_early_bird_tickets(network(), batches(), structure="head")
    with pytest.raises(TrainingError, match="has none that are trained"):
        compute_early_bird_tickets(nn.Linear(4, 3), [(torch.randn(2, 4), torch.tensor([0, 1]))], bn_l1=1e-4)
