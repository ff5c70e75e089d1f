"""Hierarchical regularisation: coefficients, the penalty's closed form, and the general phase in the engine."""

import dataclasses
import json
import math

import pytest
import torch

from methods.errors import UserError
from methods.hierarchical import Hierarchical, keep_strength, layer_coefficients
from methods.lora import LoRA
from methods.mofo import MomentumFilter
from methods.part import Part
from methods.tools.importance import totals

LORA = LoRA(rank=2, alpha=6)
# The answers of the paper and of its published code to the questions in docs/methods/hierarchical.md.
PAPER = {
    "strength": 1.0e-3,
    "temperature": 1.0,
    "groups": "blocks",
    "normalise": "sum",
    "keep_strength": False,
    "xi": 1.0e-9,
    "gradient": "exact",
    "clamp": "end",
    "consolidate": "end",
    "carry_optimizer": False,
}
OFFICIAL = PAPER | {
    "temperature": 1.0e8,
    "groups": "modules",
    "gradient": "displacement",
    "clamp": "step",
    "consolidate": "epoch",
    "carry_optimizer": True,
}


@pytest.fixture
def ready(make, documents, fitting):
    """ready(part, adapter): a prepared state, its base and the adapted model it came from."""

    def prepare(part, adapter=(LORA,), kind="llama-tied", dtype=torch.float64, seed=0):
        base = {n: p.detach().clone() for n, p in make(kind, dtype).named_parameters()}
        model = make(kind, dtype)
        for other in adapter:
            model = other.adapt(model, seed=seed)
        done = part.prepare(
            model=model, base=base, general=documents, seed=seed, fit=fitting(base, batch=2), progress=None
        )
        kept = {kind: getattr(done, kind) for kind in ("importance", "start", "carry") if getattr(done, kind)}
        return done, kept, base, model

    return prepare


# --- coefficients


@pytest.mark.parametrize("temperature", ["auto", 0.5, 1.0, 1e8])
def test_coefficients_are_a_softmax_of_mean_one(temperature):
    norms = [3.0, 1.0, 4.0, 1.0, 5.0]
    scale = (sum((n - 2.8) ** 2 for n in norms) / 5) ** 0.5 if temperature == "auto" else temperature
    powers = [math.exp(n / scale) for n in norms]
    wanted = torch.tensor([5 * p / sum(powers) for p in powers], dtype=torch.float64)
    for given in (norms, torch.tensor(norms, dtype=torch.float32)):
        actual = layer_coefficients(given, temperature)
        torch.testing.assert_close(actual, wanted)
        assert actual.mean().item() == pytest.approx(1)


def test_auto_does_not_depend_on_scale_and_equal_norms_get_equal_coefficients():
    norms = torch.tensor([1.0, 2.0, 7.0])
    torch.testing.assert_close(layer_coefficients(norms, "auto"), layer_coefficients(norms * 1e9, "auto"))
    assert layer_coefficients([2.0, 2.0, 2.0], "auto").tolist() == [1, 1, 1]
    assert layer_coefficients([2.0], "auto").tolist() == [1] and layer_coefficients([2.0], 1.0).tolist() == [1]
    assert layer_coefficients([1e9, 0.0], 1.0).tolist() == [2, 0]


@pytest.mark.parametrize("wrong", [0.0, -1.0, "warm"])
def test_a_wrong_temperature_is_named(wrong):
    with pytest.raises(UserError, match="temperature is"):
        layer_coefficients([1.0, 2.0], wrong)


def test_keep_strength_leaves_the_importance_weighted_sum():
    c, mass = torch.tensor([0.2, 0.8, 2.0]), torch.tensor([5.0, 1.0, 30.0])
    assert (keep_strength(c, mass) * mass).sum() == pytest.approx(mass.sum().item())
    assert torch.equal(keep_strength(c, torch.zeros(3)), c)


# --- penalty


def loss_form(run, importance, start, coefficients, strength, group, uniform):
    """φ Σ c Σ Ω(θ−θ*)², written out once more and differentiable."""
    total = 0.0
    for name, omega in importance.items():
        stem = name.removesuffix(".weight")
        a, b = (f"base_model.model.{stem}.lora_{letter}.default.weight" for letter in "AB")
        if a in run.weights:
            moved = 3.0 * (run.weights[b] @ run.weights[a] - start[b] @ start[a])
        else:
            moved = run.weights[name] - start[name]
        total = total + strength * coefficients[group(name)] * ((omega.mean() if uniform else omega) * moved**2).sum()
    return total


def module_of(name):
    return name.rpartition(".")[0]


