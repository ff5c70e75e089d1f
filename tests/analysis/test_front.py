"""Settings in the plane of gain and loss, and their front."""

from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pytest

import analysis
from analysis.families import family
from analysis.load import load_cells
from analysis.measures import GENERAL
from analysis.sections.front import section
from analysis.statistics.comparison import comparison
from analysis.statistics.front import front, nondominated
from analysis.statistics.nats import DOMAIN
from analysis.statistics.resample import resampled
from tests.analysis.fixtures import write_results

WHERE = {"model": "smollm2-135m", "domain": "science"}
SWEPT = ("full", "lora", "ewc", "ewc-s1", "ewc-s2")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    return load_cells(root, write_results(root, methods=SWEPT, seeds=(0, 1, 2)))


def page(name, **values):
    folder = Path(analysis.__file__).parent
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(folder)
    )
    return environment.get_template(f"sections/{name}.html.j2").render(**values)


def test_fronts_of_many_draws_are_those_of_each():
    rng = np.random.default_rng(1)
    gain, lost = rng.integers(-2, 6, (50, 6)) / 4, rng.integers(-2, 6, (50, 6)) / 4  # coarse, so that ties occur
    for g, f, kept in zip(gain, lost, nondominated(gain, lost)):
        all_points = [*zip(g, f), (0.0, 0.0)]

        def beats(a, b):
            return a[0] >= b[0] and a[1] <= b[1] and a != b

        expected = [not any(beats(other, point) for other in all_points) for point in all_points[:-1]]
        assert kept.tolist() == expected


def test_the_bare_base_beats_what_learns_nothing_and_forgets():
    assert nondominated(np.array([-0.01, 0.1]), np.array([0.02, 0.05])).tolist() == [False, True]


def test_families_by_name():
    names = {
        "ewc": "ewc",
        "ewc-s1": "ewc",
        "ewc-s12": "ewc",
        "ewc-lora": "ewc-lora",
        "mofo-sparse": "mofo-sparse",
        "s-s1": "s",
    }
    assert {name: family(name) for name in names} == names


def test_the_front_is_of_the_comparisons_own_numbers(swept):
    data, table = front(resampled(swept, **WHERE)).set_index("method"), comparison(swept).set_index("method")
    assert list(data.index) == list(SWEPT)
    for name, key in (("gain", DOMAIN), ("lost", GENERAL.key)):
        assert list(data[name]) == pytest.approx([table.at[method, key] for method in SWEPT])
    assert list(data["front"]) == list(nondominated(data["gain"], data["lost"]))
    assert data["share"].between(0, 1).all() and data.loc[data["front"], "share"].min() > 0


def test_the_sentences_name_the_front_and_how_settings_were_chosen(swept):
    strength = {"ewc": 2.0, "ewc-s1": 1.0, "ewc-s2": 4.0}
    swept = replace(swept, cells=swept.cells.copy())
    for cell, method in swept.cells["method"].items():
        swept.cells.at[cell, "parts"] = {"ewc": {"strength": strength.get(method, 0.0)}}
        swept.cells.at[cell, "settings"] = {"learning_rate": 1e-3}
    said, rule, tied, end = section(swept, **WHERE)
    assert "science has chosen the setting with the least nats" in rule and tied.startswith("Equal to the chosen one")
    assert "was chosen at the end of its range, which should be widened" in end and end.startswith("ewc-s")
    data = front(resampled(swept, **WHERE))
    assert all(f"{name} (" in said for name in data[data["front"]]["method"]) and "of the redraws" in said


def test_one_method_alone_has_no_front(tmp_path):
    loaded = load_cells(tmp_path, write_results(tmp_path, methods=("full",)))
    assert section(loaded, **WHERE) == []
