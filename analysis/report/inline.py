"""Turn a figure's SVG file into an element of the page: in the page's colours, with unique ids, and small.

matplotlib names every element and repeats a glyph's long id at each letter. Here unused ids are dropped and the others
shortened, coordinates are rounded to a tenth of a point, and a glyph is defined once per page. So is a text that the
page shows often, as one path: a browser makes a copy of its own for each use of a glyph, which takes much of the time
in which it opens a page of many figures.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from xml.etree import ElementTree

from analysis import style
from methods.errors import UserError

DRAWN = {"svg", "defs", "style", "g", "path", "use", "clipPath", "rect", "image"}  # elements that matplotlib writes
SHADES = {style.INK: "ink", style.MUTED: "muted", style.GRID: "grid", style.PAPER: "paper"}
GLYPH = re.compile(r'(?: d="([^"]*)")? transform="scale\((0\.0*[1-9]\d*)\)"')  # a space has no d
OFTEN = 5  # times that a text stands letter by letter, which is shorter, before it is defined


@dataclass
class Drawn:
    """What the figures of a page have defined so far; known definitions are used again, new ones are added."""

    paths: dict[str, str] = field(default_factory=dict)  # a path's attributes -> its id
    came: Counter[str] = field(default_factory=Counter)  # the letters of a text -> how often they came
    texts: dict[str, str] = field(default_factory=dict)  # the letters of a text -> the id of its path


def inline(svg: str, *, prefix: str, label: str, drawn: Drawn | None = None) -> str:
    """The element for the text of an SVG file; `prefix` begins its ids, `label` is read by screen readers.

    drawn   is of the page: the figures before this one have filled it, and this one adds to it
    """
    drawn = drawn or Drawn()
    svg = svg[max(svg.find("<svg"), 0) :]  # without one it is refused below
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
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
        name = drawn.paths.setdefault(path[2], path[1])
        again[path[1]] = name
        return path[0] if name == path[1] else ""

    # definitions of paths: glyphs and markers
    svg = re.sub(r'<path id="([^"]*)"([^>]*)/>', once, svg)
    svg = re.sub(r'href="#([^"]+)', lambda m: f'href="#{again.get(m[1], m[1])}', svg)
    svg = re.sub(r"<defs></defs>|<g></g>", "", svg)
    svg = _texts_once(svg, drawn, prefix=prefix)
    _refuse_active(svg, label)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _texts_once(svg: str, drawn: Drawn, *, prefix: str) -> str:
    """The figure, in which a text that the page shows often is one element instead of one for each letter."""
    glyphs = {name: found for path, name in drawn.paths.items() if (found := GLYPH.fullmatch(path))}

    def once(text: re.Match) -> str:
        drawn.came[text[0]] += 1
        letters = re.findall(r'href="#([^"]+)"(?: x="([^"]*)")?', text[0])
        scales = {glyphs[name][2] if name in glyphs else None for name, _ in letters}
        if drawn.came[text[0]] < OFTEN or len(scales) > 1 or None in scales:
            return text[0]
        if name := drawn.texts.get(text[0]):
            return f'<use href="#{name}"/>'
        (scale,) = scales
        path = "".join(_moved(glyphs[name][1] or "", float(x or 0) / float(scale)) for name, x in letters)
        name = drawn.texts[text[0]] = f"{prefix}-t{len(drawn.texts)}"
        return f'<defs><path id="{name}" d="{path}" transform="scale({scale})"/></defs><use href="#{name}"/>'

    return re.sub(r'(?:<use href="#[^"]+"(?: x="[-\d.]+")?/>){2,}', once, svg)


def _moved(path: str, right: float) -> str:
    """A path, whose commands all take absolute pairs of x and y, moved to the right."""
    numbers = 0

    def moved(number: re.Match) -> str:
        nonlocal numbers
        numbers += 1
        return f"{float(number[0]) + right:.0f}" if numbers % 2 else number[0]

    return re.sub(r"-?\d+(?:\.\d+)?", moved, path)


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
