"""Memory: what was planned, item by item, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lottery_tickets.reports._content import Axis, Bars, Fact, Level, Section
from lottery_tickets.reports._numbers import memory, plain

_STEPS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def memory_bars(plan: Mapping[str, Any], measured: int | None) -> Bars:
    """Items of a plan and their sum, beside what was measured where anything was.

    Args:
        plan: A `MemoryPlan` as a dictionary.
        measured: Peak in bytes; None if nothing was measured.
    """
    items = {name: count for name, count in plan["bytes"].items() if count and name != "total"}
    total = "total" if plan["complete"] else "at least"
    shown = {**items, total: plan["bytes"]["total"]}
    summary = "What the operation was planned to take at its worst moment, item by item."
    if plan["turns"]:
        summary += " Some items come when others are gone, so that the total is less than their sum."
    if plan["traced"]:
        summary += " Activations are an estimate."
    if measured is not None:
        shown["measured"] = measured
        summary += (
            " Measured: the most that the process had, less what it had before the model was there; code of "
            "libraries that came meanwhile is in it, and in no plan."
        )
    limit = plan["limit"]
    return Bars(
        "memory",
        "Memory, planned and measured" if measured is not None else "Memory, planned",
        summary + ("" if limit is None else f" Dashed: the limit, {memory(limit)}."),
        Axis("memory", spelling=memory, from_zero=True, ticks=_ticks(max(*shown.values(), limit or 0))),
        "item",
        list(shown),
        list(shown.values()),
        None if limit is None else Level(limit, f"limit: {memory(limit)}"),
    )


def _ticks(most: int) -> list[float]:
    """Round numbers of the unit that the largest is told in, six at most."""
    unit = 1024 ** max(0, (most.bit_length() - 1) // 10)
    step = next(one for one in _STEPS if most / unit <= 5 * one) * unit
    return [step * turn for turn in range(int(most / step) + 1)]


def section_of_plan(plan: Mapping[str, Any], source: str) -> Section:
    """One operation, planned."""
    least = "" if plan["complete"] else "at least "
    fits = {True: "It fits.", False: "It does not fit.", None: ""}[plan["fits"]]
    return Section(
        title=f"{plan['operation']} of {plan['model']}",
        kind="memory plan",
        source=source,
        conclusion=f"Takes {least}{memory(plan['bytes']['total'])}. {fits}".strip(),
        facts=[
            *([] if plan["limit"] is None else [Fact("limit", memory(plan["limit"]))]),
            Fact("batch", plain(plan["batch_size"])),
            Fact("tokens", plain(plan["sequence_length"])),
            *([] if plan["largest_batch"] is None else [Fact("largest batch", plain(plan["largest_batch"]))]),
        ],
        figures=[memory_bars(plan, None)],
        notes=[f"{one['setting']} would save {memory(one['saved'])}." for one in plan["knobs"]],
        configuration={
            name: plan[name] for name in ("operation", "model", "dtype", "device", "batch_size", "sequence_length")
        },
    )
