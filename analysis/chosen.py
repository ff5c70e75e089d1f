"""Choose which setting of a swept family to report: the one that learns its domain best on probe rows.

A setting is judged by its nats per token on the domain's probe rows, at the weights that the run delivers, and by
nothing else: a choice by what was forgotten would make plain fine-tuning look as if it did not forget, and accuracy
does not tell close settings apart. `python -m experiments tune` judges its trials by the same rule (`least`). Every
model and domain chooses for itself, and of settings that are equal to the last digit the first one is taken.
"""

from collections.abc import Mapping

import pandas as pd

from analysis import words
from analysis.families import families
from analysis.load import Loaded

RULE = "the setting with the least nats per token on the domain's probe rows; of equal ones the first"
COLUMNS = ["family", "method", "seeds", "domain_nll_probe", "setting", "value", "chosen", "tied", "end"]


def least(nats: Mapping[str, float]) -> list[str]:
    """The names with the least nats, in their order: the first is chosen, and any others are equal to it."""
    best = min(nats.values(), default=None)
    return [name for name, value in nats.items() if value == best]


def end_of(chosen: float | None, values: list) -> str:
    """'lowest' or 'highest' if the chosen one of several values lies at that end of them, so that others may be better.

    Values that are no numbers have no ends.
    """
    if len(values) < 2 or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return ""
    return {min(values): "lowest", max(values): "highest"}.get(chosen, "")


def chosen(loaded: Loaded, family: str, *, model: str, domain: str) -> str | None:
    """The chosen setting of a family; None if none of its settings was probed to its end."""
    table = choices(loaded, model=model, domain=domain)
    settings = table[(table["family"] == family) & table["chosen"]]["method"]
    return None if settings.empty else str(settings.iloc[0])


def reported(loaded: Loaded) -> Loaded:
    """The results with one setting per family, so that none is picked by its test scores."""
    dropped: list[str] = []
    for model, domain in loaded.comparisons:
        cells = loaded.of(model, domain)
        dropped += list(cells.index[~cells["method"].isin(reported_methods(loaded, model=model, domain=domain))])
    return loaded.without(dropped) if dropped else loaded


def reported_names(loaded: Loaded) -> set[str]:
    """model/domain/method of every method that `reported` keeps."""
    return {cell.rpartition("/")[0] for cell in reported(loaded).cells.index}


def reported_methods(loaded: Loaded, *, model: str, domain: str) -> set[str]:
    """The methods of one comparison that `reported` keeps: of each family the chosen setting; in a family without
    probes the method itself, or else its first setting."""
    cells = loaded.of(model, domain)
    if cells.empty:
        return set()
    table, kept = choices(loaded, model=model, domain=domain), set()
    picked = set(table[table["chosen"]]["method"])
    for name, blocks in families(dict.fromkeys(cells["method"])).items():
        kept.add(next((block for block in blocks if block in picked), name if name in blocks else blocks[0]))
    return kept


def settings_said(loaded: Loaded, *, model: str, domain: str) -> list[str]:
    """Sentences about how the settings of swept methods were chosen: the rule, ties, and ends of ranges."""
    table = choices(loaded, model=model, domain=domain)
    table = table[table["family"].duplicated(keep=False)]
    if table.empty:
        return []
    lines = [f"Of a method with several settings, {domain} has chosen {RULE}; never what was forgotten, nor accuracy."]
    if tied := list(table[table["tied"]]["method"]):
        lines.append(f"Equal to the chosen one were {words.few(tied)}.")
    ends = [f"{row.method} ({row.setting} = {row.value:g})" for row in table[table["end"] != ""].itertuples()]
    if ends:
        what = "was chosen at the end of its range, which should be widened"
        what = what if len(ends) == 1 else "were chosen at the ends of their ranges, which should be widened"
        lines.append(f"{words.few(ends)} {what}: another value may learn the domain better.")
    return lines