def block_of(name):
    if ".layers." in name or ".h." in name:
        return f"block.{name.split('.')[2]}"
    if "embed" in name or "wte" in name:
        return "embedding"
    return "head" if "lm_head" in name else "final_norm"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"groups": "blocks"},
        {"keep_strength": False, "temperature": 2.0},
        {"layer_wise": False},
        {"element_wise": False},
        {"bits": 32},
        PAPER,
        OFFICIAL | {"strength": 0.5},
        {"normalise": "sum"},
    ],
)
@pytest.mark.parametrize("kind, adapter", [("llama-tied", (LORA,)), ("gptj", (LORA,)), ("llama-untied", ())])
def test_closed_form_is_the_gradient_of_the_loss_form(ready, documents, run_of, drawn, dense, settings, kind, adapter):
    part = Hierarchical(**settings)
    done, state, base, model = ready(part, adapter, kind)
    run = run_of(model, base)
    part.begin(run=run, state=state, examples=documents)
    with torch.no_grad():
        for name, value in done.start.items():
            run.weights[name].copy_(value)
    for w in run.weights.values():
        w.grad = torch.zeros_like(w)
    assert part.before_clip(run=run, state=state, step=0) == 0 and all(
        (w.grad == 0).all() for w in run.weights.values()
    )
    drawn(model)

    chosen = part.settings()
    importance = dense(done.importance)
    group = block_of if chosen["groups"] == "blocks" else module_of
    groups = list(dict.fromkeys(map(group, importance)))
    own = {g: [o for n, o in importance.items() if group(n) == g] for g in groups}
    c = layer_coefficients([math.sqrt(sum((o**2).sum() for o in own[g])) for g in groups], chosen["temperature"])
    c = c if chosen["layer_wise"] else torch.ones_like(c)
    if chosen["keep_strength"]:
        mass = torch.tensor([sum(o.sum() for o in own[g]) for g in groups], dtype=torch.float64)
        c = c * mass.sum() / (c * mass).sum()
    coefficients = dict(zip(groups, c.tolist()))
    assert state["coefficients"] == pytest.approx(coefficients)
    strength = chosen["strength"] / (len(groups) if chosen["normalise"] == "sum" else 1)
    wanted = loss_form(run, importance, done.start, coefficients, strength, group, not chosen["element_wise"])
    gradients = torch.autograd.grad(wanted, [*run.weights.values()])
    value = part.before_clip(run=run, state=state, step=0)
    assert wanted > 0
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-10, atol=0)
    for (name, w), g in zip(run.weights.items(), gradients):
        torch.testing.assert_close(w.grad, g, rtol=1e-9, atol=1e-12 * wanted.item(), msg=lambda m, n=name: f"{n}: {m}")
    report = part.report(run=run, state=state)
    assert json.loads(json.dumps(report))["coefficients"] == state["coefficients"]


def test_switching_the_layers_off_leaves_the_total_strength(ready, documents, run_of):
    sums = []
    for layer_wise in (True, False):
        part = Hierarchical(layer_wise=layer_wise, strength=2.0)
        done, state, base, model = ready(part)
        part.begin(run=run_of(model, base), state=state, examples=documents)
        sums.append(sum(strength * totals(omega)[0] for _, omega, strength in state["terms"]))
    assert sums[0] == pytest.approx(sums[1])


# --- settings


def test_the_default_study_has_blocks_for_the_paper_and_its_code():
    from experiments.study import config

    methods = config.load().methods
    for name, wanted in (("hierarchical-paper", PAPER), ("hierarchical-official", OFFICIAL)):
        part = next(part for part in methods[name].parts if part.key == "hierarchical")
        assert part == Hierarchical(samples=256, length=256, **wanted)


@pytest.mark.parametrize(
    "wrong", [{"strength": -1}, {"temperature": 0}, {"temperature": "warm"}, {"groups": "layers"}, {"xi": 0.0}]
)
def test_wrong_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"hierarchical.{name} is .*it must be"):
        Hierarchical(**wrong)


# --- the general phase


@pytest.mark.parametrize("adapter", [(LORA,), ()])
def test_preparation_is_a_run_on_general_text(ready, documents, train, make, dense, adapter):
    part = Hierarchical(epochs=2, learning_rate=3e-3, samples=4, length=8)
    done, state, base, model = ready(part, adapter)
    fresh = make()
    for other in adapter:
        fresh = other.adapt(fresh, seed=0)
    assert not any(module._forward_hooks for module in model.modules())
    short = [{n: t[:8] for n, t in d.items()} for d in documents[:4]]
    alone = train(fresh, (), short, epochs=2, learning_rate=3e-3, base=base)
    assert done.tokens == alone.tokens and done.notes["documents"] == 4 and done.carry is None
    assert done.start.keys() == alone.run.weights.keys()
    assert all(torch.equal(done.start[n], w) for n, w in alone.run.weights.items())
    assert len(done.importance) == (4 if adapter else len(base)) and all(
        (o >= 0).all() for o in dense(done.importance).values()
    )


