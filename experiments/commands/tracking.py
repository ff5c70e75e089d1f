"""MLflow as a mirror of results/: a run a method and below it one a cell, found again by tag, filled anew when what they hold changed.

    python -m experiments track ; mlflow ui

The JSON and CSV files are the truth and this can be rebuilt from them at any time. Nothing here runs inside training.
"""

import filecmp
import hashlib
import json
import logging
import os
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from analysis.comparable import KIND, guarded
from analysis.load import load_cells
from analysis.sections.tables import BANNER, comparison
from experiments.commands import dashboard
from experiments.commands.mirror import EXPERIMENT, Run, run_of
from experiments.commands.mirror_groups import base_of, group_of, groups
from experiments.study import config
from experiments.study.cells import grid
from methods.errors import UserError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by mlflow when it is first used
os.environ.setdefault("DO_NOT_TRACK", "true")

FILES = ("metrics.json", "train.json", "curve.csv", "scores.json", "evaluate.json")
KINDS = ("holdfast.cell", "holdfast.group", "holdfast.base")  # the tag that names a run says what it is of
PARENT = "mlflow.parentRunId"
DIGITS = 6  # of a fraction: the page prints all digits that there are, and results/ has the others
METRICS, PARAMETERS, CHARACTERS, TAG_CHARACTERS, DIGEST_CHARACTERS = 1000, 100, 6000, 5000, 36  # MLflow's own limits


def main(study) -> None:
    """`python -m experiments track`: into mlflow.db at the root; without a study's name the default one and every other that has results."""
    root = study.paths.root
    database = root / "mlflow.db"
    others = (
        []
        if study.name
        else [
            folder.parent.name
            for folder in sorted((root / "experiments/studies").glob("*/params.yaml"))
            if (root / "results" / folder.parent.name / "runs").is_dir()
        ]
    )
    for own in (study, *(config.load(name, root=root) for name in others)):
        name = own.name or "default"
        try:
            made = track(results_root=own.paths.results, cells=grid(own), study=name, database=database)
            links = [link(study=name, database=database, charts=charts) for charts in (False, True)]
        except _errors() as error:
            raise UserError(
                f"{database} cannot be written ({str(error).strip().splitlines()[0]}): let other programs that use it end; if that "
                "does not help, delete it and run `python -m experiments track`, which makes it again from results/"
            ) from error
        print(
            f"mlflow.db: {len(made)} cells of study {name}; `make ui` (or `mlflow ui`), then open\n  "
            + "\n  ".join(links)
        )


def link(*, study: str, database: Path | str, address: str = "http://127.0.0.1:5000", charts: bool = False) -> str:
    """Where `mlflow ui` shows the study's runs with scores and costs as columns, or its charts."""
    experiment = _client(Path(database).resolve()).get_experiment_by_name(study)
    return f"{address}/{dashboard.address(experiment.experiment_id, charts=charts)}"


def track(*, results_root: Path | str, cells, study: str, database: Path | str) -> dict[str, str]:
    """Fills the store `database` (sqlite; artefacts in `mlartifacts` beside it) from results/; returns run id by cell.

    Experiment `study`; a run for each of `cells` with a result or a recorded failure, below the run of its (model, domain,
    method) with the aggregate; one for the bare base of each (model, domain). A run whose files are gone is deleted. The
    same files give the same runs, parameters and metrics, in this store or in a fresh one.
    """
    from mlflow.entities import ViewType

    root, database = Path(results_root), Path(database).resolve()
    database.parent.mkdir(parents=True, exist_ok=True)
    client = _client(database)
    loaded, made = load_cells(root, cells), {}
    compared = guarded(loaded)
    about = {"pairs": compared.comparisons, "banner": BANNER if loaded.not_a_result else ""}
    experiment = _experiment(client, database, study, folder=database.parent / "mlartifacts" / study, about=about)
    before = client.search_runs([experiment], run_view_type=ViewType.ALL, max_results=50_000)
    store = _Store(client=client, database=database, experiment=experiment, runs=before)
    table, work = comparison(compared), "work" if study == "default" else f"work/{study}"
    aside = {row["cell"]: row["reason"] for row in compared.failures.to_dict("records") if row["kind"] == KIND}
    for model, domain in dict.fromkeys(tuple(cell.split("/")[:2]) for cell in loaded.planned):
        store.place(f"{model}/{domain}", base_of(compared, model, domain, table=table), files=[])
    for group, planned in groups(loaded).items():
        runs = {cell: run_of(loaded, cell, work=work, aside=aside.get(cell, "")) for cell in planned}
        aggregate = group_of(group, table=table, cells=planned, runs=[run for run in runs.values() if run])
        above = store.place(group, aggregate, files=_of_group(root, group))
        for cell, run in runs.items():
            identity = store.place(cell, run, files=_of_cell(root, cell), above=above)
            if identity:
                made[cell] = identity
    return made


