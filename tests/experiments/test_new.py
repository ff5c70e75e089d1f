"""`new`: what a file of rows is taken for, the study that is written for it, and what is refused."""

import csv
import json
import shutil
import sys

import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML

from experiments.commands import new
from experiments.commands.table import COMMANDS
from experiments.data.guess import guess
from experiments.model import random_models, weights
from experiments.study import config, pipeline
from experiments.study.params_text import flow, read_yaml
from experiments.study.paths import HERE
from experiments.study.schema import Model
from methods.errors import UserError
from methods.tools.files import read_json
from methods.tools.jsonl import Row
from tests.experiments.test_inheritance import write
from tests.test_pipeline import project_of, repro, run

DEMO = read_yaml(HERE / "experiments/studies/demo/params.yaml")
ROOT = DEMO | {
    "methods": DEMO["methods"] | {"replay": {"replay": {"share": 0.1}}, "wise-ft": {"wise_ft": {"alpha": 0.5}}},
    "tune": {"epochs": 0.5, "methods": {"full": {"train.learning_rate": [1.0e-3, 2.0e-3]}}},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [{"question": f"How many are {k} and {k}?", "answer": str(2 * k)} for k in range(120)]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"How many are {k} and {k}?"},
            {"role": "assistant", "content": f"They are {2 * k}."},
        ]
    }
    for k in range(120)
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project whose default study is the demo, with the methods that `new` takes by default."""
    write(tmp_path, ROOT)
    shutil.copy(HERE / "dvc.yaml", tmp_path)
    shutil.copytree(HERE / "experiments/studies/demo/rows", tmp_path / "experiments/studies/demo/rows")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(root, name="mine", **options):
    given = {"model": "llama-tiny", "rows": "rows.jsonl", "retention": "colours"} | options
    new.main(name, root=root, **given)
    return config.load(name, root=root)


ONE = {  # a row → its format, the columns that are read, and `columns:`
    '{"messages": [{"role": "user", "content": "a"}], "text": "b"}': ("chat", ("messages",), {}),
    '{"conversations": [{"from": "human", "value": "a"}]}': ("chat", ("conversations",), {}),
    '{"dialog": [{"role": "user", "content": "a"}]}': ("chat", ("dialog",), {"messages": "dialog"}),
    '{"prompt": "a", "completion": "b", "text": "c"}': ("pairs", ("prompt", "completion"), {}),
    '{"instruction": "a", "input": "", "output": "b"}': ("pairs", ("instruction", "output", "input"), {}),
    '{"instruction": "a", "context": "", "response": "b"}': (
        "pairs",
        ("instruction", "response", "context"),
        {"output": "response", "input": "context"},
    ),
    '{"query": "a", "response": "b"}': ("pairs", ("query", "response"), {"prompt": "query", "completion": "response"}),
    '{"text": "a", "id": 3}': ("text", ("text",), {}),
    '{"content": "a", "url": "b"}': ("text", ("content",), {"text": "content"}),
    '{"Poem": "a"}': ("text", ("Poem",), {"text": "Poem"}),
}


@pytest.mark.parametrize("row", ONE)
def test_the_columns_tell_the_format(row):
    found = guess([Row(json.loads(row), at="line 1")] * 3, where="rows")
    assert (found.format, found.reads, found.columns) == ONE[row]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([{"question": "q", "choices": ["x", "y"], "answer": 1}] * 2, [1, 1]),
        ([{"question": "q", "choices": ["x", "y"], "answer": n} for n in (1, 2)], [0, 1]),
        ([{"question": "q", "choices": ["x", "y"], "answer": n} for n in "BA"], [1, 0]),
        ([{"question": "q", "options": ["x", "y"], "label": n} for n in "yx"], [1, 0]),
        ([{"question": "q", "A": "x", "B": "y", "C": "z", "answer": n} for n in "CA"], [2, 0]),
        (
            [
                {"question": "q", "choices": {"text": ["x", "y"], "label": names}, "answerKey": names[1]}
                for names in ("AB", "12")
            ],
            [1, 1],
        ),
    ],
)
def test_a_question_with_choices_is_scored_by_the_right_one(tmp_path, rows, wanted):
    """By lm-eval's own reading of the task that is written."""
    from evaluation.task import make_task

    rows = [row | {"question": f"Question {k}"} for k, row in enumerate(rows)]
    rows = [json.loads(json.dumps(row)) for row in rows]
    for row in rows:  # a list, as JSON has it
        if isinstance(row.get("choices"), dict):
            row["choices"]["label"] = list(row["choices"]["label"])
    found = guess([Row(row, at=f"line {k}") for k, row in enumerate(rows)], where="rows")
    assert found.format == "task"
    task = make_task("mine", found.block["task"], rows, metric="acc")
    answers = [int(task.doc_to_target(doc)) for doc in task.eval_docs]
    assert answers == wanted and task.doc_to_choice(task.eval_docs[0])[:2] == ["x", "y"]


