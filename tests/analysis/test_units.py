"""Metrics that are not proportions of rows are shown everywhere in their own unit, or are left out."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from analysis import units
from analysis.compare import write_summary
from analysis.load import load_cells
from analysis.sections.tables import as_text
from analysis.statistics.comparison import comparison
from analysis.statistics.flips import flips
from analysis.statistics.intervals import of_set
from analysis.statistics.tests import paired_tests
from experiments.commands import tracked_runs
from tests.analysis.fixtures import write_items, write_json, write_results

PAIR = {"model": "smollm2-135m", "domain": "science"}


def in_another_metric(root, task, metric, **about):
    """The results in `root` with a task in another metric: an item's score is a log-likelihood, or empty for a set."""
    base = pd.read_csv(root / "base/smollm2-135m/items.csv.gz")
    whole = {path: pd.read_csv(path) for path in sorted(root.glob("runs/**/items.csv.gz"))}
    per_item = metric == "perplexity"

    def turn(items):
        return items.assign(
            score=items["score"].where(items["task"] != task, items["score"] - 3 if per_item else np.nan)
        )

    before = float(base.loc[base["task"] == task, "score"].mean())
    for path, items in whole.items():
        after = float(items.loc[items["task"] == task, "score"].mean())
        metrics = json.loads((file := path.parent / "metrics.json").read_text())
        own = metrics["scores_by_task"][task]
        value = (lambda share: math.exp(3 - share)) if per_item else (lambda share: 2 * share - 1)
        own |= {
            "metric": metric,
            "value": value(after),
            "base": value(before),
            "change": (after - before) * (1 if per_item else 2),
            "unit": "nats" if per_item else metric,
            "per_item": per_item,
            "higher_is_better": not per_item,
        } | about
        if task == metrics["domain"]:
            metrics |= {
                "domain_score": own["value"],
                "domain_score_base": own["base"],
                "domain_gain": own["change"],
                "domain_unit": own["unit"],
            }
        else:
            metrics["forgetting_by_task"].pop(task)
            metrics |= {
                "forgetting": float(np.mean(list(metrics["forgetting_by_task"].values()))),
                "forgetting_apart": {task: {"forgetting": -own["change"], "unit": own["unit"]}},
            }
        write_json(file, metrics)
        write_items(path, turn(items))
    write_items(root / "base/smollm2-135m/items.csv.gz", turn(base))


def test_a_domain_in_nats_is_compared_row_by_row_and_said_in_nats(tmp_path):
    names = write_results(tmp_path, methods=("full", "lora"))
    in_another_metric(tmp_path, "science", "perplexity")
    loaded = load_cells(tmp_path, names)
    row = comparison(loaded).set_index("method").loc["full"]
    items = loaded.items[(loaded.items["cell"] == names[0]) & (loaded.items["task"] == "science")].set_index("doc_id")[
        "score"
    ]
    asked = loaded.base["smollm2-135m"]["items"]
    changed = items - asked[asked["task"] == "science"].set_index("doc_id")["score"]
    half = (
        student.ppf(0.975, len(changed) - 1) * changed.std(ddof=1) / math.sqrt(len(changed))
    )  # no row more: nothing turns
    assert row["domain_gain"] == pytest.approx(changed.mean())
    assert (row["domain_gain_low"], row["domain_gain_high"]) == pytest.approx(
        (changed.mean() - half, changed.mean() + half)
    )
    text = as_text(loaded, comparison(loaded))
    assert (
        re.search(r"full .* perplexity +\+0\.\d+ nats\n", text) and "the gain of science in nats of perplexity" in text
    )
    tests = paired_tests(loaded, **PAIR)
    assert tests.loc[tests["measure"] == "domain_gain", "difference"].iloc[0] == pytest.approx(changed.mean())
    assert "science" not in set(flips(loaded, **PAIR)["task"])


def test_a_metric_of_the_set_goes_through_the_whole_summary_without_a_paired_test(tmp_path):
    names = write_results(tmp_path / "results", methods=("full",), seeds=(0, 1))
    in_another_metric(tmp_path / "results", "science", "mcc", change_error=0.04)
    in_another_metric(tmp_path / "results", "piqa", "perplexity")
    text = write_summary(results_root=tmp_path / "results", summary_dir=tmp_path / "summary", cells=names, title="t")
    assert (
        re.search(r"full .* 0\.\d+ mcc +\+0\.\d+\n", text)
        and "piqa (science) is not a proportion of rows and not in the mean; its own forgetting, in nats" in text
    )
    tests = pd.read_csv(tmp_path / "summary/tests.csv")
    assert "domain_gain" not in set(tests["measure"]) and "forgetting" in set(tests["measure"])
    page = (tmp_path / "summary/report.html").read_text()
    assert "Gain in mcc is not tested: it is one number of all rows" in page
    loaded = load_cells(tmp_path / "results", names)
    row = comparison(loaded).set_index("method").loc["full"]
    gains = loaded.cells.loc[loaded.cells["method"] == "full", "domain_gain"].to_numpy(dtype=float)
    half = math.sqrt(1.959964**2 * 0.04**2 + student.ppf(0.975, 1) ** 2 * gains.var(ddof=1) / 2)
    assert row["domain_gain_high"] - row["domain_gain_low"] == pytest.approx(2 * half, rel=1e-6)
    run = tracked_runs.run_of(loaded, names[0])
    assert f"{gains[0]:+.3g} mcc" in run.tags.values()


def test_an_interval_of_the_set_without_an_error_has_no_bounds():
    assert of_set([0.1], [None], n=20).low is None
    one = of_set([0.1], [0.05], n=20)
    assert (one.low, one.high) == pytest.approx((0.1 - 1.959964 * 0.05, 0.1 + 1.959964 * 0.05), rel=1e-6)


@pytest.mark.parametrize(
    "value, unit, level, change",
    [
        (0.4837, "share", "48.4", "+48.4"),
        (15.8948, "nats", "15.89", "+15.9"),
        (1.12, "nats", "1.120", "+1.12"),
        (-0.61, "nats", "−0.6100", "−0.610"),
        (1234.0, "nats", "1234", "+1.23e+03"),
        (-0.25, "mcc", "−0.25", "−0.25"),
        (0.0, "mcc", "0", "0"),
        (5.976e12, "nats", "5.976e+12", "+5.98e+12"),
        (None, "nats", "–", "–"),
    ],
)
def test_numbers_as_they_are_written(value, unit, level, change):
    assert (units.level(value, unit), units.change(value, unit)) == (level, change)
