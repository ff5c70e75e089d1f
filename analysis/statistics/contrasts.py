"""Differences between a method and the base, or between two methods, with intervals and p values of one model.

Seeds and items are crossed (crossed.py), and the variance between seeds is pooled over the methods of one (model,
domain) at one setting and moderated (seeds.py): of a method's own seeds for a difference from the base, of the
differences seed by seed for two methods. Cells are not counted as independent, and left out of the pool, if they train
nothing (weights equal to the base's) or share a training with another (reused, or equal weights); they are compared
like all others. With one shared seed there is the items' part alone: a description of that run.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from analysis import units
from analysis.chosen import reported_methods
from analysis.families import families, family
from analysis.load import Loaded, retention_tasks
from analysis.measures import BY_KEY
from analysis.roles import PLAIN
from analysis.statistics.crossed import crossed
from analysis.statistics.intervals import Interval
from analysis.statistics.nats import DOMAIN, Change, Changes
from analysis.statistics.resample import Resampled, resampled
from analysis.statistics.seeds import Prior, moderated, of_methods, of_pairs
from analysis.statistics.signs import sign_flips

BASE = "base"
SCORE = "domain_gain"
AT_ONCE = 4_000_000  # numbers held at a time
Pair = tuple[str, str]


class Contrasts:
    """All differences of one (model, domain)."""

    def __init__(self, loaded: Loaded, *, model: str, domain: str, changes: Changes | None = None) -> None:
        self.cells = loaded.of(model, domain)
        self.methods = list(dict.fromkeys(self.cells["method"]))
        self.changes = changes or Changes(loaded, self.cells)
        self.settings = settings_of(loaded, model=model, domain=domain)
        self.chosen = reported_methods(loaded, model=model, domain=domain)
        self._seeds: dict[str, dict[int, str]] = defaultdict(dict)
        for cell, row in self.cells.iterrows():
            self._seeds[row["method"]][row["seed"]] = cell
        self._measured: dict[str, Measured | None] = {}
        self._priors: dict[tuple[str, int], tuple[Prior, Prior]] = {}

    def of(self, key: str, pairs: Sequence[Pair]) -> dict[Pair, Interval]:
        """a − b in the measure `key`, for those `pairs` (b may be "base") that share a seed of which it is known."""
        found: dict[Pair, Interval] = {}
        if (measured := self.measured(key)) is None:
            return found
        by_seeds = defaultdict(list)
        for pair in pairs:
            if seeds := self.shared(measured, *pair):
                by_seeds[len(seeds)].append((pair, seeds))
        for count, group in by_seeds.items():
            at_once = max(1, AT_ONCE // (count * measured.n))
            for start in range(0, len(group), at_once):
                found |= self._together(measured, group[start : start + at_once], count)
        return {pair: found[pair] for pair in pairs if pair in found}

    def of_runs(self, key: str, pairs: Sequence[Pair]) -> np.ndarray:
        """The sign-flip p of those `pairs` that share one seed, as they are in `of`: a description of these runs."""
        measured = self.measured(key)
        ends = [(pair, self.shared(measured, *pair)) for pair in pairs]
        first, second = (self._rows(measured, [(pair[side], seeds) for pair, seeds in ends])[:, 0] for side in (0, 1))
        return sign_flips([(task[first] - task[second]).T for task in measured.tasks])

    def shared(self, measured: "Measured", a: str, b: str) -> list[int]:
        """The seeds of which both have the measure."""
        own = (
            {s for s, cell in self._seeds[method].items() if cell in measured.rows}
            for method in (a, b)
            if method != BASE
        )
        return sorted(set.intersection(*own))

    def at_settings(self) -> dict[int, list[str]]:
        """The methods that are tested, by setting."""
        by_setting = defaultdict(list)
        for method in self.methods:
            if self.settings[method] >= 0:
                by_setting[self.settings[method]].append(method)
        return dict(sorted(by_setting.items()))

    @property
    def plain(self) -> list[str]:
        """Plain fine-tuning, at each of its settings."""
        return [method for method in self.methods if family(method) == PLAIN]

    def differences(self, measured: "Measured", a: str, b: str, seeds: list[int]) -> list[np.ndarray]:
        """a − b by item, (S seeds, n_t items) per task."""
        first, second = (self._rows(measured, [(method, seeds)])[0] for method in (a, b))
        return [task[first] - task[second] for task in measured.tasks]

    def measured(self, key: str) -> "Measured | None":
        """The items of all cells that have a measure, or None if none has."""
        if key not in self._measured:
            self._measured[key] = _measured(self.changes, self.cells, key)
        return self._measured[key]

    def priors(self, key: str, setting: int) -> tuple[Prior, Prior]:
        """What the methods of a setting say about the variance of a method's seeds, and of a difference by seed."""
        if (key, setting) not in self._priors:
            self._priors[key, setting] = self._pooled(key, setting)
        return self._priors[key, setting]

    def moderate(self, key: str, method: str, variance: float, df: float) -> tuple[float, float]:
        """A method's variance between seeds in a measure, moderated, and its degrees of freedom (resample.py)."""
        if self.unchanged(method):
            return variance, df
        (own,), (worth,) = moderated([self.priors(key, self.settings[method])[0]], np.array([variance]), df)
        return float(own), float(worth)

    def _pooled(self, key: str, setting: int) -> tuple[Prior, Prior]:
        measured = self.measured(key)
        pool = [method for method in self.independent if self.settings[method] == setting]
        seeds = sorted({seed for method in pool for seed in self._seeds[method]})
        table = np.full((len(pool), len(seeds)), np.nan)
        for row, method in enumerate(pool):
            for seed, cell in self._seeds[method].items():
                if cell in measured.rows:
                    table[row, seeds.index(seed)] = measured.means[measured.rows[cell]]
        return of_methods(table), of_pairs(table)

    @cached_property
    def independent(self) -> list[str]:
        """The methods with several seeds that trained, each training once."""
        kept, weights = [], set()
        for method, cells in self.cells.groupby("method", sort=False):
            own = set(cells["weights_sha256"])
            reused = "training_reused" in cells and cells["training_reused"].eq(True).any()
            if len(cells) > 1 and not reused and not own & weights and not self.unchanged(method):
                kept.append(method)
            weights |= own
        return kept

    def unchanged(self, method: str) -> bool:
        """Whether all runs of a method are the base: it trains nothing, or nothing of it is kept."""
        return method in self._unchanged

    @cached_property
    def _unchanged(self) -> set[str]:
        same = (self.cells["weights_sha256"] == self.cells["base_sha256"]).groupby(self.cells["method"]).all()
        return set(same.index[same])

    def _together(self, measured: "Measured", group: list[tuple[Pair, list[int]]], count: int) -> dict[Pair, Interval]:
        """The differences of pairs that share `count` seeds each."""
        first, second = (self._rows(measured, [(pair[side], seeds) for pair, seeds in group]) for side in (0, 1))
        tasks = [task[first] - task[second] for task in measured.tasks]
        seeds = None
        if count > 1:
            own = (measured.means[first] - measured.means[second]).var(axis=1, ddof=1)
            seeds = moderated([self._prior(measured.key, pair) for pair, _ in group], own, count - 1)
        found = crossed(tasks, step=measured.step, moderated=seeds)
        scope, low, high = "method" if count > 1 else "run", found.value - found.half, found.value + found.half
        columns = (found.value, low, high, found.error, found.df)
        return {
            pair: Interval(value, None, None, measured.n, count, scope)
            if np.isnan(bottom)
            else Interval(float(value), float(bottom), float(top), measured.n, count, scope, float(error), float(df))
            for (pair, _), value, bottom, top, error, df in zip(group, *columns)
        }

    def _rows(self, measured: "Measured", runs: list[tuple[str, list[int]]]) -> np.ndarray:
        """The rows of `measured` of methods, each at its seeds."""
        cells = [
            [self._seeds[method].get(seed) if method != BASE else None for seed in seeds] for method, seeds in runs
        ]
        return np.array([[measured.rows.get(cell, -1) for cell in own] for own in cells])

    def _prior(self, key: str, pair: Pair) -> Prior:
        trained = [method for method in pair if method != BASE and not self.unchanged(method)]
        if not trained:
            return Prior()
        found = [self.priors(key, self.settings[method])[len(trained) - 1] for method in trained]
        return max(found, key=lambda prior: prior.variance)  # of two settings that of the one whose seeds differ more


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measure of C cells by item, as parts of which the measure is the mean over tasks of the mean over items.

    tasks  (C + 1 cells, n_t items) per task; the last row is the base, all 0
    means  (C + 1,) the measure of each cell
    rows   cell -> its row
    step   how far an item moves if its answer changes (crossed.py)
    """

    key: str
    tasks: list[np.ndarray]
    means: np.ndarray
    rows: dict[str, int]
    step: float

    @property
    def n(self) -> int:
        return sum(task.shape[1] for task in self.tasks)


def _measured(changes: Changes, cells: pd.DataFrame, key: str) -> Measured | None:
    runs = [cell for cell in cells.index if _change(changes, [cell], key)]
    if not runs:
        return None
    change, step = _change(changes, runs, key)
    tasks = [np.vstack([task, np.zeros(task.shape[1])]) for task in change.linear]
    means = np.mean([task.mean(axis=1) for task in tasks], axis=0)
    return Measured(key=key, tasks=tasks, means=means, rows={cell: row for row, cell in enumerate(runs)}, step=step)


def _change(changes: Changes, runs: Sequence[str], key: str) -> tuple[Change, float] | None:
    """What `runs` lost, or of the domain gained, in a measure, and its step; None if it is not known of all items."""
    first, domain = changes.first, changes.first["domain"]
    if key in BY_KEY:
        change, step = changes.of(BY_KEY[key], runs), 0.0
    elif key == DOMAIN or (key == SCORE and units.per_token(first, domain)):
        change, step = changes.per_token(domain, runs), 0.0
    elif key == SCORE:
        known = units.per_item(first, domain)
        change, step = changes.scored([domain], runs) if known else None, units.step(units.of_domain(first))
    else:
        lost = changes.scored(retention_tasks(first), runs)
        change, step = lost and -lost, units.step(units.SHARE)
    return None if change is None else (change, step)


def settings_of(loaded: Loaded, *, model: str, domain: str) -> dict[str, int]:
    """method -> its setting: methods are pooled with, and compared at, the same one.

    Families with as many blocks as plain fine-tuning have its settings, in the order of the grid. Of any other family
    the block that was chosen on probe rows is at the setting chosen for plain fine-tuning, and each other block is at a
    setting of its own kind (−1, −2, …), which is not tested.
    """
    blocks = families(dict.fromkeys(loaded.of(model, domain)["method"]))
    chosen = reported_methods(loaded, model=model, domain=domain)
    plain = blocks.get(PLAIN, [])
    usual = next((place for place, block in enumerate(plain) if block in chosen), 0)
    settings = {}
    for own in blocks.values():
        for place, block in enumerate(own):
            settings[block] = place if len(own) == len(plain) else usual if block in chosen else -place - 1
    return settings


def redrawn(loaded: Loaded, *, model: str, domain: str) -> Resampled | None:
    """Gains and losses redrawn with items and seeds (resample.py), the spread of seeds moderated as in the tests."""
    if (model, domain) not in loaded.redraws:
        own = Contrasts(loaded, model=model, domain=domain)
        made = resampled(loaded, model=model, domain=domain, changes=own.changes, moderate=own.moderate)
        loaded.redraws[model, domain] = made
    return loaded.redraws[model, domain]
