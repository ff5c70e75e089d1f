import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from analysis.statistics.crossed import crossed
from analysis.statistics.intervals import (
    by_run,
    of_arrays,
    of_shares,
    paired,
    per_token,
    perplexity_ratio,
    refuse_unequal,
    wilson,
)
from methods.errors import UserError


def items(task, scores, gold=0, cell=None):
    hashes = [f"{task}{i}" for i in range(len(scores))]
    frame = pd.DataFrame(
        {"task": task, "doc_id": range(len(scores)), "doc_hash": hashes, "score": scores, "gold": gold}
    )
    return frame if cell is None else frame.assign(cell=cell)


def difference(base, tuned):
    """tuned − base on the items that both have, over all tasks."""
    tasks = [rows for _, rows in paired(base, tuned).groupby("task")]
    return of_arrays([by_run(rows) - rows["base"].to_numpy(dtype=float) for rows in tasks])


def test_wilson_by_hand():
    found = wilson(8, 10)  # Wilson's interval of 8 in 10, worked out by hand
    assert (
        found.value == 0.8
        and found.low == pytest.approx(0.4902, abs=1e-4)
        and found.high == pytest.approx(0.9433, abs=1e-4)
    )
    assert found.scope == "run"


def test_paired_joins_on_the_item_and_keeps_each_run():
    base = items("a", [1, 0, 1])
    tuned = pd.concat([items("a", [1, 1, 0], cell="m/seed0").iloc[::-1], items("a", [1, 0, 0], cell="m/seed1")])
    pairs = paired(base, tuned)
    assert list(pairs["tuned"]) == [1, 0.5, 0]
    assert list(pairs["m/seed0"]) == [1, 1, 0] and list(pairs["m/seed1"]) == [1, 0, 0]
    other = items("a", [1, 1, 1]).assign(doc_hash=["x", "y", "z"])
    assert paired(base, other).empty  # same positions, other rows: nothing to pair


def test_a_row_scored_twice_is_refused():
    base = items("a", [1, 0, 1])
    twice = pd.concat([items("a", [1, 1, 0], cell="m/seed0")] * 2)
    with pytest.raises(UserError, match="m/seed0.*a0.*twice"):
        paired(base, twice)


def test_mean_difference_weights_tasks_equally():
    base = pd.concat([items("a", [1, 1, 1, 0]), items("b", [1, 0])])
    tuned = pd.concat([items("a", [0, 1, 1, 0]), items("b", [1, 1])])
    found = difference(base, tuned)
    # differences a: -1 0 0 0 and two more, +1 -1, of 6: sum -1, squares 3, s^2 17/30
    # differences b: 0 1 and two more, +1 -1, of 4: sum 1, squares 3, s^2 11/12
    first, second = 17 / 30 / 6 / 4, 11 / 12 / 4 / 4  # one seed, so items alone with Satterthwaite's t
    df = (first + second) ** 2 / (first**2 / 3 + second**2 / 1)
    assert found.value == pytest.approx(0.125) and found.n == 6 and found.df == pytest.approx(df)
    assert found.high - found.value == pytest.approx(student.ppf(0.975, df) * math.sqrt(first + second))
    assert found.low < 0 < found.high and found.scope == "run"


@pytest.mark.parametrize("shift", (0.0, 0.3, 1.0))
def test_one_task_is_two_way_random_effects(shift):
    """Against the mean squares of a table worked out cell by cell: (MS_seed + MS_item - MS_rest) / (S n)."""
    table = np.random.default_rng(0).normal(size=(4, 30)) + shift * np.array([[2.0], [0.0], [1.0], [-1.0]])
    seeds, n = table.shape
    squares = {"seed": 0.0, "item": 0.0, "rest": 0.0}
    for s in range(seeds):
        for i in range(n):
            by_seed, by_item, mean = table[s].mean(), table[:, i].mean(), table.mean()
            squares["seed"] += (by_seed - mean) ** 2 / (seeds - 1)
            squares["item"] += (by_item - mean) ** 2 / (n - 1)
            squares["rest"] += (table[s, i] - by_seed - by_item + mean) ** 2 / ((seeds - 1) * (n - 1))
    variance = (squares["seed"] + squares["item"] - squares["rest"]) / (seeds * n)
    bottom = (
        squares["seed"] ** 2 / (seeds - 1)
        + squares["item"] ** 2 / (n - 1)
        + squares["rest"] ** 2 / ((seeds - 1) * (n - 1))
    )
    found = of_arrays([table], step=0)
    df = max((variance * seeds * n) ** 2 / bottom, seeds - 1)
    assert found.error == pytest.approx(math.sqrt(variance)) and found.df == pytest.approx(df)
    assert found.scope == "method" and found.seeds == 4 and found.n == 30
    assert found.high - found.value >= student.ppf(0.975, found.df) * found.error - 1e-12


def test_a_seed_moves_all_tasks_together():
    """Three tasks without item differences, and seeds 0, 3, 6 apart in all of them: only the seeds' spread is left."""
    tasks = [np.repeat([[0.0], [3.0], [6.0]], n, axis=1) for n in (10, 20, 30)]
    found = of_arrays(tasks, step=0)
    assert found.value == 3.0 and found.error == pytest.approx(3 / math.sqrt(3))  # sd 3 over three seeds, not over nine
    assert found.df == pytest.approx(2) and found.high == pytest.approx(3 + student.ppf(0.975, 2) * math.sqrt(3))


