"""The answer in three sentences over all models and domains, every number computed from the comparison.

1. What plain fine-tuning gains and loses. 2. Which remedies forget less, at which gain. 3. What they cost, and what
could not be told apart. With one seed intervals are of the run, and nothing is said of methods.
"""

import pandas as pd

from analysis import numbers, units, words
from analysis.chosen import reported_names
from analysis.families import family
from analysis.load import Loaded
from analysis.measures import ACCURACY, BY_KEY, GENERAL
from analysis.roles import PLAIN
from analysis.sections import credit, matched
from analysis.statistics.detectable import LEVEL
from analysis.statistics.nats import DOMAIN

NAMED = 5  # methods named one by one in a sentence
SPELLED = 2  # pairs of model and domain that have a clause each; more are summed up


def sentences(loaded: Loaded, table: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Three sentences about all comparisons, each method at the setting that was chosen on probe rows.

    table   all rows of `comparison`
    tests   all rows of `all_tests`, which decide what is told apart
    """
    chosen = reported_names(loaded)
    names = table["model"] + "/" + table["domain"] + "/" + table["method"]
    of_chosen, parts = table[names.isin(chosen)], [[], [], []]
    costs, models = _costs(of_chosen), of_chosen["model"].nunique()
    if len(loaded.comparisons) > SPELLED and (many := _over_many(loaded, of_chosen, tests)):
        return [*many, _sentence([costs])]
    for model, domain in loaded.comparisons:
        rows, own = (frame[(frame["model"] == model) & (frame["domain"] == domain)] for frame in (of_chosen, tests))
        where = f"on {domain}" + (f" ({model})" if models > 1 else "")
        parts[0].append(_plain(rows, own, where=where))
        parts[1].append(_remedies(loaded, rows, own, where=where if len(loaded.comparisons) > 1 else ""))
        parts[2].append(_untold(loaded, rows, own, where=where if len(loaded.comparisons) > 1 else ""))
    return [_sentence(parts[0]), _sentence(parts[1]), _sentence([costs, *parts[2]])]


def _over_many(loaded: Loaded, rows: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """The first two sentences over many models and domains: ranges and counts; none without plain fine-tuning."""
    plain, key = rows[rows["method"].map(family) == PLAIN], GENERAL.key
    if plain.empty or not {DOMAIN, key} <= set(rows) or plain[[DOMAIN, key]].isna().any(axis=None):
        return []
    gained, lost = (_ends(plain, name, numbers.nats) for name in (DOMAIN, key))
    first = f"Over {len(plain)} pairs of model and domain plain fine-tuning gains {gained} nats per token"
    own = tests[(tests["family"] == PLAIN) & (tests["measure"] == key) & ~tests["descriptive"].astype(bool)]
    for side in ("a", "b"):  # both at the settings that were chosen
        own = own.merge(rows[["model", "domain", "method"]].rename(columns={"method": side}))
    own = own[own["a"].isin(loaded.roles.leading(own["a"])) & ~own["a"].isin(set(credit.apart(loaded)))]
    sure = own[own["p_holm"] < LEVEL]
    less, more = ((sure["difference"] * sign > 0).sum() for sign in (-1, 1))
    second = f"Of {len(own)} comparisons of a remedy with it, {less} show significantly less loss and {more} more"
    second += _bracketed(_found_from(own[~(own["p_holm"] < LEVEL)], key))
    if own.empty:
        second = "With one seed, the runs are described and no method is told apart from it"
    return [f"{first} and loses {lost} {_what(key)}.", f"{second}; the table and the parts below have each one."]


def reading(loaded: Loaded, table: pd.DataFrame) -> str:
    """What the intervals are about."""
    seeds = set(table[table["method"] != "base"]["seeds"])
    if seeds == {1}:
        return "There is one seed: the intervals cover the scored items of this run, not another run of the method."
    text = "Intervals are 95 % and over seeds and scored items"
    text += ", or over items alone for a method with one seed." if 1 in seeds else "."
    return text + " Of a method with several settings, the answer takes the one chosen on probe rows."


def without_accuracy(table: pd.DataFrame) -> list[str]:
    """A line for each domain on which right answers cannot show forgetting, because the base is at chance."""
    lines = []
    for (model, domain), rows in table[table["method"] != "base"].groupby(["model", "domain"], sort=False):
        if rows[ACCURACY].isna().all():
            apart = dict.fromkeys(task for tasks in rows.get("apart", pd.Series()).dropna() for task in tasks)
            units_ = f" Shown in its own unit: {_and(list(apart))}." if apart else ""
            lines.append(
                f"On {domain} no retention task is a proportion of rows on which {model} is above chance, so right "
                f"answers cannot show forgetting.{units_}"
            )
    return lines


def _sentence(parts: list[str]) -> str:
    text = "; ".join(dict.fromkeys(filter(None, parts)))
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _main(rows: pd.DataFrame) -> str:
    """The key of the measure of forgetting that resolves most among those that are known."""
    return next((key for key in (GENERAL.key, ACCURACY) if key in rows and rows[key].notna().any()), "")


def _gain(row: pd.Series, *, bounds: bool = True) -> str:
    """A method's gain with its unit: in nats, if they are known."""
    if not numbers.missing(row.get(DOMAIN)):
        return f"{_bounded(row, DOMAIN, numbers.nats, bounds=bounds)} nats per token"
    unit = row["unit"]
    return f"{_bounded(row, 'domain_gain', lambda v: units.change(v, unit), bounds=bounds)} {units.named(unit)}"


def _lost(row: pd.Series, key: str, *, bounds: bool = True) -> str:
    show = BY_KEY[key].show if key in BY_KEY else numbers.points
    return _bounded(row, key, show, bounds=bounds)


def _what(key: str) -> str:
    return "nats per token of general text" if key == GENERAL.key else "points of accuracy on retention tasks"


def _bounded(row: pd.Series, key: str, show, *, bounds: bool) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    known = bounds and not numbers.missing(low) and not numbers.missing(high)
    return f"{show(row[key])} [{show(low)}, {show(high)}]" if known else show(row[key])


def _plain(rows: pd.DataFrame, tests: pd.DataFrame, *, where: str) -> str:
    """What plain fine-tuning gains and loses; without it, the method that loses most."""
    plain, key = rows[rows["method"].map(family) == PLAIN], _main(rows)
    row = plain.iloc[0] if len(plain) else rows.loc[rows[key].astype(float).idxmax()] if key else rows.iloc[0]
    who = "plain fine-tuning" if len(plain) else row["method"]
    gained = f"{who} {where} gains {_gain(row)}"
    if not key:
        return f"{gained}; no retention task is above chance for the base model, so nothing can show forgetting"
    own = tests[(tests["a"] == row["method"]) & (tests["b"] == "base") & (tests["measure"] == key)]
    known = own["p_holm"].dropna()
    p = f", {numbers.p(known.iloc[0])}" if len(known) else ""
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
    return f"{gained} and loses {_lost(row, key)} {_what(key)} ({seeds}{p})"


def _remedies(loaded: Loaded, rows: pd.DataFrame, tests: pd.DataFrame, *, where: str) -> str:
    """Which remedies are told apart from plain fine-tuning, pairs of leaders from each other, and compositions."""
    key, others = _main(rows), rows[rows["method"].map(family) != PLAIN]
    if not key or others.empty:
        return f"{where} there is no remedy to compare".strip()
    against, beyond = _against_plain(loaded, rows, tests, key), _pairs(rows, tests, key)
    of = {"model": rows["model"].iloc[0], "domain": rows["domain"].iloc[0]}
    beyond += _composed(loaded, rows, tests, key) + credit.clause(loaded, most=NAMED, **of)
    if against.empty:
        return f"{where} {_ordered(loaded, others, key)}{beyond}".strip()
    kind = "leaders" if loaded.roles.leaders else "remedies"
    by_method, found = rows.set_index("method"), []
    for side, sign in (("less", -1), ("more", 1)):
        sure = against[against["sure"] & (against["difference"] * sign > 0)]
        if len(sure):
            ordered = sure.sort_values("difference", key=lambda values: -values.abs())["a"]
            each = [f"{m} ({_lost(by_method.loc[m], key, bounds=False)} {_at(by_method.loc[m])})" for m in ordered]
            rest = len(each) - NAMED
            named = ", ".join(each[:NAMED]) + (f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else "")
            found.append(
                f"{len(sure)} of {len(against)} {kind}, at their chosen settings, lose significantly {side} than "
                f"plain fine-tuning after Holm's correction: {named}"
            )
    text = "; ".join(found)
    text = text or f"none of {len(against)} {kind} loses significantly less or more after Holm's correction"
    text += matched.clause(loaded, against["a"], key=key, **of)
    text += credit.others(loaded, _with_plain(rows, tests, key), leaders=against["a"])
    return f"{where} {text}{beyond}".strip()


def _ordered(loaded: Loaded, others: pd.DataFrame, key: str) -> str:
    """What untested remedies lose, from the least, without controls and the methods that are compared with theirs."""
    remedies = set(loaded.roles.leading(others["method"])) - {*credit.apart(loaded), *loaded.roles.control_of.values()}
    own = others[others["method"].isin(remedies)].dropna(subset=[key]).sort_values(key)
    each = [(row["method"], _lost(row, key), _at(row)) for _, row in own.iterrows()]
    if not each:
        return "no remedy here trains on the domain alone"
    least, *others = each
    text = f"{least[0]} loses {'least, ' if others else ''}{least[1]} {_what(key)} {least[2]}"
    more = [f"{method} loses {lost} {gained}" for method, lost, gained in others[: NAMED - 1]]
    if len(each) > NAMED:
        rest = f"{len(each) - NAMED} others lose" if len(each) > NAMED + 1 else "one other loses"
        more.append(f"{rest} up to {_lost(own.iloc[-1], key, bounds=False)}")
    once = (own["seeds"] == 1).all()
    if not others:
        return f"in one run {text}" if once else text
    return f"of {len(each)} remedies{', each run once,' if once else ''} {_and([text, *more])}"


def _against_plain(loaded: Loaded, rows: pd.DataFrame, tests: pd.DataFrame, key: str) -> pd.DataFrame:
    """The tests of the remedies in `rows` against plain fine-tuning in `rows`, with `sure`; empty with one seed.

    Controls and compositions are no remedies. A method that trains on general text is left out, too: it is compared
    with its control (analysis/sections/credit.py).
    """
    mixed, own = credit.apart(loaded), _with_plain(rows, tests, key)
    warm = set(mixed.values()) & set(rows.loc[rows["tokens_prepare"].astype(float) > 0, "method"])
    return own[own["a"].isin(set(loaded.roles.leading(rows["method"])) - {*mixed, *warm})]


def _with_plain(rows: pd.DataFrame, tests: pd.DataFrame, key: str) -> pd.DataFrame:
    """The tests of all methods in `rows` against plain fine-tuning in `rows`, with `sure`; empty with one seed."""
    own = tests[(tests["family"] == PLAIN) & (tests["measure"] == key) & ~tests["descriptive"].astype(bool)]
    own = own[own["a"].isin(rows["method"]) & own["b"].isin(rows["method"])]
    return own.assign(sure=own["p_holm"] < LEVEL)


def _at(row: pd.Series) -> str:
    return f"at a gain of {_gain(row, bounds=False).partition(' ')[0]}"


def _pairs(rows: pd.DataFrame, tests: pd.DataFrame, key: str) -> str:
    """How many pairs of the leaders in `rows` are told apart."""
    own = tests[(tests["family"] == "leaders") & (tests["measure"] == key) & ~tests["descriptive"].astype(bool)]
    own = own[own["a"].isin(rows["method"]) & own["b"].isin(rows["method"])]
    apart = int((own["p_holm"] < LEVEL).sum())
    pairs = "pair of leaders" if len(own) == 1 else "pairs of leaders"
    could = _bracketed(_found_from(own[~(own["p_holm"] < LEVEL)], key))
    return f"; {apart} of {len(own)} {pairs} {'is' if apart == 1 else 'are'} told apart{could}" if len(own) else ""


def _composed(loaded: Loaded, rows: pd.DataFrame, tests: pd.DataFrame, key: str) -> str:
    """Whether a composition forgets less than every single method, controls included: at equal gain, or where that is
    not known, at the same setting."""
    tested = {
        name: tests[(tests["family"] == name) & (tests["measure"] == key)] for name in ("equal_gain", "compositions")
    }
    own = next((rows for rows in tested.values() if len(rows)), None)
    if own is None:
        return ""
    equal = own is tested["equal_gain"]
    at = " at equal gain" if equal else " at the same setting"
    sure, unsure = own[own["p_holm"] < LEVEL], own[~(own["p_holm"] < LEVEL)]
    others = [name for name in loaded.roles.composed(rows["method"]) if name not in set(own["a"])]
    judged = unsure[unsure["detectable"].notna()] if equal else unsure
    why = _bracketed(
        _and([f"{row['a']} not than {row['b']}" for _, row in judged.iterrows()]) if len(judged) else "",
        _found_from(unsure, key),
        _not_reached(unsure) if equal else "",
        f"not tested, for want of seeds: {_and(others)}" if others else "",
    )
    if sure.empty:
        return f"; no composition loses significantly less{at} than every single method{why}"
    each = _and([f"{row['a']} ({numbers.p(row['p_holm'])})" for _, row in sure.iterrows()])
    return f"; {each} {'loses' if len(sure) == 1 else 'lose'} less{at} than every single method, controls included{why}"


def _not_reached(unsure: pd.DataFrame) -> str:
    """The compositions that never gain as much as another method does at its first setting, of which nothing can be
    found at equal gain (analysis/statistics/tests.py)."""
    names = list(unsure.loc[unsure["detectable"].isna(), "a"])
    never = "it never does" if len(names) == 1 else "they never do"
    return f"{_and(names)} cannot be judged: another method gains at its first setting what {never}" if names else ""


def _untold(loaded: Loaded, rows: pd.DataFrame, tests: pd.DataFrame, *, where: str) -> str:
    """Which remedies could not be told apart from plain fine-tuning, and what could have been detected."""
    key = _main(rows)
    against = _against_plain(loaded, rows, tests, key)
    unsure = against[~against["sure"]] if len(against) else against
    if unsure.empty:
        return ""
    named = words.few(unsure["a"])
    return f"{where} not told apart from plain fine-tuning: {named}{_bracketed(_found_from(unsure, key))}".strip()


def _found_from(unsure: pd.DataFrame, key: str) -> str:
    """The true difference that 80 of 100 such studies would have found; '' where none is known."""
    sizes = (1 if key in BY_KEY else 100) * unsure["detectable"].dropna()
    ends = _range([f"{sizes.min():.2g}", f"{sizes.max():.2g}"]) if len(sizes) else ""
    return f"a difference of {ends} {_what(key).partition(' of ')[0]} would have been found" if ends else ""


def _bracketed(*texts: str) -> str:
    """The texts in one pair of brackets; '' if all are empty."""
    return f" ({'; '.join(filter(None, texts))})" if any(texts) else ""


def _costs(rows: pd.DataFrame) -> str:
    """Tokens that are read on top of training on the domain, seconds of training and bytes to keep: the least and the
    most of all methods."""
    known = rows.dropna(subset=["seconds_train"]) if "seconds_train" in rows else rows[:0]
    if known.empty:
        return "what the methods cost is not known"
    beside = known[["tokens_prepare", "tokens_added"]].astype(float).fillna(0).sum(axis=1)
    tokens = _range([f"{beside.min():,.0f}", f"{beside.max():,.0f}"])
    took = _ends(known, "seconds_train", numbers.seconds)
    text = f"on top of training on the domain's rows the methods read {tokens} tokens; they train for {took}"
    if known["bytes_weights_delta"].notna().any():
        text += f" and keep {_ends(known, 'bytes_weights_delta', numbers.size)}"
    return text


def _ends(rows: pd.DataFrame, key: str, show) -> str:
    values = rows[key].astype(float)
    return _range([show(values.min()), show(values.max())])


def _range(ends: list[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def _and(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
