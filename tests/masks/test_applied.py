"""A model that computes with a ticket: the same numbers as with zeroed weights, and itself again afterwards."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import oracles
from lottery_tickets import Mask, applied, apply_mask, create_magnitude_mask, remove_mask
from lottery_tickets.errors import MaskAppliedError, MaskError, MaskMismatchError, WeightsError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: oracles.bytes_of(value) for name, value in model.state_dict(keep_vars=True).items()}


def masked_weights(model: nn.Module, mask: Mask) -> dict[str, torch.Tensor]:
    """W * mask for every name the parameters go by, tied ones included."""
    kept = {id(model.get_parameter(name)): mask[name] for name in mask}
    return {
        name: weight * kept[id(weight)] if id(weight) in kept else weight
        for name, weight in model.named_parameters(remove_duplicate=False)
    }


def oracle_call(model: nn.Module, mask: Mask, *inputs: torch.Tensor) -> torch.Tensor:
    """The model's answer with other weights put in its place by torch."""
    return torch.func.functional_call(model, masked_weights(model, mask), inputs, tie_weights=False)


class Tied(nn.Module):
    """A weight in two places, one of them transposed in use."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(6, 3)
        self.decode = nn.Linear(6, 3, bias=False)
        self.decode.weight = self.code.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.code(inputs)) @ self.decode.weight


class Reuses(nn.Module):
    """One layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(6, 6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            inputs = torch.tanh(self.step(inputs))
        return inputs


def gpt2_layer() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(4, 6), nn.GELU(), Conv1D(2, 4))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), (5, 6)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose1d(3, 2, 3)),
        (2, 2, 8),
    ),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
        (2, 2, 6, 6),
    ),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh()).to(memory_format=torch.channels_last),
        (2, 2, 6, 6),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ConvTranspose3d(2, 1, 2)), (1, 1, 4, 4, 4)),
    "tied": (Tied, (5, 6)),
    "called three times": (Reuses, (5, 6)),
    "transformers Conv1D": (gpt2_layer, (5, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (2, 3, 6)),
    "parametrized": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 2)), (5, 6)),
}


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Mask, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    model = make().to(dtype)
    exclude = "0.weight" if kind == "parametrized" else None
    return model, create_magnitude_mask(model, 0.5, exclude=exclude), torch.randn(shape).to(dtype)


def gradients(model: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (output.double() ** 2).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# --- The numbers ---


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_are_those_of_zeroed_weights(kind):
    model, mask, inputs = made(kind)
    expected = oracle_call(model, mask, inputs)
    expected_gradients = gradients(model, expected)
    with applied(model, mask) as inside:
        assert inside is model
        found = model(inputs)
        found_gradients = gradients(model, found)
    torch.testing.assert_close(found, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])
        if name in mask:
            assert not gradient[~mask[name]].any()
            assert gradient[mask[name]].any()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_outputs_without_gradients(kind, context):
    model, mask, inputs = made(kind)
    model.eval()
    with context():
        expected = oracle_call(model, mask, inputs)
        with applied(model, mask):
            torch.testing.assert_close(model(inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_data_types(dtype):
    model, mask, inputs = made("linear", dtype)
    expected = oracle_call(model, mask, inputs)
    expected_gradients = gradients(model, expected)
    with applied(model, mask):
        found = model(inputs)
        found_gradients = gradients(model, found)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[name], expected_gradients[name]) for name in expected_gradients)


def test_a_plain_dict_is_a_mask():
    model, mask, inputs = made("linear")
    expected = oracle_call(model, mask, inputs)
    with applied(model, dict(mask)):
        assert torch.equal(model(inputs), expected)


def test_a_mask_over_a_part_of_the_model():
    model, mask, inputs = made("linear")
    part = {"2.weight": mask["2.weight"]}
    expected = oracle_call(model, Mask.from_tensors(part), inputs)
    with applied(model, part):
        assert torch.equal(model(inputs), expected)


