import json
import os
import re
import shutil
import socket
from pathlib import Path
from urllib.parse import parse_qs

import pandas as pd
import pytest

from analysis import numbers
from analysis.measures import ORDER
from experiments.commands.track import track
from experiments.commands.tracked_page import CURVES, first_link
from methods.errors import UserError
from tests.analysis.fixtures import METHODS, write_results

CELL = "smollm2-135m/science/{}/seed0".format


def client(database: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}")


def runs_of(database: Path, study: str = "default", *, kind: str = "cell") -> dict:
    found = client(database)
    experiment = found.get_experiment_by_name(study)
    every = found.search_runs([experiment.experiment_id])
    return {run.data.tags["holdfast.key"]: run for run in every if run.data.tags.get("row") == kind}


def content(database: Path) -> dict:
    """All that a rebuilt store must have again: no run ids."""
    found, all_of_it = client(database), {}
    every = {key: run for kind in ("cell", "method", "base") for key, run in runs_of(database, kind=kind).items()}
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


def test_a_cell_holds_settings_headlines_curves_costs_as_text_and_its_files(database, results):
    folder = results / "runs" / CELL("ewc")
    (folder / "details.json").write_text("{}")
    made = track(results_root=results, cells=[CELL(m) for m in METHODS], study="default", database=database)
    assert list(made) == [CELL(m) for m in METHODS]
    runs, metrics = runs_of(database), json.loads((folder / "metrics.json").read_text())
    run = runs[CELL("ewc")]
    assert len(runs) == 5 and run.info.run_id == made[CELL("ewc")] and run.info.status == "FINISHED"
    assert run.data.params["ewc.strength"] == "10000.0" and run.data.params["scoring.scorer"] == "shared-prefix"
    for key in ORDER:
        assert run.data.metrics[key] == pytest.approx(metrics[key], rel=1e-5)
        assert len(repr(run.data.metrics[key]).split(".")[-1]) <= 8
    found = client(database)
    loss = found.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in loss] == list(range(1, 61)) and loss[-1].timestamp - loss[0].timestamp == pytest.approx(
        268_000 * 59 / 60, abs=2
    )
    accuracy = found.get_metric_history(run.info.run_id, "probe/accuracy")
    curve = pd.read_csv(folder / "curve.csv").set_index("step")
    tasks = [f"probe_{task}" for task in metrics["forgetting_by_task"] if task not in metrics["at_chance"]]
    assert len(tasks) > 1 and {m.step: m.value for m in accuracy} == pytest.approx(
        curve[tasks].dropna().mean(axis=1).to_dict(), rel=1e-5
    )
    assert set(run.data.metrics) == {*ORDER, *CURVES}  # whatever else is a number has no chart of one point
    tags = run.data.tags
    assert tags["training time"] == "4 min 28 s" and tags["peak memory"] == numbers.size(metrics["peak_memory_bytes"])
    assert tags["mlflow.source.git.commit"] == metrics["git"]["commit"] and tags["git.dirty"] == "False"
    assert (
        tags["weights_sha256"] == metrics["weights_sha256"] and tags["weights"] == f"work/cells/{CELL('ewc')}/weights"
    )
    logged = {file.path for file in found.list_artifacts(run.info.run_id)}
    assert logged == {path.name for path in folder.iterdir()} >= {"metrics.json", "details.json", "items.csv.gz"}


def test_the_base_holds_the_report_and_the_front_as_large_as_it_is(database, results):
    from PIL import Image

    figures = results / "summary/figures"
    figures.mkdir(parents=True)
    for name in ("overview", "overview_phone", "cost-smollm2-135m-science", "cost-smollm2-135m-physical"):
        Image.new("RGB", (900, 600)).save(figures / f"{name}.png")
    (results / "summary/report.html").write_text("<p>report")
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    base = runs_of(database, kind="base")["smollm2-135m/science"]
    found = client(database)
    assert {file.path for file in found.list_artifacts(base.info.run_id)} == {"report.html", "figures", "images"}
    own = ["figures/cost-smollm2-135m-science.png", "figures/overview.png"]
    assert [file.path for file in found.list_artifacts(base.info.run_id, "figures")] == own
    folder = database.parent / "mlartifacts/default" / base.info.run_id / "artifacts/images"
    assert {Image.open(file).size for file in folder.iterdir()} == {(900, 600)} and len(list(folder.iterdir())) == 2


