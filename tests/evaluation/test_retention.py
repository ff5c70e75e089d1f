"""The rule of what counts as forgetting, on numbers made by hand."""

import math

import numpy as np
import pytest

from evaluation.retention import (
    above_chance,
    bits_per_byte,
    change,
    forgetting,
    lost_in_nats,
    lower_bound,
    nats_per_token,
)
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


def scores(*, nats, bits, kl=None, tasks):
    return {"general": {"nats_per_token": nats, "bits_per_byte": bits, "kl": kl, "kl_reverse": kl}, "tasks": tasks}


def test_what_is_lost_in_nats():
    base = {
        "a": entry(0.6, gold_nll=2.0, margin=1.0, brier=0.4),
        "written": entry(0.6, gold_nll=5.0),
        "chance": entry(0.2, gold_nll=1.0, margin=9.0, brier=0.1),
        "t": entry(0.9, role="transfer", gold_nll=1.0, margin=1.0, brier=0.1),
    }
    tuned = {
        "a": entry(0.6, gold_nll=2.5, margin=0.25, brier=0.5),
        "written": entry(0.6, gold_nll=4.5),
        "chance": entry(0.2, gold_nll=9.0, margin=0.0, brier=0.9),
        "t": entry(0.9, role="transfer", gold_nll=9.0, margin=0.0, brier=0.9),
    }
    lost = lost_in_nats(
        scores(nats=3.0, bits=1.0, kl=0.0, tasks=base), scores(nats=3.25, bits=1.125, kl=0.5, tasks=tuned)
    )
    assert lost == {
        "general_nll_lost": 0.25,
        "general_bits_per_byte_lost": 0.125,
        "general_kl": 0.5,
        "general_kl_reverse": 0.5,
        "gold_nll_lost": 0.0,  # the mean of both
        "margin_lost": 0.75,
        "gold_nll_lost_by_task": {"a": 0.5, "written": -0.5},
        "margin_lost_by_task": {"a": 0.75},
        "brier_lost_by_task": {"a": pytest.approx(0.1)},
    }


def test_a_model_loses_exactly_nothing_against_itself():
    itself = scores(nats=0.1 + 0.2, bits=0.7, kl=0.0, tasks={"a": entry(0.6, gold_nll=1 / 3, margin=-0.1, brier=0.3)})
    flat = [
        v
        for value in lost_in_nats(itself, itself).values()
        for v in (value.values() if isinstance(value, dict) else [value])
    ]
    assert flat == [0.0] * 9 and not any(math.copysign(1, value) < 0 for value in flat)


def test_scores_without_log_likelihoods_lose_an_unknown_amount():
    old = scores(nats=3.0, bits=1.0, tasks={"a": entry(0.6)})
    del old["general"]["kl"]
    lost = lost_in_nats(old, old)
    assert lost["general_kl"] is lost["gold_nll_lost"] is lost["margin_lost"] is None and lost["general_nll_lost"] == 0
    assert nats_per_token(entry(0.6)) is bits_per_byte(entry(0.6)) is None


def test_nats_of_a_domain_are_per_token_of_its_answers_or_its_labelled_text():
    answers = entry(0.6, n=10, gold_nll=6.0, tokens=30, bytes=120)  # 60 nats
    assert nats_per_token(answers) == 2.0 and bits_per_byte(answers) == pytest.approx(0.5 / math.log(2))
    text = entry(1.5, n=10, format="chat", tokens=40, bytes=160)
    assert nats_per_token(text) == 1.5 and bits_per_byte(text) == pytest.approx(60 / 160 / math.log(2))