def test_empty_cells_do_not_hide_a_column():
    rows = [Row({"prompt": "a" if k % 4 == 0 else None, "completion": "b"}, at=f"line {k}") for k in range(20)]
    assert guess(rows, where="rows").reads == ("prompt", "completion")


def test_rows_longer_than_the_longest_length_are_said(root, capsys):
    lines(
        root / "rows.jsonl",
        [row | {"question": "words " * (k % 4) * 40 + row["question"]} for k, row in enumerate(PAIRS)],
    )
    study = begin(root, methods="full")
    assert study.train.length == 512  # the positions of the tiny Llama
    assert "% of the rows are longer than train.length (512)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "q", "choices": ["a", "b"], "answer": "²"}],
        [{"question": "q", "choices": ["a", "b"], "answer": "9" * 5000}],
        [{"question": "q", "choices": ["a", "b"], "answer": 1}, {"question": "q", "choices": 5, "answer": 1}],
        [{"question": "q", "choices": {"text": 5, "label": 6}, "answer": "A"}],
        [{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answer": "A"}]
        + [{"question": "q", "choices": ["a"], "answer": "A"}],
    ],
)
def test_choices_and_answers_of_another_kind_are_no_task(rows):
    with pytest.raises(UserError, match="which are not those of task"):
        guess(rows, where="r", format="task")


@pytest.mark.parametrize(
    ("damaged", "message"),
    [("{", "is not JSON"), ('{"splits": []}', "names no sets"), ('{"splits": ["..", "a"]}', "names no sets")],
)
def test_a_saved_data_set_without_the_names_of_its_sets_is_refused(root, damaged, message):
    (root / "saved").mkdir()
    (root / "saved/dataset_dict.json").write_text(damaged)
    with pytest.raises(UserError, match=message):
        begin(root, name="mine", rows="saved")


def test_rows_of_no_format_are_refused_by_their_columns():
    rows = [Row({"prompt": "a", "chosen": "b", "rejected": "c"}, at="line 1")]
    wanted = r"columns chosen, prompt, rejected, which are not those of chat .*--columns completion=chosen"
    with pytest.raises(UserError, match=wanted):
        guess(rows, where="rows")
    with pytest.raises(UserError, match=r"which are not those of text \(text\)"):
        guess(rows, where="rows", format="text")


def test_a_study_is_written_that_loads_and_says_what_to_run(root, capsys):
    lines(root / "rows.jsonl", PAIRS)
    study = begin(root)
    said = capsys.readouterr().out
    assert study.grid.model_dump() == {
        "models": ["llama-tiny"],
        "domains": ["mine"],
        "methods": ["full", "lora", "replay", "wise-ft"],
        "seeds": [0],
    }
    block = study.domains["mine"]
    assert (block.format, block.retention, block.probes) == ("pairs", ["colours"], ["colours"])
    assert block.split.model_dump() == {"train": "all", "probe": 6, "test": 12, "distinct": False}
    assert study.models["llama-tiny"].as_written == ROOT["models"]["llama-tiny"]
    assert study.train.learning_rate == ROOT["train"]["learning_rate"]
    # the byte tokenizer: 25 letters of the longest questions, a line, 3 of their answers, and an end
    assert study.train.length == 64 and "the longest 30" in said
    assert study.tune.as_written == {
        "epochs": 0.5,
        "methods": {
            "full": {"train.learning_rate": [1.0e-3, 2.0e-3]},
            "replay": {"replay.share": [0.05, 0.1, 0.2, 0.4]},
            "wise-ft": {"wise_ft.alpha": [0.2, 0.4, 0.6, 0.8]},
        },
    }
    assert "rows: 102 to train on, 6 to probe, 12 to score" in said and json.dumps(PAIRS[0]) in said
    assert not pipeline.behind(study)
    commands = [line.split("#")[0].split() for line in said.partition("next:\n")[2].splitlines()]
    assert [words[:4] for words in commands] == [
        ["python", "-m", "experiments", "show"],
        ["python", "-m", "experiments", "plan"],
        ["make", "study", "NAME=mine"],
    ]
    assert {"show", "plan", "tune"} <= COMMANDS.keys()
    text = study.paths.params.read_text()
    assert max(map(len, text.splitlines())) <= 125 and text.count("#") > 8


def test_where_the_root_reads_its_rows_the_study_does(root):
    lines(root / "rows.jsonl", PAIRS)
    write(root, ROOT | {"data": {"source": "pypi"}})
    assert "\ndata:" not in begin(root, methods="full").paths.params.read_text()
    write(root, ROOT | {"data": {"source": "hub"}})
    assert begin(root, "other", methods="full").data.source == "hub"


