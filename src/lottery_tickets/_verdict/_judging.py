"""From one score for each network and seed to the verdict and its reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal, TypedDict

from lottery_tickets._verdict._paired import MANY, POWER, lower_bound, mean_of, p_above, seeds_needed
from lottery_tickets.errors import VerdictError

TICKET, DENSE = "ticket", "dense"
# A winning ticket is better than these; without one of them that cannot be claimed.
REQUIRED = ("random_reinit", "random_mask")
# These too are random masks, and count where they were trained.
RANDOM = (*REQUIRED, "layer_shuffled")

Verdict = Literal["winning", "matching", "not a ticket"]


class VerdictTest(TypedDict):
    """One claim, and how it stands.

    Gains are paired by seed: the ticket's score minus the control's, the sign turned where less is better, so that
    above 0 the ticket is the better one.

    Attributes:
        claim: In words.
        control: What the ticket is compared with.
        null: The mean gain that is to be refuted: minus the margin against "dense", else 0.
        mean_gain: Over the seeds.
        lower_bound: One-sided confidence bound: the mean gain is at least that; None where all gains are equal and
            the seeds too few for any bound.
        upper_bound: The same from above.
        p_value: One-sided, of the hypothesis that the mean gain is `null` or less.
        p_opposite: One-sided, of the hypothesis that it is `null` or more.
        shown: Whether `p_value` is at most 1 - confidence: the claim is made.
        refuted: Whether `p_opposite` is: the opposite of the claim is shown. Where neither is, the seeds are too
            few to tell.
        seeds_needed: Estimate of the seeds with which the claim would be shown with probability 0.8, were mean and
            spread those observed (1001 stands for more than 1000); None where it is shown, or the mean gain is not
            above `null`.
    """

    claim: str
    control: str
    null: float
    mean_gain: float
    lower_bound: float | None
    upper_bound: float | None
    p_value: float
    p_opposite: float
    shown: bool
    refuted: bool
    seeds_needed: int | None


class Judgement(TypedDict):
    """A verdict on scores.

    Attributes:
        verdict: "winning", "matching" or "not a ticket".
        reason: What it rests on, in words.
        tests: What it rests on, in numbers: against "dense" first, then against the controls that count.
        margin: How much worse than dense is not worse, in the unit of the scores.
        confidence: Of each test.
        seeds: How many.
    """

    verdict: Verdict
    reason: str
    tests: list[VerdictTest]
    margin: float
    confidence: float
    seeds: int


def judge(
    scores: Mapping[str, Sequence[float]],
    *,
    margin: float,
    confidence: float = 0.95,
    higher_is_better: bool = True,
) -> Judgement:
    """See `lottery_tickets.verdict.compute_verdict_from_scores`."""
    check_standard(margin, confidence)
    seeds = _checked(scores)
    sign = 1.0 if higher_is_better else -1.0
    gains = {
        name: [sign * (a - b) for a, b in zip(scores[TICKET], values, strict=True)]
        for name, values in scores.items()
        if name != TICKET
    }
    not_worse = _test(DENSE, gains[DENSE], -margin, confidence)
    better = [_test(name, gains[name], 0.0, confidence) for name in RANDOM if name in gains]
    missing = [name for name in REQUIRED if name not in gains]
    verdict: Verdict = "not a ticket"
    if not_worse["shown"]:
        verdict = "winning" if not missing and all(test["shown"] for test in better) else "matching"
    return Judgement(
        verdict=verdict,
        reason=_reason([not_worse, *better], missing, seeds),
        tests=[not_worse, *better],
        margin=margin,
        confidence=confidence,
        seeds=seeds,
    )


def check_standard(margin: float, confidence: float) -> None:
    """Refuse a margin or confidence that is none."""
    if not _is_number(margin) or margin < 0:
        raise VerdictError(
            f"margin is how much worse than dense is not worse, a number of at least 0, got {margin!r}."
        )
    if not _is_number(confidence) or not 0.5 < confidence < 1:
        raise VerdictError(f"confidence is between 0.5 and 1, such as 0.95, got {confidence!r}.")


def check_seed_count(count: int) -> None:
    """One seed shows no spread."""
    if count < 2:
        raise VerdictError(
            f"{count} seed{'' if count else 's'}: seeds are what a verdict is drawn over, and without a spread "
            "between them there is no interval and no test. Give two at the very least, better five: "
            "seeds=(0, 1, 2, 3, 4)."
        )


def _checked(scores: Mapping[str, Sequence[float]]) -> int:
    """How many seeds; an error for what cannot be compared."""
    absent = [name for name in (TICKET, DENSE) if name not in scores]
    if absent:
        raise VerdictError(
            f"scores has {', '.join(scores) or 'nothing'}, and lacks {' and '.join(absent)}: a verdict says how "
            "the ticket does beside the dense network."
        )
    lengths = {name: len(values) for name, values in scores.items()}
    if len(set(lengths.values())) > 1:
        raise VerdictError(
            f"scores are paired by seed, so every network has one for each; found {lengths} scores."
        )
    check_seed_count(lengths[TICKET])
    for name, values in scores.items():
        wrong = [value for value in values if not _is_number(value)]
        if wrong:
            raise VerdictError(f"scores[{name!r}] holds {wrong[0]!r}; a score is a finite number.")
    return lengths[TICKET]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _test(control: str, gains: Sequence[float], null: float, confidence: float) -> VerdictTest:
    opposite = [-gain for gain in gains]
    p_value, p_opposite = p_above(gains, null), p_above(opposite, -null)
    shown = p_value <= 1 - confidence
    from_above = lower_bound(opposite, confidence)
    return VerdictTest(
        claim=f"not worse than dense by more than {-null:g}" if control == DENSE else f"better than {control}",
        control=control,
        null=null,
        mean_gain=mean_of(gains),
        lower_bound=lower_bound(gains, confidence),
        upper_bound=None if from_above is None else -from_above,
        p_value=p_value,
        p_opposite=p_opposite,
        shown=shown,
        refuted=p_opposite <= 1 - confidence,
        seeds_needed=None if shown else seeds_needed(gains, null, confidence),
    )


# ---------------------------------------------------------------- in words


def _reason(tests: Sequence[VerdictTest], missing: Sequence[str], seeds: int) -> str:
    parts = [_told(test, seeds) for test in tests]
    if missing:
        parts.append(f"{' and '.join(missing)} not trained, so winning cannot be claimed")
    return f"Over {seeds} seeds: " + "; ".join(parts) + "."


def _told(test: VerdictTest, seeds: int) -> str:
    """One claim: shown, its opposite shown, or neither."""
    if test["shown"]:
        return f"{test['claim']} ({_numbers(test, 'lower_bound', 'p_value')})"
    if test["refuted"]:
        opposite = f"worse than {test['control']}" + (f" by more than {-test['null']:g}" if test["null"] else "")
        return f"shown to be {opposite} ({_numbers(test, 'upper_bound', 'p_opposite')})"
    return (
        f"undecided whether {test['claim']} ({_numbers(test, 'lower_bound', 'p_value')}): {_outlook(test, seeds)}"
    )


def _numbers(
    test: VerdictTest, bound: Literal["lower_bound", "upper_bound"], p: Literal["p_value", "p_opposite"]
) -> str:
    numbers = [f"gain {test['mean_gain']:+.3g}"]
    value = test[bound]
    if value is not None:
        numbers.append(f"at {'least' if bound == 'lower_bound' else 'most'} {value:+.3g}")
    return ", ".join([*numbers, f"p = {test[p]:.2g}"])


def _outlook(test: VerdictTest, seeds: int) -> str:
    """Whether more seeds would help."""
    needed = test["seeds_needed"]
    if needed is None:
        return f"{seeds} seeds cannot tell, and more like these would not show it"
    more = f"more than {MANY - seeds}" if needed > MANY else f"about {needed - seeds}"
    return (
        f"{seeds} seeds cannot tell; with this gain and spread it would take {more} more (an estimate, for a "
        f"chance of {POWER:.0%})"
    )
