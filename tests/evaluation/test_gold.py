"""Values stay what they are: a gold text is matched to the choices before it is taken for an index, and null is
never a word.
"""

import numpy as np
import pytest

from evaluation.task import make_task, render
from methods.errors import UserError
from methods.tools.jsonl import Row
from tests.evaluation.conftest import write_rows

PLAIN = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}"}


def golds(tmp_path, target, *rows, **more):
    """The golds by which the rows are scored and trained, lm-eval's own reading of each beside them."""
    file = write_rows(tmp_path / "rows.jsonl", [{"q": f"Which {n}?"} | row for n, row in enumerate(rows)])
    task = make_task("set", PLAIN | {"doc_to_target": target} | more, file, metric="acc")
    rendered = [row["gold"] for row in render(task)]
    for gold, doc in zip(rendered, task.eval_docs):  # the number that lm-eval's acc compares with the likeliest choice
        likeliest = [(0.0 if k == gold else -1.0, False) for k in range(len(doc["choices"]))]
        assert task.process_results(doc, likeliest)["acc"] == 1.0
    return rendered


def test_digits_that_name_a_choice_by_text_and_by_index_alike_or_by_one_alone(tmp_path):
    assert golds(tmp_path, "{{answer}}", {"choices": ["0", "1"], "answer": "1"}) == [1]
    assert golds(
        tmp_path, "{{answer}}", {"choices": ["7", "5"], "answer": "5"}, {"choices": ["9", "5"], "answer": "9"}
    ) == [1, 0]
    assert golds(tmp_path, "{{answer}}", {"choices": ["a", "b"], "answer": "1"}) == [1]
    assert golds(tmp_path, "{{answer}}", {"choices": ["²", "³"], "answer": "³"}) == [
        1
    ]  # str.isdigit, and no number to Python


def test_digits_that_name_two_choices_are_refused_by_row(tmp_path):
    rows = {"choices": ["0", "1", "2"], "answer": "0"}, {"choices": ["1", "2", "0"], "answer": "0"}
    with pytest.raises(
        UserError, match=r"line 2: the gold answer '0' is choice 2 of .* as a text and choice 0 as an index"
    ):
        golds(tmp_path, "{{answer}}", *rows)
    assert golds(tmp_path, "answer", *rows) == [0, 2]  # the remedy that the message names: the column itself is a text
    with pytest.raises(UserError, match="not one of its 3 choices"):
        golds(tmp_path, "{{ answer }} ", *rows)


def test_whole_numbers_in_the_rows_are_indices(tmp_path):
    rows = {"choices": ["1", "2", "0"], "label": 0}, {"choices": ["1", "2", "0"], "label": 2}
    assert golds(tmp_path, "{{label}}", *rows) == golds(tmp_path, "label", *rows) == [0, 2]
    assert golds(tmp_path, "{{label | int}}", {"choices": ["1", "2", "0"], "label": "2"}) == [2]
    assert golds(tmp_path, "{{'abc'.index(label)}}", {"choices": ["1", "2", "0"], "label": "b"}) == [1]
    assert golds(tmp_path, lambda doc: np.int32(doc["label"]), {"choices": ["1", "2", "0"], "label": 2}) == [2]
    assert golds(tmp_path, "label", {"choices": ["no", "yes"], "label": True}) == [1]
    assert golds(tmp_path, "label", {"choices": ["no", "yes"], "label": 1.0}) == [1]
    with pytest.raises(UserError, match="gold answer '1.0' is not one"):
        golds(tmp_path, "{{label}}", {"choices": ["no", "yes"], "label": 1.0})


def test_choices_that_are_numbers(tmp_path):
    assert golds(tmp_path, "answer", {"choices": [3, 5, 7], "answer": 5}) == [1]
    assert golds(tmp_path, "answer", {"choices": [3, 5, 7], "answer": "7"}) == [2]
    assert golds(tmp_path, "answer", {"choices": [0.5, 2.5], "answer": 2.5}) == [1]
    with pytest.raises(UserError, match="gold answer 1 is choice 0"):
        golds(tmp_path, "answer", {"choices": [1, 2, 3], "answer": 1})
    task = make_task(
        "set",
        PLAIN | {"doc_to_target": "a"},
        write_rows(tmp_path / "r.jsonl", [{"q": "2+3?", "choices": [5, 6], "a": 0}]),
        metric="acc",
    )
    assert render(task)[0]["choices"] == [" 5", " 6"]


def test_choices_that_are_no_list_are_refused(tmp_path):
    with pytest.raises(UserError, match="'yes or no', not a list of choices"):
        golds(tmp_path, "answer", {"choices": "yes or no", "answer": 0}, doc_to_choice="choices")


def test_several_golds_in_every_row_or_in_none(tmp_path):
    assert golds(tmp_path, "ok", {"choices": ["a", "b"], "ok": ["b", "a"]}, {"choices": ["a", "b"], "ok": ["b"]}) == [
        1,
        1,
    ]
    with pytest.raises(UserError, match="line 2 has the gold answer"):
        golds(tmp_path, "{{ok}}", {"choices": ["a", "b"], "ok": "1"}, {"choices": ["a", "b"], "ok": "[1]"})


