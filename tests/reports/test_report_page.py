"""The page of a report in a real browser: what is seen, what can be done, and that nothing leaves it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from lottery_tickets.reports import write_report
from reporting import HOSTILE

WIDE, NARROW = 1200, 360
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def page_file(
    pruned: Path,
    ticket: Path,
    scores: Path,
    evaluated: Path,
    overlapped: Path,
    compared: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A report on all there is."""
    given = [pruned, ticket, scores, evaluated, overlapped, compared]
    return write_report(given, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Open]:
    """Opens the report; afterwards nothing was asked for but the file, nothing was said, nothing has run."""
    contexts, asked, said = [], [], []

    def open_(*, width: int = WIDE, scheme: str = "light", script: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.goto(page_file.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert set(asked) == {page_file.as_uri()}
    assert said == []


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_figure_is_drawn_and_described(opened: Open, width: int) -> None:
    page = opened(width=width)
    titles = page.locator("figure h3").all_text_contents()
    assert {"Test accuracy over density", "Sparsity of each tensor", "Distances between masks"} <= set(titles)
    assert {"Overlap of tickets", "Mean score of each tensor", "Memory, planned and measured"} <= set(titles)
    assert {"Perplexity of the tickets and of the dense model", "Overlap in each tensor"} <= set(titles)
    assert any(title.startswith("The ticket and its controls") for title in titles)
    assert any(title.startswith("Error barrier") for title in titles)
    for figure in page.locator("figure").all():
        drawing = figure.locator("svg.chart:visible")
        assert drawing.count() == 1
        box = drawing.bounding_box()
        assert 0 < box["width"] <= width
        assert box["height"] > 40
        assert drawing.locator("[data-tip]").count() > 0
        assert len(drawing.get_attribute("aria-label")) > 40
        assert figure.locator("details table tbody tr").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_numbers_are_those_of_the_run(opened: Open, pruned: Path) -> None:
    results = json.loads((pruned / "results.json").read_text(encoding="utf-8"))
    page = opened()
    rows = page.locator("#part-1-accuracy details tbody tr")
    assert rows.count() == len(results["rounds"])
    for row, one in zip(rows.all(), results["rounds"], strict=True):
        found = [float(cell.get_attribute("data-value")) for cell in row.locator("th, td").all()]
        numbers = one["numbers"]
        assert found == [
            one["density"],
            numbers["early_stopping_test_accuracy"]["mean"],
            numbers["test_accuracy"]["mean"],
        ]


def test_names_that_mean_harm_stay_text(opened: Open) -> None:
    page = opened()
    assert page.locator("img, iframe, object, link[rel=stylesheet]").count() == 0
    assert page.locator("script").count() == 1
    assert page.locator("[onerror], [onclick], [onload]").count() == 0
    cells = page.locator("tbody th").all_text_contents()
    assert sum(cell == f"{HOSTILE}.weight" for cell in cells) >= 3
    assert HOSTILE in page.locator("dl dd").all_text_contents()
    labels = page.locator("svg.chart text").all_text_contents()
    assert any(label.startswith("<img src=x") for label in labels)


def test_tables_sort_by_the_keyboard_alone(opened: Open, ticket: Path) -> None:
    page = opened()
    table = page.get_by_role("group", name="Tensors of this ticket").locator("table")
    heading = table.get_by_role("columnheader", name="sparsity")

    def column(place: int) -> list[str]:
        return [
            cell.get_attribute("data-value") for cell in table.locator(f"tbody tr > :nth-child({place})").all()
        ]

    before = [float(value) for value in column(5)]
    assert heading.get_attribute("aria-sort") is None
    heading.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in column(5)] == sorted(before)
    page.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in column(5)] == sorted(before, reverse=True)
    name = table.get_by_role("columnheader", name="tensor")
    name.get_by_role("button").click()
    assert table.locator("[aria-sort]").count() == 1
    names = table.locator("tbody th").all_text_contents()
    assert names[1:4] == ["layers.1.weight", "layers.2.weight", "layers.3.weight"]  # 2 before 10


def test_a_long_table_can_be_searched(opened: Open) -> None:
    page = opened()
    region = page.get_by_role("group", name="Tensors of this ticket")
    page.locator("section").filter(has=region).get_by_label("Only rows with").fill("LAYERS.1")
    assert region.locator("tbody tr:visible").count() == 11  # 1 and 10 to 19


def test_light_and_dark(opened: Open) -> None:
    def paper(page: Any) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = opened(scheme="light"), opened(scheme="dark")
    assert paper(light) != paper(dark)
    for page, other in ((light, paper(dark)), (dark, paper(light))):
        toggle = page.get_by_role("button", name="Dark", exact=True)
        before = toggle.get_attribute("aria-pressed")
        toggle.click()
        assert paper(page) == other
        assert toggle.get_attribute("aria-pressed") != before
        toggle.click()
        assert toggle.get_attribute("aria-pressed") == before


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_no_rule_of_accessibility_is_broken(opened: Open, width: int, scheme: str) -> None:
    page = opened(width=width, scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_the_report_at_once(opened: Open) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.locator("h1").count() == 1
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1


def test_marks_tell_their_numbers(opened: Open) -> None:
    page = opened()
    mark = page.locator("#part-1-accuracy svg.wide [data-tip]").last
    mark.hover()
    assert page.locator("#tip").text_content() == mark.get_attribute("data-tip")
    assert re.fullmatch(
        r"at the end, weights left 25%: [\d.]+% \[-?[\d.]+%, [\d.]+%\]", mark.get_attribute("data-tip")
    )


def test_it_can_be_read_without_scripts(opened: Open) -> None:
    page = opened(script=False)
    assert page.locator("table").count() > 5
    assert page.locator("button:visible").count() == 0
    assert page.locator("figure svg.chart:visible").count() == page.locator("figure").count()


def test_nothing_can_leave_the_page(browser: Any, page_file: Path) -> None:
    """Whatever came to run in it: the browser itself refuses."""
    page = browser.new_page()
    page.goto(page_file.as_uri())
    with socket.create_server(("127.0.0.1", 0)) as server:
        refused = page.evaluate(
            """async (address) => {
                const told = [];
                document.addEventListener("securitypolicyviolation", (one) => told.push(one.effectiveDirective));
                await fetch(address).catch(() => {});
                const image = new Image();
                image.src = address;
                const script = document.createElement("script");
                script.textContent = "window.ran = true";
                document.head.append(script);
                navigator.sendBeacon(address, "all of it");
                try { new WebSocket(address.replace("http", "ws")); } catch {}
                await new Promise((done) => setTimeout(done, 100));
                return [window.ran, told.sort()];
            }""",
            f"http://127.0.0.1:{server.getsockname()[1]}/",
        )
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    page.close()
    assert refused == [None, ["connect-src", "connect-src", "connect-src", "img-src", "script-src-elem"]]
