"""What a report says, without a browser: numbers, escaping, refusals, figures for papers."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from lottery_tickets import Mask, compute_ticket_overlap
from lottery_tickets.errors import MaskFileError, MissingExtraError, ReportError
from lottery_tickets.reports import write_figures, write_report
from lottery_tickets.reports._content import Curves, Intervals, Matrix
from lottery_tickets.reports._memory import _ticks
from lottery_tickets.reports._numbers import duration, memory, percent, plain
from lottery_tickets.reports._sources import document_of
from lottery_tickets.reports._svg import safe_svg
from lottery_tickets.reports._vega import _labels
from lottery_tickets.vision import DATASETS, NETWORKS, Images
from reporting import HOSTILE
from test_cli import fail, run, succeed, without  # noqa: F401  # a fixture among them
from test_cli_imp import one_thread  # noqa: F401  # a fixture

REPRODUCTION = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduce.json"


def figures(path: Path) -> dict[str, Any]:
    return {figure.slug: figure for section in document_of([path]).sections for figure in section.figures}


class Reader(HTMLParser):
    """What a browser would find: tags, attributes, links, and the text of the largest heading."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name.endswith("href")]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "h1" and data.strip():
            self.headings.append(data)


@pytest.fixture
def bird(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short search, of a network that is quick to train."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(60, 1, 4, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    network = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 3))  # noqa: E731
    monkeypatch.setitem(DATASETS, "mnist", lambda: Images(images, labels, images, labels))
    monkeypatch.setitem(NETWORKS, "lenet-300-100", network)
    quick = ("--epochs", 3, "--lr", 0.1, "--batch-size", 20, "--window", 2)
    succeed(
        "early-bird", "lenet-300-100", "--data", "mnist", *quick, "--controls", "--plot", "-o", tmp_path / "bird"
    )
    return tmp_path / "bird"


# ---------------------------------------------------------------- what it says


def test_the_matrices_are_those_of_the_library(pruned: Path) -> None:
    found = figures(pruned)
    masks = [Mask.load(pruned / "seed-0" / "masks" / f"round-{number:02d}.safetensors") for number in (1, 2)]
    differing = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0].names) / masks[0].numel
    assert isinstance(found["distances"], Matrix)
    assert [list(row) for row in found["distances"].values] == [[0, differing], [differing, 0]]
    last = [Mask.load(pruned / f"seed-{seed}" / "masks" / "round-02.safetensors") for seed in (0, 1)]
    overlap = compute_ticket_overlap(*last)
    assert found["overlap"].values[0][1] == overlap["overall_overlap"]
    assert f"{overlap['expected_by_chance']:.3f}" in found["overlap"].summary


def test_verdict_and_stability_of_a_run_are_told_with_it(pruned: Path) -> None:
    kinds = [section.kind for section in document_of([pruned]).sections]
    assert kinds == ["iterative magnitude pruning", "verdict", "linear mode connectivity", "overlap"]
    judged = json.loads((pruned / "verdict" / "round-02" / "results.json").read_text(encoding="utf-8"))
    section = document_of([pruned / "verdict" / "round-02"]).sections[0]
    assert section.reason == judged["reason"]
    points = {
        name: point.y for name, point in zip(section.figures[0].names, section.figures[0].points, strict=True)
    }
    assert points["random reinit"] == judged["networks"]["random_reinit"][judged["score"]]["mean"]


def test_a_search_shows_its_distances_and_its_memory(bird: Path) -> None:
    results = json.loads((bird / "results.json").read_text(encoding="utf-8"))
    looks, found = results["results"][0]["checkpoints"], figures(bird)
    assert isinstance(found["settling"], Curves)
    assert [point.y for point in found["settling"].lines[0].points] == [
        look["distances"][-1] for look in looks[1:]
    ]
    assert len(found["distances"].names) == len(looks)
    for before, (here, there) in enumerate(pairwise(looks)):
        assert there["distances"][-1] == found["distances"].values[before][before + 1], here
    shown = dict(zip(found["memory"].names, found["memory"].values, strict=True))
    assert shown["at least"] == results["memory"]["plan"]["bytes"]["total"]
    assert shown["measured"] == max(look["peak_bytes"] for look in looks) - results["memory"]["bytes_before"]
    assert set(found["controls"].names) == {"dense", "ticket 0.5", "random 0.5"}