def test_pruned_nan_and_infinity_are_zeros():
    """0 times NaN would be NaN, and a negative weight times 0 is -0.0."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[float("nan"), float("inf"), -3.0, 2.0]])
    with applied(layer, {"weight": torch.tensor([[0, 0, 0, 1]])}):
        assert oracles.bytes_of(layer.weight) == oracles.bytes_of(torch.tensor([[0.0, 0.0, 0.0, 2.0]]))


def test_second_derivatives():
    model, mask, inputs = made("tied")

    def penalty(output: torch.Tensor) -> list[torch.Tensor]:
        weights = list(model.parameters())
        first = torch.autograd.grad(torch.tanh(output).sum(), weights, create_graph=True)
        return torch.autograd.grad(sum((gradient**2).sum() for gradient in first), weights)

    expected = penalty(oracle_call(model, mask, inputs))
    with applied(model, mask):
        found = penalty(model(inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Layers are computed again in the backward pass, with the mask on."""
    model, mask, inputs = made("linear")
    inputs.requires_grad_()
    expected = gradients(model, oracle_call(model, mask, inputs))
    with applied(model, mask):
        found = gradients(model, checkpoint(model, inputs, use_reentrant=reentrant))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_autocast():
    model, mask, inputs = made("linear", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = oracle_call(model, mask, inputs)
        with applied(model, mask):
            assert torch.equal(model(inputs), expected)
        assert not torch.equal(model(inputs), expected)  # no masked weight is left in autocast's cache


def test_a_layer_that_writes_into_its_weight():
    """What a layer reads is its own copy, so writing is allowed, and gradients are of what it wrote."""

    class Doubled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return F.linear(inputs, self.weight.mul_(2), self.bias)

    layer, inputs = Doubled(6, 2).double(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mask, before = create_magnitude_mask(layer, 0.5), bytes_of(layer)
    with applied(layer, mask):
        output = layer(inputs)
        output.sum().backward()
    assert bytes_of(layer) == before
    torch.testing.assert_close(inputs.grad, (2 * layer.weight * mask["weight"]).sum(0).expand(5, 6))


def test_training_in_the_block_moves_kept_weights_only():
    model, mask, inputs = made("linear")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with applied(model, mask):
        for _ in range(3):
            optimizer.zero_grad()
            (model(inputs) ** 2).sum().backward()
            optimizer.step()
    for name, weight in model.named_parameters():
        moved = weight.detach() != before[name]
        assert moved.any()
        if name in mask:
            assert not moved[~mask[name]].any()


def test_a_step_between_forward_and_backward_is_an_error():
    """As in plain autograd; without it the gradient would silently be that of other weights."""
    model, mask, inputs = made("linear")
    with applied(model, mask):
        output = model(inputs.requires_grad_())
        with torch.no_grad():
            dict(model.named_parameters())["2.weight"].add_(1)
        with pytest.raises(RuntimeError, match="modified in place between the forward and the backward"):
            output.sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_model(grad):
    """No mask is compiled in: dense, one ticket, another, dense again."""
    model, mask, inputs = made("linear")
    compiled = torch.compile(model, backend="eager")
    with torch.set_grad_enabled(grad):
        dense = model(inputs)
        assert torch.equal(compiled(inputs), dense)
        for ticket in (mask, ~mask, mask):
            expected = oracle_call(model, ticket, inputs)
            with applied(model, ticket):
                found = compiled(inputs)
                assert torch.equal(found, expected)
                if grad:
                    for name, gradient in gradients(model, found).items():
                        assert name not in ticket or not gradient[~ticket[name]].any()
        assert torch.equal(compiled(inputs), dense)


@pytest.mark.slow
def test_a_language_model(load_smollm2):
    model = load_smollm2(torch.float32)
    mask = create_magnitude_mask(model, 0.5)
    tokens = torch.arange(8).view(1, 8)
    before = bytes_of(model)
    with torch.no_grad():
        with applied(model, mask):
            found = model(tokens).logits
        assert bytes_of(model) == before
        removed = apply_mask(model, mask, clone_weights=True)
        assert torch.equal(model(tokens).logits, found)
    remove_mask(model, mask, removed)
    assert bytes_of(model) == before


# --- The model afterwards ---


def odd_layer() -> nn.Linear:
    """Weights whose bits a multiplication by 0 or 1 would not keep."""
    layer = nn.Linear(4, 2)
    patterns = torch.tensor([0x7FC01234, 0x7F812345, -0x80000000, 0x00000001, -1, 0x7F800000, 0, 0x3F800000])
    layer.weight.data = patterns.to(torch.int32).view(torch.float32).reshape(2, 4)
    return layer


def leave_by_exception(model, mask, inside):
    with pytest.raises(ZeroDivisionError), applied(model, mask):
        inside()
        raise ZeroDivisionError


def leave_by_interrupt(model, mask, inside):
    with pytest.raises(KeyboardInterrupt), applied(model, mask):
        inside()
        raise KeyboardInterrupt


def leave_by_closing_a_generator(model, mask, inside):
    def losses():
        with applied(model, mask):
            inside()
            yield 1
            raise AssertionError

    generator = losses()
    assert next(generator) == 1
    generator.close()


def leave_by_dropping_a_generator(model, mask, inside):
    def losses():
        with applied(model, mask):
            inside()
            yield 1

    next(iter(losses()))


def leave_normally(model, mask, inside):
    with applied(model, mask):
        inside()


def leave_by_a_failing_layer(model, mask, inside):
    with pytest.raises(RuntimeError, match="shapes"), applied(model, mask):
        inside()
        model(torch.ones(3, 99))


WAYS_OUT = [
    leave_normally,
    leave_by_exception,
    leave_by_interrupt,
    leave_by_closing_a_generator,
    leave_by_dropping_a_generator,
    leave_by_a_failing_layer,
]


@pytest.mark.parametrize("leave", WAYS_OUT)
def test_every_way_out_leaves_every_bit_as_it_was(leave):
    model = nn.Sequential(odd_layer(), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[0].eval()
    mask = {"0.weight": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1]]), "1.weight": torch.zeros(2, 2)}
    classes = [type(module) for module in model.modules()]
    state = [dict(vars(module)) for module in model.modules()]
    parameters = dict(model.named_parameters())
    before = bytes_of(model)

    def inside() -> None:
        assert not model[1].weight.any()
        model(torch.ones(3, 4)).sum().backward()
        assert calls.pop() == "hook"

    leave(model, mask, inside)
    assert bytes_of(model) == before
    assert [type(module) for module in model.modules()] == classes
    assert [dict(vars(module)) for module in model.modules()] == state
    assert all(model.get_parameter(name) is weight for name, weight in parameters.items())
    assert [weight.requires_grad for weight in parameters.values()] == [True, True, False, False]
    assert [module.training for module in model.modules()] == [True, False, True]
    assert not calls
    assert model[1].weight.any()


