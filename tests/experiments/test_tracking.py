import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from experiments.tracking import link, track
from tests.analysis.fixtures import METHODS, write_results

CELL = "smollm2-135m/science/{}/seed0".format


def client(database: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}")


def runs_of(database: Path, study: str = "default") -> dict:
    found = client(database)
    experiment = found.get_experiment_by_name(study)
    return {run.data.tags["holdfast.cell"]: run for run in found.search_runs([experiment.experiment_id])}


def content(database: Path) -> dict:
    """All that a rebuilt store must have again: no run ids."""
    found, all_of_it = client(database), {}
    for cell, run in runs_of(database).items():
        points = {key: [(m.step, m.timestamp, m.value) for m in found.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
        inputs = sorted((d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs)
        files = sorted(file.path for file in found.list_artifacts(run.info.run_id))
        all_of_it[cell] = (run.info.status, run.info.start_time, run.info.end_time, run.data.params, points, run.data.tags, inputs, files)
    return all_of_it


@pytest.fixture(scope="module")
def migrated(tmp_path_factory) -> Path:
    """An empty store: MLflow's migrations take seconds, so they run once."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(database).search_experiments()
    return database


@pytest.fixture
def database(migrated, tmp_path) -> Path:
    copy = tmp_path / "root" / "mlflow.db"
    copy.parent.mkdir()
    shutil.copy(migrated, copy)
    return copy


@pytest.fixture
def results(tmp_path) -> Path:
    write_results(tmp_path / "results")
    return tmp_path / "results"


def test_a_run_holds_parameters_curves_scores_costs_data_and_files(database, results):
    figure = results / "summary/figures/cost-smollm2-135m-science.png"
    figure.parent.mkdir(parents=True)
    figure.write_bytes(b"picture")
    (results / "summary/report.html").write_text("<p>report")
    made = track(results_root=results, cells=[CELL(m) for m in METHODS], study="default", database=database)
    assert list(made) == [CELL(m) for m in METHODS]
    runs = runs_of(database)
    run, metrics = runs[CELL("ewc")], json.loads((results / "runs" / CELL("ewc") / "metrics.json").read_text())
    assert len(runs) == 5 and run.info.run_id == made[CELL("ewc")] and run.info.status == "FINISHED"
    assert run.data.params["ewc.strength"] == "10000.0" and run.data.params["scoring.scorer"] == "shared-prefix" and run.data.params["seed"] == "0"
    for key in ("forgetting", "domain_gain", "seconds_train", "seconds_prepare", "bytes_anchor", "peak_memory_bytes"):
        assert run.data.metrics[key] == metrics[key]
    assert run.data.metrics["forgetting/hellaswag"] == metrics["forgetting_by_task"]["hellaswag"]
    found = client(database)
    loss = found.get_metric_history(run.info.run_id, "curve/loss")
    assert [m.step for m in loss] == list(range(1, 61)) and loss[-1].timestamp - loss[0].timestamp == pytest.approx(268_000 * 59 / 60, abs=2)
    assert [m.step for m in found.get_metric_history(run.info.run_id, "probe/hellaswag")] == [0, 12, 24, 36, 48, 60]
    tags = run.data.tags
    assert tags["git.commit"] == metrics["git"]["commit"] and tags["git.dirty"] == "False" and tags["not_a_result"] == "False"
    assert tags["mlflow.note.content"].count("\n\n") == 1 and "ewc" in tags["mlflow.note.content"]
    data = {d.dataset.name: (d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs}
    assert data["science train"] == (metrics["data_sha256"][:36], "training") and data["hellaswag"][1] == "evaluation" and len(data) == 10
    assert {f.path for f in found.list_artifacts(run.info.run_id)} == {"metrics.json", "train.json", "curve.csv", "scores.json", "evaluate.json", "environment.json", "report.html", "figures"}
    assert (database.parent / "mlartifacts").is_dir()


def test_twice_gives_the_same_runs_and_a_fresh_store_the_same_content(database, results, migrated, tmp_path):
    cells = [CELL(m) for m in METHODS[:3]]
    first = track(results_root=results, cells=cells, study="default", database=database)
    before = content(database)
    assert track(results_root=results, cells=cells, study="default", database=database) == first
    assert content(database) == before
    fresh = tmp_path / "fresh" / "mlflow.db"
    fresh.parent.mkdir()
    shutil.copy(migrated, fresh)
    track(results_root=results, cells=cells, study="default", database=fresh)
    assert content(fresh) == before


def test_a_rerun_with_another_setting_resumes_the_run_without_leftovers(database, results):
    first = track(results_root=results, cells=[CELL("ewc")], study="default", database=database)
    folder = results / "runs" / CELL("ewc")
    train = json.loads((folder / "train.json").read_text())
    train["settings"]["ewc"] = {"strength": 10.0}
    (folder / "train.json").write_text(json.dumps(train))
    lines = (folder / "curve.csv").read_text().splitlines()
    (folder / "curve.csv").write_text("\n".join(lines[:11]) + "\n")
    assert track(results_root=results, cells=[CELL("ewc")], study="default", database=database) == first
    run = runs_of(database)[CELL("ewc")]
    assert run.data.params["ewc.strength"] == "10.0" and "ewc.samples" not in run.data.params
    assert len(client(database).get_metric_history(run.info.run_id, "curve/loss")) == 9


def test_a_failed_cell_shows_failed_with_its_reason_and_recovers(database, tmp_path):
    root = tmp_path / "results"
    write_results(root, methods=("full", "mofo"), failed={"mofo": "loss is NaN at step 12: lower the learning rate"})
    cells = [CELL("full"), CELL("mofo")]
    first = track(results_root=root, cells=cells, study="default", database=database)
    run = runs_of(database)[CELL("mofo")]
    assert run.info.status == "FAILED" and "loss is NaN at step 12" in run.data.tags["failure.reason"]
    assert "loss is NaN at step 12" in run.data.tags["mlflow.note.content"] and run.data.metrics == {}
    shutil.rmtree(root)
    write_results(root, methods=("full", "mofo"))
    assert track(results_root=root, cells=cells, study="default", database=database) == first
    run = runs_of(database)[CELL("mofo")]
    assert run.info.status == "FINISHED" and "failure.reason" not in run.data.tags and "forgetting" in run.data.metrics


def test_a_cell_that_never_ran_has_no_run_and_one_that_is_gone_loses_it(database, results):
    cells = [CELL("full"), CELL("lora"), CELL("never")]
    assert set(track(results_root=results, cells=cells, study="default", database=database)) == {CELL("full"), CELL("lora")}
    shutil.rmtree(results / "runs" / CELL("lora"))
    track(results_root=results, cells=cells, study="default", database=database)
    assert set(runs_of(database)) == {CELL("full")}


def test_studies_are_experiments_of_their_own(database, results):
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    track(results_root=results, cells=[CELL("full")], study="demo", database=database)
    assert set(runs_of(database)) == set(runs_of(database, "demo")) == {CELL("full")}


def test_a_dvc_experiment_is_a_run_of_its_own_and_its_tag_stays(database, results, monkeypatch):
    plain = track(results_root=results, cells=[CELL("full"), CELL("lora")], study="default", database=database)
    path = results / "runs" / CELL("full") / "train.json"
    train = json.loads(path.read_text())
    train["settings"]["learning_rate"] = 0.5
    path.write_text(json.dumps(train))
    monkeypatch.setenv("DVC_EXP_NAME", "high-lr")
    tried = track(results_root=results, cells=[CELL("full"), CELL("lora")], study="default", database=database)
    assert tried[CELL("lora")] == plain[CELL("lora")]  # nothing of it changed
    assert tried[CELL("full")] != plain[CELL("full")]
    assert client(database).get_run(tried[CELL("full")]).data.tags["DVC_EXP_NAME"] == "high-lr"
    monkeypatch.delenv("DVC_EXP_NAME")
    assert track(results_root=results, cells=[CELL("full")], study="default", database=database) == {CELL("full"): tried[CELL("full")]}


def test_many_parameters_and_long_values_fit_mlflows_limits(database, results):
    path = results / "runs" / CELL("full") / "train.json"
    train = json.loads(path.read_text())
    train["settings"] |= {f"knob{i}": i for i in range(250)} | {"long": "x" * 9000}
    path.write_text(json.dumps(train))
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    params = runs_of(database)[CELL("full")].data.params
    assert params["knob249"] == "249" and len(params["long"]) == 6000


def test_tracking_opens_no_connection(database, results, monkeypatch):
    def refuse(self, address, *rest):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true" and is_telemetry_disabled()


def test_the_link_opens_a_view_with_scores_as_columns(database, results):
    import base64
    import zlib

    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    experiment = client(database).get_experiment_by_name("default")
    address = link(study="default", database=database)
    assert f"/experiments/{experiment.experiment_id}/runs?" in address and address.endswith("viewStateShareKey=holdfast")
    view = json.loads(zlib.decompress(base64.b64decode(experiment.tags["mlflow.sharedViewState.holdfast"].removeprefix("deflate;"))))
    assert "metrics.`forgetting`" in view["selectedColumns"]
    shown = {f"metrics.`{key}`" for key in runs_of(database)[CELL("full")].data.metrics}
    assert set(view["selectedColumns"]) <= shown
