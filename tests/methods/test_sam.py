"""SAM against a plain loop, and the point at which it takes the second gradient."""

import weakref

import pytest
import torch
from torch.nn import functional as F

from experiments.study import ahead
from experiments.study.paths import HERE
from methods import registry
from methods.errors import UserError
from methods.gmt import GradientMask
from methods.hft import HalfFineTuning
from methods.lisa import LISA
from methods.part import Part
from methods.random_mask import RandomMask
from methods.sam import SAM
from tests.experiments import worlds
from tests.experiments.test_ahead import study

LORA = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.2}}


class Watched(Part):
    """Weights and rows of each step, its gradient, and how far the module's own weights are from them in each pass."""

    key = "watched"
    phase = "mask"

    def begin(self, *, state, **_):
        state |= {"rows": [], "weights": [], "gradient": [], "moved": []}

    def examples(self, *, run, state, rows, step):
        state["rows"].append(rows)
        state["weights"].append({name: weight.detach().clone() for name, weight in run.weights.items()})
        return rows

    def loss(self, *, run, state, **_):
        own = dict(run.model.named_parameters())
        differences = [own[name].detach().double() - weight for name, weight in state["weights"][-1].items()]
        state["moved"].append(float(torch.stack([d.norm() for d in differences]).norm()))

    def before_clip(self, *, run, state, step):
        state["gradient"].append({name: weight.grad.clone() for name, weight in run.weights.items()})


def flat(**settings):
    """The demo with SAM alone, and settings of its model."""
    return study(
        HERE,
        ("methods/flat", {"sam": {}}),
        ("grid/methods", ["flat"]),
        *((f"models/llama-tiny/{name}", value) for name, value in settings.items()),
    )


def gradient_of(model, rows):
    total, count = 0.0, 0
    for row in rows:
        nll = F.cross_entropy(model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], reduction="sum")
        total, count = total + nll, count + int((row["labels"][1:] != -100).sum())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(total / count, list(trained.values())), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_steps_gradient_is_that_of_the_moved_weights(make, documents, train, adaptive, frozen):
    class Freezing(Watched):
        def begin(self, *, run, state, **arguments):
            super().begin(run=run, state=state, **arguments)
            name, weight = next(iter(run.weights.items()))
            state["frozen"] = {name: torch.arange(weight.numel()).view(weight.shape) % 2 == 0} if frozen else {}

    rho = 0.3
    result = train(make(), (SAM(rho=rho, adaptive=adaptive), Freezing()), documents, batch=4, micro_batch=2)
    seen, model = result.states["watched"], make()
    for step in (0, 1):
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in seen["weights"][step].items():
                parameters[name].copy_(weight)
        first = gradient_of(model, seen["rows"][step])
        for name, mask in seen["frozen"].items():
            first[name][mask] = 0
        scale = {n: parameters[n].detach().abs() + 0.01 if adaptive else torch.ones_like(g) for n, g in first.items()}
        length = torch.cat([(scale[n] * g).flatten() for n, g in first.items()]).norm()
        with torch.no_grad():
            for name, g in first.items():
                parameters[name].add_(rho * scale[name] ** 2 * g / length)
        for name, g in gradient_of(model, seen["rows"][step]).items():
            torch.testing.assert_close(seen["gradient"][step][name], g, rtol=1e-7, atol=1e-9)
    assert result.added["sam"]["tokens"] == result.tokens and result.added["sam"]["flops"] == result.flops


