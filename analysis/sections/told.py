"""Which methods are told apart from plain fine-tuning, and by which measures."""

from collections.abc import Collection

import pandas as pd

from analysis.measures import FORGETTING
from analysis.roles import PLAIN
from analysis.statistics.detectable import LEVEL

MEASURES = dict(zip(FORGETTING, ("text", "KL", "answers", "margin", "accuracy")))
MIXED = "remedy and text together"


def with_told(table: pd.DataFrame, tests: pd.DataFrame, *, mixed: Collection[str] = ()) -> pd.DataFrame:
    """The comparison with three columns: how each method differs from plain fine-tuning.

    told          'less', 'more' or 'no' by the measure that resolves most; None without several seeds
    told_detects  of a 'no', the true difference in that measure that 80 of 100 such studies would find
    told_also     the other measures that tell the two apart, 'also KL, answers; more by margin'

    mixed  methods that train on general text, whose difference is that of remedy and text together
    """
    tests = tests[(tests["family"] == PLAIN) & ~tests["descriptive"].astype(bool)]
    by_method = {key: own.set_index("measure") for key, own in tests.groupby(["model", "domain", "a"], sort=False)}
    told, detects, also = [], [], []
    for row in table.itertuples():
        own = by_method.get((row.model, row.domain, row.method))
        sides = {} if own is None else {key: _side(own.loc[key]) for key in MEASURES if key in own.index}
        main = next(iter(sides), None)
        told.append(first := sides.pop(main, None))
        detects.append(own.loc[main]["detectable"] if first == "no" else None)
        others = {side: [MEASURES[key] for key, its in sides.items() if its == side] for side in ("less", "more")}
        texts = {side: "also" if side == first else f"{side} by" for side in others}
        names = "; ".join(f"{texts[side]} {', '.join(names)}" for side, names in others.items() if names)
        also.append(MIXED if first and row.method in mixed else names)
    return table.assign(told=told, told_detects=pd.Series(detects, index=table.index, dtype=float), told_also=also)


def _side(test: pd.Series) -> str:
    return "no" if not test["p_holm"] < LEVEL else "less" if test["difference"] < 0 else "more"
