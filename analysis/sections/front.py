"""The front of gain against loss, both in nats, in sentences: settings that no other exceeds in both."""

import pandas as pd

from analysis import numbers, words
from analysis.chosen import settings_said
from analysis.load import Loaded
from analysis.measures import GENERAL
from analysis.statistics.contrasts import redrawn
from analysis.statistics.front import points
from analysis.statistics.nats import DOMAIN


def section(loaded: Loaded, rows: pd.DataFrame, *, model: str, domain: str) -> list[str]:
    """Sentences about the front of one comparison and the settings on it; none for fewer than two settings."""
    data = points(loaded, rows, model=model, domain=domain, draws=redrawn(loaded, model=model, domain=domain))
    if len(data) < 2:
        return []
    best, said = data[data["front"]].sort_values(DOMAIN), settings_said(loaded, model=model, domain=domain)
    if best.empty:
        none = "No setting is on the front of gain against loss: the bare base gains as much and loses as little."
        return [none, *said]
    return [f"On the front of gain against loss: {words.few(map(_place, best.to_dict('records')), join='; ')}.", *said]


def _place(point: dict) -> str:
    share = point["front_share"]
    share = "" if numbers.missing(share) else f", in {100 * share:.0f} % of the redraws"
    return f"{point['method']} ({numbers.nats(point[DOMAIN])} gained, {numbers.nats(point[GENERAL.key])} lost{share})"
