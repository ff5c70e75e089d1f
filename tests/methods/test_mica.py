"""MiCA: the directions that are trained, peft's own initialisation, and what is merged and saved."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from experiments.training.engine import final_weights
from methods.errors import UserError
from methods.mica import MiCA
from methods.tools.adapter import merged, read_adapter

KINDS = [("llama-tied", ("q_proj", "down_proj")), ("gptj", ("fc_in",)), ("gpt2", ("c_attn", "c_fc"))]


def prepared(part, model):
    return {"calibration": part.calibrate(model=model, general=(), seed=0, progress=None).calibration}


@pytest.mark.parametrize("kind, targets", KINDS)
def test_the_update_stays_in_the_minor_left_singular_directions(make, documents, train, kind, targets):
    part = MiCA(rank=3, alpha=6.0, targets=targets)
    states = {"mica": prepared(part, make(kind))}
    result = train(make(kind), (part,), documents, states=states, weight_decay=0.1)
    assert all(".lora_A." in name for name in result.run.weights)
    final = final_weights(result, (part,))
    assert final
    for name, tensor in final.items():
        turned = (lambda t: t.T) if kind == "gpt2" else (lambda t: t)
        weight, delta = turned(result.run.base[name]), turned(tensor - result.run.base[name])
        u, s, _ = torch.linalg.svd(weight, full_matrices=False)
        minor = u[:, -3:]
        assert delta.norm() > 1e-4
        torch.testing.assert_close(minor @ (minor.T @ delta), delta, rtol=1e-5, atol=1e-6)
        stored = states["mica"]["calibration"][name.replace(".weight", ".B")].double()
        torch.testing.assert_close(stored.T @ stored, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close((weight.T @ stored).norm(dim=0), s[-3:], rtol=1e-4, atol=1e-6)
    assert result.method.reports(result.run)["mica"]["scale"] == 2.0


@pytest.mark.parametrize("kind, targets", KINDS)
def test_it_is_what_peft_computes_and_learns(make, documents, kind, targets):
    part = MiCA(rank=3, alpha=6.0, targets=targets)
    own = part.adapt(make(kind, torch.float32), seed=0, state=prepared(part, make(kind, torch.float32)))
    config = LoraConfig(
        r=3, lora_alpha=6.0, target_modules=list(targets), init_lora_weights="mica", fan_in_fan_out=kind == "gpt2"
    )
    theirs = get_peft_model(make(kind, torch.float32), config)
    draw, signs = torch.Generator().manual_seed(3), {}
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in theirs.named_parameters() if p.requires_grad]
    for name in trained:
        b, b_theirs = (m.get_parameter(name.replace("lora_A", "lora_B")).detach() for m in (own, theirs))
        assert (own.get_parameter(name) == 0).all() and (theirs.get_parameter(name) == 0).all()
        signs[name] = (b * b_theirs).sum(0).sign()[:, None]  # of a singular vector the sign is free
        torch.testing.assert_close(b * signs[name].T, b_theirs, rtol=1e-3, atol=1e-3)
        a = torch.randn(own.get_parameter(name).shape, generator=draw)
        own.get_parameter(name).data.copy_(signs[name] * a)
        theirs.get_parameter(name).data.copy_(a)
    losses = [model(input_ids=documents[0]["input_ids"][None]).logits.square().mean() for model in (own, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.backward()
    for name in trained:
        gradient = own.get_parameter(name).grad * signs[name]
        torch.testing.assert_close(gradient, theirs.get_parameter(name).grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_adapter_is_an_ordinary_one_of_the_same_rank(make, documents, train, tmp_path, dtype):
    part = MiCA(rank=3, alpha=6.0)
    states = {"mica": prepared(part, make(dtype=dtype))}
    result = train(make(dtype=dtype), (part,), documents, states=states)
    part.save(run=result.run, state={}, folder=tmp_path)
    updates, scale, _ = read_adapter(tmp_path / "adapter")
    assert scale == 2.0 and {len(update["a"]) for update in updates.values()} == {3}
    final = final_weights(result, (part,))
    for name, update in updates.items():
        assert torch.equal(merged(result.run.base[name], **update, scale=scale), final[name])
    loaded = PeftModel.from_pretrained(make(dtype=torch.float32), tmp_path / "adapter").merge_and_unload()
    for name, tensor in final.items():
        if dtype == torch.float32:
            torch.testing.assert_close(loaded.get_parameter(name).detach(), tensor, rtol=1e-5, atol=1e-6)


def test_more_directions_than_there_are_is_refused(make):
    part = MiCA(rank=17, targets=("k_proj",))
    with pytest.raises(UserError, match=r"mica.rank is 17: .*k_proj is \[16, 32\]"):
        part.adapt(make(), seed=0, state={})
