"""What MLflow's page of a study shows, and in which order: a view that MLflow saves and offers in its menu of views.

A view lies in a tag of the experiment, {"name", "createdAt", "updatedAt", "state"}, and a link with its key opens it.
It holds the columns of the table and the charts; a metric that is one number gets no chart.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

from analysis import numbers, units
from analysis.measures import ACCURACY, BY_KEY, GENERAL, ORDER

# Browsers take every name under localhost for this machine; at localhost itself MLflow opens its assistant at first.
HOST = "holdfast.localhost"
IMAGE = "front"  # the figure among the charts, by its key in MLflow
TAG, KEY = "mlflow.sharedViewState.", "holdfast"  # the tag of a view, before its key; the key, before its number
KIND = {"workflowType": "machine_learning"}  # else MLflow shows what it has for language models in production
ROW = "row"  # the tag of what a run is: a cell, a method or the base


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A number that every method has: the head of its column, and how it is written."""

    head: str
    show: Callable[[float | None], str]


HEADS = {
    "domain_nll_gained": "domain gained: nats/token",
    "domain_gain": "domain gained: points",
    ACCURACY: "accuracy lost: points",
    **{key: measure.head.replace(",", ":") for key, measure in BY_KEY.items()},  # MLflow's names have no comma
}
SHOW = {"domain_nll_gained": numbers.nats} | {key: measure.show for key, measure in BY_KEY.items()}
# with numbers, because MLflow sorts by name wherever no view says otherwise
HEADLINES = {
    key: Headline(head=f"{number} {HEADS[key]}", show=SHOW.get(key, numbers.points))
    for number, key in enumerate(ORDER, start=1)
}
COSTS = {
    "tokens_prepare": ("tokens of preparation", numbers.count),
    "seconds_prepare": ("preparation time", numbers.seconds),
    "seconds_train": ("training time", numbers.seconds),
    "peak_memory_bytes": ("peak memory", numbers.size),
    "bytes_weights_delta": ("weights to keep", numbers.size),
    "bytes_stored": ("importance and anchor", numbers.size),
}
PROBES = ("domain_nll", "domain_accuracy", "general_nll", "gold_nll", "accuracy")
CURVES = (*(f"probe/{name}" for name in PROBES), "loss")


def shown(values: dict) -> dict[str, str]:
    """Tags with a run's headline numbers and their intervals, and with its costs, as people write them."""
    texts, unit = {}, values.get("unit", units.SHARE)
    for key, headline in HEADLINES.items():
        if not numbers.missing(values.get(key)):
            show, suffix = headline.show, ""
            if key == "domain_gain" and unit != units.SHARE:
                show, suffix = partial(units.change, unit=unit), f" {units.named(unit)}"
            bounds = [values.get(f"{key}_{end}") for end in ("low", "high")]
            interval = "" if any(map(numbers.missing, bounds)) else f" [{', '.join(map(show, bounds))}]"
            texts[headline.head] = f"{show(values[key])}{interval}{suffix}"
    known = {key: values[key] for key in COSTS if not numbers.missing(values.get(key))}
    return texts | {COSTS[key][0]: COSTS[key][1](value) for key, value in known.items()}


def tags(runs: list, *, ids: dict[str, str], experiment: str, study: str) -> dict[str, str]:
    """The experiment's tags: a view of every (model, domain), and a description that leads to them and to the report.

    runs  those of `tracked_runs`; ids  MLflow's ids by their keys
    """
    made, lines = {}, []
    for number, pair in enumerate(dict.fromkeys("/".join(run.key.split("/")[:2]) for run in runs), start=1):
        own = [run for run in runs if run.key == pair or run.key.startswith(f"{pair}/")]
        title = " on ".join(pair.split("/"))
        made[f"{TAG}{KEY}{number}"] = _view(own, pair=pair, title=title)
        links = {"charts": _address(experiment, number), "table": _address(experiment, number, charts=False)}
        if report := next((run for run in own if any(file.name == "report.html" for file, _ in run.files)), None):
            links["report"] = (
                f"#/experiments/{experiment}/runs/{ids[report.key]}/artifacts/report.html?{urlencode(KIND)}"
            )
        lines.append(f"{title}: {', '.join(f'[{text}]({address})' for text, address in links.items())}")
    lines.append(f"Study {study} of Holdfast, a mirror of results/ that `python -m experiments track` writes.")
    return made | {"mlflow.note.content": "\n\n".join(lines)}