@dataclass(frozen=True, kw_only=True)
class _Store:
    """The open store and what stood in the experiment before, deleted runs too."""

    client: object
    database: Path
    experiment: str
    runs: list

    def place(
        self, key: str, run: Run | None, *, files: list[tuple[Path, str]], above: str | None = None
    ) -> str | None:
        """Makes or resumes the run named `key` and answers with its id; None and the old ones deleted where there is none now."""
        own = [old for old in self.runs if key in (old.data.tags.get(kind) for kind in KINDS)]
        own.sort(key=_deleted)
        if run is None:
            for gone in own:
                if not _deleted(gone):
                    self.client.delete_run(gone.info.run_id)
            return None
        digest = hashlib.sha256(json.dumps(asdict(run), sort_keys=True, default=str).encode()).hexdigest()
        same = [old for old in own if old.data.tags.get("holdfast.digest") == digest]
        resumed = same or [old for old in own if old.data.tags.get(EXPERIMENT, "") == run.tags.get(EXPERIMENT, "")]
        if resumed and _deleted(resumed[0]):  # its files were gone for a while, as during a rerun
            self.client.restore_run(resumed[0].info.run_id)
        identity = (
            resumed[0].info.run_id
            if resumed
            else self.client.create_run(self.experiment, run_name=run.title).info.run_id
        )
        # an unchanged cell of a DVC experiment stays where it is, below a parent that still stands
        standing = resumed[0].data.tags.get(PARENT) if same else None
        if not same:
            _clear(self.database, identity)
            _fill(self.client, identity, run)
            _finish(self.database, identity, run)
        if above and standing not in {old.info.run_id for old in self.runs if not _deleted(old)}:
            self.client.set_tag(identity, PARENT, above)
        there = [(file, folder) for file, folder in files if file.exists()]
        _artefacts(self.client, identity, beside=self.database.parent, files=there, texts=run.texts)
        if not same:
            self.client.set_tag(identity, "holdfast.digest", digest)  # last: a run cut off half-way is filled again
        return identity


def _deleted(run) -> bool:
    return run.info.lifecycle_stage == "deleted"


def _errors() -> tuple[type[Exception], ...]:
    """What a store that is locked, damaged, of another MLflow or on a full disk raises."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError


def _client(database: Path):
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}")


def _experiment(client, database: Path, study: str, *, folder: Path, about: dict) -> str:
    """Its id; made or restored where it is not there, with the view and the text its page opens with.

    A store that was moved or copied with its project keeps its artefacts beside itself, not where it once was.
    """
    found = client.get_experiment_by_name(study)
    identity = found.experiment_id if found else client.create_experiment(study, artifact_location=folder.as_uri())
    if found and found.lifecycle_stage == "deleted":
        client.restore_experiment(identity)
    if found and found.artifact_location != folder.as_uri():
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute(
                "UPDATE runs SET artifact_uri = replace(artifact_uri, ?, ?) WHERE experiment_id = ?",
                (found.artifact_location, folder.as_uri(), identity),
            )
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (folder.as_uri(), identity)
            )
    for key, value in dashboard.tags(study=study, identity=identity, **about).items():
        client.set_experiment_tag(identity, key, value)
    return identity


def _clear(database: Path, run_id: str) -> None:
    """Empties a resumed run: MLflow refuses to change a parameter and would keep every old point of a curve."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for table in ("params", "metrics", "latest_metrics"):
            connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id,))
        connection.execute("DELETE FROM inputs WHERE destination_id = ?", (run_id,))
        connection.execute(
            "DELETE FROM tags WHERE run_uuid = ? AND key NOT IN ('mlflow.runName', 'mlflow.user')", (run_id,)
        )


