"""Cells of another study beside a study's own."""

import json

import pytest

from analysis.also import beside
from analysis.load import load_cells
from analysis.roles import Roles
from methods.errors import UserError
from tests.analysis.fixtures import write_results


@pytest.fixture
def studies(tmp_path):
    own = write_results(tmp_path / "own", methods=("full", "lora"))
    other = write_results(tmp_path / "screen", methods=("full", "mofo", "ewc"), missing=("ewc",))
    return load_cells(tmp_path / "own", own), tmp_path / "screen", other


def test_finished_cells_of_another_study_stand_beside_and_apart(studies):
    loaded, root, other = studies
    shown = beside(loaded, {"screen": (root, other)})["screen"]
    assert list(shown.cells["method"]) == ["full", "mofo"] and list(loaded.cells["method"]) == ["full", "lora"]
    assert len(shown.base_items("smollm2-135m")) and set(shown.items["cell"]) == set(shown.cells.index)


def test_cells_of_another_domain_are_left_out(studies, tmp_path):
    loaded, _, _ = studies
    cells = write_results(tmp_path / "code", methods=("full",), domain="code")
    assert beside(loaded, {"code": (tmp_path / "code", cells)}) == {}


@pytest.mark.parametrize("what", ["base_sha256", "data_sha256", "scoring"])
def test_a_study_of_another_base_data_or_scoring_is_refused_by_name(studies, what):
    loaded, root, other = studies
    path = root / "runs" / other[1] / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics[what] = {"scoring": 99} if what == "scoring" else "0" * 64
    path.write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="also names the study screen, but its .* on smollm2-135m/science"):
        beside(loaded, {"screen": (root, other)})


def test_without_a_list_all_but_plain_controls_and_compositions_lead():
    methods = ["full", "lora-warm", "hierarchical", "mofo", "mofo-s2", "kl", "three"]
    roles = Roles(compositions=("three",), controls={"hierarchical": "lora-warm"})
    assert roles.leading(methods) == ["hierarchical", "mofo", "mofo-s2", "kl"] and roles.composed(methods) == ["three"]
    assert Roles(leaders=("mofo",)).leading(methods) == ["mofo", "mofo-s2"]
