import gzip
import json
import os

import pandas as pd
import pyarrow as pa
import pytest

from analysis import load
from analysis.load import load_cells
from methods.errors import UserError
from tests.analysis.fixtures import write_results


def test_every_finished_cell_is_a_row_with_its_own_numbers(tmp_path):
    planned = write_results(tmp_path)
    loaded = load_cells(tmp_path, planned)
    assert list(loaded.cells.index) == planned and loaded.failures.empty
    for cell in planned:
        metrics = json.loads((tmp_path / "runs" / cell / "metrics.json").read_text())
        assert loaded.cells.at[cell, "forgetting"] == metrics["forgetting"]
        assert (loaded.curves["cell"] == cell).sum() == 61
        assert cell in loaded.prepared
    assert loaded.comparisons == [("smollm2-135m", "science")]
    assert set(loaded.base) == {"smollm2-135m"} and len(loaded.tuning) == 1
    assert not loaded.not_a_result
    for frame in (loaded.curves, loaded.items):  # a text column of a piece for each cell is slow to take rows of
        texts = frame.select_dtypes("str")
        assert len(texts.columns) and not any(isinstance(pa.array(texts[name]), pa.ChunkedArray) for name in texts)


def test_many_processes_read_the_same_as_one(tmp_path, monkeypatch):
    planned = write_results(tmp_path, failed={"mofo": "loss is NaN at step 12"}, missing=("ewc",))
    monkeypatch.setattr(load, "AT_ONCE", 2)
    found = []
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
        found.append(load_cells(tmp_path, planned))
    for frame in ("cells", "curves", "items", "failures"):
        pd.testing.assert_frame_equal(getattr(found[0], frame), getattr(found[1], frame))
    assert found[0].prepared == found[1].prepared and found[0].drift == found[1].drift


def test_missing_and_failed_cells_are_named_with_their_reason(tmp_path):
    planned = write_results(tmp_path, failed={"mofo": "loss is NaN at step 12"}, missing=("ewc",))
    loaded = load_cells(tmp_path, planned)
    assert len(loaded.cells) == 3
    found = loaded.failures.set_index("cell")
    assert found.at["smollm2-135m/science/mofo/seed0", "reason"] == "loss is NaN at step 12"
    assert found.at["smollm2-135m/science/mofo/seed0", "kind"] == "nan"
    assert found.at["smollm2-135m/science/ewc/seed0", "kind"] == "not run"


def test_a_recorded_failure_outranks_older_metrics(tmp_path):
    planned = write_results(tmp_path)
    failure = tmp_path / "failures" / f"{planned[0]}.json"
    failure.parent.mkdir(parents=True)
    failure.write_text(
        json.dumps({"cell": planned[0], "stage": "train", "kind": "out of memory", "reason": "no room", "when": ""})
    )
    loaded = load_cells(tmp_path, planned)
    assert planned[0] not in loaded.cells.index and list(loaded.failures["kind"]) == ["out of memory"]


def test_a_cell_cut_off_between_stages_says_how_far_it_came(tmp_path):
    planned = write_results(tmp_path, methods=("full",))
    (tmp_path / "runs" / planned[0] / "metrics.json").unlink()
    assert "scored" in load_cells(tmp_path, planned).failures.iloc[0]["reason"]
    (tmp_path / "runs" / planned[0] / "scores.json").unlink()
    assert "trained" in load_cells(tmp_path, planned).failures.iloc[0]["reason"]


def test_nothing_at_all_is_not_an_error(tmp_path):
    loaded = load_cells(tmp_path, ["m/d/full/seed0"])
    assert loaded.cells.empty and loaded.comparisons == [] and len(loaded.failures) == 1


