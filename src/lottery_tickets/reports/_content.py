"""What a report says, before anyone has decided how it looks: figures as numbers, tables, and sections of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lottery_tickets.reports._numbers import plain

Spelling = Callable[[float], str]  # a number in words


@dataclass(frozen=True)
class Cell:
    """One field of a table.

    Attributes:
        text: What is read.
        value: What the column is sorted by; None sorts as text.
        share: Of a bar behind the number, in [0, 1]; None for no bar.
    """

    text: str
    value: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first column names the row.

    Attributes:
        caption: What it is a table of.
        headings: One for each column.
        rows: Of cells.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers."""
        return [any(row[place].value is not None for row in self.rows) for place in range(len(self.headings))]


@dataclass(frozen=True)
class Axis:
    """An axis of numbers.

    Attributes:
        title: With the unit.
        scale: `symlog` has room for zero.
        falling: From large to small.
        spelling: How its numbers are read.
        percent: Its numbers are shares of one, and their ticks hundredths.
        ticks: Where; None for wherever the chart likes.
        from_zero: Zero is on it.
    """

    title: str
    scale: Literal["linear", "log", "symlog"] = "linear"
    falling: bool = False
    spelling: Spelling = plain
    percent: bool = False
    ticks: Sequence[float] | None = None
    from_zero: bool = False


@dataclass(frozen=True)
class Point:
    """A mean and its interval, where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points under one name."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Level:
    """A value that the lines are held against."""

    y: float
    name: str


@dataclass(frozen=True)
class Figure:
    """What all figures have.

    Attributes:
        slug: Of file names and anchors, unique within a section.
        title: A few words.
        summary: What it shows, in a sentence or two, for those who do not see it and for those who do.
    """

    slug: str
    title: str
    summary: str

    def table(self) -> Table:
        """The same numbers to read."""
        raise NotImplementedError


@dataclass(frozen=True)
class Curves(Figure):
    """Lines over numbers."""

    x: Axis
    y: Axis
    lines: Sequence[Line]
    levels: Sequence[Level] = ()

    def table(self) -> Table:
        places = sorted({point.x for line in self.lines for point in line.points}, reverse=self.x.falling)
        at = [{point.x: point for point in line.points} for line in self.lines]
        rows = [
            [Cell(self.x.spelling(place), place), *(_point_cell(one.get(place), self.y.spelling) for one in at)]
            for place in places
        ]
        names = [line.name if len(self.lines) > 1 else self.y.title for line in self.lines]
        return Table(self.title, [self.x.title, *names], rows)


@dataclass(frozen=True)
class Bars(Figure):
    """A bar for each name."""

    axis: Axis
    what: str
    names: Sequence[str]
    values: Sequence[float]
    limit: Level | None = None

    def table(self) -> Table:
        rows = [
            [Cell(name), Cell(self.axis.spelling(value), value)]
            for name, value in zip(self.names, self.values, strict=True)
        ]
        return Table(self.title, [self.what, self.axis.title], rows)


@dataclass(frozen=True)
class Intervals(Figure):
    """A mean with its interval for each name.

    Attributes:
        first: The name that the others are held against.
    """

    axis: Axis
    what: str
    names: Sequence[str]
    points: Sequence[Point]  # whose y counts
    first: str

    def table(self) -> Table:
        rows = [
            [Cell(name), _point_cell(point, self.axis.spelling)]
            for name, point in zip(self.names, self.points, strict=True)
        ]
        return Table(self.title, [self.what, self.axis.title], rows)


@dataclass(frozen=True)
class Matrix(Figure):
    """A number for each pair; None where there is none."""

    axis: Axis
    what: str
    names: Sequence[str]
    values: Sequence[Sequence[float | None]]

    def table(self) -> Table:
        rows = [
            [Cell(name), *(_number_cell(value, self.axis.spelling) for value in row)]
            for name, row in zip(self.names, self.values, strict=True)
        ]
        return Table(self.title, [self.what, *self.names], rows)


@dataclass(frozen=True)
class Fact:
    """A number that matters, and what it is."""

    name: str
    value: str


@dataclass(frozen=True)
class Section:
    """A run, or a part of what came of it.

    Attributes:
        title: Of the section.
        kind: What made it, in a word or two.
        conclusion: What came out, in a sentence; empty where there is nothing to conclude.
        reason: What that rests on.
        facts: The numbers to know.
        figures: What to look at.
        tables: What to look up; the first are in full view.
        configuration: Every setting, by name.
        versions: Package to version, of the libraries that it was made with.
        source: The file or folder that it was read from; empty where it is made of other sections.
    """

    title: str
    kind: str
    source: str = ""
    conclusion: str = ""
    reason: str = ""
    facts: Sequence[Fact] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    sections: Sequence[Section]


def without_gaps(pairs: Iterable[tuple[float, float | None]]) -> list[Point]:
    """Points of the pairs that have a value."""
    return [Point(x, y) for x, y in pairs if y is not None]


def _point_cell(point: Point | None, spelling: Spelling) -> Cell:
    if point is None:
        return Cell("")
    if point.low is None or point.high is None:
        return Cell(spelling(point.y), point.y)
    return Cell(f"{spelling(point.y)} [{spelling(point.low)}, {spelling(point.high)}]", point.y)


def _number_cell(value: float | None, spelling: Spelling) -> Cell:
    return Cell("") if value is None else Cell(spelling(value), value)
