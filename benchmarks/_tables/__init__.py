"""The sections of docs/measurements.md, in their order, and the tables that other pages have marks for."""

from _tables import deployment
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
BLOCKS = {
    "deployment_disk": deployment.disk,
    "deployment_passes": deployment.passes,
    "deployment_cuda": deployment.cuda,
}
