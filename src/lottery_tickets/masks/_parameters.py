"""Which tensors of a model may be pruned, and under which names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lottery_tickets._dtensors import local_of
from lottery_tickets.errors import MaskMismatchError, ParameterSelectionError, WeightsError

Pattern = str | Callable[[str, nn.Parameter], bool]
Patterns = Pattern | Iterable[Pattern] | None

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Place(NamedTuple):
    """One attribute of one module that holds a parameter."""

    module: nn.Module
    attribute: str


def prunable_parameters(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    only_weights: bool = True,
) -> dict[str, nn.Parameter]:
    """Parameters the library may prune, by canonical name, in the order of the model.

    By default the weights of linear and convolution layers and of transformers' `Conv1D`; not embeddings, an
    output head tied to one, norms or biases. A parameter that stands in several places (tied weights, a module
    used twice) counts once, under the first of its names.

    Args:
        model: Any module.
        include: Widens the default: a glob on names ("*.embed_tokens.weight"), a predicate
            `(name, parameter) -> bool`, or several of them.
        exclude: Narrows the result likewise, and wins over `include`. To prune only what a predicate says:
            `exclude=lambda name, parameter: not wanted(name)`.
        only_weights: If False, the biases of the same layers are prunable too.

    Returns:
        Canonical name to the model's own parameter (not a copy).

    Raises:
        ParameterSelectionError: A pattern that matches no parameter, a layer whose weight is computed by a
            parametrization or not yet initialised, or nothing left to prune.

    Example:
        >>> from torch import nn
        >>> from lottery_tickets import prunable_parameters
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> list(prunable_parameters(model))
        ['1.weight', '3.weight']
        >>> list(prunable_parameters(model, include="0.*", exclude="3.*"))
        ['0.weight', '1.weight']
    """
    chosen = chosen_parameters(model, include, exclude, only_weights=only_weights)
    return {name: _checked(name, parameter) for name, parameter in chosen.items()}


def chosen_parameters(
    model: nn.Module, include: Patterns, exclude: Patterns, *, only_weights: bool
) -> dict[str, nn.Parameter]:
    """What `prunable_parameters` returns, of a model on the meta device too."""
    aliases = parameter_aliases(model)
    canonical = {alias: names[0] for names in aliases.values() for alias in names}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names, computed = _layer_parameters(model, only_weights=only_weights)
    excluded = matching_names(exclude, parameters, "exclude", computed)
    _refuse_computed(name for name in computed if name not in excluded)
    chosen = {canonical[name] for name in names}
    chosen -= {canonical[name] for name in _embedding_weights(model)}
    chosen |= {canonical[name] for name in matching_names(include, parameters, "include")}
    chosen -= {canonical[name] for name in excluded if name in canonical}
    if not chosen:
        raise ParameterSelectionError(
            f"{type(model).__name__} has nothing to prune: no linear or convolution weight is left. "
            "include='*.weight' widens the choice."
        )
    return {names[0]: parameters[names[0]] for names in aliases.values() if names[0] in chosen}


def parameter_aliases(model: nn.Module) -> dict[int, list[str]]:
    """All names of each distinct parameter, the canonical one first, in the order of the model.

    The key only tells parameters apart. Two Parameter objects over the same memory are one.
    """
    aliases: dict[int, list[str]] = {}
    keys: dict[object, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = keys.setdefault(_identity(parameter), len(keys))
        aliases.setdefault(key, []).append(name)
    return aliases


def parameters_of(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """The parameters a mask speaks of, by its names, in the order of the mask.

    Args:
        model: The model the mask is meant for.
        mask: A `Mask`, or anything that maps names to things with a shape.

    Raises:
        MaskMismatchError: A name that the model does not have or that is not the canonical one, or another
            shape; every offender is named.
        WeightsError: Parameters on the meta device.

    Example:
        >>> import torch
        >>> from lottery_tickets.masks import Mask, parameters_of
        >>> model = torch.nn.Linear(2, 2)
        >>> list(parameters_of(model, Mask.ones_like(model)))
        ['weight']
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    canonical = {alias: names[0] for names in parameter_aliases(model).values() for alias in names}
    shapes = mask_shapes(mask)
    problems = []
    for name, shape in shapes.items():
        if name not in parameters:
            problems.append(f"{name}: the model has no such parameter")
        elif canonical[name] != name:
            problems.append(f"{name}: tied to {canonical[name]}, which is the name to use")
        elif parameters[name].shape != shape:
            problems.append(f"{name}: mask {tuple(shape)}, parameter {tuple(parameters[name].shape)}")
    if problems:
        raise MaskMismatchError(
            f"The mask does not fit {type(model).__name__}: " + "; ".join(problems) + ". "
            "Draw the mask from this model, or load the model it was drawn from."
        )
    return {name: _checked(name, parameters[name]) for name in shapes}


