"""O-LoRA: the penalty and its gradient by brute force, what it does to the adapter, and where A_old comes from."""

import json
import math

import pytest
import torch

from methods.errors import UserError
from methods.lora import LoRA
from methods.o_lora import OLoRA

LORA = LoRA(rank=2)


def trained(make, documents, train, fitting, *, strength, lora=LORA, **settings):
    part = OLoRA(strength=strength, samples=4, length=8, **settings)
    base = {name: p.detach().clone() for name, p in make().named_parameters()}
    model = lora.adapt(make(), seed=0)
    prepared = part.prepare(
        model=model, base=base, general=documents, seed=0, fit=fitting(base, learning_rate=1e-2), progress=None
    )
    state = {"o_lora": {"carry": prepared.carry}}
    return train(make(), (lora, part), documents, states=state, epochs=4.0), prepared


@pytest.mark.parametrize("kind", ["llama-tied", "gptj", "gpt2"])
def test_the_gradient_is_that_of_the_sum_of_absolute_products(make, run_of, drawn, kind):
    targets = ("c_attn", "c_fc") if kind == "gpt2" else ("q_proj", "v_proj")
    model = drawn(LoRA(rank=3, targets=targets).adapt(make(kind), seed=0))
    run = run_of(model, {name: p.detach() for name, p in make(kind).named_parameters()})
    draw = torch.Generator().manual_seed(2)
    old = {
        name.removeprefix("base_model.model.").replace(".lora_A.default", ""): torch.randn(
            5, weight.shape[1], generator=draw, dtype=torch.float64
        )
        for name, weight in run.weights.items()
        if ".lora_A." in name
    }
    for weight in run.weights.values():
        weight.grad = torch.ones_like(weight)
    state = {"carry": old}
    part = OLoRA(strength=0.3)
    part.begin(run=run, state=state, examples=())
    value = part.before_clip(run=run, state=state, step=0)
    total = 0.0
    for name, weight in run.weights.items():
        if ".lora_A." not in name:
            assert (weight.grad == 1).all()
            continue
        other = old[name.removeprefix("base_model.model.").replace(".lora_A.default", "")]
        brute = 0.3 * sum((one * two).sum().abs() for one in other for two in weight)
        (expected,) = torch.autograd.grad(brute, weight)
        torch.testing.assert_close(weight.grad - 1, expected)
        total += brute.item()
    assert value.item() == pytest.approx(total)


def test_where_rows_are_orthogonal_nothing_is_pulled(make, run_of):
    model = LORA.adapt(make(), seed=0)
    run = run_of(model, {name: p.detach() for name, p in make().named_parameters()})
    old = {}
    for name, weight in run.weights.items():
        weight.grad = torch.zeros_like(weight)
        if ".lora_A." in name:
            weight.data[:, 16:] = 0
            basis = torch.zeros(2, 32, dtype=torch.float64)
            basis[0, 20] = basis[1, 30] = 1.0
            old[name.removeprefix("base_model.model.").replace(".lora_A.default", "")] = basis
    state, part = {"carry": old}, OLoRA()
    part.begin(run=run, state=state, examples=())
    assert part.before_clip(run=run, state=state, step=0) == 0
    assert not any(weight.grad.any() for weight in run.weights.values())
    assert part.report(run=run, state=state) == {"overlap_at_start": 0.0, "overlap": 0.0}


def test_the_update_becomes_orthogonal_to_what_the_old_adapter_reads(make, documents, train, fitting):
    overlaps = {}
    for strength in (0.0, 0.5):
        result, prepared = trained(make, documents, train, fitting, strength=strength)
        report = result.method.reports(result.run)["o_lora"]
        cosines = []
        for name, old in prepared.carry.items():
            a = result.run.weights[f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight"].detach()
            cosines += [
                abs(float(one @ two) / math.sqrt(float(one @ one) * float(two @ two))) for one in old for two in a
            ]
        assert report["overlap"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)
        overlaps[strength] = report
    assert overlaps[0.0]["overlap_at_start"] == overlaps[0.5]["overlap_at_start"] < 0.35  # drawn independently
    assert overlaps[0.5]["overlap"] < 0.3 * overlaps[0.0]["overlap"]


def test_the_old_adapter_is_fitted_on_general_text_from_a_draw_of_its_own(make, documents, train, fitting):
    result, prepared = trained(make, documents, train, fitting, strength=0.0)
    assert prepared.tokens == sum(min(8, len(row["input_ids"])) for row in documents[:4])
    assert prepared.notes == {"layers": 4, "documents": 4} and len(prepared.carry) == 4
    again = trained(make, documents, train, fitting, strength=0.0)[1]
    other = trained(make, documents, train, fitting, strength=0.0, learning_rate=1e-3)[1]
    for name, old in prepared.carry.items():
        assert torch.equal(old, again.carry[name]) and not torch.equal(old, other.carry[name])


def test_a_saved_adapter_can_be_the_old_one(make, documents, train, fitting, tmp_path):
    earlier = train(make(), (LoRA(rank=3),), documents)
    LoRA(rank=3).save(run=earlier.run, state={}, folder=tmp_path)
    path = str(tmp_path / "adapter")
    shapes = {name: p.shape for name, p in make().named_parameters()}
    OLoRA(path=path).look(shapes=shapes)
    result, prepared = trained(make, documents, train, fitting, strength=0.5, path=path)
    assert prepared.tokens == 0 and OLoRA(path=path).preparation() == ()
    for name, old in prepared.carry.items():
        factor = earlier.run.weights[f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight"]
        torch.testing.assert_close(old.double(), factor.detach(), rtol=1e-6, atol=1e-7)
    report = result.method.reports(result.run)["o_lora"]
    assert report["overlap"] < 0.5 * report["overlap_at_start"]


def test_folders_that_cannot_be_used_are_refused(make, documents, train, tmp_path):
    with pytest.raises(UserError, match="o_lora.path: .* is no folder of a peft adapter"):
        OLoRA(path=str(tmp_path / "nothing")).look(shapes={})
    earlier = train(make(), (LORA,), documents)
    LORA.save(run=earlier.run, state={}, folder=tmp_path)
    folder = tmp_path / "adapter"
    wider = {name: p.shape for name, p in make(hidden_size=64).named_parameters()}
    with pytest.raises(UserError, match="is an adapter of another model"):
        OLoRA(path=str(folder)).look(shapes=wider)
    part = OLoRA(path=str(folder))
    old = part.prepare(model=None, base={}, general=(), seed=0, fit=None, progress=None).carry
    with pytest.raises(UserError, match="is of other layers than this method's"):
        train(make(), (LoRA(targets=("down_proj",)), part), documents, states={"o_lora": {"carry": old}})
    config = json.loads((folder / "adapter_config.json").read_text())
    old_form = {name: value for name, value in config.items() if name not in ("use_rslora", "fan_in_fan_out")}
    (folder / "adapter_config.json").write_text(json.dumps(old_form))
    assert OLoRA(path=str(folder)).look(shapes={}) is None  # written by an earlier peft
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    with pytest.raises(UserError, match="is a LOHA adapter, which has no factor A"):
        OLoRA(path=str(folder)).look(shapes={})


def test_it_needs_adapters_and_general_text(make, documents, train):
    with pytest.raises(UserError, match="o_lora: the method has no adapters: add `lora`"):
        train(make(), (OLoRA(),), documents, states={"o_lora": {"carry": {}}})
    with pytest.raises(UserError, match="there is no general text to fit an adapter on"):
        OLoRA().prepare(model=make(), base={}, general=(), seed=0, fit=None, progress=None)
