"""Local rows in lm-eval's tasks: the shipped prompts, and every way of scoring 0.0 in silence refused by name."""

import sys

import pytest

from evaluation.catalogue import named
from evaluation.shipped import SHIPPED, shipped_config, shipped_yaml
from evaluation.task import doc_hash, make_task, read_rows, render
from evaluation.templates import environment
from methods.errors import UserError
from tests.evaluation.conftest import HELLASWAG, LAMBADA, SCIQ, WINOGRANDE, write_rows


def made(tmp_path, rows, task="sciq", *, metric="acc", name="set"):
    return make_task(name, task, write_rows(tmp_path / "rows.jsonl", rows), metric=metric)


def test_shipped_prompt_on_local_rows(tmp_path):
    first = render(made(tmp_path, SCIQ))[1]
    assert first["context"] == "It has been said that \nQuestion: What is number 1?\nAnswer:"
    assert first["choices"] == [" wind", " a longer wrong answer a longer wrong answer ", " w", " water 1"]
    assert first["gold"] == 3
    assert "norm" not in first


def test_a_template_is_compiled_once(tmp_path, monkeypatch):
    compiled, real = [], environment.compile
    monkeypatch.setattr(
        environment,
        "compile",
        lambda source, *args, **settings: compiled.append(source) or real(source, *args, **settings),
    )
    mapping = {"include": "sciq", "doc_to_text": "{{question}}, asked once:"}  # no other test has compiled it
    assert len(render(made(tmp_path, SCIQ, mapping))) == len(SCIQ)
    assert compiled.count(mapping["doc_to_text"]) == 1 and len(set(compiled)) == len(compiled)


def test_process_docs_and_acc_norm(tmp_path):
    row = render(made(tmp_path, HELLASWAG, "hellaswag", metric="acc_norm"))[2]
    assert row["context"] == "Baking: A man has 2 eggs.. He Breaks them"
    assert row["choices"][1] == " into a bowl and stirs."  # [substeps] and double spaces removed by the task
    assert row["gold"] == 2
    assert row["norm"] == [len(choice) - 1 for choice in row["choices"]]


def test_one_continuation(tmp_path):
    row = render(made(tmp_path, LAMBADA, "lambada_openai"))[0]
    assert row["context"].endswith("ran to the") and row["choices"] == [" house"] and row["gold"] == 0


def test_id_is_the_doc_hash_of_the_processed_document(tmp_path):
    task = made(tmp_path, HELLASWAG, "hellaswag")
    assert [row["id"] for row in render(task)] == [doc_hash(doc) for doc in task.eval_docs]
    assert len({row["id"] for row in render(task)}) == len(HELLASWAG)


def test_inline_task_and_one_built_on_a_shipped_one(tmp_path):
    rows = [{"q": "2+2?", "options": ["3", "4"], "answer": 1}, {"q": "1+1?", "options": ["2", "5"], "answer": 0}]
    inline = {"doc_to_text": "{{q}}", "doc_to_choice": "options", "doc_to_target": "answer"}
    assert render(made(tmp_path, rows, inline))[0] | {"id": ""} == {
        "id": "",
        "context": "2+2?",
        "choices": [" 3", " 4"],
        "gold": 1,
    }
    described = render(made(tmp_path, SCIQ, {"include": "sciq", "description": "Science.\n"}))
    assert described[0]["context"].startswith("Science.\n")


def test_every_shipped_task_of_the_studies_is_found_without_the_index():
    for name in (
        "sciq",
        "hellaswag",
        "piqa",
        "lambada_openai",
        "copa",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "medmcqa",
        "winogrande",
        "commonsense_qa",
        "social_iqa",
        "boolq",
        "mmlu_anatomy",
    ):
        assert shipped_yaml(name).is_relative_to(SHIPPED)
    assert shipped_yaml("arc_challenge").name == "arc_challenge.yaml"
    assert not shipped_yaml("general_text").is_relative_to(SHIPPED)


def test_unknown_task_names_its_neighbour():
    with pytest.raises(UserError, match="hellaswagg.*did you mean 'hellaswag' or"):
        shipped_yaml("hellaswagg")


