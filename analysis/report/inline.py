"""Turn a figure's SVG file into an element of the page: in the page's colours, with unique ids, and small.

matplotlib names every element and repeats a glyph's long id at each letter. Here unused ids are dropped and the others
shortened, coordinates are rounded to a tenth of a point, and what figures use again, glyphs above all, is defined once
per page, outside of them: a figure may be drawn late or never.
"""

import re
from dataclasses import dataclass, field
from html import escape
from xml.etree import ElementTree

from analysis import style
from methods.errors import UserError

DRAWN = {"svg", "defs", "style", "g", "path", "use", "clipPath", "rect", "image"}  # elements that matplotlib writes
SHADES = {style.INK: "ink", style.MUTED: "muted", style.GRID: "grid", style.PAPER: "paper"}


@dataclass
class Drawn:
    """What the figures of a page use again: each figure adds to it."""

    paths: dict[str, str] = field(default_factory=dict)  # a path's attributes -> its id

    def definitions(self) -> str:
        """An element without a size, for the page that shows the figures."""
        paths = "".join(f'<path id="{name}"{path}/>' for path, name in self.paths.items())
        return f'<svg width="0" height="0" style="position: absolute" aria-hidden="true"><defs>{paths}</defs></svg>'


def inline(svg: str, *, prefix: str, label: str, drawn: Drawn) -> str:
    """The element for the text of an SVG file, without what it adds to `drawn`.

    prefix   begins its ids
    label    is read by screen readers
    """
    svg = svg[max(svg.find("<svg"), 0) :]  # without one it is refused below
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    _refuse_active(svg, label)
    used = dict.fromkeys(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    names = {(a or b): f"{prefix}-{number}" for number, (a, b) in enumerate(used)}
    svg = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', lambda m: m[1] + names[m[2]], svg)
    for shade, name in SHADES.items():
        svg = svg.replace(shade, f"var(--{name})")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r'(\s(?:d|x|y|transform)=")([^"]*)"', lambda m: f'{m[1]}{_short(m[2])}"', svg)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r' transform="translate\(([-\d.]+) 0\)"/>', r' x="\1"/>', svg)
    svg = re.sub(r"<g( clip-path=[^>]*)?>((?:<use [^>]*/>){2,})</g>", _styled_once, svg)
    again: dict[str, str] = {}

    def once(path: re.Match) -> str:
        again[path[1]] = drawn.paths.setdefault(path[2], path[1])
        return ""

    # definitions of paths: glyphs and markers
    svg = re.sub(r'<path id="([^"]*)"([^>]*)/>', once, svg)
    svg = re.sub(r'href="#([^"]+)', lambda m: f'href="#{again.get(m[1], m[1])}', svg)
    svg = re.sub(r"<defs></defs>|<g></g>", "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _refuse_active(svg: str, label: str) -> None:
    """Refuse what matplotlib never draws: a figure's file may be a stranger's, and the page takes it as it is."""
    try:
        elements = list(ElementTree.fromstring(svg).iter()) if "<!" not in svg else []
    except ElementTree.ParseError:
        elements = []
    found = {element.tag for element in elements} - DRAWN or {
        f"{name}={value[:40]!r}"
        for element in elements
        for name, value in element.attrib.items()
        if name.startswith("on")
        or not {"<", ">", '"', "'"}.isdisjoint(value)  # `inline` would take one for the end of a value or tag
        or (name.endswith("href") and not value.startswith(("#", "data:image/png;base64,")))
        or re.search(r"url\((?!#)", value)
    }
    if found or not elements or re.search(r"@import|url\((?!#)", svg):
        raise UserError(
            f"the SVG file of the figure {label!r:.80} holds {min(found, default='what no figure has')}, and is not as "
            "this program draws it: delete it, and draw the figure again"
        )


def _styled_once(group: re.Match) -> str:
    """The markers of one series, which all have the same style, in a group with that style."""
    styles = set(re.findall(r' style="[^"]*"', group[2]))
    if len(styles) != 1 or group[2].count(" style=") != group[2].count("<use "):
        return group[0]
    (style,) = styles
    return f"<g{group[1] or ''}{style}>{group[2].replace(style, '')}</g>"


def _short(numbers: str) -> str:
    """Coordinates to a tenth of a point; a scale, which is below 1, keeps its digits."""

    def rounded(number: re.Match) -> str:
        return number[0] if abs(float(number[0])) < 1 else f"{float(number[0]):.1f}".removesuffix(".0")

    return re.sub(r"\s*\n\s*", " ", re.sub(r"-?\d+\.\d+", rounded, numbers)).strip()
