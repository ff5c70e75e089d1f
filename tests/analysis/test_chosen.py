"""A setting is chosen on the domain's probe rows alone, by the trials' rule."""

import numpy as np
import pandas as pd
import pytest

from analysis.chosen import choices, chosen, end_of, least, reported
from analysis.load import Loaded
from experiments.commands import tune


def loaded(runs, *, domain="science", probed=True, **about):
    """Runs (method, seed) -> nats per token of the domain's probes at the end, with columns `about` of the cells."""
    cells, curves = [], []
    for number, ((method, seed), nats) in enumerate(runs.items()):
        cell = f"m/{domain}/{method}/seed{seed}"
        own = {"parts": {"ewc": {"strength": float(number)}}, "settings": {"learning_rate": 1e-3}}
        own |= {key: values[number] for key, values in about.items()}
        cells.append({"cell": cell, "model": "m", "domain": domain, "method": method, "seed": seed} | own)
        for step, value in ((0, 9.0), (4, 0.1), (5, np.nan), (9, nats if probed else np.nan)):
            curves.append({"cell": cell, "step": step, f"probe_{domain}_nll": value})
    none = pd.DataFrame()
    frame = pd.DataFrame(cells).set_index("cell", drop=False) if cells else none
    return Loaded(cells=frame, curves=pd.DataFrame(curves), items=none, failures=none)


def of(found, **where):
    return choices(found, **({"model": "m", "domain": "science"} | where)).set_index("method")


def test_the_least_nats_win_and_of_equal_ones_the_first():
    runs = {("ewc", 0): 1.2, ("ewc-s1", 0): 1.1, ("ewc-s2", 0): 1.1, ("ewc-s3", 0): 1.3, ("full", 0): 5.0}
    table = of(loaded(runs))
    assert list(table[table["chosen"]].index) == ["ewc-s1", "full"] and list(table[table["tied"]].index) == ["ewc-s2"]
    assert list(table["family"]) == ["ewc"] * 4 + ["full"] and list(table["domain_nll_probe"]) == list(runs.values())
    assert chosen(loaded(runs), "lora", model="m", domain="science") is None


