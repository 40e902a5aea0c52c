"""What `--json` prints, field by field: the types of every command's results.

Nothing here runs when a command does. The tests hold every command's output against these types, and the page
docs/command-line-json.md is made of them by `make frozen`.
"""

from __future__ import annotations

from typing import Any, TypedDict

from lottery_tickets._controls import Trained
from lottery_tickets._quality import Baseline, TicketQuality
from lottery_tickets._statistics import Interval
from lottery_tickets.cli._comparison import Row
from lottery_tickets.early_bird import EarlyBirdCheckpoint, EarlyBirdTraining
from lottery_tickets.large_models import PrunedCheckpoint
from lottery_tickets.overlap import TicketOverlap
from lottery_tickets.stability import Instability
from lottery_tickets.verdict import TicketVerdict


class DrawnTicket(TypedDict):
    """A ticket file.

    Attributes:
        path: Of the file.
        target_sparsity: As asked.
        sparsity: Fraction of the prunable weights that it removes.
        numel: Prunable weights.
        removed: How many of them.
        bytes: Of the file.
        digest: Of the mask: sha256 over its bits and names.
    """

    path: str
    target_sparsity: float
    sparsity: float
    numel: int
    removed: int
    bytes: int
    digest: str


class MaskResults(TypedDict):
    """Tickets drawn.

    Attributes:
        model: What it is called.
        weights_digest: Of the weights that they were drawn from.
        criterion: What weights were ranked by.
        spread: Where the removed weights lie.
        tickets: Each of them.
    """

    model: str
    weights_digest: str
    criterion: str
    spread: str
    tickets: list[DrawnTicket]


class LayerScores(TypedDict):
    """Of one tensor.

    Attributes:
        mean: Of its scores.
        largest: Of its scores.
    """

    mean: float | None
    largest: float | None


class ScoreFile(TypedDict):
    """A file of scores.

    Attributes:
        path: Of the file.
        bytes: Of the file.
        criterion: What weights are ranked by.
        numel: Weights with scores.
        metadata: What the file says of itself.
        layers: Parameter name to what its scores are like.
    """

    path: str
    bytes: int
    criterion: str
    numel: int
    metadata: dict[str, str]
    layers: dict[str, LayerScores]


class ScoreResults(TypedDict):
    """Scores computed.

    Attributes:
        base_model: What the model is called.
        weights_digest: Of its weights.
        scores: A file for each criterion.
    """

    base_model: str
    weights_digest: str
    scores: list[ScoreFile]


class EvaluateResults(TypedDict):
    """Tickets judged on a text.

    Attributes:
        model: What it is called.
        weights_digest: Of its weights.
        text: The file.
        context: Tokens a window.
        windows: How many.
        dtype: Of the weights.
        baseline: The dense model.
        tickets: File to the quality of its ticket.
    """

    model: str
    weights_digest: str
    text: str
    context: int
    windows: int
    dtype: str
    baseline: Baseline
    tickets: dict[str, TicketQuality]


class CalibrationText(TypedDict):
    """What scores were computed from.

    Attributes:
        text: The file.
        start: Character at which it begins.
        samples: Sequences.
        context: Tokens of each.
        batch_size: Sequences at a time.
    """

    text: str
    start: int
    samples: int
    context: int
    batch_size: int


class CompareResults(TypedDict):
    """Criteria beside each other.

    Attributes:
        model: What it is called.
        weights_digest: Of its weights.
        dtype: Of the weights.
        device: Where it was computed.
        text: The file that tickets are judged on.
        windows: How many.
        context: Tokens of each.
        start: Character at which the first begins.
        calibration: What scores were computed from; null where no criterion takes a text.
        computing: How they were computed.
        confidence: Coverage of the intervals.
        dense: The dense model.
        rows: Each ticket.
    """

    model: str
    weights_digest: str
    dtype: str
    device: str
    text: str
    windows: int
    context: int
    start: int
    calibration: CalibrationText | None
    computing: dict[str, Any]
    confidence: float
    dense: Baseline
    rows: list[Row]


class TicketLayer(TypedDict):
    """A tensor of a ticket.

    Attributes:
        shape: Of the parameter.
        numel: Its weights.
        kept: How many of them stay.
        sparsity: Fraction that is removed.
    """

    shape: list[int]
    numel: int
    kept: int
    sparsity: float


class InspectResults(TypedDict):
    """A ticket file, looked at.

    Attributes:
        path: Of the file.
        bytes: Of the file.
        digest: Of the mask.
        numel: Prunable weights.
        kept: How many of them stay.
        sparsity: Fraction that is removed.
        metadata: What the ticket says of its origin.
        layers: Parameter name to what it loses.
    """

    path: str
    bytes: int
    digest: str
    numel: int
    kept: int
    sparsity: float
    metadata: dict[str, str]
    layers: dict[str, TicketLayer]


class ApplyResults(PrunedCheckpoint):
    """A pruned copy of a checkpoint.

    Attributes:
        model: What was copied.
        ticket: The file.
    """

    model: str
    ticket: str


class LayerOfUnits(TypedDict):
    """Units of one layer.

    Attributes:
        units: How many there are.
        kept: How many stay.
    """

    units: int
    kept: int