def test_the_link_opens_a_view_of_the_first_comparison(database, tmp_path):
    cells = [
        cell
        for domain in ("science", "physical")
        for cell in write_results(tmp_path / "two", methods=("full", "ewc"), domain=domain)
    ]
    track(results_root=tmp_path / "two", cells=cells, study="default", database=database)
    experiment = client(database).get_experiment_by_name("default")
    address = first_link(experiment.experiment_id)
    assert address.startswith(f"http://holdfast.localhost:5000/#/experiments/{experiment.experiment_id}/runs?")
    key = parse_qs(address.partition("?")[2])["viewStateShareKey"][0]
    views = {k: json.loads(v) for k, v in experiment.tags.items() if k.startswith("mlflow.sharedViewState.")}
    assert len(views) == 2 and len(set(views)) == 2
    state = json.loads(views[f"mlflow.sharedViewState.{key}"]["state"])
    rows = client(database).search_runs(
        [experiment.experiment_id], state["searchFilter"], order_by=[f"{state['orderByKey']} ASC"]
    )
    assert {(row.data.tags["domain"], row.data.tags["row"]) for row in rows} == {
        ("science", "base"),
        ("science", "method"),
    }
    lost = [row.data.metrics["general_nll_lost"] for row in rows]
    assert len(rows) == 3 and lost == sorted(lost)
    method = next(row for row in rows if row.data.tags["method"] == "ewc").data
    shown = [column.removeprefix("tags.`").rstrip("`") for column in state["selectedColumns"]]
    assert [head[:2] for head in shown[:7]] == [f"{n} " for n in range(1, 8)]
    text = method.tags[shown[2]]
    assert re.fullmatch(r"\+0\.\d{3} \[[+−]0\.\d+, \+0\.\d+\]", text)
    assert text.startswith(numbers.nats(method.metrics["general_nll_lost"]))
    charts = [chart for chart in state["compareRunCharts"] if not chart["deleted"]]
    assert [chart.get("metricKey") for chart in charts[2:]] == list(CURVES)
    hidden = {chart["metricKey"] for chart in state["compareRunCharts"] if chart["deleted"]}
    assert hidden == set(method.metrics) - set(CURVES)
    assert all(
        f"/experiments/{experiment.experiment_id}/runs?" in line
        for line in experiment.tags["mlflow.note.content"].split("\n\n")[:2]
    )


def test_a_reason_with_markup_stays_text(database, tmp_path):
    reason = "<img src=x onerror=alert(1)>\n[click](javascript:alert(1)) **bold**"
    write_results(tmp_path / "results", methods=("full", "mofo"), failed={"mofo": reason})
    track(results_root=tmp_path / "results", cells=[CELL("full"), CELL("mofo")], study="default", database=database)
    for kind, key in (("cell", CELL("mofo")), ("method", CELL("mofo").rsplit("/", 1)[0])):
        note = runs_of(database, kind=kind)[key].data.tags["mlflow.note.content"]
        # four spaces and an empty line before them make a block of code in Markdown
        assert "\n\n" + "\n".join(f"    {line}" for line in reason.splitlines()) in note
        assert note.count("onerror") == 1