def test_an_error_on_entering_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    mask = {"0.weight": torch.zeros(2, 2), "1.weight_ih_l0": torch.zeros(8, 2)}
    with pytest.raises(MaskAppliedError), applied(model, mask):
        pass
    assert type(model[0]) is nn.Linear


def test_inside_parameters_and_state_are_dense():
    """Whoever lists the parameters, an optimizer or a checkpoint, sees the weights themselves."""
    model, mask, _ = made("linear")
    before, parameters = bytes_of(model), list(model.parameters())
    with applied(model, mask):
        assert bytes_of(model) == before
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        assert isinstance(model[0], nn.Linear)
        assert repr(model) == repr(made("linear")[0])


def test_a_state_loaded_inside_is_masked_and_stays():
    model, mask, _ = made("linear")
    other = {name: value + 1 for name, value in model.state_dict().items()}
    with applied(model, mask):
        model.load_state_dict(other)
        assert not model[0].weight[~mask["0.weight"]].any()
    assert torch.equal(model[0].weight, other["0.weight"])


@pytest.mark.parametrize(
    "take", [copy.deepcopy, copy.copy, pickle.dumps, lambda layer: torch.save(layer, io.BytesIO())]
)
def test_copies_inside_are_refused(take):
    """They would be masked for ever, or silently dense."""
    model, mask, _ = made("linear")
    with (
        applied(model, mask),
        pytest.raises(MaskAppliedError, match=r"Linear: .* copied or pickled .* apply_mask"),
    ):
        take(model[0])
    assert type(copy.deepcopy(model)[0]) is nn.Linear


def test_nested_use_is_an_error_and_the_outer_mask_stays():
    model, mask, inputs = made("linear")
    expected, inverted = oracle_call(model, mask, inputs), oracle_call(model, ~mask, inputs)
    with applied(model, mask):
        message = r"0: .* already applied .* leave that block first"
        with pytest.raises(MaskAppliedError, match=message), applied(model, ~mask):
            pass
        assert torch.equal(model(inputs), expected)
    with applied(model, ~mask):
        assert torch.equal(model(inputs), inverted)


def test_nested_use_over_other_layers_is_an_error_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = ({f"{layer}.weight": torch.zeros(2, 2)} for layer in (0, 1))
    with (
        applied(model, first),
        pytest.raises(MaskAppliedError, match=r"0: .* already applied"),
        applied(model, second),
    ):
        pass


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_layers_that_hide_their_weights(make):
    model = nn.ModuleDict({"memory": make(2, 2)})
    mask = {"memory.weight_hh_l0": torch.zeros_like(model["memory"].weight_hh_l0)}
    message = rf"memory\.weight_hh_l0: {make.__name__} .* use apply_mask"
    with pytest.raises(MaskAppliedError, match=message), applied(model, mask):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with (
        pytest.raises(MaskAppliedError, match=r"0\.weight: .* use apply_mask"),
        applied(scripted, {"0.weight": torch.zeros(2, 2)}),
    ):
        pass


