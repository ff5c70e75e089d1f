"""Our scores against the `lm_eval` command's own: same checkpoint, rows and dtype, item for item, both scorers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from evaluation import harness, lm
from evaluation.shipped import shipped_yaml
from experiments.model.random_models import build, byte_tokenizer
from tests.evaluation.conftest import ENTRIES

# the command as it is, but for the index of the 14,000 shipped tasks, which takes longer than all the rest
LM_EVAL = """
import functools, lm_eval.tasks.manager as manager
manager.TaskManager.__init__ = functools.partialmethod(manager.TaskManager.__init__, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def command(tasks_dir, tmp_path_factory):
    """What `lm_eval` writes of a saved model on YAMLs that point the shipped tasks at the same rows."""
    folder = tmp_path_factory.mktemp("command")
    model, tokenizer = folder / "model", byte_tokenizer()
    build("gptj", seed=0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (folder / "tasks").mkdir()
    for entry in ENTRIES:
        task = {
            "include": str(shipped_yaml(entry["task"])),
            "task": f"local_{entry['name']}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(tasks_dir / f"{entry['name']}.jsonl")}},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        (folder / "tasks" / f"{entry['name']}.yaml").write_text(yaml.safe_dump(task))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LM_EVAL,
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={model},dtype=float32,max_length=512",
            "--tasks",
            *[f"local_{e['name']}" for e in ENTRIES],
            "--include_path",
            str(folder / "tasks"),
            "--batch_size",
            "4",
            "--device",
            "cpu",
            "--log_samples",
            "--output_path",
            str(folder / "out"),
        ],
        env=os.environ
        | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for entry in ENTRIES:
        (file,) = (folder / "out").rglob(f"samples_local_{entry['name']}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        samples[entry["name"]] = sorted(rows, key=lambda row: row["doc_id"])
    return model, json.loads(results.read_text())["results"], samples


@pytest.mark.parametrize("scorer", lm.SCORERS)
def test_scores_and_items_equal_the_commands(scorer, command, tasks_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, results, samples = command
    scores, items = harness.score(
        model=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        tasks_dir=tasks_dir,
        scorer=scorer,
        batch_size=4,
    )
    for entry in ENTRIES:
        ours, theirs = items[items.task == entry["name"]], samples[entry["name"]]
        assert ours.doc_hash.tolist() == [row["doc_hash"] for row in theirs]
        if entry["role"] == "perplexity":
            nats = [-float(row["filtered_resps"][0]) for row in theirs]
            assert ours.score.tolist() == pytest.approx(nats, abs=2e-3)
            theirs_bits = results["local_general"]["bits_per_byte,none"]
            assert scores["general"]["bits_per_byte"] == pytest.approx(theirs_bits, rel=1e-5)
            continue
        assert ours.score.tolist() == [row[entry["metric"]] for row in theirs]
        assert scores["tasks"][entry["name"]]["value"] == results[f"local_{entry['name']}"][f"{entry['metric']},none"]
        for (_, item), row in zip(ours.iterrows(), theirs):
            values = np.array([float(value) for value, _ in row["filtered_resps"]])
            assert item.log_likelihood == pytest.approx(values[item.gold], abs=1e-3)
