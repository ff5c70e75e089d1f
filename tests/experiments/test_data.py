import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.rendered import read_jsonl
from evaluation.task import doc_hash
from experiments.data import expected, settling_rows
from experiments.data import prepared_rows as data
from experiments.data.reader import Reader
from experiments.data.splits import normalised
from experiments.study import config
from experiments.study.paths import Paths
from methods.errors import UserError
from methods.tools.files import write_json

# a multiple-choice question from a local file, in lm-eval's own keys
TASK = {
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "output_type": "multiple_choice",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def questions(path, n, *, word, start=0):
    lines = [
        {
            "question": f"Which {word} has number {i}?",
            "choices": [f"{word} {i}", f"{word} {i + 1}", "none"],
            "gold": i % 3,
        }
        for i in range(start, start + n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"jsonl": str(path)}


@pytest.fixture
def study(tmp_path):
    """The blocks of a study whose every row comes from JSONL files; tests change them, and `write` reads them."""
    passages = tmp_path / "passages.jsonl"
    passages.write_text(
        "".join(json.dumps({"passage": f"Passage {i} tells of {i * i} things."}) + "\n" for i in range(80))
    )
    block = {"task": TASK, "metric": "acc", "chance": 0.33}
    return SimpleNamespace(
        data={"source": "pypi"},
        packages={},
        grid={"models": ["tiny"], "domains": ["birds"], "methods": ["full"], "seeds": [0]},
        models={"tiny": {"source": "random:llama"}},
        methods={"full": {}},
        train={},
        domains={
            "birds": block
            | {
                "rows": questions(tmp_path / "birds.jsonl", 60, word="bird"),
                "question": "question",
                "split": {"train": 30, "probe": 10, "test": 20},
                "retention": ["fish"],
                "transfer": ["trees"],
                "probes": ["fish"],
                "licence": "CC0",
            }
        },
        tasks={
            "fish": block
            | {
                "rows": questions(tmp_path / "fish.jsonl", 40, word="fish"),
                "test": 20,
                "probe": 8,
                "metric": "acc_norm",
            },
            "trees": block | {"rows": questions(tmp_path / "trees.jsonl", 12, word="tree")},
        },
        general={"rows": {"jsonl": str(passages)}, "text": "passage"}
        | {"importance": 20, "replay": 10, "probe": 4, "test": 20},
    )


def write(study, out):
    return data.write_data(config.build(vars(study), paths=Paths(root=out)), out)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_metric_and_a_chance_level_they_are_the_tasks(study, tmp_path):
    for block in (study.domains["birds"], study.tasks["fish"]):
        del block["metric"], block["chance"]
    write(study, tmp_path / "out")
    listed = json.loads((tmp_path / "out/evaluate/birds/tasks.json").read_text())
    assert [(entry["metric"], entry["chance"]) for entry in listed[:3]] == [
        ("acc", 1 / 3),
        ("acc", 1 / 3),
        ("acc", 0.33),
    ]


def test_a_local_jsonl_domain_needs_its_block_and_nothing_else(study, tmp_path):
    report = write(study, tmp_path / "out")
    train = lines(tmp_path / "out/train/birds/train.jsonl")
    assert len(train) == 30
    number = int(train[0]["context"].split()[-2].rstrip("?"))
    assert train[0]["context"] == f"Q: Which bird has number {number}?\nA:"
    assert train[0]["choices"] == [f" bird {number}", f" bird {number + 1}", " none"] and train[0]["gold"] == number % 3
    test = lines(tmp_path / "out/evaluate/birds/birds.jsonl")
    probe = lines(tmp_path / "out/train/birds/probe/birds.jsonl")
    asked = [
        {normalised(c) for c in part}
        for part in (
            [r["context"][3:-3] for r in train],
            [r["context"][3:-3] for r in probe],
            [r["question"] for r in test],
        )
    ]
    assert [len(part) for part in asked] == [30, 10, 20] and len(set.union(*asked)) == 60
    assert report["domains"]["birds"]["n"] == {"train": 30, "probe": 10, "test": 20}
    assert report["domains"]["birds"]["licence"] == "CC0"
    assert report["domains"]["birds"]["tasks"]["trees"]["n"]["test"] == 12


def test_tasks_json_says_what_each_file_is_for(study, tmp_path):
    write(study, tmp_path / "out")
    folder = tmp_path / "out/evaluate/birds"
    listed = json.loads((folder / "tasks.json").read_text())
    assert [(entry["name"], entry["role"], entry["metric"]) for entry in listed] == [
        ("birds", "domain", "acc"),
        ("fish", "retention", "acc_norm"),
        ("trees", "transfer", "acc"),
        ("general", "perplexity", "perplexity"),
    ]
    assert all((folder / entry["file"]).is_file() for entry in listed)
    assert listed[-1]["chance"] is None and listed[0]["task"] == TASK


def test_probe_rows_are_never_scored_rows(study, tmp_path):
    write(study, tmp_path / "out")
    probe = {row["context"] for row in lines(tmp_path / "out/train/birds/probe/fish.jsonl")}
    scored = {f"Q: {row['question']}\nA:" for row in lines(tmp_path / "out/evaluate/birds/fish.jsonl")}
    assert len(probe) == 8 and len(scored) == 20 and not probe & scored


def test_a_probe_question_that_is_scored_too_is_dropped_and_counted(study, tmp_path):
    twins = [
        json.loads(line) | {"choices": ["yes", "no", "both"]} for line in open(study.tasks["fish"]["rows"]["jsonl"])
    ]
    with open(study.tasks["fish"]["rows"]["jsonl"], "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in twins)
    study.tasks["fish"] |= {"test": 40, "probe": 40}
    said = write(study, tmp_path / "out")["domains"]["birds"]["probes"]["fish"]
    assert said["n"] + said["duplicates"]["between"] == 40 and said["duplicates"]["between"] > 5
    probe = {row["context"] for row in lines(tmp_path / "out/train/birds/probe/fish.jsonl")}
    assert not probe & {f"Q: {row['question']}\nA:" for row in lines(tmp_path / "out/evaluate/birds/fish.jsonl")}


def test_copies_are_counted_on_the_screen_and_shown_by_a_pair(study, tmp_path, capsys):
    path = study.domains["birds"]["rows"]["jsonl"]
    rows = lines(Path(path))
    again = [
        row | {"question": row["question"].upper().replace("?", " ?"), "gold": (row["gold"] + 1) % 3}
        for row in rows[1:]
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again, rows[0]]))
    study.domains["birds"]["split"] = {
        "train": 30,
        "probe": 11,
        "test": 21,
    }  # odd numbers of rows, all but one of which are two by two
    said = write(study, tmp_path / "out")["domains"]["birds"]["duplicates"]
    assert (
        said["within"] == 1
        and said["between"] > 0
        and "is a copy of" in said["pair"]
        and "birds.jsonl line" in said["pair"]
    )
    shown = capsys.readouterr().out
    assert "data: birds: rows left out as exact copies of others: 1\n" in shown
    assert f"because a row of an earlier set asks the same: {said['between']}, such as {said['pair']}" in shown


def test_a_task_of_the_domains_own_questions_is_refused_whatever_its_file_is_called(study, tmp_path):
    birds = lines(Path(study.domains["birds"]["rows"]["jsonl"]))
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps(row | {"note": i}) + "\n" for i, row in enumerate(birds)))
    study.tasks["fish"] |= {"rows": {"jsonl": str(tmp_path / "copy.jsonl")}, "test": 60}
    with pytest.raises(
        UserError,
        match="birds.retention lists 'fish', but 30 of its 60 test rows|birds.probes lists 'fish', but no rows",
    ):
        write(study, tmp_path / "out")
    study.domains["birds"]["split"] = {"train": 40, "probe": 10, "test": 10}
    with pytest.raises(UserError, match="retention lists 'fish', but 40 of its 60 test rows .*cannot show retention"):
        write(study, tmp_path / "out")


