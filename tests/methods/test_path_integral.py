"""ω and Ω against their definition along a recorded path, and against a loss whose integral is known."""

import pytest
import torch
from torch.nn import functional as F

from experiments.training.batches import schedule
from methods.lora import LoRA
from methods.part import Run
from methods.tools import adam as moments
from methods.tools.path_integral import PathIntegral

SETTINGS = {"batch": 4, "micro_batch": 2, "epochs": 2, "learning_rate": 3e-3, "weight_decay": 0.1, "clip": 0.5}
NAMES = {"lora": ("q_proj", "v_proj")}


def recorded(make, documents, kind, adapter, lora_scale):
    """The phase with torch's AdamW and autograd: [(θ before, dL/dθ, θ after, factors, their gradients, lr)]."""
    model = make(kind)
    for part in adapter:
        model = part.adapt(model, seed=0)
    parameters = dict(model.named_parameters())
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    dense = [n for n in parameters if n.endswith("base_layer.weight")] if adapter else list(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1.0, weight_decay=SETTINGS["weight_decay"])
    plan = schedule([len(d["input_ids"]) for d in documents], SETTINGS["batch"], 0, SETTINGS["epochs"])

    def theta():
        if not adapter:
            return {n: trained[n].detach().clone() for n in dense}
        return {
            n: (parameters[n] + lora_scale * parameters[_factor(n, "B")] @ parameters[_factor(n, "A")]).detach()
            for n in dense
        }

    path = []
    for step, indices in enumerate(plan):
        for n in dense:
            parameters[n].requires_grad_(True)
        asked = sum(int((documents[i]["labels"][1:] != -100).sum()) for i in indices)
        loss = (
            sum(
                F.cross_entropy(
                    model(input_ids=documents[i]["input_ids"][None]).logits[0, :-1],
                    documents[i]["labels"][1:],
                    reduction="sum",
                )
                for i in indices
            )
            / asked
        )
        loss.backward()
        g = {n: parameters[n].grad.clone() for n in dense}
        factors = {n: (p.detach().clone(), p.grad.clone()) for n, p in trained.items()} if adapter else {}
        if adapter:
            for n in dense:
                parameters[n].requires_grad_(False)
                parameters[n].grad = None
        before = theta()
        rate = SETTINGS["learning_rate"] * (1 - step / len(plan))
        optimizer.param_groups[0]["lr"] = rate
        torch.nn.utils.clip_grad_norm_(trained.values(), SETTINGS["clip"])
        optimizer.step()
        optimizer.zero_grad()
        path.append((before, g, theta(), factors, rate))
    return path, len(plan) // 2


def _factor(name, letter):
    return name.replace("base_layer.weight", f"lora_{letter}.default.weight")


