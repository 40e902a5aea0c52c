"""What users read of a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, cast

from lottery_tickets._statistics import Interval
from lottery_tickets._verdict._judging import TICKET, Judgement
from lottery_tickets._verdict._paired import mean_of, p_above, t_interval
from lottery_tickets.errors import VerdictError
from lottery_tickets.training import Evaluation, early_stopping

Metric = Literal["accuracy", "loss"]
Moment = Literal["early_stopping", "end"]

# Of these more is better, of all others less.
_MORE_IS_BETTER = ("accuracy", "early_stopping_accuracy")


class TicketTraining(TypedDict):
    """One network trained with one seed.

    Attributes:
        network: "ticket" or the name of a control.
        seed: Of the data's order and the random masks.
        weights_seed: What `make_model` was called with.
        weights: sha256 of parameters and buffers before training.
        mask: The mask's digest; None of the dense network.
        sparsity: Fraction of the weights the mask speaks of that were held at zero; 0 of the dense network.
        settled_epoch: Of the early bird the epoch at which its mask had settled, None if it had not; None of all
            others.
        train_loss: Mean over the last epoch.
        evaluations: On the way, the last of them at the end.
        seconds: Of training, evaluations included.
    """

    network: str
    seed: int
    weights_seed: int
    weights: str
    mask: str | None
    sparsity: float
    settled_epoch: int | None
    train_loss: float | None
    evaluations: list[Evaluation]
    seconds: float


class Summary(TypedDict):
    """One number of one network, over the seeds.

    Attributes:
        mean: Over the seeds.
        interval: Student's, two-sided; of no width where all seeds agree.
        values: By seed.
    """

    mean: float
    interval: Interval
    values: list[float]


class PairedDifference(TypedDict):
    """One number of the ticket minus that of a control, seed by seed.

    Attributes:
        mean: Over the seeds.
        interval: Student's, two-sided; of no width where all differences are equal.
        values: By seed.
        p_better: One-sided, of the hypothesis that the ticket is no better: more accuracy, less loss, fewer steps.
        p_worse: One-sided, of the hypothesis that it is no worse.
    """

    mean: float
    interval: Interval
    values: list[float]
    p_better: float
    p_worse: float


class TicketVerdict(Judgement):
    """What `compute_ticket_verdict` returns: a `Judgement`, and all it was drawn from.

    The numbers of a network, in `networks` and `differences`, are `loss`, `accuracy` and `validation_loss` at the
    end of training, the same with `early_stopping_` before them at the step of the least validation loss, and
    `early_stopping_step`, that step. Losses and accuracies are those of the test data where there is any. Where
    the data has no classes there are no accuracies.

    Attributes:
        score: The number that was judged, such as "early_stopping_accuracy".
        population: What the seeds are a sample of, and the intervals speak about.
        measured_on: "test" or "validation".
        networks: "ticket" and each control, to the numbers' names, to their summaries.
        differences: Each control to the numbers' names, to the ticket's differences from it.
        trainings: Every training, seed by seed.
    """

    score: str
    population: str
    measured_on: Literal["test", "validation"]
    networks: dict[str, dict[str, Summary]]
    differences: dict[str, dict[str, PairedDifference]]
    trainings: list[TicketTraining]


Numbers = dict[str, dict[str, list[float]]]


def numbers_of(trainings: Sequence[TicketTraining]) -> Numbers:
    """Network to the names of its numbers, to their values by seed.

    Raises:
        VerdictError: Trainings that were not measured on the same kinds of data, or to no number.
    """
    on_test = {one["evaluations"][-1]["test_loss"] is not None for one in trainings}
    if len(on_test) > 1:
        raise VerdictError(
            "Test data came for some seeds and not for others, so their numbers are not alike; make_dataloaders "
            "gives it for all seeds or for none."
        )
    tested = on_test == {True}
    numbers = [(training["network"], _numbers_of_one(training, tested=tested)) for training in trainings]
    if len({frozenset(one) for _, one in numbers}) > 1:
        raise VerdictError(
            "The data has classes for some seeds and not for others, so their numbers are not alike; "
            "make_dataloaders gives the same kind of data for all seeds."
        )
    found: Numbers = {}
    for network, one in numbers:
        for name, value in one.items():
            found.setdefault(network, {}).setdefault(name, []).append(value)
    return found


def score_name(numbers: Numbers, metric: Metric | None, moment: Moment) -> str:
    """The number to judge by: the accuracy where there is one, unless something else is asked for."""
    prefix = "early_stopping_" if moment == "early_stopping" else ""
    known = f"{prefix}accuracy" in numbers[TICKET]
    if metric == "accuracy" and not known:
        raise VerdictError("metric='accuracy', and the data has no classes to be right about. Use metric='loss'.")
    return prefix + (metric or ("accuracy" if known else "loss"))


def is_better_higher(name: str) -> bool:
    """Of a number's name."""
    return name in _MORE_IS_BETTER


def summaries(numbers: Numbers, confidence: float) -> dict[str, dict[str, Summary]]:
    """Means and intervals of all."""
    return {
        network: {
            name: Summary(mean=mean_of(values), interval=t_interval(values, confidence), values=values)
            for name, values in named.items()
        }
        for network, named in numbers.items()
    }


def differences(numbers: Numbers, confidence: float) -> dict[str, dict[str, PairedDifference]]:
    """The ticket minus each control."""
    ticket = numbers[TICKET]
    return {
        network: {name: _difference(name, ticket[name], values, confidence) for name, values in named.items()}
        for network, named in numbers.items()
        if network != TICKET
    }


def _difference(
    name: str, ticket: Sequence[float], control: Sequence[float], confidence: float
) -> PairedDifference:
    values = [a - b for a, b in zip(ticket, control, strict=True)]
    opposite = [-value for value in values]
    gains, losses = (values, opposite) if is_better_higher(name) else (opposite, values)
    return PairedDifference(
        mean=mean_of(values),
        interval=t_interval(values, confidence),
        values=values,
        p_better=p_above(gains, 0.0),
        p_worse=p_above(losses, 0.0),
    )


def _numbers_of_one(training: TicketTraining, *, tested: bool) -> dict[str, float]:
    end, best = training["evaluations"][-1], early_stopping(training["evaluations"])
    if best is None:
        raise VerdictError(
            f"{training['network']}, seed {training['seed']}: its validation loss was never a number, so it has "
            "no early stopping. Lower the learning rate, or look at the data."
        )
    found = {}
    for prefix, evaluation in (("", end), ("early_stopping_", best)):
        fields = {
            "loss": evaluation["test_loss"] if tested else evaluation["loss"],
            "accuracy": evaluation["test_accuracy"] if tested else evaluation["accuracy"],
            "validation_loss": evaluation["loss"],
        }
        found.update({prefix + name: value for name, value in fields.items() if value is not None})
    return {**found, "early_stopping_step": float(best["step"])}


def training_of(line: Mapping[str, object]) -> TicketTraining:
    """A line of a run's measurements, which is one."""
    return cast("TicketTraining", {name: line[name] for name in TicketTraining.__annotations__})