def with_rows(study, task, rows):
    """Add rows of the domain, as they are trained on or scored, to the file of a task, of which all are scored."""
    path, own = Path(study.tasks[task]["rows"]["jsonl"]), []
    for row in rows:
        own.append({"question": row["context"][3:-3], "choices": [c.strip() for c in row["choices"]]})
        own[-1]["gold"] = row["gold"]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in own))
    study.tasks[task] |= {"test": "all", "probe": 0}


def test_rows_that_a_task_asks_are_left_out_of_what_is_learned_and_counted(study, tmp_path, capsys):
    study.domains["birds"]["probes"] = []
    write(study, tmp_path / "out")
    folder = tmp_path / "out/train/birds"
    train, probe = lines(folder / "train.jsonl"), lines(folder / "probe/birds.jsonl")
    with_rows(study, "fish", [*train[:3], probe[0]])
    said = write(study, tmp_path / "out")["domains"]["birds"]
    assert said["n"] == {"train": 27, "probe": len(probe) - 1, "test": 20}
    assert said["duplicates"]["tasks"] == {"tasks.fish": 4}
    assert "data: birds: rows left out because tasks.fish asks the same: 4\n" in capsys.readouterr().out
    left = [lines(folder / "train.jsonl"), lines(folder / "probe/birds.jsonl")]
    assert left == [train[3:], probe[1:]]


