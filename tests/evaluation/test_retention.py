"""The rule of what counts as forgetting, on numbers made by hand."""

import math

import numpy as np
import pytest

from evaluation.retention import above_chance, change, forgetting, lower_bound
from methods.errors import UserError


def entry(value, *, n=200, chance=0.25, role="retention", **more):
    return {"role": role, "metric": "acc", "value": value, "n": n, "chance": chance, "version": 1.0} | more


@pytest.mark.parametrize("p, n", [(0.3, 200), (0.5, 40), (0.0, 10), (1.0, 10), (0.66, 100)])
def test_wilson_bound_solves_its_equation(p, n):
    """The bound L is where (p − L)² = z² L(1 − L)/n, below p: the score test just fails to reject."""
    bound, z = lower_bound(p, n), 1.6448536269514722
    assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-12)
    assert bound <= p


def test_wilson_bound_at_the_ends():
    assert lower_bound(0.0, 50) == 0.0
    assert lower_bound(1.0, 10) == pytest.approx(10 / (10 + 1.6448536269514722**2))


def test_z_is_the_95_percent_point():
    from evaluation.retention import Z

    assert 0.5 * (1 + math.erf(Z / math.sqrt(2))) == pytest.approx(0.95)


def test_above_chance_needs_the_bound_and_not_the_score():
    assert not above_chance(entry(0.29))  # 58 of 200: bound 0.240
    assert above_chance(entry(0.32))  # 64 of 200: bound 0.269
    assert above_chance(entry(0.29, n=2000))
    assert not above_chance(entry(0.0, chance=0.0))  # LAMBADA with no hit
    assert above_chance(entry(0.01, chance=0.0))


def test_mean_over_the_tasks_above_chance_only():
    base = {
        "a": entry(0.6),
        "b": entry(0.5),
        "c": entry(0.26),
        "d": entry(0.7, role="domain"),
        "t": entry(0.6, role="transfer"),
    }
    tuned = {
        "a": entry(0.5),
        "b": entry(0.53),
        "c": entry(0.0),
        "d": entry(0.9, role="domain"),
        "t": entry(0.1, role="transfer"),
    }
    lost = forgetting(base, tuned)
    assert lost["by_task"] == pytest.approx({"a": 0.1, "b": -0.03})
    assert lost["at_chance"] == ["c"]
    assert lost["forgetting"] == pytest.approx(0.035)


def test_none_where_no_task_can_show_loss():
    assert forgetting({"a": entry(0.25)}, {"a": entry(0.0)}) == {
        "forgetting": None,
        "by_task": {},
        "at_chance": ["a"],
        "apart": {},
    }


def test_base_against_itself_is_exactly_zero():
    base = {"a": entry(0.6), "b": entry(0.1 + 0.2)}
    assert forgetting(base, base)["forgetting"] == 0.0


@pytest.mark.parametrize("change", [{"n": 100}, {"metric": "acc_norm"}, {"chance": 0.5}, {"version": 2.0}])
def test_scores_of_other_rows_or_metrics_are_refused(change):
    with pytest.raises(UserError, match=f"task a: {next(iter(change))}"):
        forgetting({"a": entry(0.6)}, {"a": entry(0.6) | change})


def test_a_task_without_a_base_score_is_refused():
    with pytest.raises(UserError, match="task a has no score of the base"):
        forgetting({}, {"a": entry(0.6)})


@pytest.mark.parametrize("value", [-0.3, 1.7, 25.0, 6e12])
def test_what_is_no_proportion_is_never_above_chance(value):
    assert not above_chance(entry(value, chance=0.0))
    assert not above_chance(entry(0.5, chance=0.0, unit="mcc"))


def test_a_fall_of_perplexity_is_a_gain_in_nats_and_its_rise_forgetting():
    """exp(2) times the perplexity is 2 nats, whatever the level."""
    worse = {"unit": "nats", "metric": "perplexity", "higher_is_better": False}
    base = {"a": entry(0.6), "p": entry(math.exp(3.0), **worse, compared=-3.0)}
    tuned = {"a": entry(0.5), "p": entry(math.exp(5.0), **worse, compared=-5.0)}
    assert change(base["p"], tuned["p"]) == {"change": -2.0, "unit": "nats"}
    assert change(tuned["p"], base["p"]) == {"change": 2.0, "unit": "nats"}
    lost = forgetting(base, tuned)
    assert lost["forgetting"] == lost["by_task"]["a"] == pytest.approx(0.1) and "p" not in lost["by_task"]
    assert lost["apart"] == {"p": {"forgetting": 2.0, "unit": "nats"}} and lost["at_chance"] == []


def test_the_interval_of_a_metric_of_the_set_is_of_the_same_draws():
    draws = [0.1, 0.5, None, 0.3, 0.2]
    base = entry(0.3, unit="mcc", metric="mcc", compared=0.3, resampled=draws)
    tuned = entry(
        0.4, unit="mcc", metric="mcc", compared=0.4, resampled=[None if d is None else d + 0.1 for d in draws]
    )
    found = change(base, tuned)
    assert found["change"] == pytest.approx(0.1) and found["change_error"] is None  # no draw differs: nothing to go by
    wider = change(base, tuned | {"resampled": [0.2, 0.2, 0.2, 0.2, 0.2]})
    assert wider["change_error"] == pytest.approx(np.std([0.1, 0.5, 0.3, 0.2], ddof=1))
    assert wider["change_high"] - wider["change_low"] == pytest.approx(2 * 1.959964 * wider["change_error"], rel=1e-6)
    assert change(base, tuned | {"resampled": [None, None, None, 0.2, 0.2]})["change_error"] is None


def test_a_function_that_left_the_unit_interval_once_is_no_proportion_of_either_model():
    base, tuned = entry(0.5, unit="share", metric="rouge"), entry(30.0, unit="rouge", metric="rouge")
    assert change(base, tuned)["unit"] == change(tuned, base)["unit"] == "rouge"
