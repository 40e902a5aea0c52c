"""What each unit is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lottery_tickets.errors import StructureError, WeightsError
from lottery_tickets.masks import Part, UnitGroup, Units

Named = Literal["bn_scale", "magnitude", "l1"]
Criterion = Named | Mapping[str, torch.Tensor]
Numbers = npt.NDArray[np.float64]

_BLOCK = 1 << 20


def unit_scores(
    units: Units, model: nn.Module, parameters: Mapping[str, torch.Tensor], criterion: Criterion
) -> dict[str, Numbers]:
    """A score for each unit, by group; the same bits whatever the number of threads.

    Raises:
        StructureError: A criterion that is not known, or that has nothing to say of some group.
        WeightsError: NaN, or weights without data.
    """
    if isinstance(criterion, Mapping):
        scores = _sums(units, criterion, _check_fit(criterion, parameters), lambda numbers: numbers)
    elif criterion == "bn_scale":
        names = _normalisations(model, parameters)
        scores = _means(units, parameters, names, np.abs)
    elif criterion == "l1":
        scores = _means(units, parameters, _matrices(parameters), np.abs)
    elif criterion == "magnitude":
        squares = _means(units, parameters, _matrices(parameters), np.square)
        scores = {name: np.sqrt(found) for name, found in squares.items()}
    else:
        raise StructureError(
            f"criterion is 'bn_scale', 'magnitude', 'l1' or a mapping from parameter names to scores, got "
            f"{criterion!r}."
        )
    for name, found in scores.items():
        if np.isnan(found).any():
            raise WeightsError(f"{name}: {int(np.isnan(found).sum())} of its {found.size} units score NaN.")
    return scores


def normalised(model: nn.Module, units: Units) -> bool:
    """Whether every unit has a scale of batch normalisation."""
    scales = _normalisations(model, dict(model.named_parameters()))
    return all(any(part.name in scales for part in group.parts) for group in units.groups)


def _normalisations(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> set[str]:
    scales = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None
    }
    return {name for name, parameter in parameters.items() if id(parameter) in scales}


def _matrices(parameters: Mapping[str, torch.Tensor]) -> set[str]:
    """Weights, not biases or the scales of normalisation, which are of another size."""
    return {name for name, parameter in parameters.items() if parameter.dim() > 1}


def _check_fit(scores: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> set[str]:
    for name, score in scores.items():
        if name in parameters and score.shape != parameters[name].shape:
            raise StructureError(
                f"criterion[{name!r}]: scores of shape {tuple(score.shape)}, the parameter's is "
                f"{tuple(parameters[name].shape)}."
            )
    return set(scores)


def _means(
    units: Units, tensors: Mapping[str, torch.Tensor], names: set[str], of: Callable[[Numbers], Numbers]
) -> dict[str, Numbers]:
    """Over all the weights of a unit, so that units of many weights and of few compare."""
    sums = _sums(units, tensors, names, of)
    return {
        group.name: sums[group.name] / sum(_sizes(group, part, tensors) for part in _parts(group, tensors, names))
        for group in units.groups
    }


def _sums(
    units: Units, tensors: Mapping[str, torch.Tensor], names: set[str], of: Callable[[Numbers], Numbers]
) -> dict[str, Numbers]:
    return {
        group.name: sum(
            (_by_unit(group, part, tensors[part.name], of) for part in _parts(group, tensors, names)),
            np.zeros(group.count),
        )
        for group in units.groups
    }


def _parts(group: UnitGroup, tensors: Mapping[str, torch.Tensor], names: set[str]) -> list[Part]:
    parts = [part for part in group.parts if part.name in names and part.name in tensors]
    if not parts:
        held = ", ".join(sorted({part.name for part in group.parts}))
        raise StructureError(
            f"{group.name}: the criterion says nothing of its units, which hold {held}. criterion='magnitude' "
            "ranks any unit; 'bn_scale' needs batch normalisation behind every layer."
        )
    return parts


def _sizes(group: UnitGroup, part: Part, tensors: Mapping[str, torch.Tensor]) -> Numbers:
    """How many weights of this part each unit holds."""
    each = tensors[part.name].numel() // len(part.owners)
    return _gathered(group, part, np.full(len(part.owners), float(each)))


def _by_unit(group: UnitGroup, part: Part, tensor: torch.Tensor, of: Callable[[Numbers], Numbers]) -> Numbers:
    if tensor.is_meta:
        raise WeightsError(f"{part.name} is on the meta device and has no values; load the model's weights first.")
    rows = tensor.detach().movedim(part.dim, 0)
    each = max(1, rows.numel() // max(1, len(rows)))
    step = max(1, _BLOCK // each)
    sums = np.empty(len(rows))
    for start in range(0, len(rows), step):
        # numpy's sums, unlike torch's, do not depend on the number of threads.
        block = rows[start : start + step].to("cpu", torch.float64).reshape(-1, each).contiguous().numpy()
        sums[start : start + step] = of(cast(Numbers, block)).sum(axis=1)
    return _gathered(group, part, sums)


def _gathered(group: UnitGroup, part: Part, by_index: Numbers) -> Numbers:
    """Sums over the indices of each unit, in their order."""
    owned = part.owners >= 0
    return np.bincount(part.owners[owned], by_index[owned], minlength=group.count).astype(np.float64)
