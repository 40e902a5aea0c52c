"""Render docs/measurements.md from benchmarks/results/.

    python benchmarks/tables.py

The tests hold the page against the results, so no figure in it stands anywhere else.
"""

from __future__ import annotations

from pathlib import Path

from _tables import SECTIONS

PAGE = Path(__file__).parent.parent / "docs" / "measurements.md"
HEADING = """# Measurements

Written by `python benchmarks/tables.py` from `benchmarks/results/`, which `make bench` fills. Ratios travel
between machines better than seconds do.
"""


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([HEADING, *(section() for section in SECTIONS)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
