"""MLflow as a mirror of results/: one run a cell, found again by its tag, filled anew whenever its files changed.

    python -m experiments track ; mlflow ui

The JSON and CSV files are the truth and this can be rebuilt from them at any time. Nothing here runs inside training.
"""

import base64
import filecmp
import hashlib
import json
import logging
import os
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlparse

from analysis.load import load_cells
from analysis.mirror import Run, run_of
from experiments.cells import grid

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by mlflow when it is first used
os.environ.setdefault("DO_NOT_TRACK", "true")

FILES = ("metrics.json", "train.json", "curve.csv", "scores.json", "evaluate.json")
VIEW, COLUMNS = "holdfast", ("domain_score", "domain_gain", "forgetting", "perplexity_ratio", "seconds_prepare", "seconds_train")
# the rest of a view as MLflow 3.17 starts one; it refuses a view that lacks a key
VIEW_STATE = {
    **dict.fromkeys(("columnOrder", "runsPinned", "runsHidden"), []), **dict.fromkeys(("columnWidths", "runsExpanded", "runsVisibilityMap", "groupsExpanded"), {}),
    **dict.fromkeys(("viewMaximized", "runListHidden", "isAccordionReordered"), False), **dict.fromkeys(("useGroupedValuesInCharts", "hideEmptyCharts", "autoRefreshEnabled"), True),
    "runsHiddenMode": "FIRST_10_RUNS", "groupBy": None,
}
METRICS, PARAMETERS, CHARACTERS, TAG_CHARACTERS, DIGEST_CHARACTERS = 1000, 100, 6000, 5000, 36  # MLflow's own limits


def main(study) -> None:
    """`python -m experiments track`: the study's grid into mlflow.db at the root, also from a temporary DVC copy."""
    root = Path(os.environ.get("DVC_ROOT", study.paths.root))
    made = track(results_root=study.paths.results, cells=grid(study), study=study.name or "default", database=root / "mlflow.db")
    print(f"mlflow.db: {len(made)} runs of study {study.name or 'default'}; `make ui` (or `mlflow ui`), then open\n  "
          f"{link(study=study.name or 'default', database=root / 'mlflow.db')}")


def link(*, study: str, database: Path | str, address: str = "http://127.0.0.1:5000") -> str:
    """Where `mlflow ui` shows the study's runs with scores and costs as columns."""
    experiment = _client(Path(database).resolve()).get_experiment_by_name(study)
    return f"{address}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def track(*, results_root: Path | str, cells, study: str, database: Path | str) -> dict[str, str]:
    """Fills the store `database` (sqlite; artefacts in `mlartifacts` beside it) from results/; returns run id by cell.

    Experiment `study`, one run for each of `cells` with a result or a recorded failure; the run of a cell whose files are
    gone is deleted. The same files give the same runs, parameters and metrics, in this store or in a fresh one.
    """
    root, database = Path(results_root), Path(database).resolve()
    database.parent.mkdir(parents=True, exist_ok=True)
    client = _client(database)
    experiment = _experiment(client, study, folder=database.parent / "mlartifacts" / study)
    runs = client.search_runs([experiment], max_results=50_000)
    loaded, exp_name, made = load_cells(root, cells), os.environ.get("DVC_EXP_NAME", ""), {}
    for cell in loaded.planned:
        own = [run for run in runs if run.data.tags.get("holdfast.cell") == cell]
        run = run_of(loaded, cell)
        if run is None:
            for gone in own:
                client.delete_run(gone.info.run_id)
            continue
        digest = _digest(root, cell)
        same = [old for old in own if old.data.tags.get("holdfast.digest") == digest]
        resumed = same or [old for old in own if old.data.tags.get("DVC_EXP_NAME", "") == exp_name]
        made[cell] = run_id = resumed[0].info.run_id if resumed else client.create_run(experiment, run_name=run.title).info.run_id
        if not same:
            _clear(database, run_id)
            _fill(client, run_id, run, exp_name=exp_name)
            _finish(database, run_id, run)
            client.set_tag(run_id, "holdfast.digest", digest)  # last: a run cut off half-way is filled again
        _artefacts(client, run_id, root=root, cell=cell)
    return made