def test_a_question_in_digits_is_a_question(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"n": "7", "prime": 1}, {"n": "12", "prime": 0}])
    task = make_task(
        "set", {"doc_to_text": "{{n}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "prime"}, file, metric="acc"
    )
    assert [row["context"] for row in render(task)] == ["7", "12"]


def test_a_text_in_brackets_is_a_text(tmp_path):
    one = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{' ' + end}}"}
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "Count:", "end": "x"}, {"text": "Count:", "end": "[1]"}])
    assert [row["choices"] for row in render(make_task("set", one, file, metric="acc"))] == [[" x"], [" [1]"]]
    whole = {"output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "{{end}}"}
    file = write_rows(tmp_path / "rows.jsonl", [{"end": "[1]"}])
    assert render(make_task("set", whole, file, metric="acc"))[0]["choices"] == ["[1]"]


HINT = {"doc_to_text": "{{q}} Hint: {{hint}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "gold"}


@pytest.mark.parametrize(
    "rows, task, told",
    [
        ([{"q": "a", "hint": "b", "gold": 0}, {"q": "a", "hint": None, "gold": 1}], HINT, "row 2.*'hint' is null"),
        ([{"q": "a", "hint": None, "gold": 0}], HINT, "row 1.*'hint' is null"),
        ([{"q": "a", "hint": float("nan"), "gold": 0}], HINT, "row 1.*'hint' is null"),
        ([{"q": "a", "hint": "b", "gold": 0}, {"q": "a", "gold": 1}], HINT, "row 2.*'hint' is null"),
        ([{"q": None, "gold": 0}], HINT | {"doc_to_text": "q"}, "row 1.*'q' is null"),
        ([{"q": "a", "c": ["x", None], "gold": 0}], HINT | {"doc_to_text": "q", "doc_to_choice": "c"}, "'c' is null"),
        (
            [{"q": "a", "c": ["x", None], "gold": 0}],
            HINT | {"doc_to_text": "q", "doc_to_choice": "{{c}}"},
            "'c' is null",
        ),
        ([{"q": "a", "hint": "b", "gold": None}], HINT, "'gold' is null"),
        (
            [{"q": "a", "about": None, "gold": 0}],
            HINT | {"doc_to_text": "q", "description": "{{about}}"},
            "'about' is null",
        ),
    ],
)
def test_null_is_never_the_word_none(rows, task, told):
    with pytest.raises(UserError, match=told):
        make_task("set", task, rows, metric="acc")


def test_null_that_no_template_writes_is_no_matter(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": "a", "hint": None, "note": None, "gold": 1}])
    asked = {"doc_to_text": "{{q}}{% if hint %} Hint: {{hint}}{% endif %}:{{note or '?'}}"}
    assert render(make_task("set", HINT | asked, rows, metric="acc"))[0]["context"] == "a:?"


def test_rows_are_named_where_their_author_finds_them():
    with pytest.raises(UserError, match="task set, book.jsonl line 9: .*text"):
        make_task(
            "set",
            "lambada_openai",
            [Row({"text": "A b"}, at="book.jsonl line 7"), Row({"text": None}, at="book.jsonl line 9")],
            metric="acc",
        )


def test_marks_of_right_and_wrong_are_no_indices(tmp_path):
    for marks in ([0, 1, 0], [False, True, False], [1, 0, 0]):
        with pytest.raises(UserError, match=r"line 1: the gold answer \[.*\] can be a mark for each of the 3 choices"):
            golds(tmp_path, "labels", {"choices": ["a", "b", "c"], "labels": marks})
    assert golds(tmp_path, "{{labels.index(1)}}", {"choices": ["a", "b", "c"], "labels": [0, 1, 0]}) == [1]
    assert golds(tmp_path, "labels", {"choices": ["a", "b", "c"], "labels": [0, 1]}) == [0]


def test_truth_values_are_the_choices_that_say_so(tmp_path):
    for yes, no in ((True, False), ("True", "False"), ("true", "false")):
        rows = [
            {"choices": [yes, no], "answer": True},
            {"choices": [yes, no], "answer": False},
            {"choices": [no, yes], "answer": True},
        ]
        assert golds(tmp_path, "answer", *rows) == [0, 1, 1]
    assert golds(
        tmp_path, "{{answer}}", {"choices": [True, False], "answer": True}, {"choices": [True, False], "answer": False}
    ) == [0, 1]
    assert golds(tmp_path, "answer", {"choices": ["No", "Yes"], "answer": True}) == [1]
    with pytest.raises(
        UserError, match="line 1: the gold answer True is choice 1 of .* as an index, and 'Yes' by what it says"
    ):
        golds(tmp_path, "answer", {"choices": ["Yes", "No"], "answer": True})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"q": "x", "a": []}, r"line 2: doc_to_target \('a'\) gives \[\], a list without an answer"),
        ({"q": "x", "a": {"text": "y"}}, r"line 2: doc_to_target \('a'\) gives \{'text': 'y'\}, an object"),
        ({"q": [{"role": "user", "content": "x"}], "a": ["y"]}, r"line 2: doc_to_text \('q'\) gives .*, not a text"),
    ],
)
def test_lists_and_objects_are_not_written_as_python_would(tmp_path, columns, message):
    task = {
        "output_type": "generate_until",
        "doc_to_text": "q",
        "doc_to_target": "a",
        "metric_list": [{"metric": "exact_match"}],
    }
    with pytest.raises(UserError, match=message):
        make_task(
            "set", task, write_rows(tmp_path / "rows.jsonl", [{"q": "1?", "a": ["y"]}, columns]), metric="exact_match"
        )
