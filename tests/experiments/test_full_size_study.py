"""The study of full-size shapes on narrow models, from its params.yaml to the report and the export."""

import shutil

import pytest
from ruamel.yaml import YAML

from experiments.commands import export, plan
from experiments.stages import collect, compare, data, drift, evaluate, model, prepare, resolve, train
from experiments.study import cells, config
from experiments.study.paths import HERE
from methods.tools.files import read_json

STUDY = "full-size"


@pytest.mark.thorough
def test_every_stage_of_the_study(tmp_path, capsys):
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(HERE / file, tmp_path)
    for folder in ("experiments/studies/demo/rows", f"experiments/studies/{STUDY}"):
        shutil.copytree(HERE / folder, tmp_path / folder)
    file, yaml = tmp_path / "experiments" / "studies" / STUDY / "params.yaml", YAML()
    raw = yaml.load(file)
    raw["models"]["gptj"]["config"] = {}
    raw["models"]["llama"]["config"] = {"tie_word_embeddings": False}
    yaml.dump(raw, file)
    study = config.load(STUDY, root=tmp_path)
    resolve.main(study)
    data.main(study)
    for name in study.grid.models:
        model.main(study, model=name)
        evaluate.base(study, model=name)
    for cell in cells.grid(study):
        prepare.main(study, model=cell.model, method=cell.method, seed=cell.seed, cell=cell)
        train.main(study, cell)
        evaluate.main(study, cell)
        drift.main(study, cell)
        collect.main(study, cell)
        export.main(study, cell)
        found = read_json(study.paths.run(cell) / "train.json")
        assert found["steps"] == 2 and found["tokens_trained"] == pytest.approx(2250, abs=30), cell.name
        assert read_json(study.paths.weights(cell) / "weights.json")["kind"] == "adapter"
        assert f"{cell.name}: its " in capsys.readouterr().out
    compare.main(study)
    assert not list((study.paths.results / "failures").rglob("*.json"))
    assert plan.make(study)["disk"]["needed"]["models"] == 0