def test_it_is_the_rule_of_the_trials():
    """The same nats give the same choice as experiments/commands/tune.py makes of them, whatever was forgotten."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        nats = draw.integers(10, 13, size=4) / 10
        runs = {("ewc" if k == 0 else f"ewc-s{k}", 0): float(one) for k, one in enumerate(nats)}
        trials = [
            {"method": "ewc", "name": method, "science_nll": one, "settings": {"ewc.strength": 1.0}}
            | {"science": draw.random(), "piqa": draw.random(), "perplexity": draw.random()}
            for (method, _), one in runs.items()
        ]
        tune.judge(trials, domain="science")
        for key in ("chosen", "tied"):
            table = of(loaded(runs))
            assert [trial["name"] for trial in trials if trial[key]] == list(table[table[key]].index)


def test_neither_test_scores_nor_forgetting_count():
    runs = {("ewc", 0): 1.0, ("ewc-s1", 0): 1.1}
    for gain, lost in (([-9, 9], [9, -9]), ([9, -9], [-9, 9])):
        found = loaded(runs, domain_gain=gain, domain_nll_gained=gain, general_nll_lost=lost, forgetting=lost)
        assert chosen(found, "ewc", model="m", domain="science") == "ewc"
        assert list(reported(found).cells["method"]) == ["ewc"]


def test_each_domain_chooses_for_itself():
    one, other = loaded({("ewc", 0): 1.0, ("ewc-s1", 0): 2.0}), loaded({("ewc", 0): 2, ("ewc-s1", 0): 1}, domain="law")
    both = Loaded(
        cells=pd.concat([one.cells, other.cells]),
        curves=pd.concat([one.curves, other.curves]),
        items=pd.DataFrame(),
        failures=pd.DataFrame(),
    )
    assert list(reported(both).cells.index) == ["m/science/ewc/seed0", "m/law/ewc-s1/seed0"]


def test_what_is_reported_is_one_setting_a_family():
    runs = {("full", 0): 1.0, ("ewc", 0): 1.5, ("ewc-s1", 0): 1.0, ("mofo-s1", 0): 1.0, ("mofo-s2", 0): 1.5}
    found = reported(loaded(runs))
    assert list(found.cells["method"]) == ["full", "ewc-s1", "mofo-s1"]
    assert set(found.curves["cell"]) == set(found.cells.index)
    kept = list(reported(loaded(runs, probed=False)).cells["method"])
    assert kept == ["full", "ewc", "mofo-s1"]  # without probes the method as it is written, else its first setting
    alone = loaded({("full", 0): 1.0})
    assert reported(alone) is alone and reported(loaded({})).cells.empty


def test_seeds_are_averaged_over_those_that_all_settings_have():
    runs = {("ewc", 0): 1.3, ("ewc", 1): 1.1, ("ewc", 2): 0.1, ("ewc-s1", 0): 1.1, ("ewc-s1", 1): 1.2}
    table = of(loaded(runs))
    assert list(table["seeds"]) == [2, 2] and list(table["domain_nll_probe"]) == pytest.approx([1.2, 1.15])
    assert table["chosen"].to_list() == [False, True]


def test_without_probes_nothing_is_chosen():
    table = of(loaded({("ewc", 0): 1.0, ("ewc-s1", 0): 1.1}, probed=False))
    assert list(table["seeds"]) == [0, 0] and not table["chosen"].any() and table["domain_nll_probe"].isna().all()
    assert choices(loaded({}), model="m", domain="science").empty


def test_the_weights_that_a_run_delivers_are_judged():
    runs = {("ewc", 0): 1.0, ("ewc-s1", 0): 1.1, ("ewc-s2", 0): 1.2}
    best = {"kept_step": 4}
    assert of(loaded(runs, stopped=[None, None, best]))["domain_nll_probe"].to_list() == [1.0, 1.1, 0.1]
    finished = [None, {"parts": ["wise_ft"], "probe": {"science_nll": 0.9}}, {"parts": ["wise_ft"], "probe": {}}]
    table = of(loaded(runs, finished=finished))
    assert table["domain_nll_probe"].fillna(0).to_list() == [1.0, 0.9, 0] and table["chosen"].to_list()[1]


def test_a_choice_at_the_end_of_its_range_says_so():
    runs = {("ewc", 0): 1.2, ("ewc-s1", 0): 1.1, ("ewc-s2", 0): 1.0}
    table = of(loaded(runs))
    assert list(table["setting"]) == ["ewc.strength"] * 3 and list(table["value"]) == [0.0, 1.0, 2.0]
    assert list(table["end"]) == ["", "", "highest"]
    rates = [{"learning_rate": rate} for rate in (1e-3, 1e-4, 1e-2)]
    table = of(loaded(runs | {("ewc", 0): 0.9}, settings=rates, parts=[{}] * 3))
    assert list(table["setting"]) == ["train.learning_rate"] * 3 and not table["end"].any()  # between the two others
    table = of(loaded(runs, settings=rates))
    assert not table["setting"].any() and not table["end"].any()  # two settings differ
    assert [end_of(1, [1]), end_of(1, [1, 2]), end_of("a", ["a", "b"]), end_of(2, [1, 2, 3])] == ["", "lowest", "", ""]
    assert least({}) == []


def test_trials_say_what_is_chosen_and_how_to_run_the_values_on_either_side():
    def trials(*nats, values=(1e-4, 3e-4, 1e-3)):
        made = [
            {"method": "full", "settings": {"train.learning_rate": value}}
            | ({"d_nll": one} if one else {"failed": "NaN"})
            for value, one in zip(values, nats)
        ]
        tune.judge(made, domain="d")
        return tune.advice(made, method="full", where="m/d")

    chosen, around = trials(2.0, 1.0, 2.0)
    assert chosen == "chosen for full on m/d: train.learning_rate = 0.0003"
    assert around.endswith("python -m experiments sweep full train.learning_rate 0.0001,0.001")
    assert trials(1.0, 2.0, 3.0)[1].endswith(
        "the lowest value tried, so a better one may lie beyond: widen tune.methods.full"
    )
    assert trials(2.0, 1.0, 1.0)[0].endswith("the first of equal ones (also 0.001)")
    beyond = trials(3.0, 2.0, 1.0, None, values=(1e-4, 3e-4, 1e-3, 3e-3))[1]  # the highest that did not fail
    assert "the highest value tried" in beyond
    assert trials(None, None, None) == ["nothing is chosen for full on m/d: every trial failed"]
