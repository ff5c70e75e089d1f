"""The front of gain against loss over all settings of one comparison, both in nats."""

import numpy as np
import pandas as pd

from analysis.measures import GENERAL
from analysis.statistics.nats import DOMAIN
from analysis.statistics.resample import Resampled


def nondominated(gain: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Which of (..., k) points are not dominated by another or by the bare base (0, 0).

    A point is dominated by one that gains as much and loses as little, with at least one of them strictly better.
    """
    gain, lost = np.asarray(gain, float), np.asarray(lost, float)
    pad = [(0, 0)] * (gain.ndim - 1) + [(0, 1)]  # the base is a choice too
    gain, lost = np.pad(gain, pad), np.pad(lost, pad)
    g, f = gain[..., :, None], lost[..., :, None]
    others_g, others_f = gain[..., None, :], lost[..., None, :]
    dominated = (others_g >= g) & (others_f <= f) & ((others_g > g) | (others_f < f))
    return ~dominated.any(axis=-1)[..., :-1]


def front(made: Resampled) -> pd.DataFrame:
    """One row per method whose gain and loss of general text are known: method, gain, lost, front, share.

    front  whether no other method, nor the bare base, gains as much and loses as little
    share  of the redraws in which it is so; NaN where items are missing
    """
    data = pd.DataFrame({"method": made.methods, "gain": made.values[DOMAIN], "lost": made.values[GENERAL.key]})
    known = data.notna().all(axis=1).to_numpy()
    data = data[known].reset_index(drop=True)
    data["front"] = nondominated(data["gain"], data["lost"])
    gains, losses = made.draws[DOMAIN][:, known], made.draws[GENERAL.key][:, known]
    complete = not np.isnan(gains).any() and not np.isnan(losses).any()
    return data.assign(share=nondominated(gains, losses).mean(axis=0) if complete else np.nan)
