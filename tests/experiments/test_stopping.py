"""A rule on probes: what it decides of a sequence of values, and that it changes nothing else of a run."""

import json
import math

import pytest
import torch

from evaluation.probe import encoded, probe
from experiments.model.random_models import build, byte_tokenizer
from experiments.training.engine import final_weights, fit
from experiments.training.resume import Resume
from experiments.training.settings import TrainSettings
from experiments.training.stopping import Rule, due, rule_of, told
from methods import registry
from methods.errors import UserError
from tests.experiments import worlds
from tests.experiments.test_engine import SIZES
from tests.experiments.test_loss import ragged

TEXTS = [{"text": "A sentence of general text."}, {"text": "And another one, which is longer."}]
ANSWERS = [{"context": "Q: 1 + 1\nA:", "choices": [" 2", " 3"], "gold": 0}]
LORA = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.1}}
RULE = Rule(stop={"general_nll": 0.25, "science": -0.1}, best="science_nll")


def settings(**changes):
    """Twelve steps of a constant rate, probed at 0, 3, 6, 9 and 12: each of these ends an epoch."""
    chosen = {"learning_rate": 1e-3, "schedule": "constant", "batch": 4, "micro_batch": 4, "epochs": 4.0, "probes": 4}
    return TrainSettings(**(chosen | changes))


def trained(*, blocks=None, dtype=torch.float32, rule=None, values=None, more=(), **changes):
    """A run whose probes are `values`, or real ones; its final weights and the fit's result."""
    model, tokenizer, told_values = build("llama", seed=0, dtype=dtype), byte_tokenizer(), iter(values or ())
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    sets = {"general": encoded(TEXTS, tokenizer), "science": encoded(ANSWERS, tokenizer)}
    given = {key: changes.pop(key) for key in ("resume", "shards") if key in changes}
    result = fit(
        model=model,
        parts=(*registry.build(blocks or {}), *more),
        examples=ragged(sizes=SIZES),
        settings=settings(**changes),
        seed=3,
        base=base,
        rule=rule,
        probe=lambda one: next(told_values) if values else probe(model=one, sets=sets),
        **given,
    )
    return final_weights(result, result.method.parts), result


def falling_until(step, *, general=(2.0, 2.1, 2.2, 2.3, 2.4)):
    """Five probes, at which nats of the domain are least at `step`."""
    return [
        {"general_nll": nats, "science": 0.5, "science_nll": 1 + abs(3 * i - step) / 100}
        for i, nats in enumerate(general)
    ]


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("values", "past"),
    [
        ({"general_nll": 2.25, "science": 0.4}, {}),  # at the limits
        ({"general_nll": 2.5, "science": 0.5}, {"general_nll": 0.5}),
        ({"general_nll": 1.0, "science": 1.0}, {}),  # better
        ({"general_nll": 2.0, "science": 0.25}, {"science": -0.25}),
        ({"general_nll": 3.0, "science": 0.0}, {"general_nll": 1.0, "science": -0.5}),
    ],
)
def test_a_change_for_the_worse_beyond_its_limit_is_past_it(values, past):
    assert RULE.past({"general_nll": 2.0, "science": 0.5}, values) == past


def test_a_value_that_is_no_number_is_past_its_limit_and_never_the_best():
    past = RULE.past({"general_nll": 2.0, "science": 0.5}, {"general_nll": math.nan, "science": 0.5})
    assert list(past) == ["general_nll"]
    assert Rule(stop={}, best="d_nll").best_step({0: {"d_nll": 2.0}, 4: {"d_nll": math.nan}}) == 0


@pytest.mark.parametrize(
    ("nats", "general", "best"),
    [
        ([3.0, 2.0, 1.0], [2.0, 2.0, 2.0], 8),
        ([3.0, 2.0, 1.0], [2.0, 2.1, 2.5], 4),  # the last one has forgotten too much
        ([3.0, 2.0, 1.0], [2.0, 2.5, 2.1], 8),
        ([3.0, 2.0, 1.0], [2.0, 2.5, 2.5], 0),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], 0),  # training only hurts
        ([3.0, 2.0, 2.0], [2.0, 2.0, 2.0], 4),  # of equals the earlier
    ],
)
def test_the_best_step_has_the_least_nats_of_those_within_the_limits(nats, general, best):
    probed = {
        4 * i: {"science_nll": d, "general_nll": g, "science": 0.5} for i, (d, g) in enumerate(zip(nats, general))
    }
    assert RULE.best_step(probed) == best


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": {"general_nll": 0.1}, "probes": 0}, "`probes` is 0, so that no step is probed: set it to doubling"),
        ({"keep": "best", "probes": 1}, "`probes` is 1, so that only the first and the last step are probed"),
    ],
)
def test_a_rule_that_cannot_act_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        rule_of(settings(**changes), domain="science")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(stop={"general_nl": 0.1}, where="models.m.train"), "'general_nl' in models.m.train.stop: did you mean"),
        (
            Rule(stop={"general_nll": -0.1}),
            "train.stop.general_nll is -0.1, but nats and perplexity are worse when they rise: write [+]0.1",
        ),
        (Rule(stop={"science": 0.05}), "train.stop.science is 0.05, but accuracy is worse when it falls: write -0.05"),
        (Rule(stop={}, best="birds_nll"), "train.keep is 'best'.*least birds_nll, and no rows of the domain are"),
    ],
)
def test_a_measure_that_is_not_probed_or_a_wrong_sign_is_refused_before_the_first_step(rule, message):
    with pytest.raises(UserError, match=message):
        trained(rule=rule)


