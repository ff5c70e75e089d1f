import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from experiments.commands.track import track
from methods.errors import UserError
from tests.analysis.fixtures import METHODS, write_results

CELL = "smollm2-135m/science/{}/seed0".format


def client(database: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}")


def runs_of(database: Path, study: str = "default", *, kind: str = "cell") -> dict:
    found = client(database)
    experiment = found.get_experiment_by_name(study)
    return {
        run.data.tags[f"holdfast.{kind}"]: run
        for run in found.search_runs([experiment.experiment_id])
        if f"holdfast.{kind}" in run.data.tags
    }


def content(database: Path) -> dict:
    """All that a rebuilt store must have again: no run ids."""
    found, all_of_it = client(database), {}
    every = {key: run for kind in ("cell", "group", "base") for key, run in runs_of(database, kind=kind).items()}
    keys = {run.info.run_id: key for key, run in every.items()}
    for cell, run in every.items():
        points = {
            key: [(m.step, m.timestamp, m.value) for m in found.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        files = sorted(file.path for file in found.list_artifacts(run.info.run_id))
        tags = run.data.tags | (
            {"mlflow.parentRunId": keys[run.data.tags["mlflow.parentRunId"]]}
            if "mlflow.parentRunId" in run.data.tags
            else {}
        )
        all_of_it[cell] = (
            run.info.status,
            run.info.start_time,
            run.info.end_time,
            run.data.params,
            points,
            tags,
            files,
        )
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
    assert (
        run.data.params["ewc.strength"] == "10000.0"
        and run.data.params["scoring.scorer"] == "shared-prefix"
        and run.data.params["seed"] == "0"
    )
    costs = ("seconds_train", "seconds_prepare", "bytes_anchor", "peak_memory_bytes")
    nats = ("general_nll_lost", "general_kl", "general_kl_reverse", "gold_nll_lost", "margin_lost", "domain_nll_gained")
    for key in ("forgetting", "domain_gain", *costs, *nats):
        assert (
            run.data.metrics[key] == pytest.approx(metrics[key], rel=1e-5)
            and len(repr(run.data.metrics[key]).split(".")[-1]) <= 8
        )
    assert run.data.metrics["forgetting/hellaswag"] == pytest.approx(
        metrics["forgetting_by_task"]["hellaswag"], rel=1e-5
    )
    for measure in ("gold_nll_lost", "margin_lost"):
        by_task = metrics[f"{measure}_by_task"]
        assert run.data.metrics[f"{measure}/hellaswag"] == pytest.approx(by_task["hellaswag"], rel=1e-5)
    assert run.data.metrics["bytes_weights_delta"] == metrics["bytes_weights_delta"]  # whole numbers keep every digit
    found = client(database)
    loss = found.get_metric_history(run.info.run_id, "curve/loss")
    assert [m.step for m in loss] == list(range(1, 61)) and loss[-1].timestamp - loss[0].timestamp == pytest.approx(
        268_000 * 59 / 60, abs=2
    )
    assert [m.step for m in found.get_metric_history(run.info.run_id, "probe/hellaswag")] == [0, 12, 24, 36, 48, 60]
    tags = run.data.tags
    assert (
        tags["git.commit"] == metrics["git"]["commit"]
        and tags["git.dirty"] == "False"
        and tags["not_a_result"] == "False"
    )
    assert tags["mlflow.note.content"].count("\n\n") == 1 and "ewc" in tags["mlflow.note.content"]
    assert tags["data_sha256"] == metrics["data_sha256"] and tags["weights_sha256"] == metrics["weights_sha256"]
    assert tags["weights"] == f"work/cells/{CELL('ewc')}/weights"
    assert {f.path for f in found.list_artifacts(run.info.run_id)} == {
        "metrics.json",
        "train.json",
        "curve.csv",
        "scores.json",
        "evaluate.json",
    }
    assert (database.parent / "mlartifacts").is_dir()
    # numbers about the machine are where MLflow shows system metrics
    assert (
        run.data.metrics["system/peak_memory_train_bytes"] == 3_100_000_000
        and run.data.metrics["system/peak_memory_prepare_bytes"] == 2_000_000_000
    )
    assert len(found.get_metric_history(run.info.run_id, "system/tokens_per_second")) == 60
    above = runs_of(database, kind="group")[CELL("ewc").rsplit("/", 1)[0]]
    assert {f.path for f in found.list_artifacts(above.info.run_id)} == {"report.html", "figures"}
    assert [f.path for f in found.list_artifacts(above.info.run_id, "figures")] == [
        "figures/cost-smollm2-135m-science.png"
    ]


def test_a_method_is_a_run_with_the_comparison_above_its_seeds(database, tmp_path):
    from analysis.load import load_cells
    from analysis.statistics.comparison import comparison

    root = tmp_path / "seeds"
    cells = write_results(root, methods=("full", "ewc"), seeds=(0, 1, 2))
    made = track(results_root=root, cells=cells, study="default", database=database)
    above, children = runs_of(database, kind="group"), runs_of(database)
    assert set(above) == {"smollm2-135m/science/full", "smollm2-135m/science/ewc"} and set(children) == set(
        made
    ) == set(cells)
    for cell, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == above[cell.rsplit("/", 1)[0]].info.run_id
    row, run = comparison(load_cells(root, cells)).set_index("method").loc["ewc"], above["smollm2-135m/science/ewc"]
    own = [children[cell] for cell in cells if "/ewc/" in cell]
    assert len({child.data.metrics["forgetting"] for child in own}) > 1
    for key in (
        "forgetting",
        "forgetting_low",
        "forgetting_high",
        "domain_gain",
        "domain_gain_low",
        "perplexity_ratio",
        "seconds_train",
        "bytes_anchor",
    ):
        assert run.data.metrics[key] == pytest.approx(row[key], rel=1e-5)
    assert run.data.metrics["forgetting"] == pytest.approx(
        sum(child.data.metrics["forgetting"] for child in own) / 3, rel=1e-5
    )
    assert (
        run.info.end_time - run.info.start_time == own[0].info.end_time - own[0].info.start_time
    )  # as long as a seed took
    assert run.data.metrics["forgetting/piqa"] == pytest.approx(
        sum(child.data.metrics["forgetting/piqa"] for child in own) / 3, rel=1e-5
    )

    def last(found):
        history = client(database).get_metric_history(found.info.run_id, "curve/loss")
        return [point.value for point in history if point.step == 60]

    assert last(run) == [pytest.approx(sum(last(child)[0] for child in own) / 3, rel=1e-5)]
    assert (
        run.data.params["seeds"] == "0, 1, 2"
        and run.data.params["ewc.strength"] == "10000.0"
        and "seed" not in run.data.params
    )
    assert run.data.tags["git.commit"] == own[0].data.tags["git.commit"] and run.data.tags["git.dirty"] == "False"
    assert (
        run.data.tags["mlflow.note.content"].count("\n\n") == 1
        and "mean of 3 seeds" in run.data.tags["mlflow.note.content"]
    )
    base = runs_of(database, kind="base")["smollm2-135m/science"]
    assert (
        base.data.metrics["forgetting"] == base.data.metrics["domain_gain"] == 0
        and base.data.metrics["domain_score"] == own[0].data.metrics["domain_score_base"]
    )


def test_a_seed_more_changes_the_run_above_and_no_other_child(database, tmp_path):
    root = tmp_path / "seeds"
    cells = write_results(root, methods=("full",), seeds=(0, 1))
    first = track(results_root=root, cells=cells[:1], study="default", database=database)
    alone = runs_of(database, kind="group")["smollm2-135m/science/full"]
    assert "one seed: this run, not this method" in alone.data.tags["mlflow.note.content"]
    second = track(results_root=root, cells=cells, study="default", database=database)
    above = runs_of(database, kind="group")["smollm2-135m/science/full"]
    assert (
        above.info.run_id != alone.info.run_id
        and above.data.metrics["seeds"] == 2
        and second[cells[0]] == first[cells[0]]
    )
    assert {run.data.tags["mlflow.parentRunId"] for run in runs_of(database).values()} == {above.info.run_id}


def test_a_cell_under_other_rules_is_shown_and_not_in_the_mean(database, tmp_path):
    root = tmp_path / "seeds"
    cells = write_results(root, methods=("full", "ewc"), seeds=(0, 1, 2))
    other = root / "runs" / "smollm2-135m/science/ewc/seed2" / "metrics.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"numerics": 2}))
    track(results_root=root, cells=cells, study="default", database=database)
    runs, above = runs_of(database), runs_of(database, kind="group")["smollm2-135m/science/ewc"]
    out, kept = runs[cells[5]], [runs[cell] for cell in cells[3:5]]
    assert out.info.status == above.info.status == "FINISHED" and "forgetting" in out.data.metrics
    assert (
        "numerics" in out.data.tags["not_comparable"].lower()
        and out.data.tags["not_comparable"] in out.data.tags["mlflow.note.content"]
    )
    assert (
        above.data.tags["not_comparable"] == cells[5]
        and "mean of 2 of 3 seeds" in above.data.tags["mlflow.note.content"]
    )
    for key in ("forgetting", "forgetting/piqa"):
        assert above.data.metrics[key] == pytest.approx(sum(run.data.metrics[key] for run in kept) / 2, rel=1e-5)
        assert above.data.metrics[key] != pytest.approx(
            sum(run.data.metrics[key] for run in [*kept, out]) / 3, rel=1e-4
        )


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


def test_a_rerun_with_another_setting_replaces_the_run_and_no_other(database, results):
    cells = [CELL("full"), CELL("ewc")]
    first = track(results_root=results, cells=cells, study="default", database=database)
    folder = results / "runs" / CELL("ewc")
    train = json.loads((folder / "train.json").read_text())
    train["settings"]["ewc"] = {"strength": 10.0}
    (folder / "train.json").write_text(json.dumps(train))
    lines = (folder / "curve.csv").read_text().splitlines()
    (folder / "curve.csv").write_text("\n".join(lines[:11]) + "\n")
    second = track(results_root=results, cells=cells, study="default", database=database)
    assert second[CELL("full")] == first[CELL("full")] and second[CELL("ewc")] != first[CELL("ewc")]
    assert len(client(database).search_runs([client(database).get_experiment_by_name("default").experiment_id])) == 5
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
    above = runs_of(database, kind="group")["smollm2-135m/science/mofo"]
    assert above.info.status == "FAILED" and "loss is NaN at step 12" in above.data.tags["mlflow.note.content"]
    assert [f.path for f in client(database).list_artifacts(run.info.run_id)] == ["failure"]
    shutil.rmtree(root)
    write_results(root, methods=("full", "mofo"))
    second = track(results_root=root, cells=cells, study="default", database=database)
    assert second[CELL("full")] == first[CELL("full")]
    run = runs_of(database)[CELL("mofo")]
    assert run.info.status == "FINISHED" and "failure.reason" not in run.data.tags and "forgetting" in run.data.metrics
    assert not client(database).list_artifacts(run.info.run_id, "failure")
    above = runs_of(database, kind="group")["smollm2-135m/science/mofo"]
    assert (
        above.info.status == "FINISHED"
        and "failure.reason" not in above.data.tags
        and "forgetting" in above.data.metrics
    )


def test_a_cell_that_never_ran_has_no_run_and_one_that_is_gone_loses_it(database, results):
    cells = [CELL("full"), CELL("lora"), CELL("never")]
    assert set(track(results_root=results, cells=cells, study="default", database=database)) == {
        CELL("full"),
        CELL("lora"),
    }
    shutil.rmtree(results / "runs" / CELL("lora"))
    track(results_root=results, cells=cells, study="default", database=database)
    assert set(runs_of(database)) == {CELL("full")} and set(runs_of(database, kind="group")) == {
        "smollm2-135m/science/full"
    }


def test_cells_that_left_the_grid_disappear_and_the_runs_of_others_stay(database, results):
    track(results_root=results, cells=[CELL("full"), CELL("lora")], study="default", database=database)
    store = client(database)
    experiment = store.get_experiment_by_name("default").experiment_id
    store.create_run(experiment, run_name="of the user")
    store.create_run(store.create_experiment("theirs"), run_name="elsewhere")
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    assert set(runs_of(database)) == {CELL("full")}
    names = {run.info.run_name for run in store.search_runs([experiment])}
    assert names == {f"{m} science smollm2-135m" for m in ("base", "full")} | {
        "full science smollm2-135m seed0",
        "of the user",
    }
    theirs = store.get_experiment_by_name("theirs")
    assert theirs.lifecycle_stage == "active" and len(store.search_runs([theirs.experiment_id])) == 1


def test_a_run_cut_off_half_way_is_written_again(database, results):
    first = track(results_root=results, cells=[CELL("full")], study="default", database=database)
    client(database).delete_tag(first[CELL("full")], "holdfast.digest")  # written last
    second = track(results_root=results, cells=[CELL("full")], study="default", database=database)
    assert second != first and set(runs_of(database)) == {CELL("full")}


def test_a_deleted_experiment_is_restored(database, results):
    first = track(results_root=results, cells=[CELL("full")], study="default", database=database)
    client(database).delete_experiment(client(database).get_experiment_by_name("default").experiment_id)
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    assert set(runs_of(database)) == set(first)


def test_studies_are_experiments_of_their_own(database, results):
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    track(results_root=results, cells=[CELL("full")], study="demo", database=database)
    assert set(runs_of(database)) == set(runs_of(database, "demo")) == {CELL("full")}


def test_a_dvc_experiment_is_a_run_of_its_own_and_the_plain_run_stays(database, results):
    plain = track(results_root=results, cells=[CELL("full"), CELL("lora")], study="default", database=database)
    path = results / "runs" / CELL("full") / "train.json"
    train = json.loads(path.read_text())
    was = path.read_text()
    train["settings"]["learning_rate"] = 0.5
    path.write_text(json.dumps(train))
    metrics = results / "runs" / CELL("full") / "metrics.json"
    before = metrics.read_text()
    found = json.loads(before)
    metrics.write_text(
        json.dumps(found | {"git": found["git"] | {"experiment": "high-lr"}})
    )  # as provenance.git writes it within `dvc exp run`
    tried = track(results_root=results, cells=[CELL("full"), CELL("lora")], study="default", database=database)
    assert tried[CELL("lora")] == plain[CELL("lora")]  # nothing of it changed
    assert tried[CELL("full")] != plain[CELL("full")]
    assert client(database).get_run(tried[CELL("full")]).data.tags["DVC_EXP_NAME"] == "high-lr"
    assert track(results_root=results, cells=[CELL("full")], study="default", database=database) == {
        CELL("full"): tried[CELL("full")]
    }
    found = client(database)
    above = [
        run
        for run in found.search_runs([found.get_experiment_by_name("default").experiment_id])
        if run.data.tags.get("holdfast.group", "").endswith("/full")
    ]
    assert sorted(run.data.tags.get("DVC_EXP_NAME", "") for run in above) == ["", "high-lr"]
    path.write_text(was)
    metrics.write_text(before)
    assert track(results_root=results, cells=[CELL("full")], study="default", database=database) == {
        CELL("full"): plain[CELL("full")]
    }


def test_a_store_that_was_moved_keeps_its_files_beside_itself(database, results, tmp_path):
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    moved = tmp_path / "moved"
    database.parent.rename(moved)
    made = track(results_root=results, cells=[CELL("full")], study="default", database=moved / "mlflow.db")
    assert (
        not database.parent.exists()
        and (moved / "mlartifacts/default" / made[CELL("full")] / "artifacts/metrics.json").exists()
    )
    uri = client(moved / "mlflow.db").get_run(made[CELL("full")]).info.artifact_uri
    assert uri.startswith((moved / "mlartifacts").as_uri())


def test_without_a_name_every_study_with_results_is_tracked_and_a_bad_store_is_named(migrated, tmp_path, capsys):
    from experiments.commands import track as command
    from experiments.study import config
    from experiments.study.paths import HERE, Paths

    root = tmp_path / "project"
    for study in ("", "demo"):
        paths = Paths(study=study, root=root)
        paths.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(Paths(study=study, root=HERE).params, paths.params)
        write_results(paths.results)
    shutil.copy(migrated, root / "mlflow.db")
    shutil.copytree(root / "experiments/studies/demo", root / "experiments/studies/unrun")
    command.main(config.load(root=root))
    output = capsys.readouterr().out
    assert (
        "cells of study default" in output
        and "cells of study demo" in output
        and "unrun" not in output
        and output.count("http://127.0.0.1:5000/#/experiments/") == 2
    )
    command.main(config.load("demo", root=root))
    assert "default" not in capsys.readouterr().out
    (root / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(
        UserError, match=r"mlflow.db cannot be written .*delete it and run `python -m experiments track`"
    ):
        command.main(config.load(root=root))


def test_many_parameters_and_long_values_fit_mlflows_limits(database, results):
    path = results / "runs" / CELL("full") / "train.json"
    train = json.loads(path.read_text())
    train["settings"] |= {f"knob{i}": i for i in range(250)} | {"long": "x" * 9000}
    path.write_text(json.dumps(train))
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    params = runs_of(database)[CELL("full")].data.params
    assert params["knob249"] == "249" and len(params["long"]) == 5000


def test_tracking_opens_no_connection(database, results, monkeypatch):
    def refuse(self, address, *rest):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true" and is_telemetry_disabled()