def test_a_method_is_a_run_with_the_comparison_above_its_seeds(database, tmp_path):
    from analysis.load import load_cells
    from analysis.statistics.comparison import comparison

    root = tmp_path / "seeds"
    cells = write_results(root, methods=("full", "ewc"), seeds=(0, 1, 2))
    made = track(results_root=root, cells=cells, study="default", database=database)
    above, children = runs_of(database, kind="method"), runs_of(database)
    assert set(above) == {"smollm2-135m/science/full", "smollm2-135m/science/ewc"} and set(children) == set(
        made
    ) == set(cells)
    for cell, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == above[cell.rsplit("/", 1)[0]].info.run_id
    row, run = comparison(load_cells(root, cells)).set_index("method").loc["ewc"], above["smollm2-135m/science/ewc"]
    own = [children[cell] for cell in cells if "/ewc/" in cell]
    assert len({child.data.metrics["forgetting"] for child in own}) > 1
    assert run.data.metrics["forgetting"] == pytest.approx(row["forgetting"], rel=1e-5)
    assert run.data.metrics["forgetting"] == pytest.approx(
        sum(child.data.metrics["forgetting"] for child in own) / 3, rel=1e-5
    )
    interval = f"{numbers.points(row['forgetting_low'])}, {numbers.points(row['forgetting_high'])}"
    assert run.data.tags["7 accuracy lost: points"] == f"{numbers.points(row['forgetting'])} [{interval}]"
    assert (
        run.info.end_time - run.info.start_time == own[0].info.end_time - own[0].info.start_time
    )  # as long as a seed took

    def last(found):
        history = client(database).get_metric_history(found.info.run_id, "loss")
        return [point.value for point in history if point.step == 60]

    assert last(run) == [pytest.approx(sum(last(child)[0] for child in own) / 3, rel=1e-5)]
    assert (
        run.data.params["seeds"] == "0, 1, 2"
        and run.data.params["ewc.strength"] == "10000.0"
        and "seed" not in run.data.params
    )
    assert "mean of 3 seeds" in run.data.tags["mlflow.note.content"] and run.data.tags["seeds"] == "3"
    base = runs_of(database, kind="base")["smollm2-135m/science"]
    assert (
        base.data.metrics["forgetting"] == base.data.metrics["domain_gain"] == 0
        and f"score there is {numbers.percent(row['domain_score'] - row['domain_gain'])} %"
        in base.data.tags["mlflow.note.content"]
    )


def test_a_seed_more_changes_the_run_above_and_no_other_child(database, tmp_path):
    root = tmp_path / "seeds"
    cells = write_results(root, methods=("full",), seeds=(0, 1))
    first = track(results_root=root, cells=cells[:1], study="default", database=database)
    alone = runs_of(database, kind="method")["smollm2-135m/science/full"]
    assert "of this run, not of this method" in alone.data.tags["mlflow.note.content"]
    second = track(results_root=root, cells=cells, study="default", database=database)
    above = runs_of(database, kind="method")["smollm2-135m/science/full"]
    assert (
        above.info.run_id != alone.info.run_id
        and above.data.tags["seeds"] == "2"
        and second[cells[0]] == first[cells[0]]
    )
    assert {run.data.tags["mlflow.parentRunId"] for run in runs_of(database).values()} == {above.info.run_id}


