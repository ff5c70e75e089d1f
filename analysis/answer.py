"""The answer in a few sentences, every number computed from the comparison."""

import pandas as pd

from analysis import numbers


def sentences(rows: pd.DataFrame, *, domain: str, model: str, tasks: list[str]) -> list[str]:
    """What one comparison says. `rows` are its rows of the comparison table with the base; `tasks` count in forgetting."""
    base, methods = rows[rows["method"] == "base"].iloc[0], rows[rows["method"] != "base"]
    said = [_learning(base, methods, domain=domain, model=model)]
    if methods["forgetting"].notna().any():
        said.append(_forgetting(methods, tasks=tasks))
    else:
        said.append("No retention task is above chance for the base model, so this comparison cannot show forgetting.")
    said.append(_cost(methods))
    several = int(methods["seeds"].max()) > 1
    said.append(
        ("The intervals are over seeds and scored items. " if several else "One seed: the intervals cover the scored items of this run and say nothing of another run of the method. ")
        + "The methods did not learn equally much, so each one's forgetting has to be read beside its gain."
    )
    return said


def _learning(base: pd.Series, methods: pd.DataFrame, *, domain: str, model: str) -> str:
    worst, best = _ends(methods, "domain_score")
    before = f"On {domain} ({base['n_domain']} test rows) the bare {model} scores {numbers.percent(base['domain_score'])} %"
    if worst is best:
        return f"{before}; {best['method']} reaches {numbers.percent(best['domain_score'])} %."
    return f"{before}; after fine-tuning, the methods reach from {numbers.percent(worst['domain_score'])} % ({worst['method']}) to {numbers.percent(best['domain_score'])} % ({best['method']})."


def _forgetting(methods: pd.DataFrame, *, tasks: list[str]) -> str:
    least, most = _ends(methods, "forgetting")
    n = int(methods["n_retention"].iloc[0])
    over = f"Over {_count(len(tasks), 'retention task')} ({n} rows)"
    if least is most:
        text = f"{over} {most['method']} forgets {_with_range(most)} points."
    else:
        text = f"{over} forgetting runs from {_with_range(least)} points ({least['method']}) to {_with_range(most)} ({most['method']})."
    known = methods[methods["forgetting_low"].notna()] if "forgetting_low" in methods else methods.iloc[:0]
    unclear = list(known[(known["forgetting_low"] <= 0) & (known["forgetting_high"] >= 0)]["method"])
    if unclear:
        text += f" For {_and(unclear)} no change can be told from zero at this number of rows."
    elif len(known):
        text += " No method's interval reaches zero." if len(known) > 1 else " Its interval does not reach zero."
    ratios = methods.dropna(subset=["perplexity_ratio"])
    if len(ratios):
        low, high = _ends(ratios, "perplexity_ratio")
        spread = f"×{low['perplexity_ratio']:.2f} ({low['method']})" + ("" if low is high else f" to ×{high['perplexity_ratio']:.2f} ({high['method']})")
        text += f" Perplexity on general text is {spread} of the base's."
    return text


def _cost(methods: pd.DataFrame) -> str:
    known = methods.dropna(subset=["seconds_train"])
    if known.empty:
        return "What the methods cost is not known."
    quick, slow = _ends(known, "seconds_train")
    text = f"Training took {numbers.seconds(quick['seconds_train'])} ({quick['method']})"
    text += "" if quick is slow else f" to {numbers.seconds(slow['seconds_train'])} ({slow['method']})"
    prepared = known[known["seconds_prepare"].fillna(0) >= 0.0005]  # the clock of a method that prepares nothing reads microseconds
    if len(prepared):
        text += "; preparation took " + _and([f"{numbers.seconds(row['seconds_prepare'])} for {row['method']}" for _, row in prepared.iterrows()])
    stored = known[known["bytes_stored"].fillna(0) > 0]
    if len(stored):
        text += "; importance and anchor take " + _and([f"{numbers.size(row['bytes_stored'])} for {row['method']}" for _, row in stored.iterrows()])
    return text + "."


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