def test_a_broken_file_is_named(tmp_path):
    planned = write_results(tmp_path, methods=("full",))
    path = tmp_path / "runs" / planned[0] / "metrics.json"
    path.write_text("{")
    with pytest.raises(UserError, match="metrics.json"):
        load_cells(tmp_path, planned)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("metrics.json", lambda text: "{}", "scores_by_task is missing"),
        ("metrics.json", lambda text: "[]", "it is not a mapping"),
        ("metrics.json", lambda text: text.replace('"full"', '"ewc"', 1), "it is of the cell .*/ewc/seed0"),
        ("metrics.json", lambda text: json.dumps(json.loads(text) | {"n": None}), "n is not a mapping"),
        (
            "metrics.json",
            lambda text: json.dumps(json.loads(text) | {"domain_gain": "much"}),
            "domain_gain is not a number",
        ),
        (
            "metrics.json",
            lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "git"}),
            "git is missing",
        ),
        (
            "metrics.json",
            lambda text: json.dumps(json.loads(text) | {"scores_by_task": {"piqa": {"value": 1}}}),
            "scores_by_task.piqa lacks base",
        ),
        (
            "train.json",
            lambda text: json.dumps(json.loads(text) | {"when": "yesterday"}),
            "when is 'yesterday', not a time",
        ),
        (
            "curve.csv",
            lambda text: text.replace("\n12,", "\ntwelve,"),
            "column step holds something that is not a number",
        ),
        ("curve.csv", lambda text: text.replace("seconds", "minutes", 1), "column seconds is missing"),
        (
            "curve.csv",
            lambda text: "".join(text.splitlines(keepends=True)[:9]),
            "it ends at step 7, and train.json at 60",
        ),
        ("curve.csv", lambda text: text[:-2], "its last line is cut off"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong_and_what_restores_it(tmp_path, file, damage, message):
    planned = write_results(tmp_path, methods=("full",))
    path = tmp_path / "runs" / planned[0] / file
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=rf"{file} is not what its stage writes \({message}.*restore it with git"):
        load_cells(tmp_path, planned)


def test_damaged_items_and_failures_are_named(tmp_path):
    planned = write_results(tmp_path, methods=("full",))
    path = tmp_path / "runs" / planned[0] / "items.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + b"damaged" + whole[47:])
    with pytest.raises(UserError, match=r"items.csv.gz cannot be read .*restore it with git"):
        load_cells(tmp_path, planned)
    with gzip.open(path, "wt") as file:
        file.write("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"items.csv.gz is not what its stage writes \(column task is missing"):
        load_cells(tmp_path, planned)
    failure = tmp_path / "failures" / f"{planned[0]}.json"
    failure.parent.mkdir(parents=True)
    failure.write_text("{}")
    with pytest.raises(UserError, match=r"seed0.json is not what its stage writes \(stage is missing"):
        load_cells(tmp_path, planned)
    failure.write_text('{"stage": "train", "kind": "nan", "reason": "r", "when": "yesterday"}')
    with pytest.raises(UserError, match=r"seed0.json is not what its stage writes \(when is 'yesterday', not a time"):
        load_cells(tmp_path, planned)


def test_scores_of_the_weights_before_are_not_those_of_a_cell_that_was_trained_again(tmp_path):
    planned = write_results(tmp_path, methods=("full", "lora"), seeds=(0,))
    path = tmp_path / "runs" / planned[0] / "train.json"
    train = json.loads(path.read_text())
    known = json.loads((path.parent / "metrics.json").read_text())["weights_sha256"]
    for digest, found in ((known, planned), ("f" * 64, planned[1:])):
        path.write_text(json.dumps(train | {"weights_sha256": digest}))
        loaded = load_cells(tmp_path, planned)
        assert list(loaded.cells.index) == list(found) and set(loaded.curves["cell"]) == set(found)
    assert loaded.failures["reason"].to_list() == ["trained again, and its scores are of the weights before"]


def test_cells_may_be_objects_with_a_name(tmp_path):
    from experiments.study.cells import Cell

    write_results(tmp_path, methods=("full",))
    assert len(load_cells(tmp_path, [Cell("smollm2-135m", "science", "full", 0)]).cells) == 1


def test_a_task_may_be_called_like_a_missing_value_or_a_number(tmp_path):
    write_results(tmp_path, methods=("full",), seeds=(0,))
    (file,) = tmp_path.glob("runs/*/*/full/seed0/items.csv.gz")
    head, *rows = gzip.decompress(file.read_bytes()).decode().splitlines()
    for name in ("null", "nan", "01", "1e3", "true"):
        renamed = [f"{name},{row.partition(',')[2]}" for row in rows]
        file.write_bytes(gzip.compress("\n".join([head, *renamed]).encode()))
        items = load_cells(tmp_path, [f"{'/'.join(file.parts[-5:-3])}/full/seed0"]).items
        assert set(items["task"]) == {name} and len(items) == len(rows) and items["score"].notna().all()
