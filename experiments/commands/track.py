"""MLflow as a mirror of results/: one run per method and, nested below it, one run per cell.

    python -m experiments track ; mlflow ui

The files in results/ are the truth, and the mirror can be rebuilt from them at any time. Nothing here runs during
training. Only MLflow's public client is used: a run whose content changed is deleted and written again.
"""

import logging
import os
from pathlib import Path

from experiments.commands.tracked_runs import EXPERIMENT, Run, key_of, runs_of
from experiments.study import config
from experiments.study.cells import grid
from methods.errors import UserError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads both when it is imported
os.environ.setdefault("DO_NOT_TRACK", "true")

PARENT, DIGEST = "mlflow.parentRunId", "holdfast.digest"
METRICS, PARAMETERS = 1000, 100  # a batch, as MLflow limits it
ABOUT = (
    "Study **{study}** of Holdfast. A run is the bare base or one (model, domain, method), the mean over the seeds "
    "below it. Choose domain_gain, general_nll_lost, forgetting and seconds_train as columns, or draw a chart of "
    "general_nll_lost against domain_gain. Rebuilt from results/ by `python -m experiments track`."
)


def main(study) -> None:
    """Write a study into mlflow.db at the project's root; the default study also every other one that has results."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    root, studies = study.paths.root, [study]
    if not study.name:
        names = sorted(file.parent.name for file in (root / "experiments/studies").glob("*/params.yaml"))
        studies += [config.load(name, root=root) for name in names if (root / "results" / name / "runs").is_dir()]
    store = root / "mlflow.db"
    for study in studies:
        name = study.name or "default"
        try:
            cells = track(results_root=study.paths.results, cells=grid(study), study=name, database=store)
            number = _client(store).get_experiment_by_name(name).experiment_id
        except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:
            raise UserError(
                f"{store} cannot be written ({str(error).strip().splitlines()[0]}): end other programs that use it; if "
                "that does not help, delete it and run `python -m experiments track`, which writes it from results/"
            ) from error
        print(f"mlflow.db: {len(cells)} cells of study {name}; run `make ui` (or `mlflow ui`), then open")
        print(f"  http://127.0.0.1:5000/#/experiments/{number}/runs")


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
    before = [run for run in client.search_runs([experiment], max_results=50_000) if key_of(run.data.tags)]
    ids, made_by = {}, {}
    for run in runs_of(Path(results_root), cells, work="work" if study == "default" else f"work/{study}"):
        same = [old for old in before if (key_of(old.data.tags), old.data.tags.get(DIGEST)) == (run.key, run.digest)]
        ids[run.key] = same[0].info.run_id if same else _write(client, experiment, run)
        made_by[run.key] = run.tags.get(EXPERIMENT)
        if run.parent and not (same and same[0].data.tags.get(PARENT) == ids[run.parent]):
            client.set_tag(ids[run.key], PARENT, ids[run.parent])
    for old in before:
        replaced = old.data.tags.get(EXPERIMENT) == made_by.get(key_of(old.data.tags))
        if replaced and old.info.run_id not in ids.values():
            client.delete_run(old.info.run_id)
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
    number = known.experiment_id if known else client.create_experiment(study, artifact_location=folder.as_uri())
    client.set_experiment_tag(number, "mlflow.note.content", ABOUT.format(study=study))
    return number


def _write(client, experiment: str, run: Run) -> str:
    from mlflow.entities import Metric, Param

    run_id = client.create_run(experiment, start_time=run.start, run_name=run.title, tags=run.tags).info.run_id
    parameters = [Param(key, value) for key, value in run.parameters.items()]
    metrics = [Metric(*point) for point in run.metrics]
    for at in range(0, len(parameters), PARAMETERS):
        client.log_batch(run_id, params=parameters[at : at + PARAMETERS])
    for at in range(0, len(metrics), METRICS):
        client.log_batch(run_id, metrics=metrics[at : at + METRICS])
    for file, folder in run.files:
        client.log_artifact(run_id, str(file), folder or None)
    client.set_terminated(run_id, run.status, run.end)
    client.set_tag(run_id, DIGEST, run.digest)  # last, so that a run cut off half-way is written again
    return run_id
