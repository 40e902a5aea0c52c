"""Which parameters are prunable, and under which names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lottery_tickets import Mask, prunable_parameters
from lottery_tickets.errors import MaskMismatchError, ParameterSelectionError, WeightsError
from lottery_tickets.masks import parameter_aliases, parameters_of


class Tied(nn.Module):
    """An embedding whose table is the output head too, and a linear layer that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.again = self.first
        self.shared = nn.Linear(4, 4, bias=False)
        self.shared.weight = self.first.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def every_layer() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.Conv2d(2, 3, 2),
        nn.Conv3d(2, 3, 2),
        nn.ConvTranspose1d(2, 3, 2),
        nn.ConvTranspose2d(2, 3, 2),
        nn.ConvTranspose3d(2, 3, 2),
        nn.Linear(2, 3),
        nn.BatchNorm1d(3),
        nn.GroupNorm(1, 3),
        nn.Embedding(4, 2),
        nn.EmbeddingBag(4, 2),
        nn.PReLU(),
        nn.LSTM(2, 3),
        nn.Bilinear(2, 2, 3),
    )


def test_linear_and_convolution_weights_are_prunable():
    model = every_layer()
    found = prunable_parameters(model)
    assert list(found) == [f"{index}.weight" for index in range(7)]
    assert all(found[name] is model.get_parameter(name) for name in found)


def test_biases_of_the_same_layers_where_asked():
    names = [f"{index}.{attribute}" for index in range(7) for attribute in ("weight", "bias")]
    assert list(prunable_parameters(every_layer(), only_weights=False)) == names


def test_a_subclass_of_a_layer_is_one():
    class Scaled(nn.Linear):
        pass

    assert list(prunable_parameters(nn.Sequential(Scaled(2, 2)))) == ["0.weight"]


def test_a_lone_layer():
    assert list(prunable_parameters(nn.Linear(2, 2))) == ["weight"]


def test_transformers_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=4))
    assert list(prunable_parameters(model)) == [
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_a_language_model(smollm2):
    found = prunable_parameters(smollm2)
    assert len(found) == 30 * 7
    assert sum(weight.numel() for weight in found.values()) == 106_168_320
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in found)


def test_other_classes_called_conv1d_are_not_taken_for_it():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    assert list(prunable_parameters(nn.Sequential(Conv1D(), nn.Linear(2, 2)))) == ["1.weight"]


# --- Tied and shared ---


def test_tied_parameters_count_once_under_the_first_name():
    assert list(prunable_parameters(Tied())) == ["first.weight"]


def test_every_name_of_a_parameter_is_known():
    aliases = list(parameter_aliases(Tied()).values())
    assert ["embed.weight", "head.weight"] in aliases
    assert ["first.weight", "again.weight", "shared.weight"] in aliases
    assert [names[0] for names in aliases] == [name for name, _ in Tied().named_parameters()]


def test_two_parameters_over_the_same_memory_are_one():
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert model[1].weight is not model[0].weight
    assert list(prunable_parameters(model)) == ["0.weight"]


def test_parameters_without_memory_are_told_apart():
    model = nn.ModuleList([nn.Linear(0, 3, bias=False), nn.Linear(0, 3, bias=False)])
    assert list(prunable_parameters(model)) == ["0.weight", "1.weight"]


# --- Patterns ---


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("embed.weight", None, ["embed.weight", "first.weight"]),
        ("head.weight", None, ["embed.weight", "first.weight"]),  # an alias speaks of the parameter
        ("*", None, ["embed.weight", "first.weight", "first.bias", "norm.weight", "norm.bias"]),
        ("*", "*norm*", ["embed.weight", "first.weight", "first.bias"]),
        (["norm.*", "embed.*"], "norm.bias", ["embed.weight", "first.weight", "norm.weight"]),
        ("norm.weight", "shared.*", ["norm.weight"]),
        (lambda name, weight: weight.dim() == 1, None, ["first.weight", "first.bias", "norm.weight", "norm.bias"]),
        ("*", lambda name, weight: "weight" not in name, ["embed.weight", "first.weight", "norm.weight"]),
        ([], (), ["first.weight"]),
    ],
)
def test_patterns_widen_and_narrow(include, exclude, names):
    assert list(prunable_parameters(Tied(), include, exclude)) == names