def choices(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """One row per setting, families together.

    domain_nll_probe  nats per token on the domain's probe rows, the mean over the seeds that all probed settings of the
                      family share; a setting that was not probed to its end, or shares no seed, has none
    setting, value    the one setting in which the family's blocks differ, with its value; '' and None if there are more
    chosen, tied      whether it is chosen, and whether it is equal to the chosen one without being it
    end               of the chosen one: 'lowest' or 'highest' if its value lies at that end of the family's
    """
    if (model, domain) not in loaded.choices:
        loaded.choices[model, domain] = _choices(loaded, model=model, domain=domain)
    return loaded.choices[model, domain]


def _choices(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    ends = _ends(loaded, model=model, domain=domain)
    cells, rows = loaded.of(model, domain), []
    for name, blocks in families(dict.fromkeys(cells["method"]) if len(cells) else ()).items():
        probed = [seeds for block in blocks if (seeds := {seed for method, seed in ends if method == block})]
        common = sorted(set.intersection(*probed)) if probed else []
        scores = {block: [ends[block, seed] for seed in common if (block, seed) in ends] for block in blocks}
        nats = {block: sum(own) / len(own) for block, own in scores.items() if own}
        (best, *equal), (setting, values) = least(nats) or [None], varied(cells, blocks)
        for block in blocks:
            end = end_of(values.get(block), list(values.values())) if block == best else ""
            about = (name, block, len(scores[block]), nats.get(block), setting, values.get(block))
            rows.append((*about, block == best, block in equal, end))
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"domain_nll_probe": float, "value": object})


def varied(cells: pd.DataFrame, blocks: list[str]) -> tuple[str, dict]:
    """The one setting in which the blocks of a family differ, such as train.learning_rate, and its value in each.

    '' and {} if there is one block, or if they differ in several settings.
    """
    written = {block: _flat(cells[cells["method"] == block].iloc[0]) for block in blocks}
    names = dict.fromkeys(key for flat in written.values() for key in flat)
    differing = [key for key in names if len({repr(flat.get(key)) for flat in written.values()}) > 1]
    if len(differing) != 1 or any(differing[0] not in flat for flat in written.values()):
        return "", {}
    return differing[0], {block: flat[differing[0]] for block, flat in written.items()}


def _flat(cell: pd.Series) -> dict:
    """The settings of a cell's parts and of its training, by name: {"ewc.strength": 1.0, "train.learning_rate": …}."""
    parts = {key: block for key, block in cell["parts"].items() if isinstance(block, dict) and key != "train"}
    trained = cell.get("settings")
    parts["train"] = trained if isinstance(trained, dict) else cell["parts"].get("train") or {}
    return {f"{part}.{key}": value for part, block in parts.items() for key, value in block.items()}


def _ends(loaded: Loaded, *, model: str, domain: str) -> dict[tuple[str, int], float]:
    """Nats per token on the domain's probe rows of the weights that each run delivers, by (method, seed)."""
    found = probed(loaded, f"{domain}_nll", model=model, domain=domain)
    return {run: last for run, (_, last) in found.items()}


def probed(loaded: Loaded, name: str, *, model: str, domain: str) -> dict[tuple[str, int], tuple[float, float]]:
    """A probe's value before the first step (NaN where the run was not probed there) and at the weights that each run
    delivers, by (method, seed).

    The latter are those of the last probe, or of the step whose weights a rule kept; or of the weights after the parts
    that change them once training has ended (`finished` in train.json), if there are any.
    """
    ends, key = {}, f"probe_{name}"
    cells, known = loaded.of(model, domain), len(loaded.curves) and key in loaded.curves
    curves = dict(list(loaded.curves_of(cells)[["cell", "step", key]].groupby("cell", sort=False))) if known else {}
    for cell_name, cell in cells.iterrows():
        finished, run = cell.get("finished"), curves.get(cell_name)
        probes = {} if run is None else run.set_index("step")[key]
        if isinstance(finished, dict):
            nats = (finished.get("probe") or {}).get(name)
        elif not len(probes):
            continue
        else:
            stopped = cell.get("stopped")
            nats = probes.get(stopped["kept_step"] if isinstance(stopped, dict) else run["step"].max())
        if nats is not None and nats == nats:
            ends[cell["method"], int(cell["seed"])] = float(probes.get(0, float("nan"))), float(nats)
    return ends
