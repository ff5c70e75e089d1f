"""What hooks of parts give back: as documented, or refused with the part's name."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from experiments.model.random_models import build
from experiments.training import hooks
from experiments.training.engine import final_weights, fit
from methods.errors import UserError
from methods.part import REGISTERED, Part, register
from tests import goldens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(Part):
    key = "odd"


def run(part, *more, dtype=torch.float32, states=None, **settings):
    model = build("llama", seed=1, dtype=dtype)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = dataclasses.replace(goldens.SETTINGS, **({"epochs": 0.4} | settings))
    return fit(
        model=model,
        parts=(part, *more),
        examples=goldens.texts(18, seed=12, labelled=True),
        settings=chosen,
        seed=5,
        base=base,
        states=states,
    )


def odd(**given):
    """A part whose hooks give what is given, or call it with the hook's arguments."""
    functions = {
        name: (lambda self, value=value, **arguments: value(**arguments) if callable(value) else value)
        for name, value in given.items()
    }
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Odd", (Odd,), functions))()


class Closing(torch.optim.LBFGS):
    pass


def masked_before(batch, **_):
    mask = batch["attention_mask"].clone()
    mask[:, 0] = 0
    return batch | {"attention_mask": mask}


WRONG = {
    "loss of each token": (
        {"loss": lambda hidden, **_: hidden.square().sum(-1)},
        "odd: its `loss` gives a tensor of float32 .*: it must give a 0-dim float tensor",
    ),
    "loss as a number": ({"loss": 0.5}, "odd: its `loss` gives 0.5: it must give a 0-dim float tensor, or None"),
    "loss elsewhere": (
        {"loss": lambda **_: torch.zeros((), device="meta")},
        "odd: its `loss` gives a tensor on meta, the run is on cpu",
    ),
    "penalty of each tensor": (
        {"before_clip": lambda **_: torch.zeros(3)},
        r"odd: its `before_clip` gives a tensor of float32 \[3\]",
    ),
    "penalty as text": ({"before_clip": "0.1"}, "odd: its `before_clip` gives '0.1'"),
    "no batch": (
        {"batch": None},
        "odd: the micro-batch that its `batch` gives is None: it must be a dict with input_ids and labels",
    ),
    "batch without labels": (
        {"batch": lambda batch, **_: {"input_ids": batch["input_ids"]}},
        "odd: the micro-batch .* is a dict: it must be",
    ),
    "labels too short": (
        {"batch": lambda batch, **_: batch | {"labels": batch["labels"][:, 1:]}},
        "has labels a tensor of int64 .* beside input_ids",
    ),
    "labels as floats": (
        {"batch": lambda batch, **_: batch | {"labels": batch["labels"].float()}},
        "it must be torch.int64, .batch, tokens., on the CPU",
    ),
    "padding on the left": (
        {"batch": masked_before},
        "odd: .* attention_mask with a 0 before a 1: padding stands on the right",
    ),
    "an optimizer that closes": (
        {"optimizer": lambda run, **_: torch.optim.LBFGS(list(run.weights.values()))},
        "odd: LBFGS computes the loss again",
    ),
    "an optimizer of its kind": (
        {"optimizer": lambda run, **_: Closing(list(run.weights.values()))},
        "odd: Closing computes the loss again",
    ),
    "an optimizer of copies": (
        {"optimizer": lambda run, **_: torch.optim.SGD([w.detach().clone() for w in run.weights.values()])},
        "odd: its optimizer holds none of the trained tensors",
    ),
    "no optimizer": ({"optimizer": 3}, "odd: its `optimizer` gives 3: it must give a torch.optim.Optimizer, or None"),
    "a second optimizer": (
        {"optimizer": lambda run, **_: torch.optim.SGD(run.weights.values())},
        "even and odd cannot be combined: each brings an optimizer",
    ),
    "nothing finished": ({"finish": None}, "odd: its `finish` gives None: it must give tensors by base parameter name"),
    "an unknown name": (
        {"finish": lambda final, **_: final | {"extra.weight": torch.zeros(2)}},
        "odd: its `finish` gives extra.weight, which the base model",
    ),
    "another shape": (
        {"finish": lambda final, **_: {n: t[:1] for n, t in final.items()}},
        "odd: its `finish` gives a tensor of .* for model",
    ),
    "fewer bits": (
        {"finish": lambda final, **_: {n: t.bfloat16() for n, t in final.items()}},
        "in torch.bfloat16, which holds less than the base's torch.float32",
    ),
    "whole numbers": (
        {"finish": lambda final, **_: {n: t.to(torch.int8) for n, t in final.items()}},
        "in torch.int8, which holds less",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what):
    given, said = WRONG[what]
    part = odd(**given)
    others = [type("Even", (type(part),), {"key": "even"})()] if what == "a second optimizer" else []
    with pytest.raises(UserError, match=said):
        if "finish" in given:
            result = run(odd(), epochs=0.1)
            hooks.finished(
                part, part.finish(run=result.run, state={}, final=final_weights(result, ())), base=result.run.base
            )
        else:
            run(part, *others, epochs=0.1)


def test_what_is_documented_works():
    plain = run(odd()).curve
    part = odd(
        before_clip=lambda step, **_: (
            [0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)][step % 3] if step else 0.5
        ),
        loss=lambda hidden, **_: hidden.sum().view(1) * 0,
        finish=lambda final, **_: {n: t.double() for n, t in final.items()},
    )
    result = run(part)
    assert [row["penalty"] for row in result.curve] == [0.5, 0.5] and [row["loss"] for row in result.curve] == [
        row["loss"] for row in plain
    ]
    assert {t.dtype for t in final_weights(result, (part,)).values()} == {torch.float64}
    half = run(odd(), dtype=torch.bfloat16)
    final = {n: t.bfloat16() for n, t in final_weights(half, ()).items()}
    assert hooks.finished(odd(), final, base=half.run.base).keys() == final.keys()  # as many bits as the base has


