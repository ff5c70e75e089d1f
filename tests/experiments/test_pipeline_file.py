"""dvc.yaml: the command that completes it, the studies it is written for, and what is cached."""

import pytest
from ruamel.yaml import YAML

from analysis.load import record
from experiments.stages import resolve
from experiments.study import cells, config, pipeline
from experiments.study.lock import Lock
from experiments.study.paths import HERE
from methods.errors import UserError

STUDIES = ["", *sorted(p.parent.name for p in (HERE / "experiments" / "studies").glob("*/params.yaml"))]


@pytest.mark.parametrize("name", STUDIES)
def test_dvc_yaml_is_what_the_command_writes(name):
    study = config.load(name)
    assert (study.paths.folder / "dvc.yaml").read_text() == pipeline.rendered(study), (
        f"run `python -m experiments pipeline --study '{name}'`"
    )


@pytest.mark.parametrize("name", STUDIES)
def test_compare_lists_exactly_its_own_cells(name):
    study = config.load(name)
    deps = YAML(typ="safe").load(study.paths.folder / "dvc.yaml")["stages"]["compare"]["deps"]
    listed = {d for d in deps if d.endswith("metrics.json")}
    own = {study.paths.run(cell) / "metrics.json" for cell in cells.grid(study)}
    others = [s.paths.run(c) / "metrics.json" for s in config.also(study).values() for c in cells.grid(s)]
    assert listed == {p.relative_to(HERE).as_posix() for p in (*own, *(p for p in others if p.is_file()))}


def test_of_a_study_shown_beside_compare_lists_the_files_of_its_finished_cells(tmp_path):
    raw = YAML(typ="safe").load(HERE / "experiments/studies/demo/params.yaml")
    for name, also in (("track", ["screen"]), ("screen", [])):
        folder = tmp_path / "experiments" / "studies" / name
        folder.mkdir(parents=True)
        YAML().dump(raw | {"also": also}, folder / "params.yaml")
    track, screen = (config.load(name, root=tmp_path) for name in ("track", "screen"))
    first, second, *_ = cells.grid(screen)
    for cell, files in ((first, ("metrics.json", "items.csv.gz")), (second, ("items.csv.gz",))):
        screen.paths.run(cell).mkdir(parents=True)
        for file in files:
            (screen.paths.run(cell) / file).touch()
    listed = [path for path in pipeline.compare_inputs(track) if path.startswith("results/screen/")]
    assert listed == [f"results/screen/runs/{first.name}/{file}" for file in ("metrics.json", "items.csv.gz")]
    for name, message in (("track", "names the study track itself"), ("scren", "unknown study 'scren'.*'screen'")):
        YAML().dump(raw | {"also": [name]}, track.paths.params)
        with pytest.raises(UserError, match=message):
            config.also(config.load("track", root=tmp_path))


def test_a_study_keeps_to_its_own_folders():
    stages = YAML(typ="safe").load(HERE / "experiments" / "studies" / "demo" / "dvc.yaml")["stages"]
    for name, stage in stages.items():
        assert stage["wdir"] == "../../.."
        assert stage["cmd"].endswith("--study demo"), name
        outs = [
            next(iter(o)) if isinstance(o, dict) else o for o in [*stage.get("outs", []), *stage.get("metrics", [])]
        ]
        assert all(o.startswith(("results/demo", "work/demo")) for o in outs), name


def test_the_committed_default_study_is_of_the_code_in_git():
    """Each cell's recorded settings are those of params.yaml, and what tuning chose stands there."""
    study = config.load()
    lock = Lock(study)
    for cell in cells.grid(study):
        metrics = record(study.paths.run(cell))
        assert metrics["settings"] == study.settings(model=cell.model, domain=cell.domain, method=cell.method).numeric()
        assert lock.recorded(f"train@{cell.stage}"), (
            f"{cell.name}: dvc.lock is of other settings or sources: run `dvc repro`"
        )


def test_a_study_without_a_pipeline_file_is_told_how_to_make_it(tmp_path):
    folder = tmp_path / "experiments" / "studies" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text((HERE / "dvc.yaml").read_text())
    (folder / "params.yaml").write_text((HERE / "experiments/studies/demo/params.yaml").read_text())
    study = config.load("mine", root=tmp_path)
    assert "run `python -m experiments pipeline --study mine` and `dvc repro" in resolve.pipeline_behind(study)
    pipeline.main(study)
    assert resolve.pipeline_behind(study) == ""