def test_a_row_in_two_sets_is_refused_with_both_and_the_row(study, tmp_path):
    write(study, tmp_path / "out")
    passages = Path(study.general["rows"]["jsonl"])
    texts, fish = passages.read_text(), (tmp_path / "fish.jsonl").read_text()
    scored = lines(tmp_path / "out/evaluate/birds/birds.jsonl")[0]
    long = "A passage of which the first twelve words stand in a prompt, is the same passage as the one there, too."
    question = {"question": f"{long} Is it?", "choices": ["yes", "no"], "gold": 0}
    study.tasks["fish"] |= {"test": "all", "probe": 0}
    study.domains["birds"]["probes"] = []

    def refused(match):
        with pytest.raises(UserError, match=match):
            write(study, tmp_path / "out")
        passages.write_text(texts)
        (tmp_path / "fish.jsonl").write_text(fish)

    study.general |= {"importance": 70, "replay": 0, "probe": 0, "test": 11}  # all of 81 texts
    passages.write_text(json.dumps({"passage": long}) + "\n" + texts)
    (tmp_path / "fish.jsonl").write_text(fish + json.dumps(question) + "\n")
    refused("tasks.fish and general.(importance|test) have 1 row in common, such as .*the one there, too. Is it")
    study.general["importance"] = 69
    (tmp_path / "fish.jsonl").write_text(fish + json.dumps(scored) + "\n")
    refused(r"domains.birds \(test\) and tasks.fish have 1 row in common, such as 'Q: Which bird has number")
    study.general["importance"] = 70
    passages.write_text(json.dumps({"passage": f"Q: {scored['question']}\nA:"}) + "\n" + texts)
    refused(r"domains.birds \(test\) and general.(importance|test) have 1 row in common")
    study.general["importance"] = 69
    (tmp_path / "fish.jsonl").write_text(fish + json.dumps(scored | {"choices": ["a", "b", "c"]}) + "\n")
    write(study, tmp_path / "out")  # another answer: another item


