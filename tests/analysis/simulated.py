"""Studies whose truth is known: how often intervals cover it, and tests find a difference where there is none.

    python -m tests.analysis.simulated          the table of docs/rules.md

Every method of a study loses the same, so that each difference between two of them that is found is an error. All run
with the same seeds on the same items, and are analysed as a study is: the spread of seeds pooled and moderated.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import norm

from analysis.statistics.crossed import crossed
from analysis.statistics.detectable import LEVEL, holm
from analysis.statistics.intervals import p_value
from analysis.statistics.seeds import moderated, of_methods, of_pairs

ITEMS = 200
ERROR = 0.7  # of one run, from its items, in points
TOGETHER = 0.5  # correlation of methods at one seed: they see the data in the same order


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A kind of study.

    spreads  standard deviation over seeds in points of the first method, and of the last; those between are even in
             their logarithms, or `odd`: all but the first have the last's
    kind     normal, tails (Student's t of 3 degrees of freedom for seeds and items), or accuracy (right or wrong, from
             `before` in the base to `after`)
    """

    title: str
    methods: int
    seeds: int
    spreads: tuple[float, float] = (0.8, 0.8)
    odd: bool = False
    kind: str = "normal"
    before: float = 0.5
    after: float = 0.5

    def spread(self) -> np.ndarray:
        first, last = self.spreads
        if self.odd:
            return np.array([first, *[last] * (self.methods - 1)])
        return np.geomspace(first, last, self.methods)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Shares of studies, and of their methods and pairs.

    covers, least  intervals against the base that hold the truth: of all methods, and of the method with the fewest
    wrong, most    pairs told apart at p < .05: of all pairs, and of the pair with the most
    full, pairs    studies with any error after Holm's correction, against the first method and over all pairs
    width          an interval of a difference over the one by the pair's own seeds alone, the mean
    """

    covers: float
    least: float
    wrong: float
    most: float
    full: float
    pairs: float
    width: float


GRID = [
    Setting(title=title, methods=methods, seeds=seeds, **options)
    for title, options in {
        "spread 0.8": {},
        "spread 4": {"spreads": (4.0, 4.0)},
        "spreads 0.4 to 1.6": {"spreads": (0.4, 1.6)},
        "one 3.2, others 0.8": {"spreads": (3.2, 0.8), "odd": True},
        "heavy tails, spread 0.8": {"kind": "tails"},
        "heavy tails, spread 4": {"kind": "tails", "spreads": (4.0, 4.0)},
        "accuracy .97, spread 0.8": {"kind": "accuracy", "before": 0.97, "after": 0.97},
        "accuracy .97, spread 4": {"kind": "accuracy", "before": 0.97, "after": 0.97, "spreads": (4.0, 4.0)},
        "accuracy .03, spread 4": {"kind": "accuracy", "before": 0.03, "after": 0.03, "spreads": (4.0, 4.0)},
    }.items()
    for methods in (5, 20)
    for seeds in (3, 5)
]


def drawn(setting: Setting, draw: np.random.Generator) -> tuple[np.ndarray, float]:
    """Tuned − base, (methods, seeds, items) in points, and its true mean, of all methods or of each."""
    shape, spread = (setting.methods, setting.seeds), setting.spread()[:, None]
    noise = (lambda *size: draw.standard_t(3, size) / np.sqrt(3)) if setting.kind == "tails" else _normal(draw)
    seed = np.sqrt(TOGETHER) * noise(1, setting.seeds) + np.sqrt(1 - TOGETHER) * noise(*shape)
    if setting.kind != "accuracy":
        item = ERROR * np.sqrt(ITEMS) * np.sqrt(0.5)
        change = item * noise(ITEMS) + item * noise(*shape, ITEMS)
        return 2.0 + (spread * seed)[..., None] + change, 2.0
    # right if an ability exceeds a bound; most of it belongs to the item, and a seed shifts the bound
    at, was = -ndtri(setting.after), -ndtri(setting.before)
    scale = spread / 100 / norm.pdf(at)
    item, own = np.sqrt(0.9) * draw.standard_normal(ITEMS), np.sqrt(0.1)
    right = item + own * draw.standard_normal((*shape, ITEMS)) + (scale * seed)[..., None] > at
    base = item + own * draw.standard_normal(ITEMS) > was
    truth = norm.sf(at / np.sqrt(1 + scale[:, 0] ** 2)) - setting.before
    return 100.0 * (right * 1.0 - base), 100 * truth


def _normal(draw: np.random.Generator):
    return lambda *size: draw.standard_normal(size)


def analysed(changes: np.ndarray, *, step: float) -> dict[str, np.ndarray]:
    """Estimates of one study from (methods, seeds, items), against the base and of all pairs."""
    means, df = changes.mean(axis=-1), changes.shape[1] - 1
    first, second = np.triu_indices(len(changes), 1)
    own = means.var(axis=1, ddof=1)
    base = crossed([changes], step=step, moderated=moderated([of_methods(means)] * len(own), own, df))
    apart, differences = changes[first] - changes[second], (means[first] - means[second]).var(axis=1, ddof=1)
    seeds = moderated([of_pairs(means)] * len(differences), differences, df)
    pairs, alone = crossed([apart], step=step, moderated=seeds), crossed([apart], step=step)
    return {"base": base, "pairs": pairs, "alone": alone, "of_first": first == 0}


def simulated(setting: Setting, *, studies: int, seed: int = 0) -> Found:
    """What `studies` studies find."""
    draw, rows = np.random.default_rng([seed, setting.methods, setting.seeds]), []
    for _ in range(studies):
        changes, truth = drawn(setting, draw)
        found = analysed(changes, step=100.0 if setting.kind == "accuracy" else 0.0)
        pairs = found["pairs"]
        p = p_value(pairs.value, pairs.error, pairs.df)
        rows.append(
            {
                "covers": np.abs(found["base"].value - truth) <= found["base"].half,
                "wrong": p < LEVEL,
                "full": holm(p[found["of_first"]]).min() < LEVEL,
                "pairs": holm(p).min() < LEVEL,
                "width": (pairs.half.mean(), found["alone"].half.mean()),
            }
        )
    share = {key: np.mean([row[key] for row in rows], axis=0) for key in rows[0]}
    return Found(
        covers=float(share["covers"].mean()),
        least=float(share["covers"].min()),
        wrong=float(share["wrong"].mean()),
        most=float(share["wrong"].max()),
        full=float(share["full"]),
        pairs=float(share["pairs"]),
        width=float(share["width"][0] / share["width"][1]),
    )


def table(*, studies: int) -> str:
    """The kinds of GRID in markdown, of 5 and of 20 methods the worse one; with 3 seeds / with 5."""
    lines = [
        "| seeds differ by | intervals with the truth | pairs wrongly told apart | any against `full` | width |",
        "|---|---|---|---|---|",
    ]
    found = {setting: simulated(setting, studies=studies) for setting in GRID}
    for title in dict.fromkeys(setting.title for setting in GRID):
        by_seeds = [[f for setting, f in found.items() if (setting.title, setting.seeds) == (title, k)] for k in (3, 5)]
        columns = [
            [f"{100 * min(f.covers for f in each):.0f} ({100 * min(f.least for f in each):.0f})" for each in by_seeds],
            [f"{100 * max(f.wrong for f in each):.0f} ({100 * max(f.most for f in each):.0f})" for each in by_seeds],
            [f"{100 * max(f.full for f in each):.0f}" for each in by_seeds],
            [f"{max(f.width for f in each):.2f}" for each in by_seeds],
        ]
        lines.append(f"| {title} | {' | '.join(' / '.join(column) for column in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(studies=200))
