"""Render docs/measurements.md, and the marked tables of other pages, from benchmarks/results/.

    python benchmarks/tables.py

The tests hold the pages against the results, so no figure in them stands anywhere else.
"""

from __future__ import annotations

import re
from pathlib import Path

from _tables import BLOCKS, SECTIONS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "measurements.md"
HEADING = """# Measurements

Written by `python benchmarks/tables.py` from `benchmarks/results/`, which `make bench` fills. Ratios travel
between machines better than seconds do.
"""
MARKED = re.compile(r"(<!-- (\w+): written by benchmarks/tables\.py -->\n).*?(<!-- end -->\n)", re.DOTALL)


def page() -> str:
    """The whole page of measurements, in Markdown."""
    return "\n".join([HEADING, *(section() for section in SECTIONS)])


def filled(text: str) -> str:
    """A page with the tables between its marks as the results have them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n{found[3]}", text)


def pages() -> dict[Path, str]:
    """Every page that holds figures, as it is to be."""
    others = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")) if path != PAGE}
    return {PAGE: page()} | {path: filled(text) for path, text in others.items() if MARKED.search(text)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
