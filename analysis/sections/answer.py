"""The answer in three sentences, every number computed from the comparison."""

import pandas as pd

from analysis import numbers, units
from analysis.statistics.significance import found

NAMED = 3  # methods named one by one in a sentence


def sentences(rows: pd.DataFrame, tests: pd.DataFrame, *, domain: str, model: str, tasks: list[str]) -> list[str]:
    """What one comparison says in three sentences: what was learned, what was forgotten, what it cost.

    rows   its rows of the comparison table with the base, of each method the setting chosen on probe rows alone
    tests  its rows of `permutation.all_tests`, which say what is told from zero
    tasks  those that count in forgetting
    """
    base, methods = rows[rows["method"] == "base"].iloc[0], rows[rows["method"] != "base"]
    if methods["forgetting"].notna().any():
        forgotten = _forgetting(methods, tests, tasks=tasks)
    else:
        apart = [task for found in (methods["apart"].dropna() if "apart" in methods else ()) for task in found]
        forgotten = "No retention task is above chance for the base model, so this comparison cannot show forgetting."
        if apart:
            forgotten = f"No retention task is a proportion of rows above chance for the base model; in its own unit stands {_and(list(dict.fromkeys(apart)))}."
    return [_learning(base, methods, tests, domain=domain, model=model), forgotten, _cost(methods)]


def reading(rows: pd.DataFrame, *, tested: bool, chosen: list[str]) -> str:
    """What the answer's intervals are about, and what it leaves out; `chosen` are the chosen settings of swept methods."""
    seeds = set(rows[rows["method"] != "base"]["seeds"])
    if seeds == {1}:
        about = (
            "One seed: the intervals cover the scored items of this run and say nothing of another run of the method."
        )
    else:
        about = f"The intervals are over seeds and scored items{', of a method with one seed over its items alone' if 1 in seeds else ''}."
    told = " Told from zero is what a paired test finds after Holm's correction." if tested else ""
    swept = (
        f" Of the methods with several settings it speaks of the one chosen on probe rows ({', '.join(chosen)})."
        if chosen
        else ""
    )
    return f"{about}{told}{swept} The methods did not learn equally much, so each one's forgetting has to be read beside its gain."


def _learning(base: pd.Series, methods: pd.DataFrame, tests: pd.DataFrame, *, domain: str, model: str) -> str:
    worst, best = _ends(methods, "domain_score" if base.get("unit", units.SHARE) == units.SHARE else "domain_gain")
    unit = base.get("unit", units.SHARE)
    score = lambda row: f"{units.level(row['domain_score'], unit)} {'%' if unit == units.SHARE else row['metric']}"
    before = f"On {domain} ({base['n_domain']} test rows) the bare {model} scores {score(base)}"
    gains = [
        units.change(row["domain_score"] - base["domain_score"] if unit == units.SHARE else row["domain_gain"], unit)
        for row in (worst, best)
    ]
    told = _told(tests, "gain")
    if worst is best:
        return f"{before}; {best['method']} reaches {score(best)}, a gain of {gains[1]} {units.named(unit)}{told}."
    ends = " to ".join(f"{score(row)} ({row['method']})" for row in (worst, best))
    return f"{before}; after fine-tuning, the methods reach from {ends}, a gain of {' to '.join(gains)} {units.named(unit)}{told}."


def _forgetting(methods: pd.DataFrame, tests: pd.DataFrame, *, tasks: list[str]) -> str:
    least, most = _ends(methods, "forgetting")
    text = f"Over {_count(len(tasks), 'retention task')} ({int(methods['n_retention'].iloc[0])} rows) "
    if least is most:
        text += f"{most['method']} forgets {_with_range(most)} points"
    else:
        text += f"forgetting runs from {_with_range(least)} points ({least['method']}) to {_with_range(most)} ({most['method']})"
    text += _told(tests, "forgetting")
    ratios = methods.dropna(subset=["perplexity_ratio"])
    if len(ratios):
        low, high = _ends(ratios, "perplexity_ratio")
        spread = f"×{low['perplexity_ratio']:.2f} ({low['method']})" + (
            "" if low is high else f" to ×{high['perplexity_ratio']:.2f} ({high['method']})"
        )
        text += f"; perplexity on general text is {spread} of the base's"
    return text + "."


def _told(tests: pd.DataFrame, kind: str) -> str:
    """Of which methods gain or forgetting is told from zero; nothing where there was nothing to test."""
    tests = tests[(tests["kind"] == kind) & (tests["b"] == "base")]
    told = [test["a"] for _, test in tests.iterrows() if found(test)]
    unclear = [name for name in tests["a"] if name not in told]
    if len(tests) < 2:
        return ", which cannot be told from zero" if unclear else ""
    if not unclear:
        sides = set(tests["difference"] < 0)
        return (
            ", told from zero for every method"
            if len(sides) > 1
            else f", {'below' if True in sides else 'above'} zero for every method"
        )
    if len(unclear) == len(tests):
        return ", none of which can be told from zero"
    if len(told) <= NAMED < len(unclear):
        return f", told from zero for {_and(told)} alone"
    whose = _and(unclear) if len(unclear) <= NAMED else f"{len(unclear)} of {len(tests)} methods"
    return f", where {whose} cannot be told from zero"


def _cost(methods: pd.DataFrame) -> str:
    known = methods.dropna(subset=["seconds_train"])
    if known.empty:
        return "What the methods cost is not known."
    quick, slow = _ends(known, "seconds_train")
    text = f"Training took {numbers.seconds(quick['seconds_train'])} ({quick['method']})"
    text += "" if quick is slow else f" to {numbers.seconds(slow['seconds_train'])} ({slow['method']})"
    prepared = known[
        known["seconds_prepare"].fillna(0) >= 0.0005
    ]  # the clock of a method that prepares nothing reads microseconds
    if len(prepared):
        text += "; preparation took " + _each(prepared, "seconds_prepare", numbers.seconds)
    stored = known[known["bytes_stored"].fillna(0) > 0]
    if len(stored):
        text += "; importance and anchor take " + _each(stored, "bytes_stored", numbers.size)
    return text + "."


def _each(methods: pd.DataFrame, key: str, show) -> str:
    """A value a method; of more than NAMED, the least and the most."""
    if len(methods) <= NAMED:
        return _and([f"{show(row[key])} for {row['method']}" for _, row in methods.iterrows()])
    low, high = _ends(methods, key)
    return f"{show(low[key])} ({low['method']}) to {show(high[key])} ({high['method']})"


def _ends(methods: pd.DataFrame, key: str) -> tuple[pd.Series, pd.Series]:
    """The rows with the lowest and the highest value; the same object where there is one."""
    values = methods[key].astype(float).dropna()
    low, high = methods.loc[values.idxmin()], methods.loc[values.idxmax()]
    return (low, low) if low["method"] == high["method"] else (low, high)


def _with_range(row: pd.Series) -> str:
    text, low, high = numbers.points(row["forgetting"]), row.get("forgetting_low"), row.get("forgetting_high")
    return text if numbers.missing(low) else f"{text} [{numbers.points(low)}, {numbers.points(high)}]"


def _and(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