def _fill(client, run_id: str, run: Run) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    parameters = [Param(key, value[:CHARACTERS]) for key, value in run.parameters.items()]
    shown = lambda value: value if value.is_integer() else float(f"{value:.{DIGITS}g}")
    metrics = [Metric(key, shown(value), when, step) for key, value, when, step in run.metrics]
    client.log_batch(run_id, tags=[RunTag(key, value[:TAG_CHARACTERS]) for key, value in run.tags.items()])
    for at in range(0, len(parameters), PARAMETERS):
        client.log_batch(run_id, params=parameters[at : at + PARAMETERS])
    for at in range(0, len(metrics), METRICS):
        client.log_batch(run_id, metrics=metrics[at : at + METRICS])
    inputs = []
    for name, digest, rows, role in run.datasets:
        source, profile = json.dumps({"sha256": digest}), json.dumps({"rows": rows}) if rows else None
        about = Dataset(
            name=name, digest=digest[:DIGEST_CHARACTERS], source_type="local", source=source, profile=profile
        )
        inputs.append(DatasetInput(about, [InputTag("mlflow.data.context", role)]))
    if inputs:
        client.log_inputs(run_id, inputs)


def _finish(database: Path, run_id: str, run: Run) -> None:
    """Status with the cell's own times: the client would write the time of this mirroring as the start."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "UPDATE runs SET status = ?, start_time = ?, end_time = ? WHERE run_uuid = ?",
            (run.status, run.start, run.end, run_id),
        )


def _of_cell(root: Path, cell: str) -> list[tuple[Path, str]]:
    """A cell's own files, with the folder each goes to."""
    return [(root / "runs" / cell / name, "") for name in FILES] + [(root / "failures" / f"{cell}.json", "failure")]


def _of_group(root: Path, group: str) -> list[tuple[Path, str]]:
    """The report and its comparison's figures."""
    model, domain, _ = group.split("/")
    # a figure's own name has no "-": of models `tiny` and `llama-tiny` each has its own
    figures = [
        file
        for file in sorted((root / "summary" / "figures").glob("*.png"))
        if file.stem.partition("-")[2] == f"{model}-{domain}"
    ]
    return [(root / "summary" / "report.html", ""), *((figure, "figures") for figure in figures)]


def _artefacts(client, run_id: str, *, beside: Path, files: list[tuple[Path, str]], texts: dict[str, str]) -> None:
    """`files` and `texts` and nothing else; only what differs is written, and nothing that is not `beside` the database is deleted."""
    home = Path(unquote(urlparse(client.get_run(run_id).info.artifact_uri).path))
    wanted = {home / folder / file.name for file, folder in files} | {home / name for name in texts}
    for old in home.rglob("*"):
        if old.is_file() and old not in wanted and home.is_relative_to(beside):
            old.unlink()
    for file, folder in files:
        copy = home / folder / file.name
        if not (copy.exists() and filecmp.cmp(file, copy, shallow=False)):
            client.log_artifact(run_id, str(file), folder or None)
    for name, text in texts.items():
        if not (home / name).exists() or (home / name).read_text() != text:
            client.log_text(run_id, text, name)