def test_a_cell_under_other_rules_is_shown_and_not_in_the_mean(database, tmp_path):
    root = tmp_path / "seeds"
    cells = write_results(root, methods=("full", "ewc"), seeds=(0, 1, 2))
    other = root / "runs" / "smollm2-135m/science/ewc/seed2" / "metrics.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"numerics": 2}))
    track(results_root=root, cells=cells, study="default", database=database)
    runs, above = runs_of(database), runs_of(database, kind="method")["smollm2-135m/science/ewc"]
    out, kept = runs[cells[5]], [runs[cell] for cell in cells[3:5]]
    assert out.info.status == above.info.status == "FINISHED" and "forgetting" in out.data.metrics
    assert "numerics" in out.data.tags["not_comparable"].lower() and out.data.tags["not_comparable"]
    assert (
        above.data.tags["not_comparable"] == cells[5]
        and "mean of 2 of 3 seeds" in above.data.tags["mlflow.note.content"]
    )
    for key in ("forgetting", "general_nll_lost"):
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
    train["steps"] = 9
    (folder / "train.json").write_text(json.dumps(train))
    lines = (folder / "curve.csv").read_text().splitlines()
    (folder / "curve.csv").write_text("\n".join(lines[:11]) + "\n")
    second = track(results_root=results, cells=cells, study="default", database=database)
    assert second[CELL("full")] == first[CELL("full")] and second[CELL("ewc")] != first[CELL("ewc")]
    assert len(client(database).search_runs([client(database).get_experiment_by_name("default").experiment_id])) == 5
    run = runs_of(database)[CELL("ewc")]
    assert run.data.params["ewc.strength"] == "10.0" and "ewc.samples" not in run.data.params
    assert len(client(database).get_metric_history(run.info.run_id, "loss")) == 9


def test_a_failed_cell_shows_failed_with_its_reason_and_recovers(database, tmp_path):
    root = tmp_path / "results"
    write_results(root, methods=("full", "mofo"), failed={"mofo": "loss is NaN at step 12: lower the learning rate"})
    cells = [CELL("full"), CELL("mofo")]
    first = track(results_root=root, cells=cells, study="default", database=database)
    run = runs_of(database)[CELL("mofo")]
    assert run.info.status == "FAILED" and "loss is NaN at step 12" in run.data.tags["failure.reason"]
    assert "loss is NaN at step 12" in run.data.tags["mlflow.note.content"] and run.data.metrics == {}
    above = runs_of(database, kind="method")["smollm2-135m/science/mofo"]
    assert above.info.status == "FAILED" and "loss is NaN at step 12" in above.data.tags["mlflow.note.content"]
    assert [f.path for f in client(database).list_artifacts(run.info.run_id)] == ["seed0.json"]
    shutil.rmtree(root)
    write_results(root, methods=("full", "mofo"))
    second = track(results_root=root, cells=cells, study="default", database=database)
    assert second[CELL("full")] == first[CELL("full")]
    run = runs_of(database)[CELL("mofo")]
    assert run.info.status == "FINISHED" and "failure.reason" not in run.data.tags and "forgetting" in run.data.metrics
    assert "seed0.json" not in {f.path for f in client(database).list_artifacts(run.info.run_id)}
    above = runs_of(database, kind="method")["smollm2-135m/science/mofo"]
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
    assert set(runs_of(database)) == {CELL("full")} and set(runs_of(database, kind="method")) == {
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
    assert names == {"base", "full", "full seed0", "of the user"}
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
        if run.data.tags.get("holdfast.key", "").endswith("/full")
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
    write_results(Paths(study="", root=root).results, model="smollm2-135m-settled", domain="math")
    write_results(Paths(study="demo", root=root).results)
    shutil.copy(migrated, root / "mlflow.db")
    shutil.copytree(root / "experiments/studies/demo", root / "experiments/studies/unrun")
    command.main(config.load(root=root))
    output = capsys.readouterr().out
    assert (
        "cells of study default" in output
        and "cells of study demo" in output
        and "unrun" not in output
        and output.count("http://holdfast.localhost:5000/#/experiments/") == 1
    )
    command.main(config.load("demo", root=root))
    output = capsys.readouterr().out
    assert "default" not in output and "http" not in output  # no cell of its grid is there
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


def test_tracking_opens_no_connection_and_writes_no_token(database, results, monkeypatch):
    def refuse(self, address, *rest):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    track(results_root=results, cells=[CELL("full")], study="default", database=database)
    written = [file.read_bytes() for file in database.parent.rglob("*") if file.is_file()]
    assert len(written) > 5 and not any(b"hf_a_secret" in content for content in written)
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true" and is_telemetry_disabled()
