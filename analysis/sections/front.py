"""The front of gain against loss, both in nats, in sentences: settings that no other exceeds in both."""

from analysis import numbers, words
from analysis.chosen import settings_said
from analysis.load import Loaded
from analysis.measures import GENERAL
from analysis.statistics.contrasts import redrawn
from analysis.statistics.front import front


def section(loaded: Loaded, *, model: str, domain: str) -> list[str]:
    """Sentences about the front of one comparison and how settings were chosen; none for fewer than two settings."""
    said, made = settings_said(loaded, model=model, domain=domain), redrawn(loaded, model=model, domain=domain)
    if made is None or GENERAL.key not in made.values or len(data := front(made)) < 2:
        return said
    best = data[data["front"]].sort_values("gain")
    if best.empty:
        none = "No setting is on the front of gain against loss: the bare base gains as much and loses as little."
        return [none, *said]
    return [f"On the front of gain against loss: {words.few(map(_place, best.itertuples()), join='; ')}.", *said]


def _place(point) -> str:
    share = "" if numbers.missing(point.share) else f", in {100 * point.share:.0f} % of the redraws"
    return f"{point.method} ({numbers.nats(point.gain)} gained, {numbers.nats(point.lost)} lost{share})"
