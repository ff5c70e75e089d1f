"""Effective weights: what LoRA's factors stand for, and where a dense gradient goes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from methods.errors import UserError
from methods.lora import LoRA
from methods.tools.effective import adapted_names, effective_weights


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gptj"])
def test_full_parameters(make, run_of, drawn, kind):
    base = (
        make(kind).state_dict() if kind != "llama-tied" else {n: p.detach() for n, p in make(kind).named_parameters()}
    )
    model = drawn(make(kind))
    weights = effective_weights(run_of(model, base))
    assert [w.name for w in weights] == [n for n, _ in model.named_parameters()] == adapted_names(model)
    for w in weights:
        parameter = model.get_parameter(w.name)
        assert torch.equal(w.value(), parameter.detach() - base[w.name])
        w.pull(torch.ones_like(parameter), scale=2.0)
        w.pull(torch.ones_like(parameter))
        assert (parameter.grad == 3).all()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama-tied", "gptj"])
def test_lora_is_what_peft_merges_and_pulls_as_autograd_does(make, run_of, drawn, kind, rslora):
    plain = dict(make(kind).named_parameters())
    model = drawn(LoRA(rank=3, alpha=5, rslora=rslora, targets=("q_proj", "v_proj")).adapt(make(kind), seed=0))
    weights = effective_weights(run_of(model, plain))
    assert [w.name for w in weights] == adapted_names(model) and len(weights) == 4
    parameters = dict(model.named_parameters())
    for w in weights:
        a, b = parameters[w.a], parameters[w.b]
        direction = torch.randn(w.value().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert w.scaling == pytest.approx(5 / (3**0.5 if rslora else 3))
        ga, gb = torch.autograd.grad((w.scaling * (b @ a) * direction).sum(), (a, b))
        w.pull(direction, scale=0.5)
        torch.testing.assert_close(a.grad, 0.5 * ga)
        torch.testing.assert_close(b.grad, 0.5 * gb)
    values = {w.name: w.value() for w in weights}
    merged = dict(model.merge_and_unload().named_parameters())
    for name, value in values.items():
        torch.testing.assert_close(merged[name].detach() - plain[name].detach(), value)


def test_change_from_an_anchor_is_exactly_zero_there_and_follows_it(make, run_of, drawn):
    for model in (drawn(make()), drawn(LoRA(rank=2).adapt(make(), seed=0))):
        run = run_of(model, {n: p.detach() for n, p in make().named_parameters()})
        anchor = {n: w.detach().clone() for n, w in run.weights.items()}
        from_base = {w.name: w.value() for w in effective_weights(run)}
        weights = effective_weights(run, anchor=anchor)
        assert all((w.value() == 0).all() for w in weights)
        drawn(model, 1)
        after = {w.name: w.value() for w in effective_weights(run)}
        for w in weights:
            torch.testing.assert_close(w.value(), after[w.name] - from_base[w.name])
        for name, tensor in anchor.items():
            tensor.copy_(run.weights[name].detach())
        assert all((w.value() == 0).all() for w in weights)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "not s·B·A"),
        ({"target_modules": ["embed_tokens"]}, "not s·B·A"),
    ],
)
def test_other_adapters_are_refused(make, run_of, wrong, message):
    bare = make("llama-untied")
    base = {n: p.detach() for n, p in make("llama-untied").named_parameters()}
    model = get_peft_model(bare, LoraConfig(**({"target_modules": ["q_proj"], "r": 2} | wrong)))
    with pytest.raises(UserError, match=message):
        effective_weights(run_of(model, base))
