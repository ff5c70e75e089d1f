"""The columns of the comparison: what was learned, what was forgotten, what it cost."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd

from analysis import numbers, units
from analysis.measures import ACCURACY, GENERAL, GOLD, KL, NATS
from analysis.sections.start import UNSETTLED
from analysis.statistics.nats import DOMAIN

GAIN, GAIN_NATS, FORGETTING = "gain, points", "gain, nats/token", "forgetting, points"
TOLD = "forgets less or more than full?"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the comparison: its head, and the text of a row of `comparison`.

    short     its head in the terminal, and `brief` its text there, if they differ
    terminal  whether the terminal shows it, which has room for some 150 characters
    """

    head: str
    text: Callable[[pd.Series], str]
    short: str = ""
    brief: Callable[[pd.Series], str] | None = None
    terminal: bool = True


def columns(rows: pd.DataFrame) -> list[Column]:
    """The ten columns of the comparison: what was learned, what was forgotten by each measure, what it cost.

    A measure that is known of no method, as in results before it was recorded, has no column.
    """
    known, most = _knows(rows), rows["seeds"].max()
    made = [Column(head="method", text=partial(_method, most=most), brief=_named)]
    if known(DOMAIN):
        made.append(Column(head=GAIN_NATS, text=lambda row: _bounded(row, DOMAIN, numbers.nats)))
    else:
        made.append(_gain(rows))
    made += [
        Column(
            head=measure.head,
            short=SHORT.get(measure.key, ""),
            text=lambda row, m=measure: _bounded(row, m.key, m.show),
            brief=lambda row, m=measure: _bounded(row, m.key, m.show, interval=m not in (KL, GOLD)),
            terminal=measure.key in SHORT,
        )
        for measure in NATS
        if known(measure.key)
    ]
    made.append(Column(head=FORGETTING, text=lambda row: _bounded(row, ACCURACY, numbers.points)))
    if known("told"):
        made.append(Column(head=TOLD, short="against full", text=_told, brief=partial(_told, all_measures=False)))
    return made + [
        Column(
            head="training, + preparation",
            short="train",
            text=_seconds,
            brief=lambda row: _cost(row, "seconds_train", numbers.seconds),
        ),
        Column(head="bytes to keep, + importance", text=_kept, terminal=False),
    ]


def others(rows: pd.DataFrame) -> list[Column]:
    """The columns behind the comparison: the gain in every other unit, perplexity, preparation and numbers of rows."""
    known, of_text = _knows(rows), _of_text(rows)
    made = [
        Column(head="method", text=lambda row: row["method"]),
        Column(
            head="nats/token" if of_text else "score %",
            text=lambda row: _score(row, metric=not of_text),
            brief=lambda row: _score(row, metric=not of_text, interval=False),
        ),
    ]
    if known(DOMAIN) and not of_text:
        made.append(_gain(rows))
    if of_text and known("domain_bits_per_byte"):
        made.append(Column(head="bits/byte", text=lambda row: _plain(row, "domain_bits_per_byte"), terminal=False))
    for key in units.gains(rows):
        task = key.removeprefix("gain_")
        unit = rows.loc[rows["method"] != "base", f"unit_{task}"].iloc[0]
        show = partial(units.change, unit=unit)
        made.append(
            Column(
                head=f"{task}: gain, {units.named(unit)}",
                short=f"{task}: gain",
                text=lambda row, key=key, show=show: _bounded(row, key, show),
                brief=lambda row, key=key, show=show: _bounded(row, key, show, interval=False),
            )
        )
    for key, what in ((DOMAIN, "gain"), (GENERAL.key, "text lost")):
        if known(column := f"{UNSETTLED}{key}"):
            text = partial(_bounded, key=column, show=numbers.nats)
            made.append(Column(head=f"{what} against the unsettled base, nats/token", text=text, terminal=False))
    return made + [
        Column(head="perplexity", text=_perplexity, terminal=False),
        Column(head="prepare", text=lambda row: _cost(row, "seconds_prepare", numbers.seconds), terminal=False),
        Column(head="n", text=lambda row: f"{row['n_domain']} + {row['n_retention']}", terminal=False),
    ]


SHORT = {"general_nll_lost": "text lost, nats", "general_kl": "KL", "gold_nll_lost": "answers lost, nats"}


