"""What a method lost in nats, by item: on general text per token, on the retention tasks per item.

The base and every run answer the same items, so that a change is paired item by item:

    general text   Σ_i change_i / Σ_i tokens_i       change_i = base's log-likelihood − tuned's, or the passage's KL
    retention      mean over tasks of the mean over items of the base's log-likelihood (or margin) − the tuned model's

The part of item i of n in a mean over tokens is n · change_i / Σ tokens, so that the mean of the parts is the measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.load import Loaded, retention_tasks
from analysis.measures import NATS, Measure
from analysis.statistics.intervals import GENERAL_TEXT, KEYS, Interval, linearised, of_arrays, refuse_unequal, tokens_of

DIVERGENCES = {measure.value for measure in NATS if not measure.signed}  # of the base from itself: 0
DOMAIN = "domain_nll_gained"  # nats per token of the domain's test rows, the sign turned: more is better


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change in nats, one array (S seeds, n items) per task; with `tokens` (n,), a mean over tokens of one task."""

    tasks: list[np.ndarray]
    tokens: np.ndarray | None = None

    @property
    def linear(self) -> list[np.ndarray]:
        """The items' parts, (S seeds, n items) per task: the measure is the mean over tasks of their means."""
        return self.tasks if self.tokens is None else [linearised(change, self.tokens) for change in self.tasks]

    @property
    def interval(self) -> Interval:
        """The measure with its 95 % interval over items, and seeds if there are several."""
        return of_arrays(self.linear, step=0)

    def __sub__(self, other: "Change") -> "Change":
        return Change(tasks=[a - b for a, b in zip(self.tasks, other.tasks)], tokens=self.tokens)

    def __neg__(self) -> "Change":
        return Change(tasks=[-task for task in self.tasks], tokens=self.tokens)


class Changes:
    """The changes of all cells of one (model, domain); the items of the cells and of the base are matched once."""

    def __init__(self, loaded: Loaded, cells: pd.DataFrame) -> None:
        """`cells` are rows of `loaded.cells` of one model and domain. Without items, every change is unknown."""
        self.base, self.tuned = loaded.base_items(cells.iloc[0]["model"]), loaded.items_of(cells)
        self.first, self.column = cells.iloc[0], {cell: column for column, cell in enumerate(cells.index)}
        self._wide: dict[str, np.ndarray | None] = {}
        self.answered = set(self.tuned["cell"].unique()) if len(self.tuned) and len(self.base) else set()
        self.known = bool(len(self.base) and len(self.tuned)) and not self.base.duplicated(KEYS).any()
        if self.known:
            rows, tuned = (pd.MultiIndex.from_frame(frame[KEYS]) for frame in (self.base, self.tuned))
            self._row, self._cell = rows.get_indexer(tuned), self.tuned["cell"].map(self.column).to_numpy()
            self._places = {task: np.array(places) for task, places in self.base.groupby("task").indices.items()}
            self._tokens = tokens_of(self.base).to_numpy(dtype=float)

    def refuse_unequal(self, tasks: Sequence[str]) -> None:
        """Raise UserError if a cell was not scored on exactly the base's rows of `tasks`, each once."""
        if not self.known:
            return
        own, wanted = self.tuned["task"].isin(tasks).to_numpy(), self.base["task"].isin(tasks).sum()
        counts = np.bincount(self._cell[own], minlength=len(self.column))[np.unique(self._cell)]
        if set(tasks) - set(self._places) or (self._row[own] < 0).any() or (counts != wanted).any():
            refuse_unequal(base=self.base, tuned=self.tuned, tasks=list(tasks))

    def of(self, measure: Measure, runs: Sequence[str]) -> Change | None:
        """The change of `runs` in a measure, or None where it is not known of every item."""
        if measure.general:
            return self._per_token(GENERAL_TEXT, runs, measure.value)
        tasks = [self._change(task, runs, measure.value, sign=-1.0) for task in self.tasks(measure, runs)]
        return Change(tasks=tasks) if tasks else None

    def tasks(self, measure: Measure, runs: Sequence[str]) -> list[str]:
        """The retention tasks above chance whose items all have the measure."""
        return [t for t in retention_tasks(self.first) if self._change(t, runs, measure.value, sign=1.0) is not None]

    def scored(self, tasks: Sequence[str], runs: Sequence[str]) -> Change | None:
        """tuned − base of the items' scores, or None without tasks or where one is not known of every item."""
        changes = [self._change(task, runs, "score", sign=1.0) for task in tasks]
        return Change(tasks=changes) if changes and all(change is not None for change in changes) else None

    def scores(self, task: str, runs: Sequence[str]) -> np.ndarray:
        """The items' scores of a task that is `scored`, (S runs, n items)."""
        base = self.base["score"].to_numpy(dtype=float)[self._places[task]]
        return self.scored([task], runs).tasks[0] + base

    def per_token(self, task: str, runs: Sequence[str]) -> Change | None:
        """Nats per token gained on a task's rows: of their labelled text, or of the right answers."""
        return self._per_token(task, runs, "log_likelihood")

    def tokens_of(self, task: str) -> np.ndarray | None:
        """The tokens of a task's items, (n,), or None where they are not known."""
        tokens = self._tokens[self._places[task]] if self.known and task in self._places else np.array([np.nan])
        return None if np.isnan(tokens).any() else tokens

    def of_task(self, task: str, runs: Sequence[str], *, value: str) -> Change | None:
        """What is lost per item of one task in `value`, a column of the items."""
        change = self._change(task, runs, value, sign=-1.0)
        return None if change is None else Change(tasks=[change])

    def _per_token(self, task: str, runs: Sequence[str], value: str) -> Change | None:
        change, tokens = self._change(task, runs, value, sign=1.0), self.tokens_of(task)
        if change is None or tokens is None or not tokens.sum():
            return None
        return Change(tasks=[change * tokens if value in DIVERGENCES else change], tokens=tokens)

    def _change(self, task: str, runs: Sequence[str], value: str, *, sign: float) -> np.ndarray | None:
        """sign · (tuned − base), (S runs, n items); None if a number is missing or infinite."""
        expected = self.first["n"].get("general_text" if task == GENERAL_TEXT else task)
        if not self.known or task not in self._places or expected not in (None, len(self._places[task])):
            return None
        if value not in self._wide:
            self._wide[value] = self._matched(value)
        if (wide := self._wide[value]) is None:
            return None
        change = sign * wide[[self.column[run] for run in runs]][:, self._places[task]]
        return change if np.isfinite(change).all() else None

    def _matched(self, value: str) -> np.ndarray | None:
        """tuned − base of every item of the base, (cells, items), missing where a cell lacks it; a divergence as is."""
        if value not in self.tuned or (value not in self.base and value not in DIVERGENCES):
            return None
        wide, known = np.full((len(self.column), len(self.base)), np.nan), self._row >= 0
        wide[self._cell[known], self._row[known]] = self.tuned[value].to_numpy(dtype=float)[known]
        if value in DIVERGENCES:
            return np.where(self._tokens == 0, 0.0, wide)  # an empty passage has none
        return wide - self.base[value].to_numpy(dtype=float)


def intervals_in_nats(changes: Changes, runs: Sequence[str]) -> dict[str, Interval]:
    """key -> the interval of every measure that is known of `runs`, and of the domain's gain in nats."""
    found = {measure.key: changes.of(measure, runs) for measure in NATS}
    found[DOMAIN] = changes.per_token(changes.first["domain"], runs)
    return {key: change.interval for key, change in found.items() if change is not None}
