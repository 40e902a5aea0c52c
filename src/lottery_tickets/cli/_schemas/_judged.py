"""Tickets judged on a text."""

from __future__ import annotations

from typing import Any, TypedDict

from lottery_tickets._quality import Baseline, TicketQuality
from lottery_tickets.cli._comparison import Row
from lottery_tickets.overlap import TicketOverlap


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


class OverlapResults(TicketOverlap):
    """How far two tickets keep the same weights.

    Attributes:
        first: File of one ticket.
        second: Of the other.
    """

    first: str
    second: str


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
