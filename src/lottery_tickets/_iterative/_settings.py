"""What an experiment was asked for, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from lottery_tickets._arguments import check_count, check_seed
from lottery_tickets._iterative._drawing import ScoreFunction
from lottery_tickets._iterative._results import Rewind
from lottery_tickets.errors import SparsityError, TrainingError
from lottery_tickets.masks import Patterns
from lottery_tickets.sparsity import check_sparsity
from lottery_tickets.training import Recipe

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Settings:
    """The arguments of `compute_iterative_magnitude_pruning` that say what is pruned and rewound.

    Raises:
        TrainingError: What cannot be, or contradicts another.
        SparsityError: A sparsity or fraction out of range.
    """

    target_sparsity: float
    num_iterations: int
    epochs: int
    rewind: Rewind
    rewind_epoch: int
    rewind_step: int | None
    prune_fraction: float | None
    scope: Scope
    criterion: str | ScoreFunction
    layer_fractions: Mapping[str, float]
    include: Patterns
    exclude: Patterns
    evaluated: bool
    tested: bool
    eval_every_steps: int | None
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        check_sparsity(self.target_sparsity, "target_sparsity")
        if not self.target_sparsity:
            raise SparsityError("target_sparsity is 0, which removes nothing; give a fraction.")
        for name in ("num_iterations", "epochs"):
            if getattr(self, name) is None:
                raise TrainingError(f"{name} is a positive integer, got None.")
            check_count(name, getattr(self, name))
        check_count("eval_every_steps", self.eval_every_steps)
        if self.prune_fraction is not None:
            _check_fraction("prune_fraction", self.prune_fraction)
        for glob, fraction in self.layer_fractions.items():
            _check_fraction(f"layer_fractions[{glob!r}]", fraction, zero=True)
        _check_one_of("rewind", self.rewind, get_args(Rewind))
        _check_one_of("scope", self.scope, get_args(Scope))
        if not callable(self.criterion):
            _check_one_of(
                "criterion", self.criterion, ("magnitude",), "a function from the model to scores by name"
            )
        self._check_rewinding()
        if self.tested and not self.evaluated:
            raise TrainingError(
                "test_dataloader is looked at where the evaluation loss is least, and there is no "
                "eval_dataloader. Give both, or test data as eval_dataloader."
            )
        if self.eval_every_steps is not None and not self.evaluated:
            raise TrainingError("eval_every_steps says how often to evaluate, and there is no eval_dataloader.")
        check_seed(self.seed)

    def check_against(self, recipe: Recipe, length: int | None) -> None:
        """Refuse what the recipe or the data's length rules out."""
        if recipe.trainer_fn is not None:
            given = [name for name in ("rewind_step", "eval_every_steps") if getattr(self, name) is not None]
            if given:
                raise TrainingError(
                    f"trainer_fn trains whole epochs, so {' and '.join(given)} cannot be kept. Use rewind_epoch."
                )
        if length is not None and self.rewind_step is not None and self.rewind_step >= length * self.epochs:
            raise TrainingError(
                f"rewind_step={self.rewind_step}, but training has {length * self.epochs} steps ({self.epochs} "
                f"epochs of {length}), so nothing would be left to train. Rewind to an earlier step or train "
                "longer."
            )

    @property
    def criterion_name(self) -> str:
        """Of a function its own, of a partial one that of what it calls."""
        named = self.criterion
        while isinstance(named, partial):
            named = named.func
        return named if isinstance(named, str) else str(getattr(named, "__name__", type(named).__name__))

    def _check_rewinding(self) -> None:
        for name, value in (("rewind_epoch", self.rewind_epoch), ("rewind_step", self.rewind_step or 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise TrainingError(f"{name} is a non-negative integer, got {value!r}.")
        if self.rewind_step is not None and self.rewind_epoch:
            raise TrainingError(
                f"rewind_epoch={self.rewind_epoch} and rewind_step={self.rewind_step} name two points. Leave one "
                "out."
            )
        if self.rewind_epoch >= self.epochs:
            raise TrainingError(
                f"rewind_epoch={self.rewind_epoch}, but training has {self.epochs} epochs, so nothing would be "
                "left to train. Rewind to an earlier epoch or train longer."
            )


def _check_fraction(name: str, value: float, *, zero: bool = False) -> None:
    check_sparsity(value, name)
    if not value and not zero:
        raise SparsityError(f"{name} is 0, which removes nothing; give the fraction that a round removes.")


def _check_one_of(name: str, value: object, known: tuple[str, ...], also: str | None = None) -> None:
    if value not in known:
        listed = " or ".join([*map(repr, known), *([also] if also else [])])
        raise TrainingError(f"{name} is {listed}; got {value!r}.")
