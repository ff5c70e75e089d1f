"""The first page's table and figure: every method of every comparison, and what other studies add."""

from collections.abc import Collection

import pandas as pd

from analysis import numbers, style, units, words
from analysis.chosen import choices, reported_names
from analysis.families import families, family
from analysis.load import Loaded
from analysis.measures import ACCURACY, GENERAL
from analysis.roles import PLAIN
from analysis.sections.columns import Column, columns
from analysis.statistics.comparison import comparison
from analysis.statistics.front import nondominated
from analysis.statistics.nats import DOMAIN


def table(loaded: Loaded, compared: pd.DataFrame, beside: pd.DataFrame) -> tuple[list[str], list[dict]]:
    """Heads and rows of the one table, as macros.html.j2 draws it: a group of rows a (model, domain).

    Settings of a method other than the chosen one, and methods of other studies, are muted.
    """
    if compared.empty:
        return [], []
    shown, rows, chosen = columns(compared), [], reported_names(loaded)
    for model, domain in loaded.comparisons:
        rows.append({"title": f"{model} on {domain}"})
        own = compared[(compared["model"] == model) & (compared["domain"] == domain)]
        shades = colours(labelled(loaded, points(loaded, own, beside[:0])))
        for _, row in own[own["method"] != "base"].iterrows():
            aside = f"{model}/{domain}/{row['method']}" not in chosen
            shade = shades.get(family(row["method"]), style.FAINT)
            rows.append(row_of(row, shown) | {"class": "aside" if aside else "", "colour": shade})
        there = beside[(beside["model"] == model) & (beside["domain"] == domain)] if len(beside) else beside
        if len(there):  # methods of which this study has no setting, each at its chosen one
            there = there[~there["method"].map(family).isin(own["method"].map(family)) & there["chosen"]]
        for _, row in there.iterrows():
            made = row_of(row, shown)
            note = ", ".join(filter(None, (row["study"], made["note"])))
            rows.append(made | {"class": "aside", "note": note, "colour": ""})
    return [column.head.replace(", ", "|", 1) for column in shown], rows


def row_of(row: pd.Series, shown: list[Column]) -> dict:
    """A row of the comparison, each text split at its bracket into a value and small print below it."""
    name, *texts = (column.text(row) for column in shown)
    name, _, note = name.partition(" (")
    cells = [text.partition(" [")[::2] for text in texts]
    return {
        "name": name,
        "note": note.rstrip(")"),
        "colour": "" if row["method"] == "base" else style.colour(row["method"]),
        "cells": [(value, _bracketed(rest)) for value, rest in cells],
    }


def _bracketed(rest: str) -> str:
    """The inside of a bracket; an interval, of two numbers, keeps it."""
    inside = rest.rstrip("]")
    return f"[{rest}" if ", " in inside and inside[:1] in f"+{numbers.MINUS}0123456789" else inside


def also(loaded: Loaded) -> pd.DataFrame:
    """The comparison of the cells of other studies, with `study`, and `chosen` of the setting chosen on probe rows."""
    frames = []
    for study, other in loaded.also.items():
        picked, made = reported_names(other), comparison(other)
        names = made["model"] + "/" + made["domain"] + "/" + made["method"]
        frames.append(made[made["method"] != "base"].assign(study=study, chosen=names.isin(picked)))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def points(loaded: Loaded, compared: pd.DataFrame, beside: pd.DataFrame) -> pd.DataFrame:
    """Gain and loss of every setting with their bounds: of domain and general text in nats where both are known.

    Columns: model, domain, study ('' of its own), method, family, value (of the setting in which a family's methods
    differ), gain and lost, each with _low and _high, unit, measure. A family's rows are in the order of their values.
    """
    own = compared[compared["method"] != "base"].assign(study="") if len(compared) else compared
    rows, made = pd.concat([own, beside]) if len(beside) else own, []
    for (model, domain), group in rows.groupby(["model", "domain"], sort=False) if len(rows) else ():
        gain, unit, more = _best_known(group, DOMAIN, "domain_gain")
        lost, measure, of_lost = _best_known(group, GENERAL.key, ACCURACY)
        data = group[["model", "domain", "study", "method"]].assign(unit=unit, measure=measure)
        data["family"] = data["method"].map(family)
        data["value"] = _values(loaded, data, model=model, domain=domain)
        for name, key, scale in (("gain", gain, more), ("lost", lost, of_lost)):
            for end in ("", "_low", "_high"):
                data[name + end] = scale * group[key + end].astype(float)
        place = {name: number for number, name in enumerate(dict.fromkeys(data["family"]))}
        data["place"] = data["family"].map(place)
        data = data.dropna(subset=["gain", "lost"]).sort_values(["place", "value", "lost"], kind="stable")
        made.append(data.drop(columns="place"))
    return pd.concat(made, ignore_index=True) if made else pd.DataFrame()


