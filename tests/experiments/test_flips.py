"""The command that prints the most forgotten questions from the local rows."""

import json

import pytest

from evaluation.harness import load_tasks
from experiments.commands import flips
from experiments.study import config
from experiments.study.paths import Paths
from methods.errors import UserError
from tests.analysis.fixtures import write_items, write_json
from tests.analysis.test_flips import frame

PIQA = [
    {"goal": f"Boil {i} eggs.", "sol1": f"Take {i} hot pans.", "sol2": "Wait for rain.", "label": 0} for i in range(3)
]
LAMBADA = [{"text": f"The cat saw {i} dogs and ran to the house"} for i in range(2)]
WINOGRANDE = [
    {
        "sentence": f"The {i} cups did not fit the boxes as _ were too big.",
        "option1": "the cups",
        "option2": "the boxes",
        "answer": "1",
    }
    for i in range(2)
]
TASKS = {"piqa": (PIQA, "acc_norm"), "lambada_openai": (LAMBADA, "acc"), "winogrande": (WINOGRANDE, "acc")}


@pytest.fixture
def study(tmp_path):
    """Two runs of the demo study, scored on rows of three kinds; each lost the first row of every task, one of them
    more.
    """
    study = config.load("demo").model_copy(update={"paths": Paths(study="demo", root=tmp_path)})
    folder = study.paths.data / "evaluate" / "sums"
    folder.mkdir(parents=True)
    listed = []
    for name, (rows, metric) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        listed.append(
            {"name": name, "role": "retention", "task": name, "metric": metric, "chance": 0.0, "file": f"{name}.jsonl"}
        )
    write_json(folder / "tasks.json", listed)
    hashes = {entry["name"]: [row["id"] for row in flips.questions(task)] for entry, task in load_tasks(folder)}
    base = frame({name: "1" * len(rows) for name, (rows, _) in TASKS.items()})
    base["doc_hash"] = [hashes[task][i] for task, i in zip(base["task"], base["doc_id"])]
    root = study.paths.results
    write_json(root / "base" / "llama-tiny" / "scores.json", {"tasks": {}})
    write_items(root / "base" / "llama-tiny" / "items.csv.gz", base)
    for method, wrong in (("full", (0,)), ("lora", (0, 1))):
        run = root / "runs" / f"llama-tiny/sums/{method}/seed0"
        lost = base["doc_id"].isin(wrong)
        tuned = base.assign(score=(~lost).astype(float), choice=lost.astype(int)).astype({"choice": object})
        tuned.loc[(tuned["task"] == "lambada_openai") & lost, "choice"] = None
        write_items(run / "items.csv.gz", tuned)
        write_json(
            run / "metrics.json",
            {
                "cell": f"llama-tiny/sums/{method}/seed0",
                "model": "llama-tiny",
                "domain": "sums",
                "method": method,
                "seed": 0,
                "not_a_result": True,
                "at_chance": [],
                "forgetting_by_task": dict.fromkeys(TASKS, 0.5),
                **dict.fromkeys(("transfer_by_task", "scoring", "parts", "git", "hardware", "versions"), {}),
                **dict.fromkeys(("dtype", "base_sha256", "weights_sha256"), "x"),
                "numerics": 1,
                **dict.fromkeys(("domain_score", "domain_score_base", "domain_gain"), 0.5),
                "n": {name: len(rows) for name, (rows, _) in TASKS.items()},
                "scores_by_task": {
                    name: {
                        "role": "retention",
                        "value": 0.5,
                        "base": 1.0,
                        "n": len(rows),
                        "metric": metric,
                        "chance": 0.0,
                    }
                    for name, (rows, metric) in TASKS.items()
                },
            },
        )
    return study


def test_questions_that_both_runs_lost_with_their_text(study, capsys):
    flips.main(study, patterns=["llama-tiny/sums/*"])
    said = capsys.readouterr().out
    assert (
        "Boil 0 eggs." in said
        and "correct: Take 0 hot pans." in said
        and "chosen: Wait for rain.  [full/seed0, lora/seed0]" in said
    )
    assert "The cat saw 0 dogs and ran to the" in said and "correct: house" in said
    assert "correct: The 0 cups did not fit the boxes as the cups were too big." in said
    assert "The 0 cups did not fit the boxes as the boxes were too big." in said.partition("chosen: ")[2]
    assert "Boil 1 eggs." not in said and said.count("lost by 2 of 2 (full, lora)") == 3


def test_one_run_alone_and_the_first_only(study, capsys):
    flips.main(study, patterns=["*/lora/seed0"], top=1)
    said = capsys.readouterr().out
    assert said.count("lost by 1 of 1 (lora)") == 1


def test_mistakes_say_what_to_do(study):
    with pytest.raises(UserError, match="no cell of the grid matches other"):
        flips.main(study, patterns=["other/*"])
    with pytest.raises(UserError, match="--top 0"):
        flips.main(study, top=0)
    with pytest.raises(UserError, match="none of 1 cells has scored items"):
        flips.main(study, patterns=["*/ewc/*"])
    rows = study.paths.data / "evaluate" / "sums" / "piqa.jsonl"
    rows.write_text(rows.read_text().replace("eggs", "rice"))
    with pytest.raises(UserError, match="of piqa: these are not the rows that were scored"):
        flips.main(study)
    rows.unlink()
    with pytest.raises(UserError, match="does not exist"):
        flips.main(study)
