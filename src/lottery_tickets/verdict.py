"""Is it a winning ticket? Its controls trained beside it, over seeds, and a verdict that statistics bear out."""

from __future__ import annotations

from lottery_tickets._verdict._judging import Judgement, Verdict, VerdictTest, judge

__all__ = ["Judgement", "Verdict", "VerdictTest", "compute_verdict_from_scores"]

compute_verdict_from_scores = judge