@pytest.mark.parametrize("adapters", [False, True])
def test_a_bfloat16_model_is_moved_by_rho(make, documents, train, adapters):
    """In what it computes with, at a ρ that bfloat16 would round away nearly whole."""
    rho = 1e-3
    model = make(dtype=torch.bfloat16)
    parts = (*registry.build(LORA if adapters else {}), SAM(rho=rho), Watched())
    result = train(model, parts, documents, micro_batch=1, learning_rate=1e-3)
    moved = result.states["watched"]["moved"]
    first, second = moved[0::4] + moved[1::4], moved[2::4] + moved[3::4]  # two micro-batches a pass
    assert set(first) == {0.0} and second == pytest.approx([rho] * len(second), rel=0.01)
    assert {p.dtype for p in result.run.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_gradients_have_the_same_dropout(make, documents, train, dtype):
    """At almost no distance they are therefore almost the same."""
    first = []

    class Recorded(SAM):
        def second_gradient(self, *, run, **arguments):
            first.append({name: weight.grad.clone() for name, weight in run.weights.items()})
            return super().second_gradient(run=run, **arguments)

    parts = (*registry.build(LORA), Recorded(rho=1e-5), Watched())
    second = train(make(dtype=dtype), parts, documents, micro_batch=1).states["watched"]["gradient"]
    for one, two in zip(first, second, strict=True):
        one, two = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in (one, two))
        assert (two - one).norm() < 1e-3 * one.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_pass_holds_neither_the_first_gradient_nor_the_offsets(make, documents, train, dtype):
    """What it needs to go back are the weights alone, as `plan` counts."""
    first, alive = [], []

    class Recorded(SAM):
        def second_gradient(self, *, run, **arguments):
            offsets = super().second_gradient(run=run, **arguments)
            first.append([weakref.ref(tensor) for tensor in offsets.values()])
            return offsets

    class Looking(Part):
        key = "looking"
        phase = "mask"

        def loss(self, **_):
            alive.append(sum(tensor() is not None for tensor in first[-1]) if first else 0)

    train(make(dtype=dtype), (Recorded(rho=0.1), Looking()), documents, micro_batch=1, epochs=0.5)
    assert first and all(first) and set(alive) == {0}


def test_a_step_without_labels_moves_nothing(make, documents, train):
    """However large ρ is: there is no gradient, and so no direction."""
    rows = [row | {"labels": torch.full_like(row["labels"], -100)} for row in documents]
    model = make(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = train(model, (SAM(rho=5.0),), rows, epochs=0.5).run.weights
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


def test_without_a_distance_a_bfloat16_run_computes_in_bfloat16(make, documents, train):
    plain, none = (train(make(dtype=torch.bfloat16), parts, documents) for parts in ((), (SAM(rho=0.0),)))
    assert all(torch.equal(none.run.weights[name], weight) for name, weight in plain.run.weights.items())
    assert none.added == {}


def test_a_shared_model_that_computes_in_bfloat16_is_refused(make, documents, tmp_path):
    with worlds.of_one() as shards, pytest.raises(UserError, match="sam: it takes a gradient at weights moved by less"):
        worlds.cell("llama", "full", more=(SAM(),), shards=shards, dtype=torch.bfloat16)


def test_it_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="methods.flat.sam: it takes a gradient .*model llama-tiny"):
        ahead.look(flat(processes=2, compute_dtype="bfloat16"))
    for settings in ({"processes": 2}, {"compute_dtype": "bfloat16"}):
        ahead.look(flat(**settings))


@pytest.mark.parametrize(
    "kind, settings",
    [
        (GradientMask, {"mask": "update"}),
        (RandomMask, {"fraction": 0.5, "every": 1}),
        (LISA, {"every": 1}),
        (HalfFineTuning, {"redraw": "epoch"}),
    ],
)
def test_the_weights_are_moved_where_this_step_may_move_them(make, documents, train, kind, settings):
    """Not where the last one did. A mask that is chosen by the step's gradient is not known yet."""
    still, frozen = [], []

    class Recorded(SAM):
        def second_gradient(self, *, run, **arguments):
            still.append({n: w.grad == 0 for n, w in run.weights.items() if n.endswith("proj.weight")})
            return super().second_gradient(run=run, **arguments)

    class Masking(kind):
        key = "masking"

        def after_step(self, *, run, state, **_):
            frozen.append(state.get("frozen", {}))

    train(make(), (Masking(**settings), Recorded(rho=0.1)), documents, epochs=2.0)
    for step, (one, masks) in enumerate(zip(still, frozen, strict=True)):
        for name, zero in one.items():
            mask = torch.tensor(False) if kind is GradientMask else masks.get(name, torch.tensor(False))
            assert torch.equal(zero, mask.expand_as(zero)), (step, name)
    assert any(mask.any() for mask in frozen[-1].values())