def test_a_verdict_tells_every_option_it_was_given(pruned: Path, tmp_path: Path) -> None:
    (section,) = document_of([pruned / "verdict" / "round-02"]).sections
    told = section.configuration
    assert (told["controls"], told["judged-at"]) == ("dense,random_reinit,random_mask", "early-stopping")
    assert (told["margin"], told["seeds"], told["device"]) == (0.005, 2, "auto")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(pruned / "verdict" / "round-02" / "results.json", alone)
    assert "device" not in document_of([alone]).sections[0].configuration
    for text in ("a: [", "- a"):
        (alone / "run.yaml").write_text(text)
        with pytest.raises(ReportError, match="not whole"):
            document_of([alone])


def test_places_on_an_axis_of_memory_are_round() -> None:
    for most, expected in (
        (0, [0]),
        (3, [0, 1, 2, 3]),
        (700 << 10, ["0 bytes", *(f"{n} KiB" for n in range(200, 700, 200))]),
    ):
        found = _ticks(most)
        assert (found if isinstance(expected[0], int) else [memory(one) for one in found]) == expected
    for exponent in range(50):
        found = _ticks(3 << exponent)
        assert 3 <= len(found) <= 6
        assert found[-1] <= 3 << exponent


@pytest.mark.parametrize("part", ["", "verdict/round-02", "stability/dense"])
def test_every_run_shows_the_memory_that_was_planned_and_what_it_took(pruned: Path, part: str) -> None:
    told = json.loads((pruned / part / "results.json").read_text(encoding="utf-8"))["memory"]
    (section, *_) = document_of([pruned / part]).sections
    found = next(figure for figure in section.figures if figure.slug == "memory")
    shown = dict(zip(found.names, found.values, strict=True))
    planned = told["plan"]["bytes"]
    assert planned["weights"] == shown["weights"] == 4 * (6 * 12 + 12 + 12 * 3 + 3)
    assert (told["plan"]["batch_size"], shown["at least"]) == (8, planned["total"])
    assert shown["measured"] == told["peak_bytes"] > planned["total"], "code that was loaded is in it"


