import math

import numpy as np
import pandas as pd
import pytest

from analysis.intervals import mean_difference, paired, perplexity_ratio, wilson


def items(task, scores, gold=0):
    return pd.DataFrame({"task": task, "doc_id": range(len(scores)), "doc_hash": [f"{task}{i}" for i in range(len(scores))], "score": scores, "gold": gold})


def test_wilson_by_hand():
    found = wilson(8, 10)  # Wilson's interval of 8 in 10, worked out by hand
    assert found.value == 0.8 and found.low == pytest.approx(0.4902, abs=1e-4) and found.high == pytest.approx(0.9433, abs=1e-4)


def test_paired_joins_on_the_item_and_averages_over_runs():
    base = items("a", [1, 0, 1])
    tuned = pd.concat([items("a", [1, 1, 0]).iloc[::-1], items("a", [1, 0, 0])])
    assert list(paired(base, tuned)["tuned"]) == [1, 0.5, 0]
    other = items("a", [1, 1, 1]).assign(doc_hash=["x", "y", "z"])
    assert paired(base, other).empty  # same positions, other rows: nothing to pair


def test_mean_difference_weights_tasks_equally():
    base = pd.concat([items("a", [1, 1, 1, 0]), items("b", [1, 0])])
    tuned = pd.concat([items("a", [0, 1, 1, 0]), items("b", [1, 1])])
    found = mean_difference(paired(base, tuned), ["a", "b"])
    # differences a: -1 0 0 0, mean -.25, s^2 .25; b: 0 1, mean .5, s^2 .5
    assert found.value == pytest.approx(0.125) and found.n == 6
    assert found.high - found.value == pytest.approx(1.959964 * math.sqrt(0.25 / 4 + 0.5 / 2) / 2, rel=1e-6)
    assert not found.excludes_zero


def test_equal_items_have_no_width_and_one_item_has_no_bounds():
    base = items("a", [1, 0, 1])
    assert mean_difference(paired(base, base), ["a"]).high == 0
    one = items("a", [1])
    assert mean_difference(paired(one, one), ["a"]).low is None


def test_perplexity_ratio_by_hand():
    base, tuned = items("general", [300.0, 100.0], [100, 50]), items("general", [310.0, 110.0], [100, 50])
    found = perplexity_ratio(paired(base, tuned))
    ratio = 20 / 150
    residuals = np.array([10 - ratio * 100, 10 - ratio * 50])
    half = 1.959964 * math.sqrt((residuals**2).sum() * 2) / 150
    assert found.value == pytest.approx(math.exp(ratio)) and found.high == pytest.approx(math.exp(ratio + half), rel=1e-6)


def test_coverage_of_the_paired_interval():
    """95 % over items: in 1000 drawn studies of 3 tasks x 100 items, the truth is inside 93 to 97 times in 100."""
    draw, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        tasks, loss, keep = ("a", "b", "c"), (0.05, 0.1, 0.2), []
        for lost in loss:
            base = draw.random(100) < 0.6
            keep.append(np.where(base, draw.random(100) >= lost, draw.random(100) < 0.02).astype(float) - base)
        value = np.mean([d.mean() for d in keep])
        pairs = pd.DataFrame({"task": np.repeat(tasks, 100), "base": 0.0, "tuned": np.concatenate(keep)})
        found = mean_difference(pairs, list(tasks))
        assert found.value == pytest.approx(value)
        truth = np.mean([-0.6 * lost + 0.4 * 0.02 for lost in loss])
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / 1000 <= 0.97