def mask_shapes(mask: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Size]:
    """Name to shape, without unpacking a packed mask."""
    shapes: Mapping[str, torch.Size] | None = getattr(mask, "shapes", None)
    return shapes if shapes is not None else {name: tensor.shape for name, tensor in mask.items()}


def places_of(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> dict[str, list[Place]]:
    """Every module attribute that holds each of these parameters."""
    wanted = {_identity(parameter): name for name, parameter in parameters.items()}
    places: dict[str, list[Place]] = {name: [] for name in parameters}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and _identity(parameter) in wanted:
                places[wanted[_identity(parameter)]].append(Place(module, attribute))
    return places


def _identity(parameter: torch.Tensor) -> object:
    """Equal for parameters that are the same weights."""
    if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.numel():
        return id(parameter)
    try:
        address = local_of(parameter).data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own
        return id(parameter)
    return (parameter.device, address, parameter.shape, parameter.stride()) if address else id(parameter)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: GPT-2's linear layer, whose weight is (input, output)."""
    # Told by name so that transformers need not be installed.
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in type(module).__mro__
    )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_transposed_linear(module)


def _layer_parameters(model: nn.Module, *, only_weights: bool) -> tuple[list[str], list[str]]:
    """Names of the layers' parameters, and of weights that are not parameters but computed from some."""
    names, computed = [], []
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not _is_layer(module):
            continue
        for attribute in ("weight",) if only_weights else ("weight", "bias"):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if module._parameters.get(attribute) is not None:
                names.append(name)
            elif attribute == "weight":
                computed.append(name)
    return names, computed


def _refuse_computed(names: Iterable[str]) -> None:
    for name in names:
        raise ParameterSelectionError(
            f"{name} is computed by a parametrization or by torch.nn.utils.prune, so there is no parameter of "
            "that name to prune. Make it plain first (torch.nn.utils.parametrize.remove_parametrizations or "
            f"torch.nn.utils.prune.remove), or pass exclude={name!r}."
        )


def lasting(patterns: Patterns) -> Patterns:
    """Patterns that can be gone through again and again."""
    single = patterns is None or isinstance(patterns, str) or callable(patterns)
    return patterns if single else tuple(cast("Iterable[Pattern]", patterns))


def _embedding_weights(model: nn.Module) -> list[str]:
    return [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _EMBEDDINGS)
    ]


def matching_names(
    patterns: Patterns, parameters: Mapping[str, nn.Parameter], role: str, computed: Iterable[str] = ()
) -> set[str]:
    """Names that patterns match; globs speak of computed weights too, predicates need a parameter."""
    if patterns is None:
        return set()
    single = isinstance(patterns, str) or callable(patterns) or not isinstance(patterns, Iterable)
    listed: list[Any] = [patterns] if single else list(cast("Iterable[Pattern]", patterns))
    found = set()
    for pattern in listed:
        if isinstance(pattern, str):
            matched = {name for name in (*parameters, *computed) if fnmatchcase(name, pattern)}
        elif not callable(pattern):
            raise ParameterSelectionError(
                f"{role}: a pattern is a glob on names or a predicate (name, parameter) -> bool, got {pattern!r}."
            )
        else:
            matched = {name for name, parameter in parameters.items() if pattern(name, parameter)}
        if not matched:
            raise ParameterSelectionError(
                f"{role}={pattern!r} matches no parameter; names look like {next(iter(parameters), 'nothing')!r}."
            )
        found |= matched
    return found


def _checked(name: str, parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ParameterSelectionError(
            f"{name} is not initialised yet; run one batch through the lazy module first."
        )
    if parameter.is_meta:
        raise WeightsError(f"{name} is on the meta device and has no values; load the model's weights first.")
    return parameter
