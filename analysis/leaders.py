"""Rank the families of a study by what they lose on general probe text at one gain on the domain's probe rows.

A screen chooses which methods are worth five seeds, and must not choose by the rows that those seeds are scored on: it
reads probe rows alone. Two numbers are taken of each setting, at the weights that its run delivers (`chosen.probed`):
the nats per token gained on the domain's probe rows and lost on the general ones, against the base. A family's curve
through its settings is that of the matched gain (analysis/statistics/matched.py). All families are compared at

    L = SHARE · the gain of plain fine-tuning at its chosen setting

and ordered by their loss there. A family that gains more than L at its first setting has that setting's loss, which is
too high; one that never gains L has none.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis import chosen
from analysis.families import families
from analysis.load import Loaded
from analysis.roles import PLAIN
from analysis.statistics.matched import curve

SHARE = 0.95
COLUMNS = ["family", "lost", "chosen", "gains", "losses"]


def ranking(loaded: Loaded, *, model: str, domain: str) -> tuple[float, pd.DataFrame]:
    """L in nats per token, and one row per family in the order of its loss at L; those without one come last.

    lost           nats per token of general probe text at L; NaN for a family that never gains L
    chosen         the setting with the least domain nats
    gains, losses  of each setting, {method: nats per token}

    Raises ValueError where plain fine-tuning was not probed, or no run that starts from the base.
    """
    domain_nats = chosen.probed(loaded, f"{domain}_nll", model=model, domain=domain)
    general_nats = chosen.probed(loaded, "general_nll", model=model, domain=domain)
    runs = [run for run in domain_nats if run in general_nats]
    base = _base(loaded, domain_nats, general_nats, model=model, domain=domain)
    table, rows = {}, []
    for method in dict.fromkeys(method for method, _ in runs):
        own = [run for run in runs if run[0] == method]
        ends = (float(np.mean([nats[run][1] for run in own])) for nats in (domain_nats, general_nats))
        table[method] = base[0] - next(ends), next(ends) - base[1]
    best = {name: chosen.chosen(loaded, name, model=model, domain=domain) for name in families(table)}
    if best.get(PLAIN) not in table:
        raise ValueError(f"{PLAIN} was not probed on {domain}")
    level = SHARE * table[best[PLAIN]][0]
    for name, own in families(table).items():
        gains, losses = (np.array([table[method][k] for method in own]) for k in (0, 1))
        lost = float(curve(gains, losses).at(level, bound=True))
        about = [{method: table[method][k] for method in own} for k in (0, 1)]
        rows.append((name, lost, best[name], *about))
    return level, pd.DataFrame(rows, columns=COLUMNS).sort_values("lost", kind="stable", ignore_index=True)


def _base(loaded: Loaded, *probes: Mapping, model: str, domain: str) -> list[float]:
    """What the bare base has in each of the probes: their values before the first step of a run that starts from it.

    A method whose preparation trains starts elsewhere, and its own first probe would hide what the preparation did.
    """
    for cell, row in loaded.of(model, domain).iterrows():
        run = row["method"], int(row["seed"])
        firsts = [probe[run][0] for probe in probes if run in probe]
        known = len(firsts) == len(probes) and not np.isnan(firsts).any()
        if known and not loaded.prepared.get(cell, {}).get("bytes_start"):
            return firsts
    raise ValueError(f"no run on {domain} that starts from the base was probed before its first step")
