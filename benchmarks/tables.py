"""Render docs/measurements.md and docs/measurements-quick.md from benchmarks/results/.

    python benchmarks/tables.py

The tests hold the pages against the results, so no figure in them stands anywhere else.
"""

from __future__ import annotations

from pathlib import Path

from _tables import full, quick

DOCS = Path(__file__).parent.parent / "docs"


def pages() -> dict[str, str]:
    """What stands in each file of docs/."""
    return {"measurements.md": full.page(), "measurements-quick.md": quick.page()}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)
