"""How every figure looks: fixed colours by method, direct labels, no chartjunk, the same bytes for the same data."""

import zlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend is chosen first
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from analysis import numbers, spreadsheet  # noqa: E402
from analysis.families import families, family  # noqa: E402

MANY = 10  # methods beyond which figures change: of a sweep one block is labelled, and numbers become shades
ROW = 0.145  # inches of a line of small text: with more methods than MANY, figures grow by this for each
WIDTH = 6.8  # inches: text stays readable on a phone that scrolls the figure, and on a printed page
INK, MUTED, FAINT, GRID, PAPER, RED = "#1b1f24", "#5b636d", "#a4abb3", "#d9dde2", "#ffffff", "#c5221f"
DARK, LIGHT = "#10141a", "#fdfdfd"  # text on a filled square, which is the same on the light and the dark page

# Okabe and Ito's colours, darkened or lightened until each stands out 3:1 on white and on the dark page
FIXED = {"full": "#6e7781", "lora": "#0f7ac0", "ewc": "#d15600", "mofo": "#008f68", "hierarchical": "#b5588e"}
OTHERS = ("#a07800", "#7a68d8", "#2f8fa3", "#a8543c", "#6b8e23", "#c2477f")
MARKERS = {"full": "o", "lora": "s", "ewc": "D", "mofo": "^", "hierarchical": "v"}
OTHER_MARKERS = ("P", "X", "<", ">", "p", "h")
# a number inside of its axes, which the layout need not measure: measuring a text takes as long as drawing it
INSIDE = {"fontsize": 7.5, "color": INK, "in_layout": False}

SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "holdfast",
    "svg.fonttype": "path",
    "path.simplify": False,
}


def colour(method: str) -> str:
    """A method's colour, the same in every figure and for all blocks of its sweep; unknown methods get one by name."""
    method = family(method)
    return FIXED.get(method) or OTHERS[zlib.crc32(method.encode()) % len(OTHERS)]


def marker(method: str) -> str:
    """A method's marker, so that no reader has to distinguish methods by hue alone."""
    method = family(method)
    # independent of the colour, so that two methods of one colour seldom have one shape too
    return MARKERS.get(method) or OTHER_MARKERS[zlib.crc32(method.encode()) // len(OTHERS) % len(OTHER_MARKERS)]


def line(method: str, *, size: float) -> dict:
    """The look of a method's line; the blocks of a sweep are dashed and thinner than the method itself."""
    block = method != family(method)
    return {
        "color": colour(method),
        "marker": marker(method),
        "markersize": 0.7 * size if block else size,
        "linewidth": 0.8 if block else 1.3,
        "linestyle": (0, (4, 2)) if block else "-",
    }


def course(axes, runs: pd.DataFrame, *, method: str, x: str, y: str, size: float) -> tuple[float, float]:
    """Draw the runs of a method over their steps, several seeds faintly below their mean; return the mean's end."""
    for _, run in runs.groupby("cell", sort=False) if runs["cell"].nunique() > 1 else ():
        axes.plot(run[x], run[y], color=colour(method), linewidth=0.5, alpha=0.3)
    mean = runs.groupby("step")[[x, y]].mean()
    axes.plot(mean[x], mean[y], **line(method, size=size))
    return float(mean[x].iloc[-1]), float(mean[y].iloc[-1])


def named(methods) -> list[str]:
    """The methods to label: all, or one per family (itself or its first block) if there are more than MANY."""
    methods = list(methods)
    if len(methods) <= MANY:
        return methods
    return [name if name in own else own[0] for name, own in families(methods).items()]


def height(least: float, methods) -> float:
    """Inches of a panel of lines whose ends are labelled: at least `least`, and room for every label."""
    return max(least, 0.6 + ROW * len(named(methods)))


def house():
    """A context in which everything is drawn and saved in the house style."""
    return plt.rc_context(SETTINGS)


def new(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure and its axes; inches. Call it inside `house()`."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def save(figure, data: pd.DataFrame, *, stem: Path, not_a_result: bool) -> list[Path]:
    """Write stem.png, stem.svg and stem.csv (the data) without dates, and close the figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if not_a_result:
        figure.suptitle("NOT A RESULT", color=RED, fontsize=13, fontweight="bold")
        data = data.assign(not_a_result=True)
    figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.set_layout_engine(None)  # everything has its place now; with "none" matplotlib would draw once for nothing
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    plt.close(figure)
    stem.with_suffix(".csv").write_text(spreadsheet.text(data, digits="%.10g"), encoding="utf-8")
    return [stem.with_suffix(suffix) for suffix in (".png", ".svg", ".csv")]


def where(cells: pd.DataFrame) -> str:
    """Model, domain and seeds for a figure's title, because a picture travels without its page."""
    first, seeds = cells.iloc[0], cells["seed"].nunique()
    return f"{first['model']}, {first['domain']}, " + (f"{seeds} seeds" if seeds > 1 else f"seed {first['seed']}")


def bars(value: float, low, high):
    """An interval as matplotlib's error bar; None if a bound is missing."""
    return None if numbers.missing(low) or numbers.missing(high) else [[value - low], [high - value]]


def shaded(values: pd.DataFrame, *, norm, bar: str, show=None, rows: int):
    """A new figure of a table as squares, darker for more, and its axes; no square where a value is missing.

    norm   matplotlib's, from values to shades
    bar    what the colour bar says
    show   the text of a value, written into its square; None without
    rows   methods, one a line, which decide on the height
    """
    figure, axes = new(WIDTH, 1.1 + ROW * rows)
    shades = matplotlib.colors.ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.08, 0.9, 64)))
    look = {"cmap": shades, "norm": norm, "edgecolors": PAPER, "linewidth": 0.6}
    mesh = axes.pcolormesh(np.ma.masked_invalid(values.to_numpy(dtype=float)), **look)
    for y, row in enumerate(values.to_numpy(dtype=float)) if show else ():
        for x, value in enumerate(row):
            if value == value:
                dark = norm(value) > 0.7
                look = INSIDE | {"ha": "center", "va": "center", "fontsize": 7, "color": LIGHT if dark else DARK}
                axes.text(x + 0.5, y + 0.5, show(value), **look)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(values)) + 0.5, values.index, fontsize=7.5)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    scale = figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.5, fraction=0.4 / (1.1 + ROW * rows), aspect=40)
    scale.outline.set_visible(False)
    scale.set_label(bar, fontsize=8)
    scale.ax.tick_params(labelsize=7.5)
    return figure, axes