def _knows(rows: pd.DataFrame) -> Callable[[str], bool]:
    """Whether a column is there and known of any method."""
    return lambda key: key in rows and bool(rows.loc[rows["method"] != "base", key].notna().any())


def _of_text(rows: pd.DataFrame) -> bool:
    return bool((rows["metric"] == units.PER_TOKEN).all())


def _method(row: pd.Series, *, most: int) -> str:
    """A method, what it saw beside the domain, which is part of its name, and its seeds if others have more."""
    beside = [row.get(key) for key in ("tokens_prepare", "tokens_added")]
    tokens = sum(value for value in beside if not numbers.missing(value))
    about = [f"+{tokens:,.0f} tokens"] if tokens else []
    if 0 < row["seeds"] < most:
        about.append(f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}")
    return _named(row) + (f" ({', '.join(about)})" if about else "")


def _named(row: pd.Series) -> str:
    """A method, with a star if the legend has a note about it."""
    return row["method"] + ("*" if row.get("note") and isinstance(row["note"], str) else "")


def _score(row: pd.Series, *, metric: bool, interval: bool = True) -> str:
    unit = row.get("unit", units.SHARE)
    # the heads of the columns name the unit of shares; any other is written behind the number
    after = "" if unit == units.SHARE or not metric else f" {row['metric']}"
    bounds = _range(row, "domain_score", lambda value: units.level(value, unit)) if interval else ""
    return f"{units.level(row['domain_score'], unit)}{after}{bounds}"


def _gain(rows: pd.DataFrame) -> Column:
    """The gain in the unit of the domain's own metric."""
    of_text = _of_text(rows)

    def text(row: pd.Series, *, interval: bool = True) -> str:
        own = row.get("unit", units.SHARE)
        after = "" if own in (units.SHARE, row["metric"]) or of_text else f" {own}"
        show = numbers.nats if row["metric"] == units.PER_TOKEN else partial(units.change, unit=own)
        return _bounded(row, "domain_gain", show, after=after, interval=interval)

    return Column(head=GAIN_NATS if of_text else GAIN, text=text, brief=partial(text, interval=False))


def _told(row: pd.Series, *, all_measures: bool = True) -> str:
    """Whether a method is told apart from plain fine-tuning by general text, and in brackets by other measures."""
    if numbers.missing(row.get("told")):
        return "" if row["method"] == "base" else "–"
    detects = "" if numbers.missing(row["told_detects"]) else f", detects {row['told_detects']:.2g}"
    return row["told"] + detects + (f" [{row['told_also']}]" if row["told_also"] and all_measures else "")


def _seconds(row: pd.Series) -> str:
    """Seconds of training, and in brackets of a preparation."""
    prepared = row.get("seconds_prepare")
    some = not numbers.missing(prepared) and prepared >= 0.0005
    return _cost(row, "seconds_train", numbers.seconds) + (f" [+ {numbers.seconds(prepared)}]" if some else "")


def _kept(row: pd.Series) -> str:
    """Bytes of weights or adapter, and in brackets of importance and anchor."""
    more = row.get("bytes_stored")
    some = not numbers.missing(more) and more > 0
    return _cost(row, "bytes_weights_delta", numbers.size) + (f" [+ {numbers.size(more)}]" if some else "")


def _bounded(row: pd.Series, key: str, show, *, after: str = "", interval: bool = True) -> str:
    """A method's number with its interval; nothing for the base, from which all differences are."""
    if row["method"] == "base" and row["seeds"] == 0:
        return ""
    return f"{show(row[key])}{after}{_range(row, key, show) if interval else ''}"


def _cost(row: pd.Series, key: str, show) -> str:
    return "" if row["method"] == "base" else show(row.get(key))


def _plain(row: pd.Series, key: str) -> str:
    return "–" if numbers.missing(row.get(key)) else f"{row[key]:.3f}"


def _perplexity(row: pd.Series) -> str:
    if row["method"] == "base":
        return f"{row['perplexity']:.1f}"
    if numbers.missing(row["perplexity_ratio"]):
        return "–"
    return f"×{row['perplexity_ratio']:.2f}{_range(row, 'perplexity_ratio', '{:.2f}'.format)}"


def _range(row: pd.Series, key: str, show) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if numbers.missing(low) or numbers.missing(high) else f" [{show(low)}, {show(high)}]"
