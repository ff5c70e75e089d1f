"""L2-SP and L1 against their losses written out, on all weights and on LoRA's effective update."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from methods.l1 import L1
from methods.l2_sp import L2SP
from methods.lora import LoRA

STRENGTH = 0.3


def gpt2():
    """GPT-2 stores its linear layers as in × out."""
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=31, n_positions=32)).double()


def base_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def loss_form(part, run, targets):
    """The penalty as a differentiable function of what is trained, from the definition alone."""
    moved = []
    for name, weight in run.weights.items():
        if ".lora_A." in name:
            b = run.weights[name.replace("lora_A", "lora_B")]
            moved.append(7 / 3 * b @ weight)  # alpha over rank
        elif ".lora_B." not in name:
            moved.append(weight - run.base[name])
    count = sum(m.numel() for m in moved)
    each = sum((m**2).sum() / 2 if isinstance(part, L2SP) else m.abs().sum() for m in moved)
    return STRENGTH * each / (count if part.normalise == "mean" else 1)


@pytest.mark.parametrize("normalise", ["sum", "mean"])
@pytest.mark.parametrize("part", [L2SP, L1])
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("c_attn",)], ids=["full", "lora", "lora-conv1d"])
def test_the_gradient_and_the_value_are_those_of_the_loss(make, run_of, drawn, part, targets, normalise):
    model = gpt2() if targets == ("c_attn",) else make()
    base = base_of(model)
    model = LoRA(rank=3, alpha=7, targets=targets).adapt(model, seed=0) if targets else model
    part = part(strength=STRENGTH, normalise=normalise)
    run, state = run_of(model, base), {}
    part.begin(run=run, state=state, examples=())
    drawn(model)
    wanted = loss_form(part, run, targets)
    gradients = torch.autograd.grad(wanted, [*run.weights.values()])
    for weight in run.weights.values():
        weight.grad = torch.ones_like(weight)  # it is added to what is there
    value = part.before_clip(run=run, state=state, step=0)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=0)
    for (name, weight), gradient in zip(run.weights.items(), gradients, strict=True):
        torch.testing.assert_close(weight.grad - 1, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    entries = {(): sum(t.numel() for t in base.values()), ("c_attn",): 8 * 24}.get(targets)
    assert entries is None or part.report(run=run, state=state) == {"penalised": entries}
    assert sum(t.nbytes for t in state["anchor"].values()) == (0 if targets else sum(t.nbytes for t in base.values()))


def test_a_tied_head_is_counted_once(make, run_of):
    model = make("llama-tied")
    run = run_of(model, base_of(model))
    assert L1().report(run=run, state={}) == {"penalised": sum(p.numel() for p in model.parameters())}


@pytest.mark.parametrize("part", [L2SP, L1])
@pytest.mark.parametrize("adapter", [(), (LoRA(rank=2),)], ids=["full", "lora"])
def test_where_nothing_has_moved_nothing_is_pulled(make, run_of, part, adapter):
    model, base = make(), base_of(make())
    for one in adapter:
        model = one.adapt(model, seed=0)
    run, state, part = run_of(model, base), {}, part(strength=5.0)
    part.begin(run=run, state=state, examples=())
    for weight in run.weights.values():
        weight.grad = torch.zeros_like(weight)
    assert part.before_clip(run=run, state=state, step=0) == 0
    assert all((weight.grad == 0).all() for weight in run.weights.values())


@pytest.mark.parametrize("part", [L2SP, L1])
def test_a_stronger_pull_ends_nearer_to_the_base(make, documents, train, part):
    base, distances = base_of(make()), []
    for strength in (0.0, 1e-2, 1e2):
        result = train(make(), (part(strength=strength),), documents, epochs=3.0, clip=1.0)
        moved = torch.cat([(w.detach() - base[n]).flatten() for n, w in result.run.weights.items()])
        distances.append(moved.norm().item())
        assert not strength or result.curve[-1]["penalty"] > 0
    assert distances[0] > distances[1] > distances[2]


def test_l2_pulls_in_proportion_and_l1_equally(make, run_of):
    model, base = make(), base_of(make())
    run, name = run_of(model, base), "lm_head.weight" if "lm_head.weight" in base else next(iter(base))
    with torch.no_grad():
        run.weights[name].view(-1)[:3] += torch.tensor([0.5, -0.25, 1e-6], dtype=torch.float64)
    for part, wanted in ((L2SP(strength=2.0), [1.0, -0.5, 2e-6]), (L1(strength=2.0), [2.0, -2.0, 2.0])):
        for weight in run.weights.values():
            weight.grad = torch.zeros_like(weight)
        state = {}
        part.begin(run=run, state=state, examples=())
        part.before_clip(run=run, state=state, step=0)
        assert run.weights[name].grad.view(-1)[:4].tolist() == pytest.approx([*wanted, 0.0], abs=1e-9)
