"""MLflow as a mirror of results/: one run per method and, nested below it, one run per cell.

    python -m experiments track        # and with MLflow's server behind it: python -m experiments ui

The files in results/ are the truth, and the mirror can be rebuilt from them at any time. Nothing here runs during
training. Only MLflow's public client is used: a run whose content changed is deleted and written again.
"""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.commands import tracked_page
from experiments.commands.tracked_runs import EXPERIMENT, KEY, Run, runs_of
from experiments.study import config
from experiments.study.cells import grid
from methods.errors import UserError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads both when it is imported
os.environ.setdefault("DO_NOT_TRACK", "true")

PARENT, DIGEST = "mlflow.parentRunId", "holdfast.digest"
METRICS, PARAMETERS = 1000, 100  # a batch, as MLflow limits it


def main(study) -> None:
    """Write a study into mlflow.db at the project's root; the default study also every other one that has results."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    root, studies = study.paths.root, [study]
    if not study.name:
        names = sorted(file.parent.name for file in (root / "experiments/studies").glob("*/params.yaml"))
        studies += [config.load(name, root=root) for name in names if (root / "results" / name / "runs").is_dir()]
    store, written = root / "mlflow.db", {}
    for study in studies:
        name = study.name or "default"
        try:
            cells = track(results_root=study.paths.results, cells=grid(study), study=name, database=store)
        except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:
            raise UserError(
                f"{store} cannot be written ({str(error).strip().splitlines()[0]}): end other programs that use it; if "
                "that does not help, delete it and run `python -m experiments track`, which writes it from results/"
            ) from error
        written[name] = len(cells)
    print(f"mlflow.db: {', '.join(f'{count} cells of study {name}' for name, count in written.items())}")
    if first := next((name for name, count in written.items() if count), None):
        number = _client(store).get_experiment_by_name(first).experiment_id
        print(f"`python -m experiments ui` serves it at\n  {tracked_page.first_link(number)}")


def track(*, results_root: Path | str, cells, study: str, database: Path | str) -> dict[str, str]:
    """Mirror the results of `cells` into experiment `study` of the sqlite file `database`; return run ids by cell.

    Artefacts lie in `mlartifacts` beside the database. A run whose content is unchanged is left as it is, a changed one
    is replaced, and one without results is deleted. What another `dvc exp run` wrote (tag DVC_EXP_NAME) stays, and so
    does every run that is not of this mirror.
    """
    database = Path(database).resolve()
    database.parent.mkdir(parents=True, exist_ok=True)
    client = _client(database)
    experiment = _experiment(client, study, folder=database.parent / "mlartifacts" / study)
    before = [run for run in client.search_runs([experiment], max_results=50_000) if KEY in run.data.tags]
    known = {(run.data.tags[KEY], run.data.tags.get(DIGEST)): run for run in before}
    ids, made_by, runs = {}, {}, []
    for run in runs_of(Path(results_root), cells, work="work" if study == "default" else f"work/{study}"):
        same = known.get((run.key, run.digest))
        ids[run.key] = same.info.run_id if same else _write(client, experiment, run)
        made_by[run.key] = run.tags.get(EXPERIMENT)
        if run.parent and not (same and same.data.tags.get(PARENT) == ids[run.parent]):
            client.set_tag(ids[run.key], PARENT, ids[run.parent])
        runs.append(run)
    for old in before:
        replaced = old.data.tags.get(EXPERIMENT) == made_by.get(old.data.tags[KEY])
        if replaced and old.info.run_id not in ids.values():
            client.delete_run(old.info.run_id)
    for key, value in tracked_page.tags(runs, ids=ids, experiment=experiment, study=study).items():
        client.set_experiment_tag(experiment, key, value)
    return {key: run_id for key, run_id in ids.items() if key.count("/") == 3}


def _client(database: Path):
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}")


def _experiment(client, study: str, *, folder: Path) -> str:
    """The id of the study's experiment, made or restored; its artefacts lie in `folder`.

    MLflow fixes an experiment's folder when it is made, and the name of a deleted experiment stays taken. So after the
    project was moved, the old experiment is renamed and deleted, and a new one is made.
    """
    known = client.get_experiment_by_name(study)
    if known and known.lifecycle_stage == "deleted":
        client.restore_experiment(known.experiment_id)
    if known and known.artifact_location != folder.as_uri():
        client.rename_experiment(known.experiment_id, f"{study}, moved from {known.artifact_location}")
        client.delete_experiment(known.experiment_id)
        known = None
    return known.experiment_id if known else client.create_experiment(study, artifact_location=folder.as_uri())


def _write(client, experiment: str, run: Run) -> str:
    from mlflow.entities import Metric, Param

    run_id = client.create_run(experiment, start_time=run.start, run_name=run.title, tags=run.tags).info.run_id
    for file, folder in run.files:
        client.log_artifact(run_id, str(file), folder or None)
    if run.image:
        _log_image(client, run_id, run.image)
    parameters = [Param(key, value) for key, value in run.parameters.items()]
    metrics = [Metric(*point) for point in run.metrics]
    for at in range(0, len(parameters), PARAMETERS):
        client.log_batch(run_id, params=parameters[at : at + PARAMETERS])
    for at in range(0, len(metrics), METRICS):
        client.log_batch(run_id, metrics=metrics[at : at + METRICS])
    client.set_terminated(run_id, run.status, run.end)
    client.set_tag(run_id, DIGEST, run.digest)  # last, so that a run cut off half-way is written again
    return run_id


def _log_image(client, run_id: str, file: Path) -> None:
    """Log a figure among the charts.

    MLflow shows a copy of 256 pixels there, whose labels nobody can read: the whole figure takes its place.
    """
    from PIL import Image

    with Image.open(file) as image, TemporaryDirectory() as folder:
        client.log_image(run_id, image, key=tracked_page.IMAGE, step=0)
        for small in client.list_artifacts(run_id, "images"):
            if small.path.endswith("compressed.webp"):
                image.save(whole := Path(folder) / Path(small.path).name, lossless=True)
                client.log_artifact(run_id, str(whole), "images")
