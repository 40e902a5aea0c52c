"""Runs with a folder of their own."""

from __future__ import annotations

from typing import TypedDict

from lottery_tickets._controls import Trained
from lottery_tickets._statistics import Interval
from lottery_tickets.cli._schemas._memory import PlannedMemory
from lottery_tickets.early_bird import EarlyBirdCheckpoint, EarlyBirdTraining
from lottery_tickets.stability import Instability
from lottery_tickets.verdict import TicketVerdict


class FoundTicket(TypedDict):
    """A search of one sparsity.

    Attributes:
        converged: Whether the mask settled while weights moved.
        convergence_epoch: The epoch at which it had; null if it did not.
        convergence_step: The same in optimizer steps.
        checkpoints: Every check until then.
        method: The criterion.
        target_sparsity: Fraction of the prunable weights that the mask removes.
        training: What was trained in all.
        reason: Why it stopped, in words.
        null_distance: That of the last check: what the distance would be if the movement were random.
        digest: Of the mask.
    """

    converged: bool
    convergence_epoch: int | None
    convergence_step: int | None
    checkpoints: list[EarlyBirdCheckpoint]
    method: str
    target_sparsity: float
    training: EarlyBirdTraining
    reason: str
    null_distance: float | None
    digest: str


class SearchMemory(TypedDict):
    """Memory of a search.

    Attributes:
        plan: What it was planned to take.
        bytes_before: What the process had before the model was loaded; the checks' `peak_bytes` less this is what
            the search took. 0 on an accelerator, where peaks are those of torch's allocations.
    """

    plan: PlannedMemory
    bytes_before: int


class EarlyBirdRun(TypedDict):
    """A run of the search.

    Attributes:
        model: What it is called.
        data: What it was trained on.
        results: Each sparsity.
        tickets: Their files.
        pictures: Their matrices of distances.
        controls: Network to what became of it; empty without --controls.
        memory: Planned, and what to hold it against.
    """

    model: str
    data: str
    results: list[FoundTicket]
    tickets: list[str]
    pictures: list[str]
    controls: dict[str, Trained]
    memory: SearchMemory


class RunMemory(TypedDict):
    """Memory of a run.

    Attributes:
        plan: What training was planned to take.
        peak_bytes: The most that there was above what was there before the first network was made: of torch's
            allocations on an accelerator, else resident in the first process. Null where the system does not say.
    """

    plan: PlannedMemory
    peak_bytes: int | None


class OverSeeds(TypedDict):
    """A number of one round.

    Attributes:
        mean: Over the seeds.
        interval: Student's; null for a single seed.
        values: By seed.
    """

    mean: float
    interval: Interval | None
    values: list[float]


class RoundOverSeeds(TypedDict):
    """A round.

    Attributes:
        round: 0 for the dense network.
        sparsity: Fraction of the prunable weights that was zero.
        density: 1 - sparsity.
        numbers: Name to the number over seeds; see `PrunedRound` for the names.
    """

    round: int
    sparsity: float
    density: float
    numbers: dict[str, OverSeeds]


class PrunedRound(TypedDict):
    """A network of one sparsity and one seed, trained.

    Attributes:
        round: 0 for the dense network, then 1, 2 and so on.
        sparsity: Fraction of the prunable weights that was zero from its first step to its last.
        layer_sparsities: Parameter name to the same within it.
        mask_digest: Of its mask; null for the dense network.
        steps: Batches it was trained on, counted from the rewinding point.
        skipped: Batches left out for a loss or gradient that was not finite.
        train_loss: Mean over the last epoch.
        eval_loss: Mean over the validation data at the end.
        accuracy: Share of its labels that are right at the end; null where there are no classes.
        early_stopping_step: Where the validation loss was least.
        early_stopping_loss: That least loss.
        early_stopping_accuracy: The accuracy there.
        test_loss: Mean over the test data at the end; null without any.
        test_accuracy: Share of its labels that are right at the end.
        early_stopping_test_loss: Mean over the test data at the early-stopping step.
        early_stopping_test_accuracy: Share of its labels that are right there.
        seconds: Of training, evaluations included.
    """

    round: int
    sparsity: float
    layer_sparsities: dict[str, float]
    mask_digest: str | None
    steps: int | None
    skipped: int
    train_loss: float | None
    eval_loss: float | None
    accuracy: float | None
    early_stopping_step: int | None
    early_stopping_loss: float | None
    early_stopping_accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    early_stopping_test_loss: float | None
    early_stopping_test_accuracy: float | None
    seconds: float


class SeedRun(TypedDict):
    """What came of a seed.

    Attributes:
        target_sparsity: Of the last round.
        rewind_step: Where survivors were put back to.
        digest: Of the last mask.
        rounds: The dense network and each round's.
    """

    target_sparsity: float
    rewind_step: int | None
    digest: str
    rounds: list[PrunedRound]


class ImpRun(TypedDict):
    """Iterative magnitude pruning.

    Attributes:
        network: Its name.
        data: Its name.
        run: The folder.
        seeds: Each of them.
        confidence: Coverage of the intervals.
        measured_on: "test" or "validation".
        rewind: What was put back after each round.
        rewind_step: To when.
        rounds: Over seeds.
        runs: Seed to what came of it.
        memory: Planned and measured.
        picture: The curves; null without --plot.
    """

    network: str
    data: str
    run: str
    seeds: list[int]
    confidence: float
    measured_on: str
    rewind: str
    rewind_step: int | None
    rounds: list[RoundOverSeeds]
    runs: dict[str, SeedRun]
    memory: RunMemory
    picture: str | None


class JudgedTraining(TypedDict):
    """One network trained with one seed.

    Attributes:
        network: "ticket" or the name of a control.
        seed: Of the data's order and the random masks.
        weights_seed: Of its weights.
        weights: sha256 of parameters and buffers before training.
        mask: The mask's digest; null of the dense network.
        sparsity: Fraction of the weights that were held at zero.
        settled_epoch: Of the early bird the epoch at which its mask had settled; null of all others.
        train_loss: Mean over the last epoch.
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
    seconds: float


class VerdictRun(TicketVerdict):
    """Tickets beside their controls.

    Attributes:
        network: Its name.
        data: Its name.
        run: The folder of `imp`.
        round: Whose tickets.
        sparsity: Of the tickets.
        start: What the networks were trained from, in words.
        memory: Planned and measured.
        trainings: Every training, seed by seed.
    """

    network: str
    data: str
    run: str
    round: int
    sparsity: float
    start: str
    memory: RunMemory
    trainings: list[JudgedTraining]  # type: ignore[misc]  # evaluations stay in the folder


class StabilityRun(Instability):
    """Which step to rewind to.

    Attributes:
        network: Its name.
        data: Its name.
        run: The folder of `imp`.
        subject: "dense", or the round whose tickets were trained.
        seeds: Each of them.
        memory: Planned and measured.
        picture: The curve; null without --plot.
    """

    network: str
    data: str
    run: str
    subject: str
    seeds: list[int]
    memory: RunMemory
    picture: str | None