def test_settings_without_a_rule_are_those_of_a_version_that_had_none():
    """So that no finished cell becomes stale."""
    plain = TrainSettings().numeric()
    assert plain == TrainSettings(stop={}, keep="last").numeric() and not plain.keys() & {"stop", "keep"}
    assert TrainSettings(stop={"general_nll": 0.1}, keep="best").numeric() == plain | {
        "stop": {"general_nll": 0.1},
        "keep": "best",
    }


@pytest.mark.parametrize(
    ("times", "steps", "wanted"),
    [
        ("doubling", 75, [0, 1, 2, 4, 8, 16, 32, 64]),
        ("doubling", 64, [0, 1, 2, 4, 8, 16, 32]),  # the last step is probed in any case
        ("doubling", 1, [0]),
        ("doubling", 0, []),
        (3, 75, [0, 25, 50]),
        (0, 75, []),
    ],
)
def test_when_a_run_is_probed(times, steps, wanted):
    assert sorted(due(times, steps=steps)) == wanted


def test_probing_at_doubled_steps_leaves_the_bits_and_writes_the_nats_of_every_set():
    plain, _ = trained(blocks=LORA, probes=0)
    final, result = trained(blocks=LORA, probes="doubling")
    equal(final, plain)
    probed = {row["step"]: row for row in result.curve if "probe_general_nll" in row}
    assert list(probed) == [0, 1, 2, 4, 8, 12] and all("probe_science_nll" in row for row in probed.values())
    rule = rule_of(settings(probes="doubling", stop={"general_nll": 0.25}), domain="science")
    _, ended = trained(probes="doubling", rule=rule, values=falling_until(3))
    assert ended.stopped["stopped_at"] == ended.steps == 4  # at the fourth probe, after 0, 1 and 2


KINDS = {
    "full": {},
    "lora": {"blocks": LORA, "micro_batch": 2},
    "bfloat16": {"dtype": torch.bfloat16, "micro_batch": 1},
    "packed": {"pack": 40},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_weights_of_one_that_was_to_end_there(kind):
    """The rate is constant, so that a run of fewer epochs makes the same steps."""
    last = Rule(stop=RULE.stop)
    final, result = trained(rule=last, values=falling_until(3), **KINDS[kind])
    three, shorter = trained(**KINDS[kind], probes=0, epochs=3.0)
    equal(final, three)
    assert (result.steps, result.tokens) == (9, 3 * sum(SIZES)) == (shorter.steps, shorter.tokens)
    losses = [[row["loss"] for row in one.curve if "loss" in row] for one in (result, shorter)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    final, result = trained(rule=RULE, values=falling_until(3), **KINDS[kind])
    equal(final, trained(**KINDS[kind], probes=0, epochs=1.0)[0])
    assert (result.steps, result.tokens) == (9, 3 * sum(SIZES))  # what was done
    assert result.stopped == {
        "rule": {"stop": {"general_nll": 0.25, "science": -0.1}, "keep": "best"},
        "stopped_at": 9,
        "past": {"general_nll": pytest.approx(0.3)},
        "kept_step": 3,
        "values": {
            "general_nll": {"first": 2.0, "last": 2.3, "kept": 2.1},
            "science": {"first": 0.5, "last": 0.5, "kept": 0.5},
            "science_nll": {"first": 1.03, "last": 1.06, "kept": 1.0},
        },
        "steps_planned": 12,
        "tokens_planned": 4 * sum(SIZES),
    }
    assert told(result.stopped) == (
        "stopped at step 9 of 12 (general_nll changed by +0.3, limit +0.25); the weights are those of step 3"
    )


def test_a_rule_on_real_probes_that_does_not_act_changes_nothing():
    plain, other = trained()
    final, result = trained(rule=Rule(stop={"general_nll": 1e9, "science": -1.0}))
    equal(final, plain)
    without = [
        {key: value for key, value in row.items() if "second" not in key and key != "mfu"} for row in other.curve
    ]
    assert all(row.items() >= kept.items() for row, kept in zip(result.curve, without, strict=True))
    assert result.stopped["stopped_at"] is None and result.steps == other.steps == 12
    nats = {row["step"]: row["probe_science_nll"] for row in other.curve if "probe_science_nll" in row}
    final, result = trained(rule=Rule(stop={}, best="science_nll"))
    assert result.stopped["kept_step"] == min(nats, key=nats.get) and result.steps == 12


@pytest.mark.parametrize(("kind", "stop"), [("lora", 4), ("bfloat16", 8)])
def test_a_run_that_was_killed_after_its_best_step_ends_as_if_it_had_not_been(tmp_path, kind, stop):
    probed = falling_until(3)

    def resume():
        return Resume(tmp_path / "run", identity={}, every=0.0)

    with pytest.raises(worlds.Stopped):
        trained(rule=RULE, values=probed, more=(worlds.Stop(left=[stop]),), resume=resume(), **KINDS[kind])
    later = [values for i, values in enumerate(probed) if 3 * i >= stop - 1]  # a kill comes before the step is kept
    final, result = trained(rule=RULE, values=later, more=(worlds.Stop(),), resume=resume(), **KINDS[kind])
    wanted, whole = trained(rule=RULE, values=probed, more=(worlds.Stop(),), **KINDS[kind])
    equal(final, wanted)
    assert result.resumed == stop - 1 and result.stopped == json.loads(json.dumps(whole.stopped))
    assert result.stopped["kept_step"] == 3 and result.tokens == whole.tokens


def test_processes_that_share_the_model_keep_their_rows():
    wanted, alone = trained(rule=RULE, values=falling_until(6))
    with worlds.of_one() as shards:
        final, result = trained(rule=RULE, values=falling_until(6), shards=shards)
    equal(final, wanted)
    assert result.stopped == alone.stopped and alone.stopped["kept_step"] == 6
