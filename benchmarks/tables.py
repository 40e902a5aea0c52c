"""Render the pages of measurements, and the marked tables of other pages, from benchmarks/results/.

    python benchmarks/tables.py

The tests hold the pages against the results, so no figure in them stands anywhere else.
"""

from __future__ import annotations

import re
from pathlib import Path

from _tables import deployment, full, quick

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = {
    "deployment_disk": deployment.disk,
    "deployment_passes": deployment.passes,
    "deployment_cuda": deployment.cuda,
}
MARKED = re.compile(r"(<!-- (\w+): written by benchmarks/tables\.py -->\n).*?(<!-- end -->\n)", re.DOTALL)


def filled(text: str) -> str:
    """A page with the tables between its marks as the results have them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n{found[3]}", text)


def pages() -> dict[Path, str]:
    """Every page that holds figures, as it is to be."""
    whole = {DOCS / "measurements.md": full.page(), DOCS / "measurements-quick.md": quick.page()}
    others = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")) if path not in whole}
    return whole | {path: filled(text) for path, text in others.items() if MARKED.search(text)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