def test_seeds_that_agree_too_well_do_not_narrow_the_interval():
    """Seeds whose means are equal by construction: MS_seed is 0, less than MS_rest, and the items' part stays whole."""
    draw = np.random.default_rng(1)
    table = draw.normal(size=(3, 200))
    table -= table.mean(axis=1, keepdims=True)
    found, alone = of_arrays([table]), of_arrays([table.mean(axis=0, keepdims=True)])
    assert found.error == pytest.approx(alone.error)


def test_a_grid_of_studies_is_each_study():
    draw = np.random.default_rng(2)
    many = [draw.normal(size=(5, 3, 20)), draw.normal(size=(5, 3, 7))]
    together = crossed(many)
    for k in range(5):
        one = of_arrays([task[k] for task in many], step=0)
        assert (together.value[k], together.error[k], together.df[k]) == pytest.approx((one.value, one.error, one.df))
        assert together.half[k] == pytest.approx(one.high - one.value)
    with pytest.raises(ValueError, match="different numbers of seeds"):
        crossed([many[0], many[1][:, :2]])


def test_items_that_do_not_move_leave_a_width_and_one_item_has_no_bounds():
    base = items("a", [1, 0] * 50)
    found = difference(base, base)
    assert found.value == 0 and found.high == -found.low == pytest.approx(
        student.ppf(0.975, 99) * math.sqrt(2 / 101 / 102)
    )
    assert (
        of_arrays([np.zeros((3, 100))]).high == pytest.approx(found.high)
        and of_arrays([np.zeros((3, 4))], step=0).high == 0
    )
    one = items("a", [1])
    alone = difference(one, one)
    assert alone.low is None and (-alone).high is None


def test_a_difference_is_the_mean_over_tasks_and_other_rows_are_refused():
    base = pd.concat([items("a", [1, 1, 1, 0]), items("b", [1, 0])])
    runs = [
        pd.concat([items("a", [0, 1, 1, 0]), items("b", [1, 1])]),
        pd.concat([items("a", [0, 0, 1, 0]), items("b", [0, 1])]),
    ]
    tuned = pd.concat([rows.assign(cell=f"seed{k}") for k, rows in enumerate(runs)])
    refuse_unequal(base=base, tuned=tuned, tasks=["a", "b"])
    found = -difference(base, tuned)
    assert found.value == pytest.approx(-np.mean([(-0.25 + 0.5) / 2, (-0.5 + 0) / 2])) and (
        found.seeds,
        found.n,
        found.scope,
    ) == (2, 6, "method")
    assert found.low < found.value < found.high
    with pytest.raises(UserError, match="seed1.*1 are in one of them only, first b1 of b"):
        refuse_unequal(base=base, tuned=tuned.iloc[:-1], tasks=["a", "b"])
    with pytest.raises(UserError, match="no scored row of task c"):
        refuse_unequal(base=base, tuned=tuned, tasks=["a", "c"])


def test_score_is_wilsons_for_one_seed_and_stays_inside_for_several():
    right = [1] * 8 + [0] * 2
    one = of_shares(np.array([right]))
    assert (one.low, one.high, one.scope) == (wilson(8, 10).low, wilson(8, 10).high, "run")
    # seeds that agree leave the items' variance p(1-p)/(n-1): Wilson's for n - 1 rows, with its t for z
    both = of_shares(np.array([right, right], dtype=float))
    by_hand = wilson(0.8 * 9, 9, z=student.ppf(0.975, 9))
    assert (both.low, both.high, both.scope, both.seeds) == (
        pytest.approx(by_hand.low),
        pytest.approx(by_hand.high),
        "method",
        2,
    )
    apart = of_shares(np.array([[1.0] * 40, [0.0] * 40]))
    assert apart.value == 0.5 and apart.low < 0.1 and apart.high > 0.9 and 0 <= apart.low
    assert of_shares(np.ones((3, 50))).low > 0.9 and of_shares(np.ones((3, 50))).high == pytest.approx(1)


def test_perplexity_ratio_by_hand():
    found = perplexity_ratio(per_token(np.array([[10.0, 10.0]]), np.array([100.0, 50.0])))
    ratio = 20 / 150
    residuals = np.array([10 - ratio * 100, 10 - ratio * 50])
    half = student.ppf(0.975, 1) * math.sqrt((residuals**2).sum() * 2) / 150
    assert found.value == pytest.approx(math.exp(ratio)) and found.high == pytest.approx(
        math.exp(ratio + half), rel=1e-6
    )


def test_perplexity_ratio_over_seeds_is_the_geometric_mean():
    change = np.array([[10.0, 10.0, 5.0], [30.0, 20.0, 30.0]])
    found = perplexity_ratio(per_token(change, np.array([100.0, 50.0, 80.0])))
    assert found.value == pytest.approx(math.exp((25 / 230 + 80 / 230) / 2)) and found.scope == "method"
    assert (
        found.error >= 55 / 230 / 2 * 0.99
    )  # two seeds 55 / 230 apart: s / sqrt(2) is half of that, and passages add to it
