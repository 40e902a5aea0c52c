"""What `--json` prints, field by field: the types of every command's results.

They are written out, and not taken from what the library computes with, where a command prints some of that only.

Nothing here runs when a command does. The tests hold every command's output against these types, and the page
docs/command-line-json.md is made of them by `make frozen`.
"""

from __future__ import annotations

from lottery_tickets.cli._schemas._files import (
    ApplyResults,
    ExtractResults,
    InspectResults,
    MaskResults,
    ReportFile,
    ScoreResults,
    UnitMaskResults,
)
from lottery_tickets.cli._schemas._judged import CompareResults, DemoResults, EvaluateResults, OverlapResults
from lottery_tickets.cli._schemas._memory import PlanResults
from lottery_tickets.cli._schemas._runs import EarlyBirdRun, ImpRun, StabilityRun, VerdictRun

__all__ = ["SCHEMAS"]

SCHEMAS: dict[str, type] = {
    "mask": MaskResults,
    "score": ScoreResults,
    "evaluate": EvaluateResults,
    "overlap": OverlapResults,
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
