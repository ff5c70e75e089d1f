"""A family's block is chosen by the trials' rule, on probe rows."""

import numpy as np
import pandas as pd
import pytest

from analysis.chosen import EQUAL, choices, chosen, reported
from analysis.load import Loaded
from experiments.commands import tune

BASE = {"science": 0.5, "piqa": 0.6, "hellaswag": 0.4, "perplexity": 20.0}


def loaded(runs, *, probed=True):
    """Runs (method, seed) -> (domain, piqa, hellaswag, perplexity) at the end; the test scores are the opposite."""
    cells, curves = [], []
    for (method, seed), scores in runs.items():
        cell = f"m/science/{method}/seed{seed}"
        cells.append(
            {
                "cell": cell,
                "model": "m",
                "domain": "science",
                "method": method,
                "seed": seed,
                "domain_gain": -scores[0],
                "forgetting": scores[1],
            }
        )
        for step, values in ((0, (0.1, 0.1, 0.1, 99.0)), (5, (np.nan,) * 4), (9, scores if probed else (np.nan,) * 4)):
            names = ("probe_science", "probe_piqa", "probe_hellaswag", "probe_perplexity")
            curves.append({"cell": cell, "step": step, **dict(zip(names, values)), "probe_piqa_nll": 3.0})
    none = pd.DataFrame()
    frame = pd.DataFrame(cells).set_index("cell", drop=False) if cells else none
    return Loaded(cells=frame, curves=pd.DataFrame(curves), items=none, failures=none)


def test_the_best_objective_wins_and_of_equal_ones_the_lowest_perplexity():
    runs = {
        ("ewc", 0): (0.80, 0.60, 0.40, 20.0),
        ("ewc-s1", 0): (0.90, 0.60, 0.40, 22.0),
        ("ewc-s2", 0): (0.896, 0.60, 0.40, 21.0),
        ("ewc-s3", 0): (0.894, 0.60, 0.40, 5.0),
        ("full", 0): (0.1, 0.1, 0.1, 90.0),
    }
    found = loaded(runs)
    assert chosen(found, "ewc", model="m", domain="science") == "ewc-s2"  # 0.4 points below the best; s3 is 0.6 below
    assert chosen(found, "full", model="m", domain="science") == "full"
    assert chosen(found, "lora", model="m", domain="science") is None
    table = choices(found, model="m", domain="science").set_index("method")
    assert table.loc["ewc-s1", "objective"] == pytest.approx(0.90 + 0.50) and table.loc[
        "ewc-s1", "retention_probe"
    ] == pytest.approx(0.5)
    assert list(table["family"]) == ["ewc"] * 4 + ["full"] and table["chosen"].sum() == 2


def test_it_is_the_rule_of_the_trials():
    """The same scores give the same choice as experiments/commands/tune.py makes of them, whatever they are."""
    assert EQUAL == tune.EQUAL
    draw = np.random.default_rng(0)
    for _ in range(50):
        scores = draw.uniform(0.4, 0.41, size=(4, 4))
        runs = {("ewc" if k == 0 else f"ewc-s{k}", 0): tuple(row) for k, row in enumerate(scores)}
        names = ("science", "piqa", "hellaswag", "perplexity")
        trials = [{"method": "ewc", "name": method} | dict(zip(names, found)) for (method, _), found in runs.items()]
        record = {"base": BASE, "trials": trials}
        tune._judge(record, "science")
        (asked,) = [trial["name"] for trial in record["trials"] if trial["chosen"]]
        assert chosen(loaded(runs), "ewc", model="m", domain="science") == asked


def test_test_scores_do_not_count():
    runs = {("ewc", 0): (0.9, 0.6, 0.4, 20.0), ("ewc-s1", 0): (0.5, 0.6, 0.4, 20.0)}
    found = loaded(runs)
    found.cells["domain_gain"], found.cells["forgetting"] = [-1.0, 1.0], [1.0, -1.0]
    assert chosen(found, "ewc", model="m", domain="science") == "ewc"


def test_what_is_reported_is_one_block_a_family_and_no_test_score_moves_it():
    runs = {
        ("full", 0): (0.9, 0.6, 0.4, 20.0),
        ("ewc", 0): (0.5, 0.6, 0.4, 20.0),
        ("ewc-s1", 0): (0.9, 0.6, 0.4, 20.0),
        ("mofo-s1", 0): (0.5, 0.6, 0.4, 20.0),
        ("mofo-s2", 0): (0.4, 0.6, 0.4, 20.0),
    }

    def kept(found):
        return list(reported(found).cells["method"])

    found = loaded(runs)
    assert kept(found) == ["full", "ewc-s1", "mofo-s1"] and set(reported(found).curves["cell"]) == set(
        reported(found).cells.index
    )
    found.cells["domain_gain"], found.cells["forgetting"] = [9.0, 9.0, -9.0, -9.0, 9.0], [-9.0, -9.0, 9.0, 9.0, -9.0]
    assert kept(found) == ["full", "ewc-s1", "mofo-s1"]
    assert kept(loaded(runs, probed=False)) == [
        "full",
        "ewc",
        "mofo-s1",
    ]  # without probes the method as it is written, else its first block
    alone = loaded({("full", 0): (0.9, 0.6, 0.4, 20.0)})
    assert reported(alone) is alone and reported(loaded({})).cells.empty


def test_seeds_are_averaged_over_those_that_all_blocks_have():
    runs = {
        ("ewc", 0): (0.7, 0.6, 0.4, 20.0),
        ("ewc", 1): (0.9, 0.6, 0.4, 20.0),
        ("ewc", 2): (1.0, 1.0, 1.0, 1.0),
        ("ewc-s1", 0): (0.82, 0.6, 0.4, 20.0),
        ("ewc-s1", 1): (0.82, 0.6, 0.4, 20.0),
    }
    table = choices(loaded(runs), model="m", domain="science").set_index("method")
    assert list(table["seeds"]) == [2, 2] and table.loc["ewc", "domain_probe"] == pytest.approx(0.8)
    assert chosen(loaded(runs), "ewc", model="m", domain="science") == "ewc-s1"


def test_without_probes_nothing_is_chosen():
    runs = {("ewc", 0): (0.7, 0.6, 0.4, 20.0), ("ewc-s1", 0): (0.8, 0.6, 0.4, 20.0)}
    found = loaded(runs, probed=False)
    assert chosen(found, "ewc", model="m", domain="science") is None
    assert list(choices(found, model="m", domain="science")["seeds"]) == [0, 0]
    assert choices(loaded({}), model="m", domain="science").empty
