"""What one run shows, over its items alone: sign flips of a difference, and right answers lost and gained.

Both describe runs. Neither is about a method, whose other seeds differ: as a test of that a sign flip would find a
difference in 15 to 50 of 100 studies without one (docs/rules.md).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from analysis.load import Loaded
from analysis.statistics.intervals import paired

FLIPS = 10_000
AT_ONCE = 4_000_000  # signs held at a time


def sign_flips(tasks: Sequence[np.ndarray], *, flips: int = FLIPS, seed: int = 0) -> np.ndarray:
    """Two-sided p of K mean differences over items, by flipping the signs of items (Fisher's randomisation test).

    tasks: one array (n_t items, K) of differences per task; a difference is the mean over tasks of the means over
    items. `flips` patterns are drawn, the same for all K, and p = (1 + #{|T*| ≥ |T|}) / (1 + flips), which is never 0
    (Phipson and Smyth 2010). Returns (K,).
    """
    values = np.concatenate([differences / len(differences) for differences in tasks])
    values = (values / np.abs(values).max(axis=0).clip(min=1e-300)).astype(np.float32)
    draw, total = np.random.default_rng(seed), values.sum(axis=0)
    least = np.abs(total) * (1 - 1e-5)  # equal up to rounding counts as extreme
    reached, at_once = np.zeros(values.shape[1]), max(1, AT_ONCE // len(values))
    for start in range(0, flips, at_once):
        bits = draw.integers(0, 256, (min(at_once, flips - start), -(-len(values) // 8)), dtype=np.uint8)
        positive = np.unpackbits(bits, axis=1, count=len(values)).astype(np.float32)
        reached += (np.abs(2 * positive @ values - total) >= least).sum(axis=0)
    return (1 + reached) / (1 + flips)


def mcnemar(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """Right answers lost and gained against the base by method, seed and task, with McNemar's exact p, not corrected.

    Columns method, seed, task, role, n, lost, gained, p. Tasks whose items are not scored 0 or 1 are left out. p is
    two-sided, of `lost` in lost + gained at one half (McNemar 1947), and 1 if no item changed.
    """
    columns = ["method", "seed", "task", "role", "n", "lost", "gained", "p"]
    cells, base = loaded.of(model, domain), loaded.base_items(model)
    tuned = loaded.items_of(cells)
    if base.empty or tuned.empty:
        return pd.DataFrame(columns=columns)
    rows, pairs = [], dict(list(paired(base, tuned).groupby("task")))
    for name, cell in cells[cells.index.isin(tuned["cell"])].iterrows():
        for task, about in cell["scores_by_task"].items():
            if task not in pairs:
                continue
            before, after = (pairs[task][column].to_numpy() for column in ("base", name))
            if about.get("subtasks"):  # an item's score is its part in the mean
                before, after = (before > 0) * 1, (after > 0) * 1
            if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
                lost, gained = int((before > after).sum()), int((before < after).sum())
                counts = (len(before), lost, gained, exact(lost, gained))
                rows.append((cell["method"], cell["seed"], task, about["role"], *counts))
    return pd.DataFrame(rows, columns=columns)


def exact(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p of `lost` against `gained` items."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
