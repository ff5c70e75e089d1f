"""The answer in four sentences, every number computed from the comparison."""

import pandas as pd

from analysis import numbers, units
from analysis.measures import GENERAL, GOLD, KL
from analysis.sections.significance import is_significant
from analysis.statistics.contrasts import SCORE

NAMED = 3  # methods named one by one in a sentence


def sentences(rows: pd.DataFrame, tests: pd.DataFrame, *, domain: str, model: str, tasks: list[str]) -> list[str]:
    """What one comparison shows: what was learned, what was forgotten in nats and in right answers, what it cost.

    A sentence each; the one in nats is left out where they are not known.

    rows   its rows of the comparison table with the base, each method at the setting chosen on probe rows
    tests  its rows of `all_tests`, which decide what is significant
    tasks  those that count in forgetting
    """
    base, methods = rows[rows["method"] == "base"].iloc[0], rows[rows["method"] != "base"]
    if methods["forgetting"].notna().any():
        forgotten = _forgetting(methods, tests, tasks=tasks)
    else:
        apart = list(dict.fromkeys(task for tasks in methods.get("apart", pd.Series()).dropna() for task in tasks))
        forgotten = "No retention task is above chance for the base model, so right answers cannot show forgetting."
        if apart:
            forgotten = (
                "No retention task is a proportion of rows above chance for the base model; shown in its own unit: "
                f"{_and(apart)}."
            )
    learned = _learning(base, methods, tests, domain=domain, model=model)
    return [learned, *_in_nats(methods, tests, tasks=tasks), forgotten, _cost(methods)]


def reading(rows: pd.DataFrame, *, tested: bool, chosen: list[str]) -> str:
    """What the answer's intervals cover, and what it leaves out; `chosen` are the chosen settings of swept methods."""
    seeds = set(rows[rows["method"] != "base"]["seeds"])
    text = "The intervals are over seeds and scored items."
    if seeds == {1}:
        text = "There is one seed: the intervals cover the scored items of this run, not another run of the method."
    elif 1 in seeds:
        text = "The intervals are over seeds and scored items, or over items alone for a method with one seed."
    if tested:
        text += " Significance is that of a paired test at 5 % after Holm's correction."
    if chosen:
        text += f" Methods with several settings appear at the one chosen on probe rows ({', '.join(chosen)})."
    return f"{text} The methods did not learn equally much, so read each one's forgetting beside its gain."


def _learning(base: pd.Series, methods: pd.DataFrame, tests: pd.DataFrame, *, domain: str, model: str) -> str:
    unit = base.get("unit", units.SHARE)
    worst, best = _ends(methods, "domain_score" if unit == units.SHARE else "domain_gain")

    def score(row: pd.Series) -> str:
        return f"{units.level(row['domain_score'], unit)} {'%' if unit == units.SHARE else units.named(row['metric'])}"

    def gain(row: pd.Series) -> str:
        share = row["domain_score"] - base["domain_score"]
        return units.change(share if unit == units.SHARE else row["domain_gain"], unit)

    before = f"On {domain} ({base['n_domain']} test rows) the bare {model} scores {score(base)}"
    tested = f"{units.named(unit)}{_significance(tests, SCORE)}{_beside(methods)}."
    if worst is best:
        return f"{before}; {best['method']} reaches {score(best)}, a gain of {gain(best)} {tested}"
    ends = " to ".join(f"{score(row)} ({row['method']})" for row in (worst, best))
    return f"{before}; after fine-tuning, the methods reach {ends}, a gain of {gain(worst)} to {gain(best)} {tested}"


def _beside(methods: pd.DataFrame) -> str:
    """The gain of the tasks that score the domain beside its own score."""
    text = ""
    for key in units.gains(methods):
        task, unit = key.removeprefix("gain_"), methods.iloc[0][f"unit_{key.removeprefix('gain_')}"]
        spread = _spread(methods, key, lambda value, unit=unit: units.change(value, unit))
        text += f"; on {task} they gain {spread}, in {units.named(unit)}"
    return text


def _in_nats(methods: pd.DataFrame, tests: pd.DataFrame, *, tasks: list[str]) -> list[str]:
    """The sentence about forgetting in nats, the measures that resolve most; none where they are not known."""
    parts = []
    for measure, text in (
        (GENERAL, "On general text the methods lose {} nats per token{}"),
        (KL, "their predictions there are {} nats per token (KL) from the base's{}"),
        (GOLD, f"the right answers of {_counted(tasks)} lose {{}} nats an item{{}}"),
    ):
        if measure.key in methods and methods[measure.key].notna().any():
            spread = _spread(methods, measure.key, measure.show)
            parts.append(text.format(spread, _significance(tests, measure.key) if measure.signed else ""))
    text = "; ".join(parts)
    return [f"{text[0].upper()}{text[1:]}."] if parts else []


