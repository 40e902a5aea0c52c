"""Tickets, scores, checkpoints and pages as files."""

from __future__ import annotations

from typing import TypedDict

from lottery_tickets.large_models import PrunedCheckpoint


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


class TicketLayer(TypedDict):
    """A tensor of a ticket.

    Attributes:
        shape: Of the parameter.
        numel: Its weights.
        kept: How many of them stay.
        sparsity: Fraction that is removed.
        not_zero: Of the others, how many are not zero in the checkpoint; null without one.
    """

    shape: list[int]
    numel: int
    kept: int
    sparsity: float
    not_zero: int | None


class CheckedModel(TypedDict):
    """A checkpoint held against a ticket.

    Attributes:
        name: As given.
        valid: Every pruned weight is zero, every tensor is there in its shape, and none holds NaN.
        not_zero: Pruned weights that are not zero.
        problems: What is not as it should be, each after the name of its tensor.
    """

    name: str
    valid: bool
    not_zero: int
    problems: list[str]


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
        model: The checkpoint that it was held against; null without one.
    """

    path: str
    bytes: int
    digest: str
    numel: int
    kept: int
    sparsity: float
    metadata: dict[str, str]
    layers: dict[str, TicketLayer]
    model: CheckedModel | None


class ApplyResults(PrunedCheckpoint):
    """A pruned copy of a checkpoint.

    Attributes:
        model: What was copied.
        ticket: The file.
    """

    model: str
    ticket: str


class UnitLayer(TypedDict):
    """A layer that loses units.

    Attributes:
        units: How many it has.
        kept: How many of them stay.
    """

    units: int
    kept: int


class UnitMaskResults(TypedDict):
    """A ticket of whole units.

    Attributes:
        path: Of the file.
        base_model: What the model is called.
        weights_digest: Of the weights that it was drawn from.
        criterion: What units were ranked by.
        unit: What leaves whole.
        count: What the sparsity is a share of.
        allocation: How removals are spread over layers.
        target_sparsity: As asked.
        parameters_removed: By all units together.
        layers: Layer to its units.
        digest: Of the mask.
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
    layers: dict[str, UnitLayer]
    digest: str


class ExtractResults(TypedDict):
    """The smaller dense model that a ticket of whole units leaves.

    Attributes:
        model: What the dense model is called.
        ticket: The file.
        output: The new folder.
        parameters_before: Of the dense model.
        parameters: Of the smaller one.
        share_left: Of the parameters.
        onnx: Whether model.onnx was written too.
        copied: Files of the old folder, tokenizer and such, that were copied.
    """

    model: str
    ticket: str
    output: str
    parameters_before: int
    parameters: int
    share_left: float
    onnx: bool
    copied: list[str]


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