def _values(loaded: Loaded, data: pd.DataFrame, *, model: str, domain: str) -> pd.Series:
    """The value of the setting in which a family's methods differ, NaN where it is no number."""
    studies = {"": loaded, **loaded.also}
    known = {study: choices(studies[study], model=model, domain=domain) for study in data["study"].unique()}
    found = {(study, row.method): row.value for study, table in known.items() for row in table.itertuples()}
    values = [found.get(key) for key in zip(data["study"], data["method"])]
    return pd.to_numeric(pd.Series(values, index=data.index, dtype=object), errors="coerce")


def _best_known(rows: pd.DataFrame, *keys: str) -> tuple[str, str, float]:
    """The first of two columns, in nats, if it is known of every row, else the second; its unit and its scale."""
    in_nats, other = keys
    if in_nats in rows and rows[in_nats].notna().all():
        return in_nats, "nats per token", 1.0
    unit = rows["unit"].iloc[0] if other == "domain_gain" and "unit" in rows else units.SHARE
    return other, units.named(unit), 100.0 if unit == units.SHARE else 1.0


def labelled(loaded: Loaded, data: pd.DataFrame) -> list[str]:
    """The families with a colour and a name: plain fine-tuning, leaders and compositions; without named leaders all of
    them, or, of more than style.MANY, those that no other exceeds in both gain and loss."""
    methods = list(data[data["study"] == ""]["method"])
    own = families(methods)
    shown = {PLAIN, *map(family, [*loaded.roles.leading(methods), *loaded.roles.composed(methods)])}
    if not loaded.roles.leaders and len(own) <= style.MANY:
        return list(own)
    if not loaded.roles.leaders:
        best = data[(data["study"] == "") & nondominated(data["gain"], data["lost"])]
        shown = {PLAIN, *best["family"], *map(family, loaded.roles.composed(methods))}
    return [name for name in own if name in shown]


def colours(named: Collection[str]) -> dict[str, str]:
    """A colour for each named family, its own unless another one has it already."""
    made: dict[str, str] = {}
    for name in named:
        free = [shade for shade in (*style.FIXED.values(), *style.OTHERS) if shade not in made.values()]
        shade = style.INK if name == PLAIN else style.colour(name)
        made[name] = free[-1] if shade in made.values() and free else shade
    return made


