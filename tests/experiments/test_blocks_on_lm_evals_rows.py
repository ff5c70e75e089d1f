"""Blocks that change a task of lm-eval's and leave its rows where they are: what cannot be, and what counts twice."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask

from evaluation import catalogue, documents
from evaluation.task import quiet, read_rows
from experiments.data import lm_eval_rows, rows
from experiments.data.data_sets import DataSets
from experiments.data.prepared_rows import write_data
from experiments.stages import resolve
from experiments.study import config
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from experiments.study.schema import Task
from methods.errors import UserError
from tests.experiments import hub_folder


def science(number):
    return {"Question": f"q {number}", "Correct Answer": "a"} | {
        f"Incorrect Answer {n}": "bcd"[n - 1] for n in (1, 2, 3)
    }


def fact(number):
    key = "A " if number == 2 else "A"  # lm-eval takes spaces before the letter away, not those behind it
    choices = {"text": ["is hot", "sings"], "label": ["A", "B"]}
    return {"question_stem": f"The sun {number}", "choices": choices, "answerKey": key}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = tmp_path_factory.mktemp("hub")
    problems = {"train": [hub_folder.problem(n) for n in range(3)], "test": [hub_folder.problem(n) for n in (5, 6)]}
    hub_folder.put(hub, "openai/gsm8k", {"main": problems})
    subsets = ("gpqa_diamond", "gpqa_extended", "gpqa_main")
    hub_folder.put(hub, "Idavidrein/gpqa", {one: {"train": [science(n) for n in range(6)]} for one in subsets})
    hub_folder.put(hub, "allenai/openbookqa", {"main": {s: [fact(n) for n in range(3)] for s in ("train", "test")}})
    hub_folder.put(
        hub,
        "TAUR-Lab/MuSR",
        {
            "default": {
                split: [hub_folder.murder(n) for n in range(2)]
                for split in ("murder_mysteries", "object_placements", "team_allocation")
            }
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(hub / "cache"))
        yield hub


def drawn(hub, **block):
    sets = DataSets(folder=Path(hub), hashes=Path(hub).parent / "hashes")
    return lm_eval_rows.draw("mine", Task.model_validate(block), test="all", data_sets=sets)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"include": "gsm8k", "num_fewshots": 3}, "task mine: unknown key 'num_fewshots': did you mean 'num_fewshot'?"),
        ({"include": "gsm8k", "num_fewshot": "5"}, "task mine: num_fewshot is '5': it must be a whole number"),
        ({"include": "gsm8k", "num_fewshot": -1}, "task mine: num_fewshot is -1: it must be 0 or more"),
        ({"include": "gsm8k", "num_fewshot": 4}, "tasks.mine: num_fewshot is 4, and the split of gsm8k .* has 3 rows"),
        (
            {"include": "gsm8k", "num_fewshot": 2, "fewshot_split": "test"},
            "num_fewshot is 2, .* has 2 rows, one of which is the row asked: lower it",
        ),
        ({"include": ["gsm8k"]}, r"task mine: include is \['gsm8k'\]: write the name of a task or group"),
        ({"doc_to_text": "{{q}}", "doc_to_target": "a"}, "task mine: it names no data set .*write `rows` in its block"),
        ("glue", r"'glue' is a tag .* without a block, .*write blocks for these \(cola, mnli, "),
        ("openllm", r"'openllm' is a group without a score .*\(openllm-arc_challenge, openllm-hellaswag, "),
        ("leaderboard_math_hard", "needs antlr4 4.11, and DVC, which runs the stages, needs 4.9"),
    ],
)
def test_what_a_block_cannot_say_is_told_by_name(hub, task, message):
    with pytest.raises(UserError, match=message):
        drawn(hub, task=task)


def test_as_many_examples_as_there_are_can_be_shown(hub):
    assert len(drawn(hub, task={"include": "gsm8k", "num_fewshot": 3}).examples["gsm8k"]) == 3
    alone = {"include": "gsm8k", "num_fewshot": 1, "fewshot_split": "test"}
    assert len(drawn(hub, task=alone).examples["gsm8k"]) == 2


def test_a_folder_without_the_data_set_is_not_told_as_its_own_remedy(hub):
    with pytest.raises(UserError, match=r"\(data.hub\) has no folder baber/piqa: put the files .* there") as told:
        drawn(hub, task="piqa")
    assert "data.hub: FOLDER" not in str(told.value) and "`tasks.mine.rows` reads other rows" in str(told.value)


def test_rows_that_a_block_has_on_the_hub_are_read_from_the_folder(hub, tmp_path):
    given = {"hub": {"path": "allenai/openbookqa", "name": "main", "split": "train", "revision": "0" * 40}}
    block = {"rows": given, "set": {"answerKey": "B"}}
    entries = written(hub, tmp_path, retention=["openbookqa"], tasks={"openbookqa": block}, source="hub")
    (entry,) = [entry for entry in entries if entry["name"] == "openbookqa"]
    assert entry["metric"] == "acc" and entry["chance"] == 0.5
    scored = read_rows(tmp_path / "out" / "evaluate" / "sums" / "openbookqa.jsonl")
    assert {row["question_stem"] for row in scored} == {f"The sun {n}" for n in range(3)}
    report = json.loads((tmp_path / "out" / "data.json").read_text())["domains"]["sums"]
    assert re.fullmatch(r"folder:allenai/openbookqa@\w{16}/main/train", report["tasks"]["openbookqa"]["source"])
    block = {"rows": {"hub": {"path": "allenai/sciq", "split": "train"}}}
    with pytest.raises(UserError, match=r"tasks.sciq: .*\(data.hub\) has no folder allenai/sciq"):
        written(hub, tmp_path, retention=["sciq"], tasks={"sciq": block}, source="hub")


def test_a_changed_folder_is_read_anew(tmp_path, monkeypatch):
    """`datasets` itself would give the rows that a folder of this name held before."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    block = {"rows": {"hub": {"path": str(tmp_path / "openai" / "gsm8k"), "name": "main", "split": "test"}}}
    found = []
    for asked in (5, 6):
        shutil.rmtree(tmp_path / "openai", ignore_errors=True)
        problems = [hub_folder.problem(n) for n in range(asked)]
        hub_folder.put(tmp_path, "openai/gsm8k", {"main": {"train": problems, "test": problems}})
        named = Task.model_validate(block).rows
        own = rows.read(named, packages={}, prefer="hub", where="tasks.mine")
        found.append((len(drawn(tmp_path, task="gsm8k").test["gsm8k"]), len(own.rows)))
    assert found == [(5, 5), (6, 6)]