def test_what_a_model_is_settled_on_is_in_no_other_set(study, tmp_path):
    study.models["settled"] = {
        "settle": {"from": study.grid["models"][0], "mix": {"trees": 1}, "gate": {"learning_rate": 1e-3}}
        | {"adapter_sha256": "a" * 64, "sha256": "a" * 64}
    }
    study.grid["models"] = ["settled"]
    study.domains["birds"]["transfer"] = []
    study.tasks["trees"] |= {"test": 2, "settle": 10}
    write(study, tmp_path / "out")
    trained = lines(tmp_path / "out/train/birds/train.jsonl")
    made_on = tmp_path / "out/results/settled/settled/settle.json"
    rows = settling_rows.of(["trees"], Reader(study=config.build(vars(study), paths=Paths(root=tmp_path))))
    for digests, told in ((settling_rows.digests(rows), None), ({"trees": "a" * 64}, "on other rows of trees than")):
        write_json(made_on, {"rows_sha256": digests})
        with pytest.raises(UserError, match=told) if told else nullcontext():
            write(study, tmp_path / "out")
    made_on.unlink()
    with_rows(study, "trees", trained[:2])
    study.tasks["trees"] |= {"test": 1, "settle": 13}
    with pytest.raises(
        UserError, match=r"domains.birds \(train\) and tasks.trees \(settle\) have [12] rows? in common"
    ):
        write(study, tmp_path / "out")
    study.tasks["trees"]["settle"] = 39
    fish = lines(tmp_path / "fish.jsonl")
    (tmp_path / "trees.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fish))
    with pytest.raises(UserError, match=r"tasks.fish and tasks.trees \(settle\) have \d+ rows in common"):
        write(study, tmp_path / "out")


def test_the_same_task_under_two_names_is_refused(study, tmp_path):
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes((tmp_path / "fish.jsonl").read_bytes())
    study.tasks["trees"] = study.tasks["fish"] | {"rows": {"jsonl": str(copied)}}
    with pytest.raises(
        UserError, match="domains.birds: tasks 'fish' and 'trees' have the same rows, prompt and metric"
    ):
        write(study, tmp_path / "out")
    study.tasks["trees"]["metric"] = "acc"  # another measure of the same answers
    with pytest.raises(UserError, match="tasks.trees and tasks.fish have 20 rows in common, such as 'Q: Which fish"):
        write(study, tmp_path / "out")
    study.domains["birds"] |= {"retention": ["fish", "trees"], "transfer": []}
    assert write(study, tmp_path / "out")["domains"]["birds"]["tasks"]["trees"]["n"]["test"] == 20


GENERAL = {name: f"general/{name}.jsonl" for name in ("settle", "importance", "replay")} | {
    "probe": "train/birds/probe/general.jsonl",
    "test": "evaluate/birds/general.jsonl",
}


def test_general_texts_are_five_sets_that_share_no_article(study, tmp_path):
    articles = [{"passage": f"Passage {i} of {i * i}.", "title": f"Article {i // 3}"} for i in range(120)]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in articles))
    sizes = {"settle": 31, "importance": 20, "replay": 10, "probe": 4, "test": 20}
    study.general |= sizes | {"article": "{{title | upper}}"}
    report = write(study, tmp_path / "out")
    assert report["general"]["n"] == sizes
    title = {row["passage"]: row["title"] for row in articles}

    def drawn():
        return {name: [row["text"] for row in lines(tmp_path / "out" / file)] for name, file in GENERAL.items()}

    first = drawn()
    assert {name: len(texts) for name, texts in first.items()} == sizes
    sets = [{title[text] for text in texts} for texts in first.values()]
    assert sum(map(len, sets)) == len(set.union(*sets))
    # other numbers of the others change nothing that is scored, and a larger test set keeps the smaller one
    study.general |= {"settle": 0, "importance": 5, "test": 25}
    write(study, tmp_path / "out")
    second = drawn()
    assert second["test"][:20] == first["test"] and second["settle"] == []
    study.general["replay"] = 100
    with pytest.raises(UserError, match=r"general.replay is 100 texts, and \d+ of 120 are left for it \(test 25, "):
        write(study, tmp_path / "out")
    study.general["perplexity"] = 20
    with pytest.raises(UserError, match="general.perplexity is called `test` now: write `test: 20` in its place"):
        write(study, tmp_path / "out")


def test_a_mix_takes_the_last_rows_and_whole_texts(study, tmp_path):
    study.general["settle"] = 9
    study.tasks["fish"]["settle"] = 7
    texts = {"task": "general_text", "metric": "perplexity", "rows": study.general["rows"]}
    study.tasks["texts"] = texts | {"set": {"text": "{{passage}}"}, "columns": ["text"], "settle": 5}

    def mixed(*names):
        return settling_rows.of(names, Reader(study=config.build(vars(study), paths=Paths(root=tmp_path))))

    found = mixed("general", "fish", "texts")
    assert {name: len(rows) for name, rows in found.items()} == {"general": 9, "fish": 7, "texts": 5}
    assert found["fish"][0]["context"].startswith("Q: Which fish") and found["texts"][0].keys() == {"id", "text"}
    write(study, tmp_path / "out")
    scored = {doc_hash(row) for row in lines(tmp_path / "out/evaluate/birds/fish.jsonl")}
    probed = {row["id"] for row in lines(tmp_path / "out/train/birds/probe/fish.jsonl")}
    assert not (scored | probed) & {row["id"] for row in found["fish"]}
    study.tasks["fish"]["settle"] = 30
    for name, message in (
        ("fish", "tasks.fish.settle is 30, and 12 rows are left after 20 that are scored and 8 that are probed"),
        ("trees", "tasks.trees has no `settle`"),
        ("tree", "unknown task 'tree' in a mix: did you mean 'trees'"),
    ):
        with pytest.raises(UserError, match=message):
            mixed(name)
    study.general["settle"] = 0
    with pytest.raises(UserError, match="general.settle is 0"):
        mixed("general")


def test_the_same_bytes_twice_and_old_files_gone(study, tmp_path):
    first = write(study, tmp_path / "out")
    (tmp_path / "out/train/gone").mkdir()
    assert write(study, tmp_path / "out") == first
    assert not (tmp_path / "out/train/gone").exists()
    assert json.loads((tmp_path / "out/data.json").read_text()) == first
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {"data.json", *first["files"]}


