"""The difference that a study can find: in 80 of 100 studies, by the test that is used."""

import numpy as np
from scipy.special import nctdtr
from scipy.stats import t as student

LEVEL = 0.05
POWER = 0.8


def detectable(error: np.ndarray, df: np.ndarray, *, tests: int, power: float = POWER) -> np.ndarray:
    """The true difference that is found with chance `power` at the first step of Holm's correction for `tests` tests.

    δ with P(T ≥ t(1 − .05 / (2 · tests), df)) = power for T of `df` degrees of freedom and noncentrality δ / error; the
    chance to find it with the wrong sign is left out.
    """
    error, df = np.broadcast_arrays(np.asarray(error, dtype=float), np.minimum(np.asarray(df, dtype=float), 1e6))
    shown, place = np.unique(np.round(df, 2), return_inverse=True)
    bound = student.ppf(1 - LEVEL / (2 * tests), shown)
    low, high = np.zeros_like(bound), 10 + 10 * bound
    for _ in range(20):
        middle = (low + high) / 2
        missed = nctdtr(shown, middle, bound) > 1 - power
        low, high = np.where(missed, middle, low), np.where(missed, high, middle)
    return error * high[place].reshape(df.shape)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values (Holm 1979): the running maximum of (m − rank + 1) p, at most 1."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    raised = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    corrected = np.empty_like(raised)
    corrected[order] = raised
    return corrected