def _client(database: Path):
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}")


def _experiment(client, study: str, *, folder: Path) -> str:
    """Its id; made or restored where it is not there, with a shared view whose columns are what a comparison needs."""
    found = client.get_experiment_by_name(study)
    identity = found.experiment_id if found else client.create_experiment(study, artifact_location=folder.as_uri(), tags={"mlflow.experimentKind": "custom_model_development"})
    if found and found.lifecycle_stage == "deleted":
        client.restore_experiment(identity)
    # as MLflow's own page writes a shared view: zlib, base64, this prefix
    view = json.dumps({**VIEW_STATE, "selectedColumns": [f"metrics.`{key}`" for key in COLUMNS]}).encode()
    client.set_experiment_tag(identity, f"mlflow.sharedViewState.{VIEW}", f"deflate;{base64.b64encode(zlib.compress(view)).decode()}")
    return identity


def _digest(root: Path, cell: str) -> str:
    """The sha256 of everything a run is filled from."""
    model, _, method, seed = cell.split("/")
    files = [root / "failures" / f"{cell}.json", *(root / "runs" / cell / name for name in (*FILES, "items.csv.gz")), root / "prepared" / model / method / seed / "prepare.json"]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() if file.exists() else b"-" for file in files)).hexdigest()


def _clear(database: Path, run_id: str) -> None:
    """Empties a resumed run: MLflow refuses to change a parameter and would keep every old point of a curve."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for table in ("params", "metrics", "latest_metrics"):
            connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id,))
        connection.execute("DELETE FROM inputs WHERE destination_id = ?", (run_id,))
        connection.execute("DELETE FROM tags WHERE run_uuid = ? AND key NOT IN ('mlflow.runName', 'mlflow.user')", (run_id,))


def _fill(client, run_id: str, run: Run, *, exp_name: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    tags = {**run.tags, **({"DVC_EXP_NAME": exp_name} if exp_name else {})}
    parameters = [Param(key, value[:CHARACTERS]) for key, value in run.parameters.items()]
    metrics = [Metric(*point) for point in run.metrics]
    client.log_batch(run_id, tags=[RunTag(key, value[:TAG_CHARACTERS]) for key, value in tags.items()])
    for at in range(0, len(parameters), PARAMETERS):
        client.log_batch(run_id, params=parameters[at : at + PARAMETERS])
    for at in range(0, len(metrics), METRICS):
        client.log_batch(run_id, metrics=metrics[at : at + METRICS])
    inputs = []
    for name, digest, rows, role in run.datasets:
        about = Dataset(name=name, digest=digest[:DIGEST_CHARACTERS], source_type="local", source=json.dumps({"sha256": digest}), profile=json.dumps({"rows": rows}) if rows else None)
        inputs.append(DatasetInput(about, [InputTag("mlflow.data.context", role)]))
    if inputs:
        client.log_inputs(run_id, inputs)
    if run.environment:
        client.log_text(run_id, json.dumps(run.environment, indent=2, sort_keys=True), "environment.json")


def _finish(database: Path, run_id: str, run: Run) -> None:
    """Status with the cell's own times: the client would write the time of this mirroring as the start."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE runs SET status = ?, start_time = ?, end_time = ? WHERE run_uuid = ?", (run.status, run.start, run.end, run_id))


def _artefacts(client, run_id: str, *, root: Path, cell: str) -> None:
    """The cell's own files, the summary's report and its comparison's figures; only what differs is copied."""
    model, domain, _, _ = cell.split("/")
    home = Path(unquote(urlparse(client.get_run(run_id).info.artifact_uri).path))
    wanted = [(root / "runs" / cell / name, "") for name in FILES] + [(root / "failures" / f"{cell}.json", "failure"), (root / "summary" / "report.html", "")]
    wanted += [(figure, "figures") for figure in sorted((root / "summary" / "figures").glob(f"*-{model}-{domain}.png"))]
    for file, folder in wanted:
        copy = home / folder / file.name
        if file.exists() and not (copy.exists() and filecmp.cmp(file, copy, shallow=False)):
            client.log_artifact(run_id, str(file), folder or None)