def test_another_retention_task_leaves_the_training_files_alone(study, tmp_path):
    before = write(study, tmp_path / "out")
    study.domains["birds"]["transfer"] = []
    after = write(study, tmp_path / "out")
    assert before["domains"]["birds"]["sha256"]["train"] == after["domains"]["birds"]["sha256"]["train"]
    assert before["domains"]["birds"]["sha256"]["evaluate"] != after["domains"]["birds"]["sha256"]["evaluate"]


def test_a_column_emptied_makes_another_domain_of_the_same_rows(study, tmp_path):
    study.domains["closed"] = study.domains["birds"] | {"set": {"hint": ""}}
    study.grid["domains"] = ["birds", "closed"]
    write(study, tmp_path / "out")
    assert all(row["hint"] == "" for row in lines(tmp_path / "out/evaluate/closed/closed.jsonl"))


def test_written_answers_trained_on_in_other_columns_than_they_are_scored_in(study, tmp_path):
    """As MetaMathQA for GSM8K: the training rows' columns are renamed at their source, and both use one prompt."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    solved = [
        {"query": f"How much is {i}+{i}?", "response": f"It is {i + i}.\nThe answer is: {i + i}", "type": "sum"}
        for i in range(40)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in solved))
    asked = [{"question": f"how much is {i} + {i}", "answer": f"{i}+{i}={i + i}\n#### {i + i}"} for i in range(35, 45)]
    test.write_text("".join(json.dumps(row) + "\n" for row in asked))
    study.domains["sums"] = {
        "task": {"include": "gsm8k", "num_fewshot": 0},
        "metric": "exact_match,flexible-extract",
        "chance": 0.0,
        "question": "question",
        "columns": ["question", "answer"],
        "split": {"train": "all", "probe": 5, "test": "all"},
        "retention": ["fish"],
        "probes": ["fish"],
        "rows": {"jsonl": {"path": str(train), "columns": {"question": "query", "answer": "response"}}},
        "test_rows": {"jsonl": str(test)},
    }
    study.grid["domains"] = ["sums"]
    report = write(study, tmp_path / "out")["domains"]["sums"]
    assert (
        report["n"] == {"train": 30, "probe": 5, "test": 10} and report["duplicates"]["between"] == 5
    )  # 35 to 39 are scored
    rendered = [row for name in ("train", "probe/sums") for row in lines(tmp_path / f"out/train/sums/{name}.jsonl")]
    assert {row["context"] for row in rendered} == {f"Question: {row['query']}\nAnswer:" for row in solved[:35]}
    assert {row["choices"][0] for row in rendered} == {f" {row['response']}" for row in solved[:35]}
    assert all(row["gold"] == 0 and row["end"] for row in rendered)
    assert sorted(row["answer"] for row in lines(tmp_path / "out/evaluate/sums/sums.jsonl")) == sorted(
        row["answer"] for row in asked
    )
    listed = json.loads((tmp_path / "out/evaluate/sums/tasks.json").read_text())
    assert listed[0]["metric"] == "exact_match,flexible-extract" and listed[0]["chance"] == 0.0


def test_bad_blocks_are_told_by_name(study, tmp_path):
    birds, fish, general = study.domains["birds"], study.tasks["fish"], study.general
    study.tasks["trees"] |= {"test": 12, "probe": 3}  # all 12 rows are test rows
    for block, change, message in (
        (
            birds,
            {"split": {"train": 50, "probe": 10, "test": 20}},
            "domains.birds: 50 train rows are requested, and 30",
        ),
        (birds, {"split": {"train": 5, "probe": 1}}, "domains.birds.split has no `test`"),
        (birds, {"question": "query"}, "domains.birds: no column 'query' in .*birds.jsonl line \\d+ .*question"),
        (birds, {"question": ""}, "domains.birds.question is ''"),
        (birds, {"retention": ["fsh"]}, "unknown task 'fsh' in domains.birds.retention: did you mean 'fish'"),
        (birds, {"retention": ["fish"], "transfer": ["fish"]}, "lists 'fish', which is evaluated already"),
        (birds, {"chance": None}, "domains.birds.chance is null: it must be a share of 1"),
        (
            birds,
            {"rows": fish["rows"], "split": {"train": 5, "probe": 1, "test": 5}},
            "'fish', which is the domain's own task or rows",
        ),
        (birds, {"probes": ["trees"]}, "birds.probes lists 'trees', but no rows are left"),
        (fish, {"rows": {}}, "tasks.fish has no 'pypi' source"),
        (fish, {"columns": {"gold": "label"}}, "tasks.fish: .*fish.jsonl line 1 has no column 'label'"),
        (fish, {"set": {"gold": 7}}, "fish.*(gold answer 7|fit the task.s prompt)"),
        (fish, {"columns": ["question", "gold"]}, "fish.*choices"),
        (general, {"importance": 500}, "general.importance is 500 texts"),
        (general, {"text": "body"}, "general: no column 'body'"),
    ):
        kept = dict(block)
        block.update(change)
        with pytest.raises(UserError, match=message):
            write(study, tmp_path / "out")
        block.clear()
        block.update(kept)
    study.grid["domains"] = ["brids"]
    with pytest.raises(UserError, match="unknown domain 'brids'.*'birds'"):
        write(study, tmp_path / "out")


def with_nulls(path, column, *numbers):
    """The file of a block with null in `column` of these lines."""
    rows = lines(path)
    for number in numbers:
        rows[number - 1][column] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "name, column, line, more, told",
    [
        ("birds", "question", 7, {}, "domains.birds: .*birds.jsonl line 7: 'question' is null"),
        (
            "birds",
            "hint",
            60,
            {"task": TASK | {"doc_to_text": "Q: {{question}} {{hint}}\nA:"}},
            "task birds, .*birds.jsonl line 60: 'hint' is null",
        ),
        (
            "fish",
            "question",
            11,
            {"set": {"question": "{{question}}!"}},
            "tasks.fish: .*fish.jsonl line 11, `set`: 'question' is null",
        ),
        ("passages", "passage", 3, {}, "general: .*passages.jsonl line 3: 'passage' is null"),
    ],
)
def test_null_is_refused_by_file_and_line_or_emptied_where_the_block_says_so(
    study, tmp_path, name, column, line, more, told
):
    rows = lines(tmp_path / f"{name}.jsonl")
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"hint": "h"} | row) + "\n" for row in rows))
    with_nulls(tmp_path / f"{name}.jsonl", column, line)
    block = {"birds": study.domains["birds"], "fish": study.tasks["fish"], "passages": study.general}[name]
    block.update(more)
    with pytest.raises(UserError, match=told):
        write(study, tmp_path / "out")
    block["nulls"] = "empty"
    write(study, tmp_path / "out")
    assert "None" not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.jsonl"))


def test_null_in_a_column_that_nothing_reads_is_no_matter(study, tmp_path):
    with_nulls(tmp_path / "birds.jsonl", "source", *range(1, 61))
    write(study, tmp_path / "out")


def test_separators_that_python_splits_lines_at_stay_in_a_text(study, tmp_path):
    texts = [f"Passage {i}:\u2028one\x85two\x0bthree\u2029four" for i in range(80)]
    passages = tmp_path / "passages.jsonl"
    passages.write_text(
        "".join(json.dumps({"passage": text}, ensure_ascii=False) + "\n" for text in texts).replace("\x0b", "\\u000b"),
        encoding="utf-8",
    )
    write(study, tmp_path / "out")
    kept = [row["text"] for row in read_jsonl(tmp_path / "out/general/importance.jsonl")]
    assert len(kept) == 20 and set(kept) <= set(texts)
    study_there = SimpleNamespace(paths=SimpleNamespace(data=tmp_path / "out"))
    assert expected.general_text(study_there) == [expected.tokens(text) for text in kept]


def test_answers_to_train_on_that_say_nothing_are_warned_of(study, tmp_path, capsys):
    task = {"output_type": "generate_until", "doc_to_text": "{{question}}", "metric_list": [{"metric": "exact_match"}]}
    study.domains["birds"] |= {"metric": "exact_match", "retention": [], "transfer": [], "probes": []}
    for target, said in (
        (" ", "in 30 of 30 training rows the answer is empty"),
        ("bird", "all 30 training rows have the same answer 'bird'"),
    ):
        study.domains["birds"]["task"] = task | {"doc_to_target": target}
        write(study, tmp_path / "out")
        assert f"warning: domains.birds: {said}: check doc_to_target" in capsys.readouterr().out


def test_general_text_in_lists_is_refused_by_line(study, tmp_path):
    Path(study.general["rows"]["jsonl"]).write_text(
        "".join(json.dumps({"passage": [f"Passage {i}", "of two parts."]}) + "\n" for i in range(80))
    )
    with pytest.raises(UserError, match=r"passages.jsonl line 1, column 'passage' is a list or an object"):
        write(study, tmp_path / "out")
    study.general["text"] = "{{passage | join(' ')}}"
    write(study, tmp_path / "out")
    assert lines(tmp_path / "out" / "general" / "importance.jsonl")[0]["text"].endswith(" of two parts.")
