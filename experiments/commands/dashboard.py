"""What MLflow's page of a study shows without any set-up: columns, charts and a text, as its page stores them itself.

The page loads a shared view from an experiment's tag, by its name in the address. The shapes here are those of
MLflow 3.17; tests/experiments/test_dashboard.py opens them in a real browser.
"""

import base64
import json
import zlib
from collections.abc import Sequence

from experiments.commands.mirror_groups import CHARTED, charted

VIEW = "holdfast"
COLUMNS = (
    "domain_score",
    "domain_gain",
    "forgetting",
    "forgetting_low",
    "forgetting_high",
    "perplexity_ratio",
    "seconds_prepare",
    "seconds_train",
    "seeds",
)
# the grid's own names of columns; it sorts metrics by name where a view gives no order, or where the view comes after the grid
NAME, ORDER = "attributes.`Run Name`", ("runDateAndNestInfo", "duration", *(f"metrics.`{key}`" for key in COLUMNS))
COSTS = (
    "seconds_prepare",
    "seconds_train",
    "peak_memory_bytes",
    "bytes_importance",
    "bytes_anchor",
    "bytes_weights_delta",
)
# the rest of a view as MLflow starts one; it refuses a view that lacks a key
STATE = {
    **dict.fromkeys(("runsPinned", "runsHidden"), []),
    **dict.fromkeys(("runsExpanded", "runsVisibilityMap", "groupsExpanded"), {}),
    **dict.fromkeys(("viewMaximized", "runListHidden"), False),
    **dict.fromkeys(("useGroupedValuesInCharts", "hideEmptyCharts", "autoRefreshEnabled"), True),
    "columnOrder": [NAME, *ORDER],
    "columnWidths": {NAME: 260, "runDateAndNestInfo": 120, "duration": 80, **dict.fromkeys(ORDER[2:], 115)},
    "runsHiddenMode": "SHOW_ALL",
    "groupBy": None,
    "isAccordionReordered": True,  # it would sort the sections by name
    "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
}


def tags(*, study: str, identity: str, pairs: Sequence[tuple[str, str]], banner: str = "") -> dict[str, str]:
    """The tags of experiment number `identity`: the shared view, with charts for each (model, domain) of `pairs`, and the text above the runs."""
    state = json.dumps(
        {
            **STATE,
            "selectedColumns": ORDER[2:],
            "compareRunCharts": _charts(pairs),
            "compareRunSections": _sections(pairs),
        }
    )
    view = f"deflate;{base64.b64encode(zlib.compress(state.encode())).decode()}"
    text = (
        f"{f'**{banner}**' + chr(10) * 2 if banner else ''}Study **{study}**: [table]({address(identity)}) · [charts: forgetting against gain, costs, curves]({address(identity, charts=True)})\n\n"
        "A run is a (model, domain, method), the mean over its seeds; the + before it opens its seeds; its artifacts hold figures and report. "
        "Rebuilt from results/ by `python -m experiments track`."
    )
    return {
        f"mlflow.sharedViewState.{VIEW}": view,
        "mlflow.note.content": text,
        "mlflow.experimentKind": "custom_model_development",
    }


def address(identity: str, *, charts: bool = False) -> str:
    """Where the page of experiment number `identity` is, without the host."""
    return f"#/experiments/{identity}/runs?workflowType=machine_learning&{'compareRunsMode=CHART&' if charts else ''}viewStateShareKey={VIEW}"


def _charts(pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """A scatter and bars for each comparison, and bars of the costs of all."""
    axis = lambda key: {"key": key, "type": "METRIC", "dataAccessKey": key}
    bar = lambda key, section: _card(f"bar-{key}", section=section, type="BAR", metricKey=key, displayName=key)
    charts = []
    for model, domain in pairs:
        gain, lost, text = (charted(model, domain, key) for key in CHARTED)
        section = f"{model}-{domain}"
        charts.append(
            _card(
                f"scatter-{section}",
                section=section,
                type="SCATTER",
                displayName=_name(model, domain),
                xaxis=axis(gain),
                yaxis=axis(lost),
            )
        )
        charts += [bar(key, section) for key in (lost, gain, text)]
    return [*charts, *(bar(key, "costs") for key in COSTS)]


def _card(name: str, *, section: str, **about) -> dict:
    """A chart; of every run, where the page would stop at ten."""
    place = {"uuid": f"holdfast-{name}", "metricSectionId": f"holdfast-{section}"}
    return {**place, "deleted": False, "isGenerated": False, "runsCountToCompare": 100, **about}


def _sections(pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """Ours first; the page adds one for every other group of metrics behind them."""
    about = {"display": True, "columns": 2, "isReordered": False, "deleted": False, "isGenerated": False}
    named = [(f"{model}-{domain}", _name(model, domain)) for model, domain in pairs] + [("costs", "Costs")]
    return [{"uuid": f"holdfast-{key}", "name": name, **about} for key, name in named]


def _name(model: str, domain: str) -> str:
    return f"Forgetting against gain: {domain}, {model}"