def test_the_retention_of_the_default_study_or_any_that_is_named(root):
    lines(root / "rows.jsonl", PAIRS)
    assert begin(root, methods="full", retention=None).domains["mine"].retention == ["colours"]
    write(root, ROOT | {"suites": {"general": ["colours", "hellaswag"]}})
    study = begin(root, "other", methods="full", retention="general,piqa")
    assert study.domains["other"].as_written["retention"] == ["general", "piqa"]
    assert study.domains["other"].retention == ["colours", "hellaswag", "piqa"]
    assert study.domains["other"].probes == ["colours"] and study.data.test == 1000


def test_a_line_divides_a_prompt_from_its_completion(root):
    from experiments.data import domain
    from experiments.data.reader import Reader

    lines(root / "rows.jsonl", PAIRS)
    study = begin(root)
    drawn = domain.draw("mine", study.domains["mine"], Reader(study=study))
    row = next(row for row in drawn.train if row["context"].startswith("How many are 7 "))
    assert (row["context"], row["choices"]) == ("How many are 7 and 7?", ["\n14"])


def test_a_csv_with_columns_of_its_own_names(root):
    with open(root / "rows.csv", "w", newline="", encoding="cp1252") as file:
        writer = csv.writer(file)
        writer.writerow(["frage", "antwort"])
        writer.writerows([row["question"], f" für {row['answer']}"] for row in PAIRS)
    options = {"rows": "rows.csv", "columns": "prompt=frage,completion=antwort", "methods": "full", "seeds": "0,1,2"}
    with pytest.raises(UserError, match="rows.csv line 2 is not UTF-8"):
        begin(root, **options)
    study = begin(root, **options, encoding="cp1252")
    assert study.domains["mine"].rows.local.encoding == "cp1252" and "set" not in study.domains["mine"].as_written
    assert study.domains["mine"].as_written["columns"] == {"prompt": "frage", "completion": "antwort"}
    assert study.grid.methods == ["full"] and study.grid.seeds == [0, 1, 2]


def test_a_conversation_needs_a_chat_template(root):
    lines(root / "rows.jsonl", CHAT)
    with pytest.raises(UserError, match="no chat template.*--chat-template"):
        begin(root)
    (root / "template.jinja").write_text(TEMPLATE)
    assert begin(root, chat_template="template.jinja").domains["mine"].chat_template == "template.jinja"


def test_a_saved_data_set_brings_its_own_test_split(root):
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(PAIRS[:90]), test=Dataset.from_list(PAIRS[90:])).save_to_disk(root / "saved")
    study = begin(root, rows="saved")
    block = study.domains["mine"]
    assert block.rows.local.split == "train" and block.test_rows.local.split == "test" and block.split.test == "all"


def test_a_local_folder_and_a_model_of_the_hub(root, capsys):
    lines(root / "rows.jsonl", PAIRS)
    block = Model.model_validate({"source": "random:gptj"})
    weights.materialise(name="x", block=block, packages={}, out_dir=root / "checkpoints/My Model.v2")
    study = begin(root, model="./checkpoints/My Model.v2", methods="full")
    assert study.models["my-model-v2"].source == "path:checkpoints/My Model.v2"
    capsys.readouterr()
    study = begin(root, "other", model="hub:someone/Some-Model", methods="full")
    assert study.models["some-model"].source == "hub:someone/Some-Model"
    said = capsys.readouterr().out
    assert "estimated from letters" in said and "dvc.yaml:model@some-model" in said
    assert study.train.length == 256


