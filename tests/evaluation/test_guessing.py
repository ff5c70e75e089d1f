"""The chance level against its definition: the metric's mean if each choice of a row is picked equally often."""

import itertools

import pytest

from evaluation.documents import kept
from evaluation.guessing import chance
from evaluation.shipped import shipped_config
from evaluation.task import make_task

ROWS = [
    {"q": f"Which is {n}?", "choices": [f"the {'long ' * c}{c}" for c in range(2 + n % 3)], "gold": n % 2}
    for n in range(7)
]
COUNTS = [len(row["choices"]) for row in ROWS]
TASK = {"doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "gold"}


def made(metric, rows=ROWS, **keys):
    higher = {"brier_score": False}.get(metric, True)
    return make_task(
        "t", TASK | keys | {"metric_list": [{"metric": metric, "higher_is_better": higher}]}, rows, metric=None
    )


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"])
def test_each_row_counts_by_its_own_number_of_choices(metric):
    task = made(metric)
    assert chance(task) == pytest.approx(sum(1 / count for count in COUNTS) / len(COUNTS))
    # lm-eval's own function, asked once for every choice
    values = []
    for doc, count in zip(task.eval_docs, COUNTS):
        answers = [[(0.0 if c == pick else -1e9, False) for c in range(count)] for pick in range(count)]
        answers = [one + [(-1.0, False)] * count for one in answers] if metric == "acc_mutual_info" else answers
        values.append(sum(task.process_results(doc, one)[metric] for one in answers) / count)
    assert chance(task) == pytest.approx(sum(values) / len(values))


def test_several_right_choices_are_as_many_chances():
    rows = [row | {"gold": row["choices"][:2]} for row in ROWS]
    assert chance(made("acc", rows)) == pytest.approx(sum(2 / count for count in COUNTS) / len(COUNTS))


def test_what_has_to_be_written_is_not_guessed():
    assert chance(made("exact_match")) == 0.0  # the model has to find the choice the likeliest text
    written = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[0]}}"}
    assert chance(made("exact_match", **written)) == 0.0


def test_a_metric_in_another_unit_has_no_chance_level():
    assert chance(made("brier_score", [row | {"choices": ["a", "b"]} for row in ROWS])) is None


def test_a_tasks_own_function_is_asked_for_every_choice():
    """TruthfulQA's second form sums the probabilities of all true answers: 2 of 3, and 1 of 4."""
    labels = [[1, 1, 0], [1, 0, 0, 0]]
    docs = [
        {"question": f"Is it {n}?", "mc2_targets": {"choices": [f"answer {c}" for c in range(len(own))], "labels": own}}
        for n, own in enumerate(labels)
    ]
    docs = [doc | {"mc1_targets": doc["mc2_targets"]} for doc in docs]
    task = kept("truthfulqa_mc2", shipped_config("truthfulqa_mc2"), docs=docs, examples=())
    assert chance(task) == pytest.approx((2 / 3 + 1 / 4) / 2)


def test_a_gold_that_is_no_choice_is_never_right():
    """As lm-eval counts it in its own tasks."""
    docs = [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": answer} for answer in (1, 9)]
    task = kept("mmlu_anatomy", shipped_config("mmlu_anatomy"), docs=docs, examples=())
    assert chance(task) == 0.125
    answers = itertools.chain(task.process_results(task.eval_docs[1], [(-1.0, False)] * 4).values())
    assert list(answers) == [0.0]
