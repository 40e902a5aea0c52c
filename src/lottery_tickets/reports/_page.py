"""The page: one file that holds all it needs and can send nothing anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from lottery_tickets.errors import MissingExtraError
from lottery_tickets.reports._content import Document, Figure, Section
from lottery_tickets.reports._svg import safe_svg
from lottery_tickets.reports._vega import NARROW, WIDE, check_charts, svg_of

_FEW_ROWS = 16  # a longer table scrolls in itself and can be searched


def html_of(document: Document) -> str:
    """The whole report as one HTML file.

    Every name and number is escaped where it is put in; drawings hold shapes and text only; the policy of the page
    admits the style and the script that are in it, by their digests, and no connection of any kind.

    Raises:
        MissingExtraError: Jinja2 or vl-convert is not installed.
    """
    check_charts()
    style, script = _shipped("report.css"), _shipped("report.js")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _environment().get_template("report.html")
    return str(
        template.render(
            document=document,
            style=style,
            script=script,
            policy=policy,
            drawn=_drawn,
            flat=flat,
            few_rows=_FEW_ROWS,
            version=version("lottery-tickets"),
        )
    )


def flat(configuration: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their full name, in words."""
    for name, value in configuration.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", _in_words(value)


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ([], {}):
        return "not set"
    if isinstance(value, (list, tuple)):
        return ", ".join(_in_words(one) for one in value)
    return str(value)


def _drawn(figure: Figure, section: Section, place: int) -> list[str]:
    """For a wide page and for a narrow one, of which the style shows one."""
    from markupsafe import Markup

    label = f"{figure.title}. {figure.summary}"
    return [
        Markup(  # cleaned by an allowlist
            safe_svg(
                svg_of(figure, width),
                prefix=f"s{place}-{figure.slug}-{width}-",
                label=label,
                classes=f"chart {name}",
            )
        )
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    ]


def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report") from error
    return Environment(
        loader=PackageLoader(__package__, "_template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shipped(name: str) -> str:
    return (files(__package__) / "_template" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """As a content security policy names what stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
