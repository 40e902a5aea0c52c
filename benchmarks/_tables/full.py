"""docs/measurements.md: what every benchmark found in full, section by section."""

from _tables.birds import check, memory, optimizers, rank_correlation
from _tables.disk import quality_from_disk, streaming
from _tables.imports import imports
from _tables.iterative import imp
from _tables.masks import evaluation, selection
from _tables.planning import plans
from _tables.ranks import ranks
from _tables.reproduction import reproduction
from _tables.scores import criteria, scoring
from _tables.units import early_bird_channels, structured

SECTIONS = (
    *(selection, streaming, quality_from_disk, ranks, evaluation, scoring, criteria, optimizers, memory, check),
    *(rank_correlation, imp, reproduction, structured, early_bird_channels, plans, imports),
)

HEADING = """# Measurements

Written by `python benchmarks/tables.py` from `benchmarks/results/`, which `make bench` fills. Ratios travel
between machines better than seconds do. [The quick form](measurements-quick.md) of all of them takes minutes.
"""


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([HEADING, *(section() for section in SECTIONS)])