def port() -> str:
    """The port of MLflow's server, by the variable that MLflow reads."""
    return os.environ.get("MLFLOW_PORT") or "5000"


def first_link(experiment: str) -> str:
    """The address of an experiment's first view, as `python -m experiments ui` serves it."""
    return f"http://{HOST}:{port()}/{_address(experiment, 1)}"


def _address(experiment: str, number: int, *, charts: bool = True) -> str:
    mode = {"compareRunsMode": "CHART" if charts else "TABLE"}
    query = {"viewStateShareKey": f"{KEY}{number}"} | KIND | mode
    return f"#/experiments/{experiment}/runs?{urlencode(query)}"


def _view(runs: list, *, pair: str, title: str) -> str:
    model, domain = pair.split("/")
    tagged, measured = {tag for run in runs for tag in run.tags}, {point[0] for run in runs for point in run.metrics}
    heads = [
        *(headline.head for headline in HEADLINES.values()),
        "seeds",
        *(head for head, _ in COSTS.values()),
        "note",
    ]
    columns = [f"tags.`{head}`" for head in heads if head in tagged]
    intervals = [f"tags.`{headline.head}`" for headline in HEADLINES.values()]
    order = ["attributes.`Run Name`", *columns, "runDateAndNestInfo", "duration"]
    sections = {
        "methods": ("Methods, with 95 % intervals", 1, 352),
        "front": ("Front", 1, 760),
        "curves": ("Learning curves on probe rows", 2, 360),
    }
    compared = {"type": "DIFFERENCE", "compareGroups": ["Tags"], "chartName": "Methods", "showDifferencesOnly": True}
    axes = {f"{axis}axis": {"key": key, "type": "METRIC"} for axis, key in zip("xy", (ORDER[0], GENERAL.key))}
    front = {"type": "SCATTER", **axes}
    if any(run.image for run in runs):
        front = {"type": "IMAGE", "imageKeys": [IMAGE], "step": 0, "showRunParams": False}
    line = {"type": "LINE", "lineSmoothness": 0, "useGlobalLineSmoothing": True, "useGlobalXaxisKey": True}
    charts = [compared | {"metricSectionId": "methods", "showChangeFromBaseline": False, "baselineColumnUuid": ""}]
    charts += [front | {"metricSectionId": "front"}]
    charts += [line | {"metricKey": curve, "metricSectionId": "curves"} for curve in CURVES if curve in measured]
    charts += [{"type": "BAR", "metricKey": key, "metricSectionId": "curves", "deleted": True} for key in HEADLINES]
    always = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    state = {
        "searchFilter": f"tags.model = '{model}' and tags.domain = '{domain}' and tags.{ROW} != 'cell'",
        "orderByKey": f"metrics.`{GENERAL.key}`",
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": order,
        "columnWidths": {key: 190 if key in intervals else 120 for key in order},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [{"uuid": f"chart{i}"} | always | chart for i, chart in enumerate(charts)],
        "compareRunSections": [
            {"uuid": key, "name": name, "columns": columns, "cardHeight": height}
            | {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
            for key, (name, columns, height) in sections.items()
        ],
        "isAccordionReordered": True,
        "autoRefreshEnabled": False,
    }
    when = max(run.end for run in runs)
    return json.dumps({"name": title, "createdAt": when, "updatedAt": when, "state": json.dumps(state)})