@pytest.mark.parametrize("adapter", [(LORA,), ()])
def test_zero_strength_is_plain_fine_tuning_from_the_same_start(ready, documents, train, make, dense, adapter):
    done, state, base, _ = ready(Hierarchical(), adapter, dtype=torch.float32)
    nothing = train(
        make(dtype=torch.float32),
        (*adapter, Hierarchical(strength=0.0)),
        documents,
        states={"hierarchical": state},
        base=base,
    )
    held = train(
        make(dtype=torch.float32),
        (*adapter, Hierarchical(strength=1.0)),
        documents,
        states={"hierarchical": state},
        base=base,
    )
    begun = make(dtype=torch.float32)
    for other in adapter:
        begun = other.adapt(begun, seed=0)
    with torch.no_grad():
        for name, value in done.start.items():
            begun.get_parameter(name).copy_(value)
    plain = train(begun, (), documents, base=base)
    assert all(torch.equal(w, nothing.run.weights[n]) for n, w in plain.run.weights.items())
    assert any(not torch.equal(w, held.run.weights[n]) for n, w in plain.run.weights.items())
    state["importance"] = {
        n: o * torch.nan for n, o in dense(state["importance"]).items()
    }  # nothing is added, not zero times something
    spared = train(
        make(dtype=torch.float32),
        (*adapter, Hierarchical(strength=0.0)),
        documents,
        states={"hierarchical": state},
        base=base,
    )
    assert all(torch.equal(w, spared.run.weights[n]) for n, w in plain.run.weights.items())
    assert held.curve[0]["penalty"] == 0 and held.curve[-1]["penalty"] > 0
    assert [row["penalty"] for row in nothing.curve] == [0, 0, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent(Part):
    key = "descent"

    def optimizer(self, *, run, learning_rate, betas, eps, weight_decay):
        return torch.optim.SGD(run.weights.values(), lr=learning_rate)


def test_the_official_code_carries_adams_state(ready, documents, train, make):
    part = Hierarchical(**OFFICIAL)
    done, state, base, _ = ready(part)
    assert {key.partition("::")[2] for key in done.carry} == {"step", "exp_avg", "exp_avg_sq"}
    steps = {value.item() for key, value in done.carry.items() if key.endswith("::step")}
    assert steps == {3.0}
    for optimizer in ((), (MomentumFilter(fraction=0.5),)):
        result = train(make(), (LORA, part, *optimizer), documents, states={"hierarchical": state}, base=base)
        assert {s["step"].item() for s in result.optimizer.state.values()} == {6.0}
    with pytest.raises(
        UserError, match="SGD cannot begin with Adam's state of the general phase: set carry_optimizer: false"
    ):
        train(make(), (LORA, part, Descent()), documents, states={"hierarchical": state}, base=base)
    dropped = train(
        make(),
        (LORA, Hierarchical(**OFFICIAL | {"carry_optimizer": False})),
        documents,
        states={"hierarchical": state},
        base=base,
    )
    assert {s["step"].item() for s in dropped.optimizer.state.values()} == {3.0}


def test_an_anchor_is_small_with_an_adapter(ready, documents, run_of):
    part = Hierarchical()
    done, state, base, model = ready(part)
    part.begin(run=run_of(model, base), state=state, examples=documents)
    assert sum(t.numel() for t in state["anchor"].values()) == sum(t.numel() for t in done.start.values())


def test_one_group_that_takes_all_is_warned_of(ready, documents, run_of):
    for settings, warned in (
        ({"temperature": 1e-6}, True),
        ({"temperature": 1e12}, False),
        ({"temperature": 1e-6, "layer_wise": False}, False),
    ):
        part = Hierarchical(**settings)
        _, state, base, model = ready(part)
        run = run_of(model, base)
        part.begin(run=run, state=state, examples=documents)
        warning = part.report(run=run, state=state)["warning"]
        assert (warning is not None) == warned
        if warned:
            assert (
                max(state["coefficients"], key=state["coefficients"].get) in warning and "higher temperature" in warning
            )


def test_no_general_text_and_foreign_importance_are_named(make, documents, ready, run_of):
    with pytest.raises(UserError, match="no general text"):
        Hierarchical().prepare(model=make(), base={}, general=[], seed=0, fit=None, progress=None)
    _, state, base, model = ready(Hierarchical())
    state["importance"].popitem()
    with pytest.raises(UserError, match="no importance was prepared for .*v_proj"):
        Hierarchical().begin(run=run_of(model, base), state=state, examples=documents)


def test_a_failed_phase_leaves_no_hooks(make, documents, ready):
    model = LORA.adapt(make(), seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    hooked = []

    def fit(*, model, parts, **_):
        from experiments.training.engine import Run

        run = Run(
            model=model,
            weights={n: p for n, p in model.named_parameters() if p.requires_grad},
            base=before,
            seed=0,
            device="cpu",
        )
        parts[0].begin(run=run, state={}, examples=documents)
        hooked.append(sum(len(module._forward_hooks) for module in model.modules()))
        raise UserError("the loss is nan")

    with pytest.raises(UserError, match="nan"):
        Hierarchical().prepare(model=model, base=before, general=documents, seed=0, fit=fit, progress=None)
    assert hooked == [4] and not any(module._forward_hooks for module in model.modules())


def test_theta_star_is_rounded_once_to_the_checkpoints_dtype_and_training_starts_there(ready, documents, train, make):
    done, state, base, _ = ready(Hierarchical(), (), dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in done.start.values())
    held = train(make(dtype=torch.bfloat16), (Hierarchical(),), documents, states={"hierarchical": state}, base=base)
    assert held.curve[0]["penalty"] == 0 and held.curve[-1]["penalty"] > 0
    assert all(t.dtype == torch.bfloat16 for t in held.states["hierarchical"]["anchor"].values())