def _counted(tasks: list[str]) -> str:
    return f"{len(tasks)} retention task{'' if len(tasks) == 1 else 's'}"


def _spread(methods: pd.DataFrame, key: str, show) -> str:
    """The lowest and the highest value with their intervals and methods, or the one value there is."""
    low, high = _ends(methods, key)

    def bounded(row: pd.Series) -> str:
        bounds = [row.get(f"{key}_{end}") for end in ("low", "high")]
        text = show(row[key]) if any(map(numbers.missing, bounds)) else ""
        return f"{text or f'{show(row[key])} [{show(bounds[0])}, {show(bounds[1])}]'} ({row['method']})"

    return bounded(low) if low is high else f"{bounded(low)} to {bounded(high)}"


def _forgetting(methods: pd.DataFrame, tests: pd.DataFrame, *, tasks: list[str]) -> str:
    least, most = _ends(methods, "forgetting")
    text = f"Over {_counted(tasks)} ({int(methods['n_retention'].iloc[0])} rows) "
    if least is most:
        text += f"{most['method']} forgets {_with_range(most)} points of accuracy"
    else:
        text += f"forgetting in accuracy ranges from {_with_range(least)} points ({least['method']}) "
        text += f"to {_with_range(most)} ({most['method']})"
    text += _significance(tests, "forgetting")
    ratios = methods.dropna(subset=["perplexity_ratio"])
    in_nats = GENERAL.key in methods and methods[GENERAL.key].notna().any()  # which is its logarithm
    if len(ratios) and not in_nats:
        low, high = _ends(ratios, "perplexity_ratio")
        spread = f"×{low['perplexity_ratio']:.2f} ({low['method']})"
        spread += "" if low is high else f" to ×{high['perplexity_ratio']:.2f} ({high['method']})"
        text += f"; perplexity on general text is {spread} of the base's"
    return text + "."


def _significance(tests: pd.DataFrame, measure: str) -> str:
    """For which methods gain or forgetting is significantly different from zero; empty if nothing was tested."""
    tests = tests[(tests["measure"] == measure) & (tests["b"] == "base") & ~tests["descriptive"].astype(bool)]
    sure = [test["a"] for _, test in tests.iterrows() if is_significant(test)]
    unclear = [name for name in tests["a"] if name not in sure]
    if len(tests) < 2:
        return ", which is not significantly different from zero" if unclear else ""
    if not unclear:
        below = set(tests["difference"] < 0)
        which = "different from" if len(below) > 1 else "below" if True in below else "above"
        return f", significantly {which} zero for every method"
    if len(unclear) == len(tests):
        return ", not significantly different from zero for any method"
    if len(sure) <= NAMED < len(unclear):
        return f", significantly different from zero for {_and(sure)} alone"
    whose = _and(unclear) if len(unclear) <= NAMED else f"{len(unclear)} of {len(tests)} methods"
    return f", not significantly different from zero for {whose}"


def _cost(methods: pd.DataFrame) -> str:
    known = methods.dropna(subset=["seconds_train"])
    if known.empty:
        return "What the methods cost is not known."
    quick, slow = _ends(known, "seconds_train")
    text = f"Training took {numbers.seconds(quick['seconds_train'])} ({quick['method']})"
    text += "" if quick is slow else f" to {numbers.seconds(slow['seconds_train'])} ({slow['method']})"
    prepared = known[known["seconds_prepare"].fillna(0) >= 0.0005]  # a method that prepares nothing takes microseconds
    if len(prepared):
        text += "; preparation took " + _each(prepared, "seconds_prepare", numbers.seconds)
    stored = known[known["bytes_stored"].fillna(0) > 0]
    if len(stored):
        text += "; importance and anchor take " + _each(stored, "bytes_stored", numbers.size)
    return text + "."


def _each(methods: pd.DataFrame, key: str, show) -> str:
    """The value of each method; of more than NAMED, the lowest and the highest."""
    if len(methods) <= NAMED:
        return _and([f"{show(row[key])} for {row['method']}" for _, row in methods.iterrows()])
    low, high = _ends(methods, key)
    return f"{show(low[key])} ({low['method']}) to {show(high[key])} ({high['method']})"


def _ends(methods: pd.DataFrame, key: str) -> tuple[pd.Series, pd.Series]:
    """The rows with the lowest and the highest value; the same object if they are of one method."""
    values = methods[key].astype(float).dropna()
    low, high = methods.loc[values.idxmin()], methods.loc[values.idxmax()]
    return (low, low) if low["method"] == high["method"] else (low, high)


def _with_range(row: pd.Series) -> str:
    text, low, high = numbers.points(row["forgetting"]), row.get("forgetting_low"), row.get("forgetting_high")
    return text if numbers.missing(low) else f"{text} [{numbers.points(low)}, {numbers.points(high)}]"


def _and(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