def figure(loaded: Loaded, data: pd.DataFrame, *, phone: bool = False):
    """Gain against loss, a panel for each (model, domain), with a curve through each method's settings."""
    pairs = list(data.groupby(["model", "domain"], sort=False))
    columns_ = 1 if phone or len(pairs) == 1 else 2
    lines = -(-len(pairs) // columns_)
    width, height = (3.75, 3.0) if phone else (style.WIDTH, 3.9) if columns_ == 1 else (9.6, 3.7)
    drawn, panels = style.new(width, height * lines, lines, columns_, squeeze=False)
    outside, wide, labels = 0, [], []
    for axes, ((model, domain), own) in zip(panels.flat, pairs):
        beyond, without, texts, bars = _panel(axes, own, named=labelled(loaded, own))
        outside += beyond
        labels.append((axes, texts, bars))
        wide += [f"{width:.2g} {own['unit' if key == 'gain' else 'measure'].iloc[0]} ({key})" for key, width in without]
        axes.set_title(style.where(loaded.of(model, domain)))
        unit = own["measure"].iloc[0]
        of = "" if phone else " of general text" if unit == "nats per token" else " of right answers"
        axes.set_xlabel(f"{own['unit'].iloc[0]} gained on {domain} (right is better)")
        axes.set_ylabel(f"{unit}{of} lost (down is better)")
    for axes in list(panels.flat)[len(pairs) :]:
        axes.set_axis_off()
    drawn.draw_without_rendering()  # once for all panels, whose places labels depend on
    for axes, texts, bars in labels:
        style.label_points(axes, texts, bars=bars, size=8)
    swept = (data.groupby(["model", "domain", "study", "family"]).size() > 1).any()
    caption = "Each point is a method" + (" at one setting; lines join the settings of a method." if swept else ".")
    caption += " Light bars are 95 % confidence intervals."
    if wide:
        caption += (
            f" Those that do not fit the axes, of up to {words.few(dict.fromkeys(wide))}, stand in the table alone;"
        )
        caption += " the intervals of differences stand with the tests."
    if loaded.also:
        caption += f" Grey without a name: other methods, and one-seed runs of {words.few(loaded.also)}."
    if outside:
        caption += f" {outside} grey point{'s lie' if outside > 1 else ' lies'} outside the axes; the CSV has all."
    return drawn, data, "Gain against forgetting", caption


def _panel(axes, data: pd.DataFrame, *, named: Collection[str]) -> tuple[int, list[tuple[str, float]], list, list]:
    """Draw one panel without its labels: how many grey points lie outside it, each axis whose bars are left out with
    the widest's width, and the points to label and the bars that `style.label_points` keeps them away from."""
    front = data["family"].isin(named) & (data["study"] == "")
    ends = {key: _cut(axes, data, front, key) for key in ("gain", "lost")}
    texts, lines, shades = [], [], colours(named)
    for (_, name, bright), own in data.assign(bright=front).groupby(["study", "family", "bright"], sort=False):
        if not bright:
            axes.plot(
                own["gain"], own["lost"], "o-", color=style.FAINT, markersize=2.6, linewidth=0.7, alpha=0.8, zorder=1
            )
            continue
        shade = shades[name]
        axes.plot(
            own["gain"], own["lost"], color=shade, marker=style.marker(name), markersize=5, linewidth=1.5, zorder=3
        )
        for point in own.itertuples():
            each = {
                "gain": (point.gain_low, point.lost, point.gain_high, point.lost),
                "lost": (point.gain, point.lost_low, point.gain, point.lost_high),
            }
            for key, (x0, y0, x1, y1) in each.items():
                if ends[key] is None:
                    axes.plot([x0, x1], [y0, y1], color=shade, linewidth=0.9, alpha=0.35, zorder=2)
                    lines.append((x0, y0, x1, y1))
        last = own.iloc[-1]
        texts.append((last["gain"], last["lost"], name, shade))
        lines += list(zip(own["gain"], own["lost"], own["gain"].shift(-1), own["lost"].shift(-1)))[:-1]
    bars = [bar for bar in lines if not any(map(numbers.missing, bar))]
    inside = data["gain"].between(*axes.get_xlim()) & data["lost"].between(*axes.get_ylim())
    return int((~inside).sum()), [(key, width) for key, width in ends.items() if width is not None], texts, bars


def _cut(axes, data: pd.DataFrame, front: pd.Series, key: str) -> float | None:
    """Cut an axis to the points with a name, their bars, and others that lie near them.

    Bars that would make it more than twice as long are left out; the result is then the width of the widest.
    """
    main = data[front] if front.any() else data
    low, high = main[key].min(), main[key].max()
    reach = 0.5 * (high - low) or abs(high) or 1.0
    near = data[data[key].between(low - reach, high + reach)][key]
    low, high, wide = near.min(), near.max(), None
    least, most = min(low, main[f"{key}_low"].min()), max(high, main[f"{key}_high"].max())
    if low < high and most - least > 2 * (high - low):
        wide = float((main[f"{key}_high"] - main[f"{key}_low"]).max())
    else:
        low, high = least, most
    margin = 0.09 * (high - low) or 0.1 * reach
    (axes.set_xlim if key == "gain" else axes.set_ylim)(low - margin, high + margin)
    if key == "lost" and low - margin < 0 < high + margin:
        axes.axhline(0, color=style.MUTED, linewidth=0.8, zorder=1)
    return wide