@pytest.mark.parametrize("role", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["decoder.*", ["first.*", "decoder.*"]])
def test_a_pattern_that_matches_nothing_is_refused(role, pattern):
    with pytest.raises(ParameterSelectionError, match=rf"{role}='decoder\.\*' matches no .* like 'embed\.weight'"):
        prunable_parameters(Tied(), **{role: pattern})


@pytest.mark.parametrize("role", ["include", "exclude"])
def test_a_predicate_that_matches_nothing_is_refused(role):
    with pytest.raises(ParameterSelectionError, match=f"{role}=<function .* matches no parameter"):
        prunable_parameters(Tied(), **{role: lambda name, weight: False})


@pytest.mark.parametrize("role", ["include", "exclude"])
@pytest.mark.parametrize("pattern", [3, [3], [None]])
def test_a_pattern_is_text_or_a_function(role, pattern):
    with pytest.raises(ParameterSelectionError, match=f"{role}: a pattern is a glob .* got"):
        prunable_parameters(Tied(), **{role: pattern})


@pytest.mark.parametrize(
    ("model", "exclude"), [(nn.LayerNorm(3), None), (nn.Linear(2, 2), "*"), (nn.ReLU(), None)]
)
def test_nothing_to_prune_is_refused(model, exclude):
    with pytest.raises(ParameterSelectionError, match=f"{type(model).__name__} has nothing to prune"):
        prunable_parameters(model, exclude=exclude)


# --- Weights that are not there ---


def computed_weights() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "parametrization": parametrizations.weight_norm(nn.Linear(3, 3)),
        "spectral": parametrizations.spectral_norm(nn.Linear(3, 3)),
        "torch prune": prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5),
    }


@pytest.mark.parametrize("kind", computed_weights())
def test_computed_weights_are_refused_or_excluded(kind):
    layer = computed_weights()[kind]
    model = nn.Sequential(layer, nn.Linear(3, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ParameterSelectionError, match=r"0\.weight is computed by .* exclude='0\.weight'"):
        prunable_parameters(model)
    for exclude in ("0.weight", "0.*", ["0.weight"]):
        assert list(prunable_parameters(model, exclude=exclude)) == ["1.weight"]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # spectral norm moves when it is read


def test_meta_tensors_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(WeightsError, match=r"0\.weight is on the meta device and has no values; load"):
        prunable_parameters(model)


def test_lazy_modules_are_refused():
    with pytest.raises(ParameterSelectionError, match=r"0\.weight is not initialised yet; run one batch"):
        prunable_parameters(nn.Sequential(nn.LazyLinear(3)))


# --- The parameters a mask speaks of ---


def test_parameters_of_keeps_the_masks_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mask = Mask.from_tensors({"1.weight": torch.ones(2, 2), "0.bias": torch.ones(2)})
    found = parameters_of(model, mask)
    assert list(found) == ["1.weight", "0.bias"]
    assert found["1.weight"] is model[1].weight
    assert list(parameters_of(model, {"0.weight": torch.ones(2, 2)})) == ["0.weight"]


def test_every_offender_is_named():
    mask = Mask.from_tensors(
        {
            "first.weight": torch.ones(4, 5),
            "head.weight": torch.ones(7, 4),
            "gone.weight": torch.ones(1),
            "embed.weight": torch.ones(7, 4),
        }
    )
    with pytest.raises(MaskMismatchError, match="does not fit Tied") as error:
        parameters_of(Tied(), mask)
    assert "first.weight: mask (4, 5), parameter (4, 4)" in str(error.value)
    assert "head.weight: tied to embed.weight, which is the name to use" in str(error.value)
    assert "gone.weight: the model has no such parameter" in str(error.value)
    assert "embed.weight:" not in str(error.value)
    assert "Draw the mask from this model" in str(error.value)


def test_meta_parameters_have_nothing_to_mask():
    with pytest.raises(WeightsError, match="weight is on the meta device"):
        parameters_of(nn.Linear(2, 2, device="meta"), {"weight": torch.ones(2, 2)})
