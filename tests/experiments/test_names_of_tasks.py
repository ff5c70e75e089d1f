"""Suites, blocks and lm-eval's names under the roles of a domain, and models that want a chat template."""

import pytest

from experiments.model.random_models import byte_tokenizer
from experiments.stages import resolve
from experiments.study import chat_templates, config
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from methods.errors import UserError


def built(tmp_path, **change):
    raw = read_yaml(HERE / "experiments" / "studies" / "demo" / "params.yaml")
    domain = {key: change.pop(key) for key in ("retention", "transfer", "probes", "score") if key in change}
    raw["domains"]["sums"] |= {"retention": [], "transfer": [], "probes": []} | domain
    raw["tasks"] |= change.pop("tasks", {})
    return config.build(raw | change, paths=Paths(root=tmp_path))


def test_names_alone_are_enough(tmp_path):
    study = built(tmp_path, retention=["mmlu", "gsm8k", "ifeval", "hellaswag"])
    assert study.domains["sums"].retention == ["mmlu", "gsm8k", "ifeval", "hellaswag"]
    assert study.tasks["mmlu"].task == "mmlu" and study.tasks["mmlu"].rows is None and study.tasks["mmlu"].test is None
    assert study.data.test == "all"


def test_a_suite_holds_tasks_groups_and_suites(tmp_path):
    suites = {"all": ["colours", "more"], "more": ["leaderboard_musr", "bhs_hindi", "colours"]}
    study = built(tmp_path, suites=suites, retention=["all"], score=["gsm8k"])
    assert study.domains["sums"].retention == ["colours", "leaderboard_musr", "bhs_hindi"]
    assert study.domains["sums"].score == ["gsm8k"]


def test_a_suite_comes_before_a_task_and_a_block_before_lm_evals_task(tmp_path):
    blocks = {"hellaswag": {"test": 7}}
    study = built(tmp_path, suites={"colours": ["hellaswag"]}, tasks=blocks, retention=["colours"])
    assert study.domains["sums"].retention == ["hellaswag"]
    assert (study.tasks["hellaswag"].task, study.tasks["hellaswag"].test) == ("hellaswag", 7)


def test_a_tag_and_a_group_without_a_score_are_their_tasks(tmp_path):
    study = built(tmp_path, retention=["openllm"], transfer=["metabench_arc_subset"])
    assert "openllm-gsm8k" in study.domains["sums"].retention
    assert study.tasks["openllm-gsm8k"].task == {"include": "gsm8k", "num_fewshot": 5}
    assert "metabench_arc" in study.domains["sums"].transfer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retention": ["gsm9k"]}, "unknown task 'gsm9k' in domains.sums.retention: .*did you mean 'gsm8k'"),
        (
            {"retention": ["s"], "suites": {"s": ["clours"]}},
            "unknown task 'clours' in suites.s: did you mean 'colours'",
        ),
        ({"retention": ["a"], "suites": {"a": ["b"], "b": ["a"]}}, "suites.a leads back to itself: a -> b -> a"),
        ({"retention": ["gsm8k", "gsm8k"]}, "domains.sums.retention names 'gsm8k' twice"),
        ({"retention": ["gsm8k"], "transfer": ["gsm8k"]}, "lists 'gsm8k', which is evaluated already"),
        ({"retention": ["gsm8k"], "probes": ["gsm8k"]}, "tasks.gsm8k.probe is 0"),
        (
            {"retention": ["x"], "tasks": {"x": {"task": "gsm8k", "nulls": "empty"}}},
            "tasks.x has `nulls` without `rows`",
        ),
        (
            {"retention": ["x", "gsm8k"], "tasks": {"x": {"task": "gsm8k"}}},
            "tasks.x and tasks.gsm8k have the same rows, prompt and metric",
        ),
    ],
)
def test_what_cannot_be_is_told_by_name(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        built(tmp_path, **change)


def test_the_roots_suites_name_what_there_is(tmp_path):
    suites = config.load("").suites
    assert {"general", "reasoning", "instruction", "code", "open-llm"} <= suites.keys()
    study = built(tmp_path, suites=suites, retention=list(suites))
    assert "openllm-mmlu" in study.domains["sums"].retention


def with_model(tmp_path, source, **evaluate):
    study = built(tmp_path, evaluate=evaluate)
    study.models["llama-tiny"] = study.models["llama-tiny"].model_copy(update={"source": source})
    return study


def test_an_instruct_model_without_its_template_is_warned_about(tmp_path):
    tokenizer, model = byte_tokenizer(), "llama-tiny"
    study = with_model(tmp_path, "hub:someone/Tiny-1B-Instruct@main")
    assert not chat_templates.look(study, model=model, tokenizer=tokenizer)  # which has no template
    (line,) = chat_templates.look(study, model=model, tokenizer=None)
    assert line.startswith("warning: llama-tiny seems to be an instruct model ('Instruct' in its name)")
    tokenizer.chat_template = "{{ messages }}"
    assert chat_templates.look(study, model=model, tokenizer=tokenizer) == [line]
    asked = with_model(tmp_path, "hub:someone/Tiny-1B-Instruct@main", chat_template=True)
    assert not chat_templates.look(asked, model=model, tokenizer=tokenizer)
    base = with_model(tmp_path, "hub:someone/Tiny-1B@main")
    assert not chat_templates.look(base, model=model, tokenizer=tokenizer)


def test_a_template_from_a_file_is_its_text_in_what_scoring_depends_on(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    study = with_model(tmp_path, "random:llama", chat_template=str(file))
    assert resolve.evaluate(study, "llama-tiny")["chat_template"] == "{{ messages }}"
    assert str(file) in resolve.local_inputs(study)
    plain = resolve.evaluate(with_model(tmp_path, "random:llama"), "llama-tiny")
    assert not {"chat_template", "fewshot_as_multiturn"} & plain.keys()


def test_what_a_suite_holds_is_in_what_the_rows_depend_on(tmp_path):
    studies = [built(tmp_path, suites={"s": held}, retention=["s"]) for held in (["gsm8k"], ["gsm8k", "piqa"])]
    first, second = (resolve.data(study)["domains"]["sums"] for study in studies)
    assert first["retention"] == ["gsm8k"] and second["retention"] == ["gsm8k", "piqa"]


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (
            {"chat_template": True},
            "evaluate.chat_template is true, and the tokenizer of llama-tiny has no chat template",
        ),
        ({"chat_template": "no.jinja"}, "evaluate.chat_template is 'no.jinja', which cannot be read"),
        ({"fewshot_as_multiturn": True}, "evaluate.fewshot_as_multiturn is true without a chat template"),
    ],
)
def test_a_template_that_is_not_there_is_refused(tmp_path, evaluate, message):
    study = with_model(tmp_path, "random:llama", **evaluate)
    with pytest.raises(UserError, match=message):
        chat_templates.look(study, model="llama-tiny", tokenizer=byte_tokenizer())
