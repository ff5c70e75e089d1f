"""Every metric of lm-eval's registry on the kind of task it is for: lm-eval's own number, or a refusal before
anything is scored.
"""

import json
import math
import re

import numpy as np
import pytest
from lm_eval.api import metrics
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import evaluate

from evaluation import harness
from evaluation.lm import build as build_lm
from evaluation.measure import LARGEST, RESAMPLES
from evaluation.task import make_task, render
from experiments.model.random_models import build
from methods.errors import UserError
from tests.evaluation.conftest import write_rows

# two choices, of unlike lengths in characters and in bytes, so that no two metrics pick alike
ROWS = [
    {
        "q": f"Is {i} odd?",
        "choices": ["é" * (3 + i % 4), "no" + "y" * (i % 3)],
        "gold": i % 2,
        "text": f"Row {i} says so. " * (1 + i % 3),
    }
    for i in range(10)
]
TASKS = {
    "multiple_choice": {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
    "loglikelihood": {"doc_to_text": "{{q}}", "doc_to_target": "{{' ' + choices[0]}}"},
    "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{text}}"},
    "generate_until": {
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[1]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    },
}
COMPUTED = {  # by lm-eval's ConfigurableTask.process_results
    "multiple_choice": {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc", "brier_score"},
    "loglikelihood": {"acc", "perplexity"},
    "loglikelihood_rolling": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
    "generate_until": {"exact_match", "bleu", "chrf", "chrf++", "ter", "mcc"},
}
PER_ITEM = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "brier_score", "perplexity"}
LOWER = {"brier_score", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter"}
NATS = {"perplexity", "word_perplexity", "byte_perplexity"}
FITTING = [(kind, metric) for kind, fitting in COMPUTED.items() for metric in sorted(fitting)]
OTHERS = [(kind, metric) for kind, fitting in COMPUTED.items() for metric in sorted(set(metric_registry) - fitting)]


def task_of(kind, metric, **more):
    return TASKS[kind] | {"output_type": kind, "metric_list": [{"metric": metric}]} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every metric that can be computed as a task of its own, on the same rows."""
    found = tmp_path_factory.mktemp("metrics")
    write_rows(found / "rows.jsonl", ROWS)
    entries = [
        {
            "name": f"{kind}-{metric}",
            "role": "retention",
            "task": task_of(kind, metric),
            "metric": metric,
            "chance": 0.0,
            "file": "rows.jsonl",
        }
        for kind, metric in FITTING
    ]
    (found / "tasks.json").write_text(json.dumps(entries))
    return found


@pytest.fixture(scope="module")
def scored(folder):
    from experiments.model.random_models import byte_tokenizer

    model, tokenizer = build("llama", seed=3), byte_tokenizer()
    # lm-eval's own classes and numbers, from its own functions: nothing of ours but the rows in memory and the forward
    # passes
    tasks = {
        entry["name"]: make_task(entry["name"], entry["task"], ROWS, metric=entry["metric"])
        for entry in json.loads((folder / "tasks.json").read_text())
    }
    asked, _ = build_lm(model, tokenizer, scorer="shared-prefix", batch_size=4)
    reference = evaluate(asked, {"tasks": tasks}, bootstrap_iters=0)
    return harness.score(model=model, tokenizer=tokenizer, tasks_dir=folder, batch_size=4), reference


@pytest.mark.parametrize("kind, metric", FITTING)
def test_the_value_is_lm_evals_and_the_items_are_its_parts(kind, metric, scored):
    (scores, items), reference = scored
    name = f"{kind}-{metric}"
    found, own = scores["tasks"][name], items[items.task == name]
    passed = [sample[metric] for sample in sorted(reference["samples"][name], key=lambda sample: sample["doc_id"])]
    assert found["value"] == pytest.approx(float(reference["results"][name][f"{metric},none"]), rel=1e-12)
    assert found["higher_is_better"] == (metric not in LOWER) and found["per_item"] == (metric in PER_ITEM)
    shares = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}
    assert found["unit"] == ("share" if metric in shares else "nats" if metric in NATS else metric)
    turned = -1 if metric in LOWER else 1
    expected = -math.log(found["value"]) if metric in NATS else turned * found["value"]
    assert found["compared"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if metric in PER_ITEM:
        assert own.score.mean() == pytest.approx(found["compared"], rel=1e-9) and "resampled" not in found
    else:
        assert own.score.isna().all() and len(found["resampled"]) == RESAMPLES
        assert found["resampled"] == drawn_again(kind, metric, passed)
    if kind == "multiple_choice" and metric == "brier_score":
        assert found["brier"] == pytest.approx(found["value"], rel=1e-9)
    if kind == "multiple_choice" and metric == "acc":
        assert (own.margin > 0).tolist() == (own.score == 1).tolist()
    if kind == "multiple_choice" and metric in shares:
        assert ((own.choice == own.gold).fillna(False) == (own.score == 1)).all()


def drawn_again(kind, metric, passed):
    """Rows drawn with replacement and lm-eval's aggregation of each draw, by the definition of a bootstrap."""
    turned = -1.0 if metric in LOWER else 1.0
    aggregate = make_task("t", task_of(kind, metric), ROWS, metric=metric).aggregation()[metric]
    rows = np.random.default_rng(0).integers(len(passed), size=(RESAMPLES, len(passed)))
    values = [aggregate([passed[row] for row in draw]) for draw in rows]
    return [round(-math.log(value) if metric in NATS else turned * float(value), 9) + 0.0 for value in values]


@pytest.mark.parametrize("kind, metric", OTHERS)
def test_what_lm_eval_does_not_compute_is_refused_with_the_data(kind, metric):
    with pytest.raises(UserError, match=f"metric '{re.escape(metric)}'|scoring an answer to this row fails"):
        make_task("t", task_of(kind, metric), ROWS, metric=metric)


def test_brier_of_each_row_is_the_squared_distance_to_its_gold(scored):
    (_, items), reference = scored
    own = items[items.task == "multiple_choice-brier_score"].sort_values("doc_id")
    for score, sample in zip(
        own.score, sorted(reference["samples"]["multiple_choice-brier_score"], key=lambda one: one["doc_id"])
    ):
        nats = np.array([value for value, _ in sample["filtered_resps"]])
        share = np.exp(nats - nats.max()) / np.exp(nats - nats.max()).sum()
        assert -score == pytest.approx(((share - np.eye(2)[ROWS[sample["doc_id"]]["gold"]]) ** 2).sum(), rel=1e-6)


def test_a_perplexity_beyond_all_numbers_is_the_largest(byte_tokenizer):
    task = make_task("t", task_of("loglikelihood", "perplexity"), ROWS, metric="perplexity")
    assert task.aggregation()["perplexity"]([-2000.0, -1000.0]) == math.exp(LARGEST)
    assert (
        task.measure.of(math.exp(LARGEST), [-2000.0, -1000.0])["compared"] == -1500.0
    )  # and what is compared is not cut
    assert task.aggregation()["perplexity"]([-2.0, -4.0]) == metrics.perplexity([-2.0, -4.0])


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"metric": "perplexity", "higher_is_better": True}, "better higher according to metric_list, and lower"),
        ({"metric": "rouge"}, "'rouge' in metric_list is not one of lm-eval's own metrics"),
        ({"metric": "acc", "hf_evaluate": True}, "code of others is not downloaded"),
    ],
)
def test_metrics_that_contradict_lm_eval_or_have_to_be_fetched_are_refused(entry, told):
    with pytest.raises(UserError, match=told):
        make_task(
            "t", task_of("loglikelihood", "acc", metric_list=[{"metric": "acc"}, entry]), ROWS, metric=entry["metric"]
        )