def test_a_split_that_is_not_there_is_told_with_its_data_set(hub):
    task = {"include": "gsm8k", "test_split": "validation"}
    said = r"tasks.mine: task gsm8k of lm-eval wants data set openai/gsm8k, configuration main, validation, train: "
    with pytest.raises(UserError, match=said + r"it has no split 'validation' \(it has train, test\)"):
        drawn(hub, task=task)


def test_a_document_that_the_task_cannot_use_is_shown(hub, tmp_path):
    read = drawn(hub, task="openbookqa")
    lm_eval_rows.write(tmp_path / "mine.jsonl", read)
    block = Task.model_validate({"task": "openbookqa"})
    with pytest.raises(
        UserError, match=r"task openbookqa: lm-eval cannot use the document .*The sun 2.*'A ' is not in list"
    ):
        lm_eval_rows.entry("mine", block, "retention", read, folder=tmp_path)


def test_the_tasks_of_a_group_shuffle_one_after_the_other(hub, tmp_path, monkeypatch):
    own = drawn(hub, task="leaderboard_gpqa").test
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))  # which holds what was shuffled before
    monkeypatch.chdir(hub)
    with quiet(), documents.seeded():
        for name, stated in catalogue.named("leaderboard_gpqa", name="gpqa").tasks.items():
            task = ConfigurableTask(config=dict(stated))
            assert own[name] == list(task.eval_docs), name
    orders = [[doc["answer"] for doc in docs] for docs in own.values()]
    assert orders[0] != orders[1]


def written(hub, tmp_path, *, tasks=None, source="pypi", **roles):
    raw = read_yaml(HERE / "experiments" / "studies" / "demo" / "params.yaml")
    raw["domains"]["sums"] |= {"retention": [], "transfer": [], "probes": []} | roles
    raw["tasks"] |= tasks or {}
    study = config.build(raw | {"data": {"hub": str(hub), "source": source}}, paths=Paths(root=tmp_path))
    assert resolve.data(study)["data"]["hub"] == str(hub)
    write_data(study, tmp_path / "out")
    return json.loads((tmp_path / "out" / "evaluate" / "sums" / "tasks.json").read_text())


def test_a_task_by_itself_and_in_a_group_is_not_in_two_roles(hub, tmp_path, capsys):
    group, task = "leaderboard_musr", "leaderboard_musr_object_placements"
    with pytest.raises(
        UserError, match=f"{task} is in '{group}' under `retention` and in '{task}' under `transfer`: leave one"
    ):
        written(hub, tmp_path, retention=[group], transfer=[task])
    entries = written(hub, tmp_path, retention=[group, task])
    assert {group, task} <= {entry["name"] for entry in entries}
    assert (
        f"{task} is in '{group}' under `retention` and in '{task}' under `retention`, and counts twice"
        in capsys.readouterr().out
    )


def test_a_group_that_holds_the_domains_own_task_is_no_retention(hub, tmp_path):
    file, own = tmp_path / "own.jsonl", "leaderboard_musr_object_placements"
    file.write_text("".join(json.dumps(hub_folder.murder(n)) + "\n" for n in range(20, 32)))
    taught = {"task": own, "question": "narrative", "rows": str(file), "split": {"train": 6, "probe": 2, "test": 2}}
    taught |= {"metric": "acc_norm"}
    with pytest.raises(
        UserError, match="retention lists 'leaderboard_musr', which is the domain's own task .* a group"
    ):
        written(hub, tmp_path, retention=["leaderboard_musr"], **taught)
    entries = written(hub, tmp_path, score=["leaderboard_musr"], **taught)
    assert "leaderboard_musr" in {entry["name"] for entry in entries}
