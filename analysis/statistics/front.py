"""Every setting of one comparison in the plane of gain and loss, both in nats: the data of the report's figure."""

import numpy as np
import pandas as pd

from analysis.chosen import choices
from analysis.families import family
from analysis.load import Loaded
from analysis.measures import ACCURACY, BY_KEY, GENERAL
from analysis.statistics.nats import DOMAIN
from analysis.statistics.resample import Resampled

MEASURED = (DOMAIN, *BY_KEY, ACCURACY)


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


def points(
    loaded: Loaded, rows: pd.DataFrame, *, model: str, domain: str, draws: Resampled | None = None
) -> pd.DataFrame:
    """One row per setting whose gain and loss of general text are known, the settings of a family in their order.

    rows    those of the comparison table (analysis/statistics/comparison.py), which has means over seeds and intervals
    draws   `resampled` of the same, for `front_share`

    method, family, seeds
    setting, value      what the family's settings differ in, '' and None if it is not one setting
    KEY, KEY_low, KEY_high
                        of MEASURED: the gain of the domain in nats per token, and what was lost by each measure
    chosen, tied, end   as in `choices`
    front, front_share  whether no other setting gains as much and loses as little general text, and in what share of
                        the redraws
    """
    rows = rows[rows["method"] != "base"]
    if not {DOMAIN, GENERAL.key} <= set(rows):
        return pd.DataFrame(columns=["method", "family", DOMAIN, GENERAL.key, "chosen", "front"])
    rows = rows.dropna(subset=[DOMAIN, GENERAL.key])
    keys = [key + end for key in MEASURED for end in ("", "_low", "_high") if key + end in rows]
    data = rows[["method", "seeds", *keys]].astype(dict.fromkeys(keys, float)).reset_index(drop=True)
    data.insert(1, "family", [family(method) for method in data["method"]])
    about = choices(loaded, model=model, domain=domain).set_index("method")
    data = data.join(about[["setting", "value", "chosen", "tied", "end"]], on="method")
    data["front"] = nondominated(data[DOMAIN], data[GENERAL.key])
    data["front_share"] = np.nan
    if draws is not None and GENERAL.key in draws.draws and len(data):
        columns = [draws.methods.index(method) for method in data["method"]]
        gains, losses = draws.draws[DOMAIN][:, columns], draws.draws[GENERAL.key][:, columns]
        if not np.isnan(gains).any() and not np.isnan(losses).any():
            data["front_share"] = nondominated(gains, losses).mean(axis=0)
    place = {name: number for number, name in enumerate(dict.fromkeys(data["family"]))}
    data["value"] = [None if isinstance(value, float) and value != value else value for value in data["value"]]
    return data.sort_values(
        ["family", "value"], key=lambda column: _order(column, place), kind="stable", ignore_index=True
    )


def _order(column: pd.Series, place: dict[str, int]) -> pd.Series:
    if column.name == "family":
        return column.map(place)
    return pd.to_numeric(column, errors="coerce").fillna(0.0)  # values that are no numbers stay in the grid's order