def label_points(
    axes,
    points: list[tuple[float, float, str, str]],
    *,
    bars: list[tuple[float, float, float, float]] = (),
    size: float = 9,
    always: int | None = None,
) -> list[str]:
    """Write each (x, y, text, colour) beside its point, away from other labels, points and bars (x0, y0, x1, y1).

    always   how many of the first points are labelled even where there is no room; all by default

    Call it after `figure.draw_without_rendering()`, which gives everything else its place.
    Returns the texts for which there was no room.
    """
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    pixels = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    along = [(x0 + (x1 - x0) * k / 60, y0 + (y1 - y0) * k / 60) for x0, y0, x1, y1 in bars for k in range(61)]
    lines = axes.transData.transform(along) if along else np.empty((0, 2))
    taken, without = [], []
    always = len(points) if always is None else always
    sides = [(1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)]
    places = [(across * far, up * far) for far in (5, 11, 17, 24, 32) for across, up in sides]
    for number, (x, y, text, shade) in enumerate(points):
        best = None
        for dx, dy in places:
            place = {"xytext": (dx, dy), "textcoords": "offset points"}
            place |= {
                "ha": ("center", "left", "right")[int(np.sign(dx))],
                "va": ("center", "bottom", "top")[int(np.sign(dy))],
            }
            look = {"color": shade, "fontsize": size, "fontweight": "bold", "zorder": 5}
            note = axes.annotate(text, (x, y), **place, **look)
            box = note.get_window_extent(renderer).expanded(1.04, 1.1)
            own, *others = [away(box, *pixel) for pixel in [pixels[number], *pixels[:number], *pixels[number + 1 :]]]
            cost = sum(box.overlaps(other) for other in taken) * 4 + sum(away < 4 for away in others) * 2
            cost += any(away <= own for away in others)  # it would read as another point's
            crossed = ((lines >= box.min) & (lines <= box.max)).all(axis=1).sum()
            cost += 0.15 * float(crossed) + 0.03 * (max(abs(dx), abs(dy)) - 5)
            cost += 4 * (box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1)
            if best is None or cost < best[0]:
                if best:
                    best[1].remove()
                best = (cost, note, box, max(abs(dx), abs(dy)) > 11)
            else:
                note.remove()
        if number >= always and best[0] >= 2:  # over another label or point, or outside
            best[1].remove()
            without.append(text)
            continue
        best[1].set_in_layout(False)
        taken.append(best[2])
        if best[3]:  # far from its point, to which a thin line joins it
            (px, py), box = pixels[number], best[2]
            across, up = axes.transData.inverted().transform((np.clip(px, box.x0, box.x1), np.clip(py, box.y0, box.y1)))
            axes.plot([x, across], [y, up], color=shade, linewidth=0.6, gid=text, scalex=False, scaley=False)
    return without


def away(box, x: float, y: float) -> float:
    """Pixels from a point to a box; 0 inside it."""
    return float(np.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1)))


def label_ends(axes, ends: list[tuple[float, float, str, str]], *, gap: float) -> None:
    """Write each (x, y, text, colour) right of the axes, level with its line's end; `gap` is a share of the height.

    Of more than MANY labels, which move far from their lines, each is joined to its line's end by a thin line.
    """
    axes.set_ylim(axes.get_ylim())  # labels are placed by height, which must not change
    heights = [float(axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]) for x, y, _, _ in ends]
    many = len(ends) > MANY
    gap, edge = min(gap, 1 / len(ends)) if ends else gap, 1.03 if many else 1
    for (x, y, text, shade), level, place in zip(ends, heights, spread(heights, gap)):
        right = {"xytext": (5, 0), "xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        look = {"fontsize": 7.5 if many else 8, "fontweight": "bold", "color": shade, "annotation_clip": False}
        axes.annotate(text, (edge, place), **right, **look)
        if many:
            start = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0]
            across = {"transform": axes.transAxes, "clip_on": False, "scalex": False, "scaley": False}
            axes.plot([start, 1, edge + 0.008], [level, level, place], color=shade, linewidth=0.5, alpha=0.5, **across)


def spread(heights: list[float], gap: float) -> list[float]:
    """Positions moved apart to at least `gap`, in the same order and as little as possible, for labels of lines."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []

    def centre(group: list[int]) -> float:
        reach = gap * (len(group) - 1) / 2
        return min(max(sum(heights[i] for i in group) / len(group), reach), max(1 - reach, reach))

    def close(one: list[int], other: list[int]) -> bool:
        return centre(other) - centre(one) < gap * (len(one) + len(other)) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and close(*groups[-2:]):
            last = groups.pop()
            groups[-1] += last
    placed = list(heights)
    for group in groups:
        for position, i in enumerate(group):
            placed[i] = centre(group) + gap * (position - (len(group) - 1) / 2)
    return placed