def test_two_starts_and_a_strange_one_are_refused():
    even = type("Even", (Odd,), {"key": "even"})()
    name = "model.norm.weight"
    start = {name: torch.full((16,), 2.0)}
    model = build("llama", seed=1)
    start = {name: torch.full_like(model.model.norm.weight.detach(), 2.0)}
    assert (run(odd(), states={"odd": {"start": start}}, learning_rate=1e-9).run.weights[name] - 2).abs().max() < 1e-3
    with pytest.raises(UserError, match="even and odd cannot be combined: each brings weights to start from"):
        run(odd(), even, states={"odd": {"start": start}, "even": {"start": start}})
    with pytest.raises(UserError, match="odd: it starts lm_head.bias from .*, which is no trained tensor"):
        run(odd(), states={"odd": {"start": {"lm_head.bias": torch.zeros(2)}}})


def test_labels_that_a_part_changes_count_in_the_steps_division():
    """Rows doubled, and half of the labels dropped: each step's loss is the mean over the labels that are left."""

    def doubled(batch, **_):
        return {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}

    def thinned(batch, **_):
        labels = batch["labels"].clone()
        labels[:, :-1][labels[:, 1:] != -100] = -100  # of three labels the last one stays
        return batch | {"labels": labels}

    def only_last(example):
        labels = example["labels"].clone()
        labels[:-1] = -100
        return example | {"labels": labels}

    plain, twice = run(odd()), run(odd(batch=doubled))
    for name, weight in plain.run.weights.items():
        torch.testing.assert_close(twice.run.weights[name], weight, rtol=1e-4, atol=1e-6)
    assert [row["loss"] for row in twice.curve] == pytest.approx([row["loss"] for row in plain.curve], rel=1e-5)
    assert (twice.tokens, twice.flops) == (plain.tokens, plain.flops)  # what the part adds is charged to it
    assert twice.added["odd"]["tokens"] == plain.tokens and twice.added["odd"]["flops"] == pytest.approx(plain.flops)
    for settings in ({}, {"pack": 64}):
        untouched = run(odd(batch=lambda batch, **_: dict(batch)), **settings)
        assert (untouched.tokens, untouched.flops) == (plain.tokens, plain.flops)
    model = build("llama", seed=1)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = fit(
        model=model,
        parts=(),
        examples=[only_last(e) for e in goldens.texts(18, seed=12, labelled=True)],
        seed=5,
        base=base,
        settings=dataclasses.replace(goldens.SETTINGS, epochs=0.4),
    )
    found = run(odd(batch=thinned))
    assert [row["loss"] for row in found.curve] == pytest.approx([row["loss"] for row in wanted.curve], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_a_part_changes_after_a_step_are_those_of_the_next(dtype):
    """Weights put back to the base after every step: every loss is one of the base."""

    def back(run, **_):
        for name, weight in run.weights.items():
            weight.copy_(run.base[name])

    found = run(odd(after_step=back), dtype=dtype, learning_rate=0.1, schedule="constant", warmup=0.0, epochs=1.0)
    still = run(odd(), dtype=dtype, learning_rate=1e-12, epochs=1.0)
    assert [row["loss"] for row in found.curve] == pytest.approx([row["loss"] for row in still.curve], rel=1e-4)


@pytest.mark.parametrize(("hook", "capability"), [("optimizer", "optimizer"), ("adapt", "adapts")])
def test_a_hook_without_its_capability_is_refused(hook, capability):
    kind = dataclasses.dataclass(frozen=True, kw_only=True)(type("Quiet", (Part,), {hook: lambda self, *_, **__: None}))
    with pytest.raises(
        TypeError, match=f"part 'quiet': it has the hook `{hook}`, so write '{capability}' among its capabilities"
    ):
        register(title="x", paper="", line="x.", key="quiet")(kind)
    assert "quiet" not in REGISTERED


def test_a_report_is_made_json():
    facts = {
        "loss": torch.tensor(0.5),
        "each": torch.arange(3),
        3: np.float32(0.25),
        "array": np.ones(2),
        "pair": (1, {"a"}),
        "nan": math.nan,
        "what": Part,
    }
    found = hooks.report(odd(report=facts), run=None, state={})
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "loss": 0.5,
        "each": [0, 1, 2],
        "3": 0.25,
        "array": [1.0, 1.0],
        "pair": [1, ["a"]],
        "nan": "nan",
        "what": str(Part),
    }
