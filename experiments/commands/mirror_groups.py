"""The dashboard's run of a method: the aggregate over its seeds, with the comparison's own intervals; and of the bare base.

Its numbers are the row of `analysis.sections.tables.comparison` and its curves the mean over seeds at each step that all have.
"""

from collections import defaultdict
from numbers import Real

import pandas as pd

from analysis import units
from analysis.load import Loaded
from analysis.style import INK, colour
from experiments.commands.mirror import EXPERIMENT, Run, gained, milliseconds, scored, tags_of, title_of

CHARTED = ("domain_gain", "forgetting", "perplexity_ratio")


def groups(loaded: Loaded) -> dict[str, list[str]]:
    """`model/domain/method` -> its planned cells, in planned order."""
    found = defaultdict(list)
    for cell in loaded.planned:
        found[cell.rsplit("/", 1)[0]].append(cell)
    return dict(found)


def group_of(group: str, *, table: pd.DataFrame, cells: list[str], runs: list[Run]) -> Run | None:
    """The run above the `runs` of its planned `cells`; None where none of them ran. FAILED where one of them is.

    `table` is the comparison (`analysis.sections.tables.comparison`); a method without a row there has no numbers here either, and
    a cell that it leaves out (tag `not_comparable`) is not in the means.
    """
    if not runs:
        return None
    model, domain, method = group.split("/")
    failed = [run for run in runs if run.status == "FAILED"]
    aside = [run for run in runs if "not_comparable" in run.tags]
    finished = [run for run in runs if run.status == "FINISHED" and "not_comparable" not in run.tags]
    row, start = _row(table, model, domain, method, bare=False), min(run.start for run in runs)
    end = start + round(
        sum(run.end - run.start for run in runs) / len(runs)
    )  # as long as a seed took: they ran days apart, perhaps
    seeds = ", ".join(run.tags["seed"] for run in finished)
    commits = dict.fromkeys(run.tags["git.commit"] for run in finished if "git.commit" in run.tags)
    share = [run.parameters.items() for run in finished]
    parameters = dict(set(share[0]).intersection(*share[1:])) if share else {}
    return Run(
        key=group,
        title=title_of(group),
        status="FAILED" if failed else "FINISHED",
        start=start,
        end=end,
        parameters=dict(sorted({**parameters, "seeds": seeds}.items())) if finished else {},
        metrics=_numbers(row, end) + _charted(row, model, domain, end) + _means(finished, end),
        datasets=list(dict.fromkeys(data for run in finished for data in run.datasets)),
        tags=tags_of(
            group,
            {
                "mlflow.note.content": _note(
                    group, row=row, cells=cells, finished=finished, failed=failed, aside=aside
                ),
                "mlflow.runColor": colour(method),
                "not_comparable": ", ".join(run.key for run in aside),
                EXPERIMENT: ", ".join(dict.fromkeys(run.tags[EXPERIMENT] for run in runs if EXPERIMENT in run.tags)),
                "git.commit": ", ".join(commits),
                "mlflow.source.git.commit": next(iter(commits)) if len(commits) == 1 else None,
                "git.dirty": any(run.tags.get("git.dirty") == "True" for run in finished) if finished else None,
                "not_a_result": any(run.tags["not_a_result"] == "True" for run in finished) if finished else None,
                "base_sha256": ", ".join(dict.fromkeys(run.tags["base_sha256"] for run in finished)),
                "note": row.get("note"),
                **{
                    f"failure.{key.split('.')[1]}": value
                    for run in failed[:1]
                    for key, value in run.tags.items()
                    if key.startswith("failure.")
                },
            },
        ),
    )