# --- For good, and back ---


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "parametrized"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_remove(kind, dtype):
    model, mask, _ = made(kind, dtype)
    before = bytes_of(model)
    expected = {
        name: oracles.bytes_of(torch.where(mask[name], weight, torch.zeros((), dtype=dtype)))
        for name, weight in model.named_parameters()
        if name in mask
    }
    removed = apply_mask(model, mask, clone_weights=True)
    assert {name: bytes_of(model)[name] for name in mask} == expected
    assert {name: bits for name, bits in bytes_of(model).items() if name in before and name not in mask} == {
        name: bits for name, bits in before.items() if name not in mask
    } or kind == "tied"
    assert {name: tensor.shape for name, tensor in removed.items()} == {
        name: torch.Size([mask.layer_numel()[name] - kept]) for name, kept in mask.layer_kept().items()
    }
    assert {tensor.dtype for tensor in removed.values()} == {dtype}
    remove_mask(model, mask, removed)
    assert bytes_of(model) == before


def test_odd_bits_come_back():
    layer, mask = odd_layer(), {"weight": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]])}
    before = bytes_of(layer)
    removed = apply_mask(layer, mask, clone_weights=True)
    assert oracles.bytes_of(layer.weight.detach()[~mask["weight"].bool()]) == bytes(5 * 4)
    remove_mask(layer, mask, removed)
    assert bytes_of(layer) == before


def test_whole_tensors_put_back_only_what_was_pruned():
    layer = nn.Linear(3, 3)
    whole = {"weight": layer.weight.detach().clone()}
    mask = create_magnitude_mask(layer, 0.5)
    assert apply_mask(layer, mask) is None
    with torch.no_grad():
        layer.weight.add_(mask["weight"].float())  # trained meanwhile
    remove_mask(layer, mask, whole)
    assert torch.equal(layer.weight, torch.where(mask["weight"], whole["weight"] + 1, whole["weight"]))


def test_autograd_notices_the_change():
    layer, inputs = nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    output = layer(inputs).sum()
    apply_mask(layer, create_magnitude_mask(layer, 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_applying_twice_changes_nothing_more():
    model, mask, _ = made("linear")
    apply_mask(model, mask)
    once = bytes_of(model)
    apply_mask(model, mask)
    assert bytes_of(model) == once


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (None, r"got NoneType; apply_mask returns one with clone_weights=True"),
        ({}, r"1\.weight: original_weights lacks it; give what apply_mask returned"),
        ({"1.weight": torch.ones(1)}, r"1\.weight: expected the 2 removed weights .* got shape \(1,\)"),
        ({"1.weight": torch.ones(2).double()}, r"1\.weight: .* torch\.float32; got shape \(2,\), torch\.float64"),
        ({"1.weight": [0.0, 0.0]}, r"1\.weight: original_weights holds list"),
    ],
)
def test_what_cannot_be_put_back(original, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mask = {"0.weight": torch.ones(2, 2), "1.weight": torch.eye(2)}
    before = bytes_of(model)
    if original is not None:
        original = {"0.weight": torch.ones(2, 2), **original}
    with pytest.raises(MaskMismatchError, match=message):
        remove_mask(model, mask, original)
    assert bytes_of(model) == before


@pytest.mark.parametrize(
    "use", [lambda model, mask: applied(model, mask).__enter__(), apply_mask, lambda a, b: remove_mask(a, b, {})]
)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"0.weight": torch.zeros(3, 2)}, MaskMismatchError, r"0\.weight: mask \(3, 2\), parameter \(2, 2\)"),
        ({"0.wieght": torch.zeros(2, 2)}, MaskMismatchError, r"0\.wieght: the model has no such parameter"),
        ({"1.weight": torch.zeros(2, 2)}, WeightsError, r"1\.weight is on the meta device"),
        ({"0.weight": torch.full((2, 2), 0.5)}, MaskError, r"0\.weight: .* found 0\.5"),
        ("ticket.safetensors", MaskError, r"got str\. A file is read by Mask\.load"),
    ],
)
def test_masks_that_do_not_fit(use, mask, error, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    before = oracles.bytes_of(model[0].weight)
    with pytest.raises(error, match=message):
        use(model, mask)
    assert oracles.bytes_of(model[0].weight) == before