@pytest.mark.parametrize("group, members", [("mmlu", "mmlu_abstract_algebra"), ("glue", "cola, mnli, mrpc")])
def test_a_group_of_tasks_is_named_as_one_with_its_tasks(group, members):
    with pytest.raises(UserError, match=f"'{group}' is a group of lm-eval's tasks.*such as {members}"):
        shipped_yaml(group)


BOOLQ = [{"passage": "Water is wet.", "question": "is water wet", "answer": True}]


def test_boolq_rows_with_answer_instead_of_label_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no column 'label' \(columns: \['answer', 'passage', 'question'\]\)"):
        made(tmp_path, BOOLQ, "boolq")
    assert render(made(tmp_path, [BOOLQ[0] | {"label": 1}], "boolq"))[0]["gold"] == 1


def without(rows, column):
    return [{key: value for key, value in row.items() if key != column} for row in rows]


@pytest.mark.parametrize(
    "rows, task, column",
    [
        (SCIQ, "sciq", "support"),
        (SCIQ, "sciq", "distractor2"),
        (HELLASWAG, "hellaswag", "endings"),
        (HELLASWAG, "hellaswag", "label"),
        ([row | {"id": 1} for row in LAMBADA], "lambada_openai", "text"),
    ],
)
def test_a_missing_column_is_named(rows, task, column, tmp_path):
    with pytest.raises(UserError, match=f"{column}.*rename"):
        made(tmp_path, without(rows, column), task)