def test_a_model_in_the_hubs_cache_is_pinned_and_its_tokenizer_counts(root, tmp_path_factory, monkeypatch, capsys):
    commit, cache = "c" * 40, tmp_path_factory.mktemp("cache")
    folder = cache / "models--someone--Some-Model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    random_models.byte_tokenizer().save_pretrained(folder / "snapshots" / commit)
    random_models.build("llama", seed=0).config.save_pretrained(folder / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    lines(root / "rows.jsonl", PAIRS)
    study = begin(root, model="hub:someone/Some-Model", methods="full")
    assert study.models["some-model"].source == f"hub:someone/Some-Model@{commit}"
    assert "estimated" not in capsys.readouterr().out and study.train.length == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Mine"}, "study 'Mine': a name is lower-case letters"),
        ({"name": "base"}, "a study cannot be called 'base'"),
        ({"name": "demo"}, "the study demo exists already and is not changed"),
        ({"name": "colours"}, "domains.colours and tasks.colours share their name"),
        ({"model": "lama-tiny"}, "unknown model 'lama-tiny' in the root: did you mean 'llama-tiny'"),
        ({"model": "someone/model"}, "write hub:someone/model for a model of the hub"),
        ({"model": "rows.jsonl"}, "is a file: give the folder"),
        ({"model": "./experiments"}, "no config.json"),
        ({"model": "./pickled"}, "./pickled holds no safetensors. Its .bin files can run code"),
        ({"model": ""}, "unknown model ''"),
        ({"name": "general"}, "a study cannot be called 'general', as its domain would be"),
        ({"rows": "row.jsonl"}, "--rows row.jsonl: there is no such file or folder"),
        ({"rows": "dvc.yaml"}, "rows are read from .jsonl, .json"),
        ({"format": "chat"}, "columns answer, question, which are not those of chat"),
        ({"rows": "few.jsonl"}, "--rows few.jsonl has 9 rows.*needs at least 10"),
        ({"rows": "chat.jsonl", "chat_template": "x.jinja"}, "--chat-template x.jinja cannot be read"),
        ({"model": "hub:two words"}, "hub:two words is no model: write a model of the hub as hub:OWNER/NAME"),
        ({"columns": "prompt=question,prompt=answer"}, "names a new column twice"),
        ({"columns": "prompt"}, "'prompt' is no NEW=OLD"),
        ({"columns": "prompt=qestion"}, "has no column 'qestion'"),
        ({"chat_template": "x.jinja"}, "rows of the format pairs have no turns"),
        ({"methods": "full,lroa"}, "unknown method 'lroa' in grid.methods: did you mean 'lora'"),
        ({"retention": "colour"}, "unknown task 'colour' in domains.mine.retention: did you mean 'colours'"),
        ({"seeds": "0,a"}, "--seeds '0,a': write whole numbers"),
        ({"seeds": "0,0"}, "grid.seeds names one entry twice"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(root, options, message):
    lines(root / "rows.jsonl", PAIRS)
    lines(root / "few.jsonl", PAIRS[:9])
    random_models.build("llama", seed=0).config.save_pretrained(root / "pickled")
    (root / "pickled/pytorch_model.bin").write_bytes(b"not read")
    lines(root / "chat.jsonl", CHAT)
    before = sorted((root / "experiments/studies").iterdir())
    with pytest.raises(UserError, match=message):
        begin(root, **({"name": "mine"} | options))
    assert sorted((root / "experiments/studies").iterdir()) == before


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "hub:OWNER/Name-1.5@abc",
        "no",
        "on",
        "12",
        "1e3",
        "a: b",
        "a # b",
        "",
        " x",
        "Zürich",
        "2024-01-01",
        "{{x}}",
        "line\nline",
        'quote"',
        "null",
        ".5",
        1.0e-5,
        0.1,
        3,
        True,
        None,
        {"train.learning_rate": [1.0e-4, 0.5]},
        ["a, b", {"c": "d]"}],
    ],
)
def test_a_value_on_one_line_is_read_as_it_was(value):
    import yaml

    text = f"{{key: {flow(value)}}}\n"
    assert YAML(typ="safe", pure=True).load(text) == {"key": value} == yaml.safe_load(text)


@pytest.mark.thorough
def test_from_a_file_to_the_report_by_the_commands_that_it_prints(tmp_path):
    """Conversations in a file, a folder with a model: the study that is written runs through real DVC."""
    project_of(tmp_path, ROOT)
    lines(tmp_path / "rows.jsonl", CHAT)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    model = random_models.build("llama", seed=3)
    model.save_pretrained(tmp_path / "mine")
    random_models.byte_tokenizer().save_pretrained(tmp_path / "mine")
    command = [sys.executable, "-m", "experiments"]
    options = ["--model", "./mine", "--rows", "rows.jsonl", "--chat-template", "template.jinja"]
    run(tmp_path, *command, "new", "talk", *options, "--retention", "colours", "--methods", "full")
    shown = run(tmp_path, *command, "show", "talk", "--study", "talk").stdout
    assert "They are" in shown
    run(tmp_path, *command, "plan", "--study", "talk")
    assert repro(tmp_path, "experiments/studies/talk/dvc.yaml")[-1].endswith("talk/dvc.yaml:compare")
    cell = tmp_path / "results/talk/runs/mine/talk/full/seed0"
    assert read_json(cell / "metrics.json")["domain_gain"] > 0
    assert read_json(cell / "scores.json")["tasks"].keys() == {"talk", "colours"}
    assert (tmp_path / "results/talk/summary/report.html").is_file()
    run(tmp_path, *command, "tune", "full", "--study", "talk")
    tried = read_json(tmp_path / "results/talk/tuning/mine/talk.json")
    gained = {tried["base"]["talk_nll"] - trial["talk_nll"]: trial["chosen"] for trial in tried["trials"]}
    assert len(gained) == 2 and all(gain > 0 for gain in gained) and gained[max(gained)] and not gained[min(gained)]