class UnitMaskResults(TypedDict):
    """A ticket of whole units.

    Attributes:
        path: Of the file.
        base_model: What the model is called.
        weights_digest: Of its weights.
        criterion: What units were ranked by.
        unit: "head", "neuron" or "channel".
        count: What the sparsity is a share of: "units" or "parameters".
        allocation: How removals are spread over layers: "uniform" or "global".
        target_sparsity: As asked.
        parameters_removed: Weights, biases and scales that go with the units.
        layers: Module that makes the units, to how many there are.
        digest: Of the mask: sha256 over its bits and names.
    """

    path: str
    base_model: str
    weights_digest: str
    criterion: str
    unit: str
    count: str
    allocation: str
    target_sparsity: str
    parameters_removed: int
    layers: dict[str, LayerOfUnits]
    digest: str


class ExtractResults(TypedDict):
    """A smaller dense model.

    Attributes:
        model: What it was extracted from.
        ticket: The file.
        output: The new folder.
        parameters_before: Of the dense model.
        parameters: Of the smaller one.
        share_left: The second over the first.
        onnx: Whether the folder holds a model.onnx.
        copied: Files that were copied as they are, such as the tokenizer's.
    """

    model: str
    ticket: str
    output: str
    parameters_before: int
    parameters: int
    share_left: float
    onnx: bool
    copied: list[str]


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


class PlannedKnob(TypedDict):
    """A setting that would take less.

    Attributes:
        setting: In words.
        saved: Bytes.
    """

    setting: str
    saved: int


class PlannedMemory(TypedDict):
    """Memory of an operation, before it starts.

    Attributes:
        operation: What is planned.
        model: What it is done to.
        dtype: Of the weights.
        device: Where it computes.
        batch_size: Samples that go through the model together.
        sequence_length: Tokens of each.
        turns: Bytes by which the items exceed the total, for some come when others are gone.
        complete: Whether all is counted; where it is not, the total is the least.
        limit: Bytes that there are; null if nobody said.
        fits: Whether it is within the limit; null where that cannot be told.
        bytes: Item to bytes, and "total".
        host_bytes: Item to bytes in the machine's memory, where an accelerator computes.
        largest_batch: Most samples that fit together; null where that cannot be told.
        knobs: What would take less.
    """

    operation: str
    model: str
    dtype: str
    device: str
    batch_size: int
    sequence_length: int
    turns: int
    complete: bool
    limit: int | None
    fits: bool | None
    bytes: dict[str, int]
    host_bytes: dict[str, int]
    largest_batch: int | None
    knobs: list[PlannedKnob]


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
        trainings: Every training, seed by seed.
    """

    network: str
    data: str
    run: str
    round: int
    sparsity: float
    start: str
    trainings: list[JudgedTraining]  # type: ignore[misc]  # evaluations stay in the folder


class StabilityRun(Instability):
    """Which step to rewind to.

    Attributes:
        network: Its name.
        data: Its name.
        run: The folder of `imp`.
        subject: "dense", or the round whose tickets were trained.
        seeds: Each of them.
        picture: The curve; null without --plot.
    """

    network: str
    data: str
    run: str
    subject: str
    seeds: list[int]
    picture: str | None


class PlanResults(TypedDict):
    """Plans of operations.

    Attributes:
        plans: Each of them.
        largest_batches: With --batches: operation to tokens to the largest batch.
    """

    plans: list[PlannedMemory]
    largest_batches: dict[str, dict[str, int | None]]


class ReportFile(TypedDict):
    """A page.

    Attributes:
        report: The file.
        bytes: Of the file.
        figures: Files of figures; empty without --figures.
    """

    report: str
    bytes: int
    figures: list[str]


class DemoTicket(TypedDict):
    """A ticket of the demo.

    Attributes:
        path: Of the file.
        target_sparsity: As asked.
        bytes: Of the file.
        ticket: Its quality.
        random: That of a random mask that removes as many weights of each tensor.
    """

    path: str
    target_sparsity: float
    bytes: int
    ticket: TicketQuality
    random: TicketQuality


class DemoResults(TypedDict):
    """Tickets of a language model beside chance.

    Attributes:
        model: The folder.
        text: The file.
        windows: How many.
        context: Tokens of each.
        prunable_weights: How many.
        seconds_drawing: For all tickets.
        seed: Of the random masks.
        dense: The dense model.
        tickets: Each of them.
    """

    model: str
    text: str
    windows: int
    context: int
    prunable_weights: int
    seconds_drawing: float
    seed: int
    dense: Baseline
    tickets: list[DemoTicket]


SCHEMAS: dict[str, type] = {
    "mask": MaskResults,
    "score": ScoreResults,
    "evaluate": EvaluateResults,
    "overlap": TicketOverlap,
    "compare": CompareResults,
    "inspect": InspectResults,
    "apply": ApplyResults,
    "unit-mask": UnitMaskResults,
    "extract": ExtractResults,
    "early-bird": EarlyBirdRun,
    "imp": ImpRun,
    "verdict": VerdictRun,
    "stability": StabilityRun,
    "plan": PlanResults,
    "report": ReportFile,
    "demo": DemoResults,
}
