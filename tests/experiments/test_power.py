"""power: the seeds and items it takes to tell a difference, from a study's own spread or from the usual one."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.load import load_cells
from analysis.statistics.contrasts import Measured
from analysis.statistics.power import USUAL, _components, needed, spreads
from experiments.commands import power
from experiments.study import cells, config
from methods.errors import UserError
from tests.analysis.fixtures import write_results


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Three methods of three seeds; `cells.grid` is the study's own list of cells."""
    made = SimpleNamespace(
        grid=SimpleNamespace(methods=["full", "full-s1", "lora", "ewc"]),
        paths=SimpleNamespace(results=tmp_path),
        names=[],
    )
    monkeypatch.setattr(cells, "grid", lambda study: [SimpleNamespace(name=name) for name in study.names])
    return made


def test_before_a_study_ran_the_usual_spread_is_stated(study, capsys):
    power.main(study, difference=0.03)
    said = capsys.readouterr().out
    assert "0.0012 between seeds and 0.018 between items" in said and "128" in said
    assert "(from the study `track`" in said
    assert "first of 2 tests" in said and "* tells a difference of 0.03 nats per token; the fewest seeds" in said
    power.main(study, difference=0.0001, seeds="3,5")
    assert "Nothing in this table tells" in capsys.readouterr().out


def test_a_study_states_its_own(study, capsys):
    study.names = write_results(study.paths.results, methods=("full", "lora", "ewc"), seeds=(0, 1, 2))
    power.main(study, difference=0.01, measure="forgetting", items="100,1000", tests=7)
    said = capsys.readouterr().out
    own = spreads(load_cells(study.paths.results, study.names), "forgetting")["smollm2-135m", "science"]
    assert "smollm2-135m/science, forgetting, in points" in said and "the median of 3 pairs" in said
    assert f"{100 * own.item:.2g} between items" in said and "first of 7 tests" in said and own.items == 600


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"difference": 0.0}, "above 0"),
        ({"difference": float("nan")}, "above 0"),
        ({"difference": 1.0, "measure": "general"}, "did you mean 'general_kl'"),
        ({"difference": 1.0, "measure": "gold_nll_lost"}, "run the study"),
        ({"difference": 1.0, "seeds": "1,3"}, "from 2"),
        ({"difference": 1.0, "items": "many"}, "whole numbers"),
        ({"difference": 1.0, "tests": -1}, "from 1"),
        ({"difference": 1.0, "tests": 10**400}, "from 1 to 1,000,000,000"),
        ({"difference": 1.0, "seeds": f"2,{10**400}"}, "from 2 to 1,000,000,000"),
    ],
)
def test_what_cannot_be_meant_is_refused(study, wrong, said):
    with pytest.raises(UserError, match=said):
        power.main(study, **wrong)


def test_more_seeds_and_items_tell_less():
    table = needed(USUAL["general_nll_lost"], seeds=[3, 5, 10], items=[64, 128, 256], tests=8).to_numpy()
    assert (np.diff(table, axis=0) < 0).all() and (np.diff(table[1:], axis=1) < 0).all()
    pooled = needed(replace(USUAL["general_nll_lost"], df=8.0), seeds=[3], items=[128], tests=8).to_numpy()
    assert pooled[0, 0] < table[0, 1]
    # with 16 seeds and 2,700 items, 1 point of accuracy is told 80 times in 100, without a correction
    assert needed(USUAL["forgetting"], seeds=[16], items=[2700], tests=1).iloc[0, 0] == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize("measure", USUAL)
def test_the_usual_spread_is_that_of_the_track(measure):
    study = config.load("track")
    found = spreads(load_cells(study.paths.results, cells.grid(study)), measure)
    (spread,) = found.values()
    usual = USUAL[measure]
    assert spread.pairs > 20
    assert [spread.seed, spread.item, spread.rest] == pytest.approx([usual.seed, usual.item, usual.rest], rel=0.1)


def test_the_spread_of_a_study_is_what_was_drawn():
    draw, found = np.random.default_rng(4), []
    measured = Measured(key="x", tasks=[np.zeros((1, 300))], means=np.zeros(1), rows={}, step=0.0)
    for _ in range(300):
        own = 0.05 * draw.standard_normal((5, 1)) + draw.standard_normal(300) + 0.7 * draw.standard_normal((5, 300))
        found.append(_components(measured, [own]))
    assert np.sqrt(np.mean(found, axis=0)) == pytest.approx([0.05, 1.0, 0.7], rel=0.1)
