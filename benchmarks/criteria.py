"""What each criterion keeps of SmolLM2-135M: perplexity at 30% and 50% sparsity and at 2:4, global and local.

    python benchmarks/criteria.py [--quick] [--without-costly] [--windows N] [--samples N]

In float32 on the World English Bible: scores from 16 sequences of 128 tokens past the first chapters, which the
model has by heart; perplexity on windows of 256 tokens from the middle. Every criterion draws with one threshold
for all weights, with one per tensor (per output row where that is the criterion's own way) and 2:4; magnitude
draws with all of them. --without-costly leaves out GraSP (a second backward pass a batch) and SynFlow (a hundred
rounds). Seconds and memory are of scoring and drawing in this process, as `lottery-tickets compare` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import MIB, benchmark_parser, keep
from lottery_tickets._data import model_folder, text_file
from lottery_tickets.cli._calibration import Excerpt, kept_apart
from lottery_tickets.cli._comparison import Comparison, Row
from lottery_tickets.cli._criteria import Criterion, criterion_of
from lottery_tickets.cli._spreads import Spread
from lottery_tickets.large_models import load_model, load_tokenizer

CONTEXT = 256
TEST_START = 2_000_000
CALIBRATION_CONTEXT = 128
CALIBRATION_START = 100_000
BATCH_SIZE = 8
SPARSITIES = (0.3, 0.5)
PATTERN = "2:4"
HYBRID = "magnitude+fisher"
COSTLY = ("grasp", "synflow")
NAMES = ("magnitude", "wanda", "grad_norm", "taylor", "fisher", "obd", "snip", *COSTLY)


def ways_of(criterion: Criterion) -> list[tuple[Criterion, Spread]]:
    """One threshold, one for each tensor or row, and the pattern."""
    local = "row" if criterion.scope == "row" else "layer"
    scopes = ("global", "layer", "row") if criterion.name == "magnitude" else ("global", local)
    return [(criterion, Spread(scope=scope)) for scope in scopes] + [(criterion, Spread(pattern=PATTERN))]


def measure(criteria: Sequence[Criterion], windows: int, samples: int, console: Console) -> dict[str, Any]:
    """All figures of this benchmark."""
    folder, text = model_folder(), text_file()
    calibration, test = kept_apart(
        Excerpt(text, CALIBRATION_CONTEXT, samples, CALIBRATION_START), Excerpt(text, CONTEXT, windows, TEST_START)
    )
    tokenizer = load_tokenizer(folder)
    comparison = Comparison(
        load_model(folder, torch.float32, progress=False),
        test.windows(tokenizer),
        calibration.batches(tokenizer, BATCH_SIZE),
        [way for criterion in criteria for way in ways_of(criterion)],
        SPARSITIES,
    )
    rows: list[Row] = []
    for row in comparison.rows():
        rows.append(row)
        console.print(row["criterion"], row["spread"], row["target_sparsity"], row["quality"]["perplexity"])
    return {
        "model": "SmolLM2-135M-Instruct, float32",
        "text": text.name,
        "windows": windows,
        "context": CONTEXT,
        "test_start": TEST_START,
        "samples": samples,
        "calibration_context": CALIBRATION_CONTEXT,
        "calibration_start": CALIBRATION_START,
        "batch_size": BATCH_SIZE,
        "ranks_by": {criterion.name: criterion.about for criterion in criteria},
        "confidence": comparison.confidence,
        "dense": rows[0]["quality"]["baseline"],
        "rows": rows,
    }


def table(results: dict[str, Any]) -> Table:
    """A row for each ticket."""
    shown = Table(title=f"{results['model']}, {results['windows']} windows of {CONTEXT} tokens")
    for heading in ("criterion", "spread"):
        shown.add_column(heading)
    for heading in ("sparsity", "perplexity", "retention", "seconds", "peak MiB"):
        shown.add_column(heading, justify="right")
    shown.add_row("dense", "", "0", f"{results['dense']['perplexity']:.2f}", "1", "", "")
    for row in results["rows"]:
        quality, peak = row["quality"], row["peak_bytes"]
        shown.add_row(
            row["criterion"],
            row["spread"],
            f"{quality['sparsity']:.3f}",
            f"{quality['perplexity']:,.2f}",
            f"{quality['performance_retention']:.3f}",
            f"{row['seconds_scoring'] + row['seconds_drawing']:.1f}",
            "-" if peak is None else f"{peak / MIB:.0f}",
        )
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/criteria.json."""
    parser = benchmark_parser(__doc__, "two criteria, two windows, two samples")
    parser.add_argument("--without-costly", action="store_true", help=f"leave out {', '.join(COSTLY)}")
    parser.add_argument("--windows", type=int, default=6, help="of the test text")
    parser.add_argument("--samples", type=int, default=16, help="sequences of the calibration text")
    chosen = parser.parse_args()
    console = Console()
    criteria = [criterion_of(name) for name in NAMES if not (chosen.without_costly and name in COSTLY)]
    criteria.append(criterion_of(HYBRID))
    windows, samples = (2, 2) if chosen.quick else (chosen.windows, chosen.samples)
    if chosen.quick:
        criteria = criteria[:2]
    results = measure(criteria, windows, samples, console)
    console.print(table(results))
    console.print(keep("criteria", results, chosen))


if __name__ == "__main__":
    main()