def test_another_metric_of_the_task_that_cannot_be_computed_is_refused_too():
    rows = [row | {"choices": ["a", "b", "c"], "gold": number % 3} for number, row in enumerate(ROWS)]
    with pytest.raises(UserError, match="metric 'f1' cannot be computed of these rows.*multiclass.*leave it out"):
        make_task(
            "t",
            task_of("multiple_choice", "acc", metric_list=[{"metric": "acc"}, {"metric": "f1"}]),
            rows,
            metric="acc",
        )


def test_a_mean_that_leaves_the_unit_interval_is_no_proportion():
    many = {
        "metric_list": [
            {"metric": lambda items: 100.0 * (items[0] == items[1]), "aggregation": "mean", "higher_is_better": True}
        ]
    }
    task = make_task("t", task_of("generate_until", "exact_match", **many), ROWS, metric="<lambda>")
    assert task.measure.unit == "<lambda>" and task.measure.per_item
    assert task.measure.of(50.0, [100.0, 0.0]) == {
        "unit": "<lambda>",
        "higher_is_better": True,
        "per_item": True,
        "compared": 50.0,
    }


@pytest.mark.parametrize("metric, lengths", [("acc_norm", [3, 2]), ("acc_bytes", [6, 2]), ("acc_norm,none", [3, 2])])
def test_probes_are_divided_as_the_metric_says(metric, lengths):
    task = make_task("t", task_of("multiple_choice", metric.partition(",")[0]), ROWS, metric=metric)
    assert render(task)[0]["norm"] == lengths