@pytest.mark.parametrize("clamp", ["end", "step"])
@pytest.mark.parametrize("consolidate", ["end", "epoch"])
@pytest.mark.parametrize(
    "kind, adapter, gradient",
    [
        ("llama-tied", (), "exact"),
        ("gptj", (), "exact"),
        ("llama-tied", (LoRA(rank=2, alpha=3),), "exact"),
        ("gptj", (LoRA(rank=2, alpha=3),), "exact"),
        ("llama-untied", (LoRA(rank=2, alpha=3),), "displacement"),
    ],
)
def test_equals_its_definition_along_the_path(make, documents, train, kind, adapter, gradient, clamp, consolidate):
    part = PathIntegral(gradient=gradient, clamp=clamp, consolidate=consolidate, xi=1e-7)
    result = train(make(kind), (*adapter, part), documents, **SETTINGS)
    actual = part.consolidated(result.states["path_integral"])
    part.release()
    path, epoch = recorded(make, documents, kind, adapter, 1.5)
    assert len(path) == result.steps == 2 * epoch
    start = path[0][0]
    for name in start:
        omega, importance = torch.zeros_like(start[name]), torch.zeros_like(start[name])
        for step, (before, g, after, factors, rate) in enumerate(path, start=1):
            gradient_here = g[name]
            if gradient == "displacement":
                (a, ga), (b, gb) = factors[_factor(name, "A")], factors[_factor(name, "B")]
                gradient_here = -1.5 * ((b - rate * gb) @ (a - rate * ga) - b @ a) / rate
            omega = omega - gradient_here * (after[name] - before[name])
            omega = omega.clamp(min=0) if clamp == "step" else omega
            if step == len(path) or (consolidate == "epoch" and step == epoch):
                importance += omega.clamp(min=0) / ((after[name] - start[name]) ** 2 + 1e-7)
                omega = torch.zeros_like(omega)
        ours = actual[name.removeprefix("base_model.model.").replace("base_layer.", "")]
        assert importance.max() > 0
        # Adam turns float32 noise in a gradient near 0 (GPT-J attends in float32) into movement
        near = 5e-3 if kind == "gptj" else 1e-6
        torch.testing.assert_close(
            ours, importance, rtol=near, atol=near * importance.max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rate", [0.2, 0.01])
def test_on_a_quadratic_the_integral_is_the_fall_of_the_loss(rate):
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=draw, dtype=torch.float64) / 6
    curvature, goal = (
        root @ root.T + torch.eye(6, dtype=torch.float64) / 2,
        torch.randn(6, generator=draw, dtype=torch.float64),
    )
    weight = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    model = torch.nn.Module()
    model.weight = weight
    run = Run(model=model, weights={"weight": weight}, base={"weight": weight.detach().clone()}, seed=0, device="cpu")

    def loss():
        return (weight.detach() - goal) @ curvature @ (weight.detach() - goal) / 2

    part, state, first, bent = PathIntegral(), {}, loss(), 0.0
    part.begin(run=run, state=state, examples=[{}])
    optimizer = part.optimizer(run=run, learning_rate=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    part.optimizer_ready(run=run, state=state, optimizer=optimizer)
    for step in range(200):
        gradient = curvature @ (weight.detach() - goal)
        run.clipped = torch.tensor(0.5)  # the optimizer sees half of the gradient
        weight.grad = gradient / 2
        movement = -rate * gradient
        optimizer.watch(weight, slice(0, 4), movement[:4])
        optimizer.watch(weight, slice(4, 6), movement[4:])
        with torch.no_grad():
            weight += movement
        bent += rate**2 * gradient @ curvature @ gradient / 2
        part.after_step(run=run, state=state, step=step, gradient=None)
    fall = first - loss()
    torch.testing.assert_close(
        state["omega"]["weight"].sum(), fall + bent
    )  # a step's sum is the fall and its curvature term
    if rate == 0.01:
        torch.testing.assert_close(state["omega"]["weight"].sum(), fall, rtol=0.02, atol=0)
    omega = state["omega"]["weight"].clone()
    torch.testing.assert_close(part.consolidated(state)["weight"], omega.clamp(min=0) / (weight.detach() ** 2 + 1e-9))


def test_it_changes_nothing_in_training_and_gives_the_model_back(make, documents, train):
    for adapter in ((), (LoRA(rank=2),)):
        plain = train(make(), adapter, documents)
        part = PathIntegral()
        watched = train(make(), (*adapter, part), documents)
        assert all(torch.equal(w, watched.run.weights[n]) for n, w in plain.run.weights.items())
        assert [r["grad_norm"] for r in plain.curve] == [r["grad_norm"] for r in watched.curve]
        assert sum(len(module._forward_hooks) for module in watched.run.model.modules()) == (4 if adapter else 0)
        part.release()
        part.release()
        assert not any(module._forward_hooks for module in watched.run.model.modules())


def test_omega_is_the_gradient_times_what_copies_of_the_weights_show(monkeypatch):
    monkeypatch.setattr(moments, "CPU_CHUNK", 64)
    draw = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(30, 41, generator=draw, dtype=torch.float64) for _ in range(2))
    weight = torch.nn.Parameter(start.clone())
    run = Run(
        model=torch.nn.ParameterDict({"w": weight}), weights={"w": weight}, base={"w": start}, seed=0, device="cpu"
    )
    part, state, omega = PathIntegral(), {}, torch.zeros_like(start)
    part.begin(run=run, state=state, examples=[])
    optimizer = part.optimizer(run=run, learning_rate=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    part.optimizer_ready(run=run, state=state, optimizer=optimizer)
    for step in (1, 2, 3):
        run.clipped = torch.tensor(0.25 * step)
        weight.grad, before = gradient * step * run.clipped, weight.detach().clone()
        optimizer.step()
        omega -= gradient * step * (weight.detach() - before)
    torch.testing.assert_close(state["omega"]["w"], omega, rtol=1e-9, atol=1e-12)


def test_bf16_models_are_measured_on_their_float32_weights(make, documents, train):
    part = PathIntegral()
    result = train(LoRA(rank=2).adapt(make(dtype=torch.bfloat16), seed=0), (part,), documents)
    part.release()
    assert {t.dtype for t in part.consolidated(result.states["path_integral"]).values()} == {torch.float32}
