"""What of a drawing may stand in the page: shapes and text, and nothing that runs, loads or links."""

from __future__ import annotations

from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"
_TAGS = frozenset({"svg", "g", "path", "line", "rect", "circle", "text", "tspan", "defs", "clipPath"})
_ATTRIBUTES = frozenset(
    {
        *(
            "class",
            "id",
            "clip-path",
            "transform",
            "opacity",
            "display",
            "aria-hidden",
            "viewBox",
            "width",
            "height",
        ),
        *("d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "ry", "dx", "dy"),
        *(
            "fill",
            "fill-opacity",
            "stroke",
            "stroke-width",
            "stroke-opacity",
            "stroke-dasharray",
            "stroke-linecap",
        ),
        *("stroke-miterlimit", "stroke-linejoin", "stroke-dashoffset"),
        *("font-family", "font-size", "font-weight", "font-style", "text-anchor"),
    }
)


def safe_svg(svg: str, *, prefix: str, label: str, classes: str) -> str:
    """A drawing that can stand in a page beside others.

    Elements and attributes that are not known to be harmless are left out, identifiers are numbered anew, and the
    drawing is one image to a screen reader, described by its label. A mark's own description moves to `data-tip`.

    Args:
        svg: As Vega writes it.
        prefix: Of its identifiers.
        label: What it shows.
        classes: Of the root.
    """
    root = ElementTree.fromstring(svg)
    named = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    _clean(root, {name: f"{prefix}{number}" for number, name in enumerate(named)})
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": label, "class": classes})
    ElementTree.register_namespace("", _SVG.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, identifiers: dict[str, str]) -> None:
    kept = {}
    for name, value in element.attrib.items():
        if name == "aria-label" and "mark-" not in element.get("class", "") and element.get("role"):
            kept["data-tip"] = value
        elif name in _ATTRIBUTES:
            kept[name] = _own(name, value, identifiers)
    if element.get("aria-roledescription") in ("axis", "legend", "group mark container", "title"):
        kept.pop("data-tip", None)
    element.attrib.clear()
    element.attrib.update(kept)
    for child in list(element):
        if child.tag.removeprefix(_SVG) in _TAGS:
            _clean(child, identifiers)
        else:
            element.remove(child)


def _own(name: str, value: str, identifiers: dict[str, str]) -> str:
    if name == "id":
        return identifiers[value]
    if name == "clip-path":
        return f"url(#{identifiers.get(value.removeprefix('url(#').removesuffix(')'), 'none')})"
    return value