def base_of(loaded: Loaded, model: str, domain: str, *, table: pd.DataFrame) -> Run | None:
    """The bare model's run: gain and forgetting 0, the point every method starts from."""
    base, row = loaded.base.get(model), _row(table, model, domain, "base", bare=True)
    if base is None or not row:
        return None
    key, about = f"{model}/{domain}", base["evaluate"]
    end = milliseconds(about.get("when"))
    tasks = set(loaded.of(model, domain).iloc[0]["n"])  # a model's base is scored on the tasks of all its domains
    scores = {f"score/{task}": values["value"] for task, values in base["scores"]["tasks"].items() if task in tasks}
    git, seconds = about.get("git", {}), about.get("seconds_evaluate")
    items = base["items"]
    return Run(
        key=key,
        title=title_of(key),
        status="FINISHED",
        start=end - round(1000 * (seconds or 0)),
        end=end,
        metrics=_numbers({**row, "seconds_evaluate": seconds, **scores}, end) + _charted(row, model, domain, end),
        datasets=scored(items[items["task"].isin({*tasks, "general"})] if len(items) else items),
        tags=tags_of(
            key,
            {
                "mlflow.note.content": f"{model} before any fine-tuning, on the tasks of {domain}: what every method is measured against.\n\n"
                f"Score {_score(row)}; gain and forgetting are 0 by definition."
                + (" **NOT A RESULT.**" if loaded.of(model, domain)["not_a_result"].any() else ""),
                "mlflow.runColor": INK,
                "base_sha256": base["scores"].get("weights_sha256"),
                "git.commit": git.get("commit"),
                "git.dirty": git.get("dirty"),
                "not_a_result": bool(loaded.of(model, domain)["not_a_result"].any()),
            },
        ),
    )


def _row(table: pd.DataFrame, model: str, domain: str, method: str, *, bare: bool) -> dict:
    """The comparison's row; the bare base's is the one without a seed, whatever a method is called."""
    if table.empty:
        return {}
    named = (table["model"] == model) & (table["domain"] == domain) & (table["method"] == method)
    rows = table[named & ((table["seeds"] == 0) == bare)]
    return rows.iloc[0].to_dict() if len(rows) else {}


def _numbers(row: dict, end: int) -> list[tuple[str, float, int, int]]:
    """Every known number of a row, under the names the cells use too."""
    return [
        (key, float(value), end, 0)
        for key, value in row.items()
        if isinstance(value, Real) and not isinstance(value, bool) and value == value
    ]


def charted(model: str, domain: str, key: str) -> str:
    """The name of a metric in the charts of one comparison: MLflow draws a metric of every run, and comparisons do not share a chart."""
    return f"{domain} {model}/{key}"


def _charted(row: dict, model: str, domain: str, end: int) -> list[tuple[str, float, int, int]]:
    return _numbers({charted(model, domain, key): row.get(key) for key in CHARTED}, end)


def _means(finished: list[Run], end: int) -> list[tuple[str, float, int, int]]:
    """Scores by task and curves: the mean over the seeds where every seed has the point; times count from `end` backwards."""
    values, times = defaultdict(list), {}
    for run in finished:
        for key, value, when, step in run.metrics:
            if "/" in key:
                values[key, step].append(value)
                times.setdefault((key, step), end - run.end + when)
    return [
        (key, sum(each) / len(each), times[key, step], step)
        for (key, step), each in values.items()
        if len(each) == len(finished)
    ]


def _note(group: str, *, row: dict, cells: list[str], finished: list[Run], failed: list[Run], aside: list[Run]) -> str:
    model, domain, method = group.split("/")
    part = f"{len(finished)} of " if len(finished) < len(cells) else ""
    seeds = "one seed" if len(cells) == 1 else f"the mean of {part}{len(cells)} seeds"
    first = f"{model} fine-tuned on {domain} with **{method}**: {seeds}."
    if aside:
        first += f" **Not in the comparison: {', '.join(run.key.rsplit('/', 1)[1] for run in aside)}** (the reason is there)."
    if failed:
        return f"{first} **{len(failed)} failed.**\n\n{failed[0].title}: {failed[0].tags.get('failure.reason', 'no reason recorded')}"
    told = [
        f"{name} {gained(row.get(key), unit)}{_bounds(row, key, unit)}"
        for name, key, unit in (
            ("Gain", "domain_gain", row.get("unit", units.SHARE)),
            ("forgetting", "forgetting", units.SHARE),
        )
    ]
    only = "; one seed: this run, not this method" if len(finished) == 1 else ""
    flag = " **NOT A RESULT.**" if any(run.tags["not_a_result"] == "True" for run in finished) else ""
    return f"{first}\n\n{', '.join(told)} (95 % intervals{only}).{flag}"


def _bounds(row: dict, key: str, unit: str) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if low is None or high is None or low != low or high != high:
        return ""
    return f" [{100 * low:+.1f}, {100 * high:+.1f}]" if unit == units.SHARE else f" [{low:+.3g}, {high:+.3g}]"


def _score(row: dict) -> str:
    unit = row.get("unit", units.SHARE)
    return f"{100 * row['domain_score']:.1f} %" if unit == units.SHARE else f"{row['domain_score']:.4g} {row['metric']}"
