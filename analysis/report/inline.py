"""A figure's SVG file as an element of the page: in the page's colours, with ids of its own, and small.

matplotlib names every element, and repeats a glyph's long id at each letter: what nothing refers to loses its name, what
is referred to gets a short one, coordinates keep a tenth of a point, and a glyph is drawn once a page.
"""

import re
from html import escape

from analysis import style

SHADES = {style.INK: "ink", style.MUTED: "muted", style.GRID: "grid", style.PAPER: "paper"}


def inline(svg: str, *, prefix: str, label: str, drawn: dict[str, str] | None = None) -> str:
    """The element for the text of an SVG file; `prefix` begins its ids, `label` is what a screen reader says of it.

    drawn   the page's definitions so far, each with its id: those that are there are used, the others are added
    """
    drawn = {} if drawn is None else drawn
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    used = dict.fromkeys(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    names = {(a or b): f"{prefix}-{number}" for number, (a, b) in enumerate(used)}
    svg = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{names[found[1]]}"' if found[1] in names else "", svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', lambda found: found[1] + names[found[2]], svg)
    for shade, name in SHADES.items():
        svg = svg.replace(shade, f"var(--{name})")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r'(\s(?:d|x|y|transform)=")([^"]*)"', lambda found: f'{found[1]}{_short(found[2])}"', svg)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r' transform="translate\(([-\d.]+) 0\)"/>', r' x="\1"/>', svg)
    svg = re.sub(r"<g( clip-path=[^>]*)?>((?:<use [^>]*/>){2,})</g>", _styled_once, svg)
    again: dict[str, str] = {}

    def once(found: re.Match) -> str:
        name = drawn.setdefault(found[2], found[1])
        again[found[1]] = name
        return found[0] if name == found[1] else ""

    # definitions of paths: glyphs and markers
    svg = re.sub(r'<path id="([^"]*)"([^>]*)/>', once, svg)
    svg = re.sub(r'href="#([^"]+)', lambda found: f'href="#{again.get(found[1], found[1])}', svg)
    svg = re.sub(r"<defs></defs>|<g></g>", "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _styled_once(group: re.Match) -> str:
    """Markers of one series, which all name the same style, in a group that names it."""
    styles = set(re.findall(r' style="[^"]*"', group[2]))
    if len(styles) != 1 or group[2].count(" style=") != group[2].count("<use "):
        return group[0]
    (style,) = styles
    return f"<g{group[1] or ''}{style}>{group[2].replace(style, '')}</g>"


def _short(numbers: str) -> str:
    """Coordinates to a tenth of a point; a scale, which is below 1, keeps its digits."""
    rounded = re.sub(
        r"-?\d+\.\d+",
        lambda found: found[0] if abs(float(found[0])) < 1 else f"{float(found[0]):.1f}".removesuffix(".0"),
        numbers,
    )
    return re.sub(r"\s*\n\s*", " ", rounded).strip()