def test_a_page_for_whatever_there_is(bird: Path, scores: Path, tmp_path: Path) -> None:
    plans = succeed("plan", "GPT-2", "--operation", "mask", "--operation", "early-bird", "--device-memory", "1GB")
    (tmp_path / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    page = write_report([bird, scores, tmp_path / "plans.json", REPRODUCTION], tmp_path / "all.html").read_text()
    for title in (
        "Memory, planned and measured",
        "Mean score of each tensor",
        "Error barrier over the rewinding step",
    ):
        assert title in page
    assert "mask of GPT-2" in page


def test_an_evaluation_shows_every_ticket_beside_the_dense_model(evaluated: Path) -> None:
    told = json.loads(evaluated.read_text(encoding="utf-8"))
    (section,) = document_of([evaluated]).sections
    (figure,), (table,) = section.figures, section.tables
    assert isinstance(figure, Intervals)
    assert figure.names == ["dense", "magnitude-0.3", Path(HOSTILE).name]
    for point, one in zip(figure.points, [told["baseline"], *told["tickets"].values()], strict=True):
        assert (point.y, [point.low, point.high]) == (one["perplexity"], one["perplexity_interval"])
    assert [row[1].value for row in table.rows] == [one["sparsity"] for one in told["tickets"].values()]
    assert [row[3].value for row in table.rows] == [
        one["performance_retention"] for one in told["tickets"].values()
    ]


def test_an_evaluation_without_a_number_is_told_too(evaluated: Path, tmp_path: Path) -> None:
    told = json.loads(evaluated.read_text(encoding="utf-8"))
    first, second = told["tickets"].values()
    first["perplexity"] = first["performance_retention"] = first["quality_score"] = None
    second["perplexity_interval"] = [1.5, None]  # infinity, as JSON writes it
    (tmp_path / "evaluate.json").write_text(json.dumps(told), encoding="utf-8")
    (section,) = document_of([tmp_path / "evaluate.json"]).sections
    assert [row[2].text for row in section.tables[0].rows] == ["not finite", plain(second["perplexity"])]
    assert section.figures[0].names == ["dense", Path(HOSTILE).name]
    assert "not finite" in write_report(tmp_path / "evaluate.json", tmp_path / "page.html").read_text()


@pytest.mark.parametrize("method", ["jaccard", "dice", "overlap"])
def test_an_overlap_is_shown_over_all_and_in_each_tensor(
    ticket: Path, overlapped: Path, tmp_path: Path, method: str
) -> None:
    other = overlapped.with_name("random.safetensors")
    told = succeed("overlap", ticket, other, "--method", method)
    (tmp_path / "overlap.json").write_text(json.dumps(told), encoding="utf-8")
    (section,) = document_of([tmp_path / "overlap.json"]).sections
    matrix, bars = section.figures
    whole = compute_ticket_overlap(Mask.load(ticket), Mask.load(other), method)
    assert matrix.values == [[1.0, whole["overall_overlap"]], [whole["overall_overlap"], 1.0]]
    assert list(matrix.names) == ["many", "random"]
    assert dict(zip(bars.names, bars.values, strict=True)) == whole["layer_overlaps"]
    assert f"{method.capitalize()} index" in section.reason
    assert f"{whole['expected_by_chance']:.3f}" in matrix.summary


def test_what_compare_prints_is_what_it_writes(compared: Path) -> None:
    told = json.loads(compared.read_text(encoding="utf-8"))
    (section,) = document_of([compared]).sections
    (curves,) = [figure for figure in section.figures if isinstance(figure, Curves)][:1]
    shown = {point.y for line in curves.lines for point in line.points}
    assert shown <= {row["quality"]["perplexity"] for row in told["rows"]}
    assert len(section.tables[0].rows) == len(told["rows"]) == 4


def test_criteria_beside_each_other(tmp_path: Path) -> None:
    def row(criterion: str, sparsity: float, perplexity: float | None) -> dict[str, Any]:
        interval = None if perplexity is None else [perplexity - 1, perplexity + 1]
        quality = {"perplexity": perplexity, "perplexity_interval": interval, "sparsity": sparsity}
        quality |= {"performance_retention": 0.9, "retention_interval": None}
        costs = {"seconds_scoring": 0.0, "seconds_drawing": 1.0, "peak_bytes": 1 << 20, "peak_device_bytes": None}
        return {
            "criterion": criterion,
            "spread": "2:4" if sparsity == 0.5 else "global",
            "quality": quality,
            **costs,
        }

    rows = [
        row("magnitude", 0.3, 12.0),
        row("magnitude", 0.6, 20.0),
        row("fisher", 0.3, None),
        row("obd", 0.5, 11.0),
    ]
    told = {"schema": "lottery-tickets.compare/1", "model": "m", "text": "t.txt", "windows": 4, "context": 512}
    told |= {"confidence": 0.95, "dense": {"perplexity": 10.0}, "rows": rows}
    path = tmp_path / "compared.json"
    path.write_text(json.dumps(told), encoding="utf-8")
    section = document_of([path]).sections[0]
    assert "11, by obd" in section.conclusion
    curves, alone = section.figures
    assert isinstance(curves, Curves)
    assert [[point.y for point in line.points] for line in curves.lines] == [[12.0, 20.0], []]
    assert isinstance(alone, Intervals)
    assert dict(zip(alone.names, [point.y for point in alone.points], strict=True)) == {"dense": 10.0, "obd": 11.0}
    assert [row[3].text for row in section.tables[0].rows] == [
        "12 [11, 13]",
        "20 [19, 21]",
        "not finite",
        "11 [10, 12]",
    ]
    assert "1.0 MiB" in write_report(path, tmp_path / "compared.html").read_text()


def test_the_same_runs_make_the_same_page(pruned: Path, ticket: Path, tmp_path: Path) -> None:
    first, second = (write_report([pruned, ticket], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


# ---------------------------------------------------------------- what is untrusted


def test_no_name_comes_through_unescaped(
    pruned: Path, ticket: Path, evaluated: Path, overlapped: Path, tmp_path: Path
) -> None:
    given = [pruned, ticket, evaluated, overlapped]
    page = write_report(given, tmp_path / "page.html", title=HOSTILE).read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    reader = Reader()
    reader.feed(page)
    assert reader.tags & {"img", "iframe", "object", "embed", "link", "base", "form", "image", "use"} == set()
    assert {
        name for name in reader.attributes if name.startswith("on") or name in ("style", "src", "srcset")
    } == set()
    assert all(link.startswith("#") for link in reader.links)
    assert reader.headings == [HOSTILE]


def test_drawings_hold_nothing_that_runs_loads_or_links() -> None:
    drawn = safe_svg(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" onload="x()">'
        '<script>x()</script><foreignObject><p/></foreignObject><a href="#"><path d="M0,0"/></a>'
        '<image xlink:href="http://a/"/><use xlink:href="#b"/><style>*{}</style>'
        '<g id="c" clip-path="url(#c)" style="fill:red" onclick="x()"><path d="M1,1" role="graphics-symbol" '
        'aria-label="one"/><text>a &lt; b</text></g></svg>',
        prefix="p-",
        label='"quoted"',
        classes="chart",
    )
    root = ElementTree.fromstring(drawn)
    assert [element.tag.rpartition("}")[2] for element in root.iter()] == ["svg", "g", "path", "text"]
    assert root.attrib == {"role": "img", "aria-label": '"quoted"', "class": "chart"}
    assert root[0].attrib == {"id": "p-0", "clip-path": "url(#p-0)"}
    assert root[0][0].attrib == {"d": "M1,1", "data-tip": "one"}
    assert root[0][1].text == "a < b"


def test_names_in_expressions_are_letters_and_escapes() -> None:
    assert _labels(["a1", '"];x()//', "\U0001f3ab"]) == (
        r'["a1", "\u0022\u005d\u003bx\u0028\u0029\u002f\u002f", "\ud83c\udfab"][datum.value]'
    )


# ---------------------------------------------------------------- what cannot be reported


def test_what_is_no_run_is_refused(pruned: Path, tmp_path: Path) -> None:
    def refused(path: object, error: type[Exception] = ReportError) -> str:
        with pytest.raises(error) as caught:
            write_report(path, tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()
        return str(caught.value)

    assert "name at least one" in refused([])
    assert "no such file" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no run" in refused(tmp_path / "empty")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    assert "has not ended" in refused(tmp_path / "begun")
    for text, problem in (
        ("{", "no JSON"),
        ("[]", "nothing that a command wrote"),
        ("{}", "without the schema"),
        ('{"schema": "lottery-tickets.mask/1"}', "what mask writes"),
        ('{"schema": "lottery-tickets.overlap/1"}', "not whole"),
        ('{"schema": "lottery-tickets.imp/1", "rounds": []}', "not whole"),
    ):
        (tmp_path / "some.json").write_text(text)
        assert problem in refused(tmp_path / "some.json")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    assert "cut.safetensors" in refused(tmp_path / "cut.safetensors", MaskFileError)


def test_what_is_missing_is_named(ticket: Path, tmp_path: Path, without: Any) -> None:  # noqa: F811
    without("vl_convert")
    with pytest.raises(MissingExtraError, match=r"vl-convert-python.*lottery-tickets\[report\]"):
        write_report(ticket, tmp_path / "page.html")


# ---------------------------------------------------------------- figures for papers


def test_every_figure_is_drawn_for_papers_too(pruned: Path, ticket: Path, tmp_path: Path) -> None:
    paths = write_figures([pruned, ticket], tmp_path / "figures", formats=["svg"])
    drawn = [figure.slug for section in document_of([pruned, ticket]).sections for figure in section.figures]
    assert [path.stem.partition("-")[2] for path in paths] == drawn
    layers = next(path for path in paths if path.name == "1-layers.svg")
    words = "".join(text for text in ElementTree.parse(layers).getroot().itertext())
    assert f"{HOSTILE}.weight" in words
    again = write_figures([pruned, ticket], tmp_path / "again", formats=["svg"])
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_a_format_that_is_not_known(ticket: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"figure\.docx"):
        write_figures(ticket, tmp_path / "figures", formats=["docx"])
    assert not (tmp_path / "figures").exists()


# ---------------------------------------------------------------- the command


def test_the_command_writes_page_and_figures(ticket: Path, tmp_path: Path) -> None:
    page, folder = tmp_path / "new" / "page.html", tmp_path / "figures"
    told = succeed("report", ticket, "-o", page, "--figures", folder, "--title", "Mine")
    assert told["bytes"] == page.stat().st_size
    assert "<h1>Mine</h1>" in page.read_text(encoding="utf-8")
    assert sorted(told["figures"]) == sorted(str(path) for path in folder.iterdir())
    assert {Path(path).suffix for path in told["figures"]} == {".svg", ".png"}
    assert "there already" in fail("report", ticket, "-o", page)
    again = run("report", ticket, "-o", page, "--force")
    assert "open it in any browser" in again.stdout
    assert "<h1>many.safetensors</h1>" in page.read_text(encoding="utf-8")


def test_numbers_are_spelled_as_they_are_read() -> None:
    assert [plain(value) for value in (0, 3, 12345, 0.123456, 1234.5, 2.5e9, -0.5)] == [
        *("0", "3", "12,345", "0.1235", "1,234", "2,500,000,000", "-0.5")
    ]
    assert [percent(value) for value in (0, 0.5, 0.1234, 0.01234, 1)] == ["0%", "50%", "12.3%", "1.23%", "100%"]
    assert [memory(value) for value in (5, 2048, 300 << 20)] == ["5 bytes", "2.0 KiB", "300 MiB"]
    assert [duration(value) for value in (1.25, 61, 3725)] == ["1.2 s", "1 min 01 s", "1 h 02 min"]
