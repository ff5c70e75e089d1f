"""What the report says of a settled base, of one that is not, and of losses against the unsettled one."""

import json

import pytest

from analysis import numbers
from analysis.chosen import chosen
from analysis.load import load_cells
from analysis.sections import start
from analysis.sections.columns import others
from analysis.statistics.comparison import comparison
from tests.analysis.fixtures import write_json, write_results

MODEL, DOMAIN = "smollm2-135m", "science"


@pytest.fixture
def begun(tmp_path):
    cells = write_results(tmp_path, methods=("full", "lora"))

    def load(**content):
        write_json(tmp_path / f"base/{MODEL}/start.json", {"unsettled": None, "improvable": None} | content)
        return load_cells(tmp_path, cells)

    return tmp_path, load


@pytest.mark.parametrize(("low", "settled"), [(0.02, False), (-0.01, True)])
def test_a_base_that_training_on_general_text_improves_is_warned_of(begun, low, settled):
    loaded = begun[1](improvable={"steps": 40, "improvement": 0.05, "low": low, "high": 0.08})
    (line,) = start.sentences(loaded, MODEL)
    assert line.startswith("Warning") is not settled and start.is_settled(loaded, MODEL) is settled


def test_losses_against_the_unsettled_base_are_those_of_settling_and_of_the_method(begun):
    root, load = begun
    after = json.loads((root / f"base/{MODEL}/scores.json").read_text())
    n = after["tasks"][DOMAIN]["n"]
    after["tasks"][DOMAIN] |= {"gold_nll": 2.0, "tokens": 4 * n}
    write_json(root / f"base/{MODEL}/scores.json", after)
    before = json.loads(json.dumps(after))
    before["general"]["nats_per_token"] += 0.25  # settling made general text more likely
    before["tasks"][DOMAIN]["gold_nll"] -= 0.5  # and the right answers of the domain less likely
    loaded = load(unsettled={"model": "raw", "scores": before})
    table = start.with_unsettled(loaded, comparison(loaded))
    rows = table.set_index("method")
    assert all(column.startswith(start.UNSETTLED) for column in set(table) - set(comparison(loaded)))
    for method in ("full", "lora"):
        lost = rows.at[method, "general_nll_lost"] - 0.25
        assert rows.at[method, "unsettled_general_nll_lost"] == pytest.approx(lost)
        gained = rows.at[method, "domain_nll_gained"] - 0.5 / 4  # an item has four tokens
        assert rows.at[method, "unsettled_domain_nll_gained"] == pytest.approx(gained)
    (line,) = start.beside(loaded, table, MODEL)
    assert "Against raw" in line and numbers.nats(rows.at["full", "unsettled_general_nll_lost"]) in line
    of = [rows.at["full", key] for key in ("unsettled_domain_nll_gained", "domain_nll_gained")]
    assert "It gains {} of {} on science: the rest makes up".format(*map(numbers.nats, of)) in line
    heads = [column.head.partition(" against")[0] for column in others(table) if "unsettled base" in column.head]
    assert heads == ["gain", "text lost"]


def test_without_a_settled_base_the_table_is_as_it_was(begun):
    loaded = begun[1]()
    table = comparison(loaded)
    assert start.with_unsettled(loaded, table) is table and start.beside(loaded, table, MODEL) == []


@pytest.mark.parametrize("settled", [True, False])
def test_a_settled_base_shows_its_last_test_or_that_at_the_rate_of_plain_fine_tuning(begun, settled):
    loaded = begun[1]()
    gates = [
        {"steps": 50, "learning_rate": 0.1, "improvement": 0.5, "low": 0.4, "high": 0.6, "nats": 3.5},  # before the end
        {"steps": 100, "learning_rate": 0.2, "improvement": 0.012, "low": -0.002, "high": 0.025, "nats": 3.0},
        {"steps": 100, "learning_rate": 0.3, "improvement": -0.024, "low": -0.044, "high": -0.004, "nats": 3.0},
    ]
    gates = [gate | {"of": 40, "holds": settled} for gate in gates]
    block = {"from": "raw", "gate": {"steps": 40, "learning_rate": 0.3}}
    loaded.base[MODEL]["settle"] = {"gates": gates, "block": block, "steps": 100, "nats": 3.3, "settled": settled}
    (line,) = start.sentences(loaded, MODEL)
    assert "from 3.300 to 3.000" in line and "rate of 0.3 change that by +0.024 [+0.004, +0.044]" in line
    assert "changed it by −0.012 [−0.025, +0.002] at 0.2." in line and "0.1" not in line
    assert ("not settled" in line) is not settled and start.is_settled(loaded, MODEL) is settled
    loaded.cells["learning_rate"] = 0.2
    (line,) = start.sentences(loaded, MODEL)
    assert "rate of 0.2 change that by −0.012 [−0.025, +0.002]" in line and "by +0.024 [+0.004, +0.044] at 0.3" in line
    assert settled or "because they may still lower it" in line  # the interval has 0
    gates[1]["low"] = 0.001
    assert settled or "because they still lower it" in start.sentences(loaded, MODEL)[0]


def test_the_test_shown_is_at_the_rate_that_was_chosen_for_plain_fine_tuning(tmp_path):
    """A second setting of it, at a rate at which the base counts as settled, changes nothing."""
    cells = write_results(tmp_path, methods=("full", "full-s1"))
    loaded = load_cells(tmp_path, cells)
    gates = [
        {"steps": 100, "learning_rate": rate, "improvement": 0.01, "low": 0.0, "high": 0.02, "nats": 3.0, "of": 40}
        | {"holds": rate == 0.4}
        for rate in (0.1, 0.4)
    ]
    block = {"from": "raw", "gate": {"steps": 40, "learning_rate": 0.4}}
    loaded.base[MODEL]["settle"] = {"gates": gates, "block": block, "steps": 100, "nats": 3.3, "settled": True}
    best = chosen(loaded, "full", model=MODEL, domain=DOMAIN)
    loaded.cells["learning_rate"] = [0.1 if best == method else 0.4 for method in loaded.cells["method"]]
    assert start.is_settled(loaded, MODEL) is False and "rate of 0.1" in start.sentences(loaded, MODEL)[0]
