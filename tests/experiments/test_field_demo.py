"""Every built-in part through the stages of the study field-demo, in one process."""

import shutil

import pytest

from analysis.load import record
from experiments.stages import collect, compare, data, drift, evaluate, model, prepare, resolve, train
from experiments.study import cells, config
from experiments.study.paths import HERE
from methods import registry

STUDY = "field-demo"


def test_it_has_a_method_for_each_part():
    study = config.load(STUDY)
    used = {part.key for name in study.grid.methods for part in study.methods[name].parts}
    assert set(registry.built_in()) - used <= {"given"}  # whose checkpoint a user brings


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study in a folder of its own, with model, data and base."""
    root = tmp_path_factory.mktemp("field-demo")
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(HERE / file, root)
    for folder in ("experiments/studies/demo/rows", f"experiments/studies/{STUDY}"):
        shutil.copytree(HERE / folder, root / folder)
    study = config.load(STUDY, root=root)
    resolve.main(study)
    model.main(study, model="llama-tiny")
    data.main(study)
    evaluate.base(study, model="llama-tiny")
    return study


@pytest.mark.thorough
def test_every_method_goes_from_its_block_to_the_report(study):
    for cell in cells.grid(study):
        prepare.main(study, model=cell.model, method=cell.method, seed=cell.seed, cell=cell)
        train.main(study, cell)
        evaluate.main(study, cell)
        collect.main(study, cell)
        drift.main(study, cell)
        metrics = record(study.paths.run(cell))
        assert metrics["domain_score"] is not None, cell.name
    compare.main(study)
    assert not list((study.paths.results / "failures").rglob("*.json"))
