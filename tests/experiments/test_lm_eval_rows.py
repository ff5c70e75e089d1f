"""Tasks by lm-eval's name: rows from a folder in the hub's layout, and scores that are lm-eval's own, item for item."""

import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import datasets
import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evaluation import catalogue, harness, lm, nulls
from evaluation.documents import load
from evaluation.task import doc_hash, quiet, read_rows
from experiments.data import expected, lm_eval_rows
from experiments.data.data_sets import DataSets
from experiments.data.prepared_rows import write_data
from experiments.model.random_models import build, byte_tokenizer
from experiments.study import config
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from experiments.study.schema import Task
from methods.errors import UserError
from tests.experiments import hub_folder
from tests.experiments.hub_server import COMMIT, Hub, run_python

SHOTS = {"include": "bhs__hindi__S_ne_O_V", "num_fewshot": 2, "fewshot_split": "test"}  # of the rows that are scored
TASKS = {  # by the names of their blocks: lm-eval's name, or a configuration
    "leaderboard_musr": "leaderboard_musr",  # a group that weighs its tasks by size
    "bhs_hindi": "bhs_hindi",  # and one that does not
    # five examples, written answers
    "gsm8k": {"include": "gsm8k", "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 24}},
    "hellaswag": "hellaswag",  # documents that its own function makes of the rows
    "truthfulqa_mc1": "truthfulqa_mc1",  # two to four choices
    "squad_completion": "squad_completion",  # written in Python
    "five_bones": {"include": "mmlu_anatomy", "num_fewshot": 5},  # the first five of another split
    "own_examples": SHOTS,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATS = {"plain": {}, "turns": {"chat_template": TEMPLATE}, "one turn": {"chat_template": TEMPLATE}}
CHATS["one turn"]["fewshot_as_multiturn"] = False


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield hub_folder.made(folder / "hub")


def sets(hub):
    return DataSets(folder=hub, hashes=hub.parent / "hashes")


def drawn(hub, name, *, test="all", **block):
    block = Task.model_validate({"task": TASKS.get(name, name)} | block)
    return block, lm_eval_rows.draw(name, block, test=test, data_sets=sets(hub))


def write(hub, folder, names, *, test="all"):
    """tasks.json and the rows of the tasks `names`; returns the entries by name."""
    entries = {}
    for name in names:
        block, rows = drawn(hub, name, test=test)
        lm_eval_rows.write(folder / f"{name}.jsonl", rows)
        entries[name], _ = lm_eval_rows.entry(name, block, "retention", rows, folder=folder)
    (folder / "tasks.json").write_text(json.dumps(list(entries.values())))
    return entries


def theirs(hub, names, *, chat_template=None, fewshot_as_multiturn=None, samples=None):
    """What lm-eval says of a tiny model on the folder's data sets, which `datasets` finds by name from inside it."""
    with pytest.MonkeyPatch.context() as patch, quiet(), nulls.written():
        patch.chdir(hub)
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # which asks every tool on the machine
        manager = TaskManager(include_defaults=False)
        manager._index = dict(catalogue.registry())
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = chat_template
        multiturn = bool(chat_template) if fewshot_as_multiturn is None else fewshot_as_multiturn
        asked = [TASKS[name] if isinstance(TASKS[name], str) else named(name) for name in names]
        return lm_eval.simple_evaluate(
            HFLM(pretrained=build("llama", seed=0), tokenizer=tokenizer, batch_size=4),
            tasks=asked,
            task_manager=manager,
            apply_chat_template=bool(chat_template),
            fewshot_as_multiturn=multiturn,
            samples=samples,
            bootstrap_iters=0,
        )


def named(name):
    """A block's configuration under the block's name, as one writes it for lm-eval in a YAML file."""
    changes = {key: value for key, value in TASKS[name].items() if key != "include"}
    return (
        dict(catalogue.named(TASKS[name]["include"], name=name).tasks[TASKS[name]["include"]])
        | changes
        | {"task": name}
    )


def ours(folder, scorer="shared-prefix", **chat):
    return harness.score(
        model=build("llama", seed=0), tokenizer=byte_tokenizer(), tasks_dir=folder, scorer=scorer, batch_size=4, **chat
    )


def compare(entries, scores, items, results):
    for name, entry in entries.items():
        own, score = items[items.task == name], scores["tasks"][name]
        metric, _, filter = entry["metric"].partition(",")
        parts = list(score.get("subtasks", {name: None}))
        samples = [
            sample
            for part in parts
            for sample in sorted(results["samples"][part], key=lambda sample: sample["doc_id"])
            if sample["filter"] == (filter or results["samples"][part][0]["filter"])
        ]
        assert own.doc_hash.tolist() == [sample["doc_hash"] for sample in samples], name
        assert own.doc_id.tolist() == list(range(len(samples)))
        chosen = filter or samples[0]["filter"]
        assert score["value"] == pytest.approx(results["results"][name][f"{metric},{chosen}"], abs=1e-12), name
        assert own.score.mean() == pytest.approx(score["value"], abs=1e-12), name
        for part in parts[1:] and parts:
            assert score["subtasks"][part]["value"] == results["results"][part][f"{metric},{chosen}"]
        if "subtasks" not in score:
            assert own.score.tolist() == [float(sample[metric]) for sample in samples], name
        choices = [[float(value) for value in one.split(";")] for one in own.choices if isinstance(one, str)]
        if choices:
            values = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
            assert [len(one) for one in choices] == [len(one) for one in values]
            assert np.concatenate(choices) == pytest.approx(np.concatenate(values), abs=1e-3), name


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    """Every row of all tasks, and the entries by name."""
    out = tmp_path_factory.mktemp("rows")
    return out, write(hub, out, TASKS)


@pytest.mark.parametrize("chat", ["plain", "turns", pytest.param("one turn", marks=pytest.mark.thorough)])
def test_scores_and_items_are_lm_evals(hub, folder, chat):
    out, entries = folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", None)  # nothing is fetched once the rows are kept
        state = random.getstate()
        scores, items = ours(out, **CHATS[chat])
        assert random.getstate() == state
    compare(entries, scores, items, theirs(hub, TASKS, **CHATS[chat]))
    assert ("chat_template" in scores["scoring"]) == (chat != "plain")


@pytest.mark.thorough
@pytest.mark.parametrize("chat", CHATS)
def test_lm_evals_own_scorer_gives_the_same(folder, chat):
    (first, items), (second, others) = (ours(folder[0], scorer, **CHATS[chat]) for scorer in lm.SCORERS)
    assert items.score.tolist() == others.score.tolist()
    for name, score in first["tasks"].items():
        assert score["value"] == second["tasks"][name]["value"] and score["prompt"] == second["tasks"][name]["prompt"]


def test_the_chat_template_changes_every_prompt_but_the_domains(folder, tmp_path):
    out, entries = folder
    entry = entries["hellaswag"]
    own = {"name": "own", "role": "domain", "metric": "acc", "chance": 0.25, "file": "own.jsonl"}
    rows = [{"q": f"Say {n}", "choices": ["a", "b"], "gold": n % 2} for n in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hellaswag.jsonl").write_bytes((out / "hellaswag.jsonl").read_bytes())
    own["task"] = {"doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    (tmp_path / "tasks.json").write_text(json.dumps([own, entry]))
    prompts = [
        {name: score["prompt"] for name, score in ours(tmp_path, **chat)[0]["tasks"].items()}
        for chat in (CHATS["plain"], CHATS["turns"])
    ]
    assert prompts[0]["own"] == prompts[1]["own"] and prompts[0]["hellaswag"] != prompts[1]["hellaswag"]


def test_a_tokenizer_without_a_template_is_refused(folder):
    with pytest.raises(
        UserError, match="evaluate.chat_template is true, and the model's tokenizer has no chat template"
    ):
        ours(folder[0], chat_template=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "evaluate.chat_template cannot write the user's turn 'Why\\?' .*endfor"),
        ("hello", "evaluate.chat_template writes 'hello' for the user's turn 'Why\\?', which is missing"),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}",
            "task gsm8k: the chat template cannot use the document .*one turn only.*: name another, or",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_told(folder, tmp_path, template, message):
    (tmp_path / "gsm8k.jsonl").write_bytes((folder[0] / "gsm8k.jsonl").read_bytes())
    (tmp_path / "tasks.json").write_text(json.dumps([folder[1]["gsm8k"]]))
    with pytest.raises(UserError, match=message):
        ours(tmp_path, chat_template=template)


def test_a_sample_is_scored_as_lm_eval_scores_these_rows(hub, folder, tmp_path):
    names = ["leaderboard_musr", "bhs_hindi", "gsm8k"]
    entries = write(hub, tmp_path, names, test=7)
    samples = {}
    for name in names:
        whole = {
            task.config.task: [doc_hash(doc) for doc in task.eval_docs] for task in load(folder[1][name], folder[0])
        }
        for task in load(entries[name], tmp_path):
            samples[task.config.task] = [whole[task.config.task].index(doc_hash(doc)) for doc in task.eval_docs]
    assert [len(samples[f"leaderboard_musr_{part}"]) for part in ("murder_mysteries", "object_placements")] == [2, 4]
    assert sum(len(rows) for task, rows in samples.items() if task.startswith("bhs")) == 7
    scores, items = ours(tmp_path)
    compare(entries, scores, items, theirs(hub, names, samples=samples))


def test_the_chance_level_is_of_each_rows_choices(folder):
    entries = folder[1]
    assert entries["truthfulqa_mc1"]["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 2 + 1 / 3) / 5)
    assert entries["hellaswag"]["chance"] == 0.25
    assert entries["five_bones"]["chance"] == pytest.approx((1 / 4 + 1 / 4 + 0) / 3)
    assert entries["bhs_hindi"]["chance"] == 0.5
    assert entries["gsm8k"]["chance"] == entries["squad_completion"]["chance"] == 0.0
    # two and three choices in turn, and a group's rows weigh alike: 3, 6 and 2 rows
    assert entries["leaderboard_musr"]["chance"] == pytest.approx((6 * 1 / 2 + 5 * 1 / 3) / 11)
    assert entries["leaderboard_musr"]["metric"] == "acc_norm" and entries["gsm8k"]["metric"] == "exact_match"


def test_the_tokens_to_score_count_the_examples_before_each_row(hub, tmp_path):
    paths = Paths(root=tmp_path)
    folder = paths.data / "evaluate" / "d"
    folder.mkdir(parents=True)
    write(hub, folder, ["gsm8k"])
    tokens = expected.scored(SimpleNamespace(paths=paths), "d")
    assert 5 * 2 < tokens / (len("What is 0+0? Twice 0. 0") / 4) < 5 * 2 * 5  # two rows, each behind five like it


def test_a_domain_without_rows_trains_on_lm_evals_training_split(hub, tmp_path):
    raw = read_yaml(HERE / "experiments" / "studies" / "demo" / "params.yaml")
    split = {"train": 2, "probe": 1, "test": 4}
    own = {"task": "hellaswag", "question": "{{ctx_a}} {{ctx_b}}", "split": split, "retention": ["truthfulqa_mc1"]}
    raw |= {"domains": {"endings": own}, "grid": raw["grid"] | {"domains": ["endings"]}, "data": {"hub": str(hub)}}
    study = config.build(raw, paths=Paths(root=tmp_path))
    report = write_data(study, tmp_path / "out")["domains"]["endings"]
    assert report["n"] == split
    assert re.fullmatch(r"(folder:Rowan/hellaswag@\w{16})/train ; test: \1/validation", report["source"])
    trained = read_rows(tmp_path / "out" / "train" / "endings" / "train.jsonl")
    known = {f"Baking: A man has {n} eggs.. He Eats" for n in (9, 10, 11)}  # which are in the training split
    assert len(trained) == 2 and {row["context"] for row in trained} < known
    entries = json.loads((tmp_path / "out" / "evaluate" / "endings" / "tasks.json").read_text())
    assert [(one["name"], one["metric"], one["chance"]) for one in entries[:1]] == [("endings", "acc", 0.25)]


def test_a_blocks_own_chance_and_metric_win(hub, tmp_path):
    block, rows = drawn(hub, "gsm8k", metric="exact_match,flexible-extract", chance=0.1)
    lm_eval_rows.write(tmp_path / "gsm8k.jsonl", rows)
    entry, (task,) = lm_eval_rows.entry("gsm8k", block, "retention", rows, folder=tmp_path)
    assert entry["chance"] == 0.1 and entry["metric"] == "exact_match,flexible-extract"
    assert task.measure.filter == "flexible-extract"


@pytest.mark.parametrize(
    ("sizes", "number", "expected"),
    [
        ({"a": 10, "b": 30, "c": 60}, 10, {"a": 1, "b": 3, "c": 6}),
        ({"a": 1, "b": 1000}, 10, {"a": 1, "b": 9}),  # each task keeps a row
        ({"a": 1, "b": 1, "c": 100}, 3, {"a": 1, "b": 1, "c": 1}),  # and there are no more for it
        ({"a": 3, "b": 3, "c": 3}, 5, {"a": 2, "b": 2, "c": 1}),
        ({"a": 2, "b": 3}, 9, {"a": 2, "b": 3}),
        ({"a": 5, "b": 5, "c": 5}, 1, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_rows_are_shared_out_in_proportion(sizes, number, expected):
    assert lm_eval_rows.shared_out(sizes, number) == expected


def test_a_larger_sample_holds_the_smaller_one_and_probes_are_other_rows(hub):
    _, few = drawn(hub, "hellaswag", test=2, probe=1)
    _, more = drawn(hub, "hellaswag", test=3, probe=1)
    assert all(doc in more.test["hellaswag"] for doc in few.test["hellaswag"])
    _, whole = drawn(hub, "hellaswag", probe=2)
    assert [len(whole.test["hellaswag"]), len(whole.probe["hellaswag"])] == [3, 2]
    assert not any(doc in whole.test["hellaswag"] for doc in whole.probe["hellaswag"])


def test_what_was_read_is_recorded_and_changes_with_the_files(hub, tmp_path):
    _, rows = drawn(hub, "gsm8k")
    before = lm_eval_rows.facts(Task.model_validate({"task": "gsm8k"}), rows)
    assert before["source"].startswith("folder:openai/gsm8k@") and before["source"].endswith("/main")
    assert before["n"] == {"train": 0, "test": 2, "probe": 0} and before["of"] == 2
    examples = [hub_folder.problem(number) for number in range(10, 15)]
    hub_folder.put(tmp_path, "openai/gsm8k", {"main": {"train": examples, "test": [hub_folder.problem(2)]}})
    _, other = drawn(tmp_path, "gsm8k", test=1)
    assert other.source != rows.source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "winogrande",
            r"tasks.winogrande: task winogrande of lm-eval wants data set allenai/winogrande, configuration "
            r"winogrande_xl, validation: .*\(data.hub\) has no folder allenai/winogrande.*`tasks.winogrande.rows`",
        ),
        (
            "mmlu_astronomy",
            "tasks.mmlu_astronomy: .* data set cais/mmlu, configuration astronomy, test, dev: .*cannot be",
        ),
        ("humaneval", "runs the programs that a model writes"),
        ("openllm", "a group without a score of its own"),
        ("math_word_problems", "a tag of several tasks"),
        ("gsm9k", "unknown task 'gsm9k': lm-eval has none of this name; did you mean 'gsm8k'"),
    ],
)
def test_rows_that_are_not_to_be_had_are_told_by_name(hub, name, message):
    with pytest.raises(UserError, match=message):
        drawn(hub, name)


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        (
            "bhs_hindi",
            "f1",
            "bhs_hindi: one of its 6 tasks cannot be scored: task bhs__hindi__S_O_V: metric 'f1' is not",
        ),
        ("gsm8k", "exact_match,any", "task gsm8k: metric 'exact_match,any' names none of its filters"),
    ],
)
def test_a_metric_that_the_tasks_do_not_have_is_refused(hub, tmp_path, name, metric, message):
    block, rows = drawn(hub, name, metric=metric)
    lm_eval_rows.write(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(UserError, match=message):
        lm_eval_rows.entry(name, block, "retention", rows, folder=tmp_path)


def test_a_metric_that_is_code_of_others_is_refused_with_the_rows(hub, tmp_path):
    block, rows = drawn(hub, "squadv2")
    lm_eval_rows.write(tmp_path / "squadv2.jsonl", rows)
    with pytest.raises(UserError, match="squadv2: metric .* cannot be computed of these rows by lm-eval"):
        lm_eval_rows.entry("squadv2", block, "retention", rows, folder=tmp_path)


def test_without_the_hub_the_setting_that_would_help_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    block = Task.model_validate({"task": {"include": "gsm8k", "dataset_path": "nobody/sums"}})
    said = (
        "task gsm8k of lm-eval wants data set nobody/sums, configuration main, test, train: .*HF_HUB_OFFLINE is set: "
    )
    with pytest.raises(UserError, match=said + "unset it.*`data.hub: FOLDER`"):
        lm_eval_rows.draw("gsm8k", block, test="all", data_sets=DataSets(folder=None, hashes=tmp_path))


DRAW = """
import sys
from pathlib import Path
from experiments.data import lm_eval_rows
from experiments.data.data_sets import DataSets
from experiments.study.schema import Task
sets = DataSets(folder=None, hashes=Path(sys.argv[1]))
drawn = lm_eval_rows.draw("gsm8k", Task.model_validate({"task": "gsm8k"}), test="all", data_sets=sets)
print(drawn.source, len(drawn.test["gsm8k"]), len(drawn.examples["gsm8k"]))
"""


@pytest.mark.thorough
def test_the_commit_that_the_hub_gave_is_recorded_and_its_cache_serves_without_it(hub, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for file in (hub / "openai" / "gsm8k" / "main").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    listed = "".join(f"  - {{split: {split}, path: {split}-00000-of-00001.parquet}}\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{listed}---\n")
    with Hub(folders={("datasets", "openai/gsm8k"): folder}) as server:
        (line,) = run_python(DRAW, tmp_path, str(tmp_path), HF_ENDPOINT=server.url).splitlines()
    assert line == f"hub:openai/gsm8k@{COMMIT}/main 2 9"
    (again,) = run_python(DRAW, tmp_path, str(tmp_path), HF_HUB_OFFLINE="1").splitlines()
    assert again == line


@pytest.mark.thorough
def test_the_command_gives_the_same(hub, folder, tmp_path):
    """`lm_eval run` in a process of its own, with its own index of names."""
    out, entries = folder
    model, tokenizer = tmp_path / "model", byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    build("llama", seed=0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    names = [name for name, task in TASKS.items() if isinstance(task, str)]
    command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks"]
    command += [*names, "--batch_size", "4", "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--apply_chat_template"], cwd=hub, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    results["samples"] = {}
    for file in (tmp_path / "out").rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        for row in rows:
            row["filtered_resps"] = [(float(one[0]), one[1]) for one in row["filtered_resps"] if isinstance(one, list)]
        results["samples"][file.name.removeprefix("samples_").rpartition("_")[0]] = rows
    scores, items = ours(out, chat_template=TEMPLATE)
    compare({name: entries[name] for name in names}, scores, items, results)


@pytest.mark.thorough
def test_the_whole_of_mmlu(tmp_path, tmp_path_factory):
    """57 tasks in four groups, five examples each, as many rows of a task as its number in the group."""
    hub = tmp_path_factory.mktemp("mmlu")
    subjects = {one["dataset_name"]: n for n, one in enumerate(catalogue.named("mmlu", name="mmlu").tasks.values())}
    rows = {
        subject: {
            "test": [hub_folder.anatomy(100 * n + i) for i in range(1 + n % 5)],
            "dev": [hub_folder.anatomy(-1 - i - 10 * n) for i in range(5)],
        }
        for subject, n in subjects.items()
    }
    hub_folder.put(hub, "cais/mmlu", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        patch.setitem(TASKS, "mmlu", "mmlu")
        entries = write(hub, tmp_path, ["mmlu"])
        scores, items = ours(tmp_path)
        results = theirs(hub, ["mmlu"])
    compare(entries, scores, items, results)
    assert len(scores["tasks"]["mmlu"]["subtasks"]) == 57