def test_a_value_missing_in_a_later_row_is_refused(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl line 3: the gold answer 4 is not one of its 4 choices"):
        made(tmp_path, [*HELLASWAG[:2], HELLASWAG[2] | {"label": "4"}], "hellaswag")


@pytest.mark.parametrize("label", [2, -1, "x", None])
def test_gold_outside_the_choices_is_refused(label, tmp_path):
    inline = {"doc_to_text": "{{q}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "label"}
    rows = [{"q": "a", "label": 1}, {"q": "b", "label": label}]
    with pytest.raises(UserError, match="row"):
        made(tmp_path, rows, inline)


def test_siqa_label_zero_becomes_minus_one_and_is_refused(tmp_path):
    row = {"context": "A.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "0"}
    with pytest.raises(UserError, match="gold answer '-1'"):
        made(tmp_path, [row], "social_iqa")


def test_metric_the_task_does_not_have(tmp_path):
    with pytest.raises(UserError, match=r"metric 'acc_norm'.*\['acc'\]"):
        made(tmp_path, WINOGRANDE, "winogrande", metric="acc_norm")


def test_choices_in_the_context_are_scored_but_not_rendered(tmp_path):
    task = made(tmp_path, WINOGRANDE, "winogrande")
    with pytest.raises(UserError, match="cannot be rendered"):
        render(task)


def test_unknown_key_of_an_inline_task(tmp_path):
    with pytest.raises(UserError, match="'doc_to_txt'.*'doc_to_text'"):
        made(tmp_path, SCIQ, {"doc_to_txt": "x"})


def test_few_shot_from_the_scored_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="num_fewshot is 2"):
        made(tmp_path, SCIQ, {"include": "sciq", "num_fewshot": 2})


@pytest.mark.parametrize(
    "example, said",
    [
        ({"question": "x", "choices": ["a", "b"], "gold": 2}, "the gold answer 2 is not one of its 2 choices"),
        ({"question": None, "choices": ["a", "b"], "gold": 0}, "'question' is null"),
        ("x", "'x' is not a mapping of columns to values"),
    ],
)
def test_a_few_shot_example_that_does_not_fit_is_named_and_no_row_is(tmp_path, example, said):
    good = {"question": "q", "choices": ["a", "b"], "gold": 1}
    task = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "num_fewshot": 1}
    with pytest.raises(UserError, match=f"^task set, example 2 of fewshot_config.samples: {said}"):
        made(tmp_path, [good], task | {"fewshot_config": {"samples": [good, example]}})
    with pytest.raises(UserError, match="num_fewshot is -1: it must be 0 or more"):
        made(tmp_path, [good], task | {"num_fewshot": -1})


@pytest.mark.parametrize("task", ["humaneval", "mbpp", {"unsafe_code": True, "doc_to_text": "x"}])
def test_programs_that_a_model_writes_are_not_run(tmp_path, task):
    with pytest.raises(UserError, match=r"runs the programs that a model writes \(unsafe_code\)"):
        made(tmp_path, [{"prompt": "x"}], task)


def test_program_code_of_metrics_is_not_fetched(tmp_path):
    with pytest.raises(UserError, match="code of others, which the library evaluate would download"):
        made(tmp_path, [{"text": "x"}], "mediqa_qa2019", metric="bleu")
    with pytest.raises(UserError, match=r"'f1' in metric_list is to be downloaded \(hf_evaluate: true\)"):
        made(tmp_path, [{"premise": "x"}], "kobest_copa")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is empty"):
        read_rows(write_rows(tmp_path / "empty.jsonl", []))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_rows(tmp_path / "bad.jsonl")


def test_rows_are_read_anew_each_time_and_nothing_is_printed(tmp_path, capfd):
    file = write_rows(tmp_path / "rows.jsonl", SCIQ[:1])
    assert len(render(make_task("a", "sciq", file, metric="acc"))) == 1
    write_rows(file, SCIQ[:2])
    assert len(render(make_task("a", "sciq", file, metric="acc"))) == 2
    made(tmp_path, HELLASWAG, "hellaswag")
    assert capfd.readouterr() == ("", "")


def test_columns_that_only_later_rows_have(tmp_path):
    rows = [SCIQ[0], SCIQ[1] | {"note": "x"}]
    assert list(made(tmp_path, rows).eval_docs[0]) == [*SCIQ[0], "note"]


CHOICES = {"doc_to_text": "{{q}}", "doc_to_choice": "{{options}}", "doc_to_target": "gold"}


@pytest.mark.parametrize("doc_to_choice", ["options", "{{options}}"])
def test_choices_that_are_numbers_are_read_as_json_writes_them(tmp_path, doc_to_choice):
    task = CHOICES | {"doc_to_choice": doc_to_choice}
    rows = [
        {"q": "a", "options": [3, 40], "gold": 1},
        {"q": "b", "options": [0.5, 2], "gold": 0},
        {"q": "c", "options": [True, -1.0], "gold": 0},
    ]
    assert [row["choices"] for row in render(made(tmp_path, rows, task))] == [
        [" 3", " 40"],
        [" 0.5", " 2"],
        [" true", " -1.0"],
    ]


@pytest.mark.parametrize(
    "choices, said",
    [
        (["x", ""], "choice 2 of 2 is empty .doc_to_choice: 'options'"),
        (["x", ["y"]], r"choice 2 of 2 is \[\"y\"\], neither text nor a number"),
        ([], "doc_to_choice .'options'. gives .*not a list of choices"),
        ({"A": "x"}, "doc_to_choice .'options'. gives .*not a list of choices"),
        ("xy", "doc_to_choice .'options'. gives 'xy', not a list"),
    ],
)
@pytest.mark.parametrize("at", [1, 3])
def test_choices_that_are_none_are_told_by_row(tmp_path, choices, said, at):
    rows = [{"q": f"q{n}", "options": ["x", "y"], "gold": 0} for n in range(4)]
    rows[at - 1]["options"] = choices
    with pytest.raises(UserError, match=f"task set, .*rows.jsonl line {at}: {said}"):
        made(tmp_path, rows, CHOICES | {"doc_to_choice": "options"})


def test_a_column_of_several_types_keeps_its_values(tmp_path):
    rows = [
        {"q": n, "options": ["x", "y"], "gold": 0, "source": source}
        for n, source in enumerate((12, "book", 1.5, True, None, [1, "x"], {"a": {}}, {"a": 1}), 1)
    ]
    task = made(tmp_path, rows, CHOICES | {"doc_to_text": "{{q}} of {{source or 'nobody'}}"})
    assert [doc["source"] for doc in task.eval_docs] == [row["source"] for row in rows]
    assert [row["context"] for row in render(task)][:5] == [
        "1 of 12",
        "2 of book",
        "3 of 1.5",
        "4 of True",
        "5 of nobody",
    ]


def test_the_row_that_a_tasks_own_function_cannot_take_is_named(tmp_path):
    rows = [dict(row) for row in HELLASWAG * 3]
    rows[5]["ctx_b"] = 7  # process_docs calls .capitalize()
    with pytest.raises(
        UserError, match="task set, .*rows.jsonl line 6: .*AttributeError: 'int' object has no attribute 'capitalize'"
    ):
        made(tmp_path, rows, "hellaswag")


@pytest.mark.parametrize(
    "task, message",
    [
        ("ifeval", "needs the Python package langdetect, which is not installed: `pip install 'langdetect'`"),
        ("minerva_math_algebra", "needs antlr4 4.11, and DVC, which runs the stages, needs 4.9"),
    ],
)
def test_a_package_that_a_task_needs_is_named(tmp_path, monkeypatch, task, message):
    for module in list(sys.modules):
        if module.startswith(("lm_eval.tasks.ifeval", "lm_eval.tasks.minerva")):
            monkeypatch.delitem(sys.modules, module)
    for module in ("langdetect", "antlr4", "sympy.parsing.latex"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"task {task!r} {message}"):
        made(tmp_path, [{"prompt": "x"}], task)


@pytest.mark.parametrize("task", ["ifeval", "leaderboard_ifeval"])
def test_data_that_a_tasks_code_would_fetch_is_named_and_not_fetched(monkeypatch, task):
    import nltk

    for module in list(sys.modules):
        if module.startswith(("lm_eval.tasks.ifeval", "lm_eval.tasks.leaderboard.ifeval")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(nltk, "download", nltk.download)  # which is restored behind the test
    monkeypatch.setattr(nltk.data, "path", [])
    wanted = f"task '{task}' needs the data 'punkt_tab' of NLTK.*fetch it with `python -m nltk.downloader punkt_tab`"
    with pytest.raises(UserError, match=wanted):
        named(task, name=task)
    with pytest.raises(UserError, match=wanted):
        shipped_config(task)


@pytest.mark.parametrize("function", ["process_results", "aggregation"])
def test_a_package_that_only_scoring_needs_is_named_before_anything_is_scored(tmp_path, function):
    def lacking(*_):
        import a_package_of_a_metric  # noqa: F401

    own = (
        {"process_results": lacking}
        if function == "process_results"
        else {"metric_list": [{"metric": "acc", "aggregation": lacking, "higher_is_better": True}]}
    )
    with pytest.raises(
        UserError,
        match="task set.* needs the Python package a_package_of_a_metric, which is not installed: `pip install",
    ):
        made(tmp_path, SCIQ, {"include": "sciq"} | own)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("doc_to_text", "{{q", "doc_to_text '{{q' is not a valid template"),
        ("doc_to_choice", "{{options|nope}}", "doc_to_choice .* No filter named 'nope'"),
        ("doc_to_text", None, "doc_to_text is None: write a column's name or a template"),
        ("target_delimiter", 3, "target_delimiter is 3: write a text"),
        ("metric_list", ["acc"], "metric_list must be a list of mappings with `metric`"),
        ("filter_list", [{"name": "x"}], "filter_list must be a list"),
        ("filter_list", [{"filter": []}], "every entry of filter_list has a `name`"),
        ("process_docs", "utils.f", "process_docs is a function"),
        (
            "filter_list",
            [{"name": "x", "filter": [{"function": "nope"}]}],
            "lm-eval cannot make the task .Unknown filter 'nope'",
        ),
        ("output_type", "nope", "output_type is 'nope': it must be one of loglikelihood,"),
    ],
)
def test_a_wrong_value_of_the_task_is_not_blamed_on_a_row(tmp_path, key, value, said):
    rows = [{"q": f"q{n}", "options": ["x", "y"], "gold": 0} for n in range(4)]
    with pytest.raises(UserError, match=f"task set: {said}"):
        made(tmp_path, rows, CHOICES | {key: value})


def test_an_object_has_the_names_that_its_row_gives_it(tmp_path):
    rows = [
        {"q": "a", "options": ["x", "y"], "gold": 0, "about": about}
        for about in ({"year": 1}, {"author": "b"}, {}, {"year": 2, "author": None})
    ]
    task = made(tmp_path, rows, CHOICES)
    assert [doc["about"] for doc in task.eval_docs] == [
        row["about"] for row in rows
    ]  # and none of the others', with a null
