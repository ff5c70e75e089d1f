"""LoRA: what is drawn, merged and saved."""

import json

import pytest
import torch
from peft import PeftModel

from experiments.training.engine import final_weights
from methods import registry
from methods.errors import UserError
from methods.kl import KL
from methods.l2_sp import L2SP
from methods.lora import LoRA
from methods.tools.adapter import merged, read_adapter, row_norms
from methods.wise_ft import WiSEFT


def logits(model, documents):
    with torch.no_grad():
        return model.eval()(input_ids=documents[0]["input_ids"][None]).logits


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("chosen", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize(
    "kind, targets",
    [
        ("llama-tied", ("q_proj", "v_proj")),
        ("gptj", ("q_proj", "fc_in")),
        ("llama-untied", ("down_proj", "k_proj")),
        ("gpt2", ("c_attn", "c_fc")),
    ],
)
def test_merged_and_saved_adapters_compute_what_was_trained(
    make, documents, train, tmp_path, kind, targets, chosen, dtype
):
    base = {n: p.detach().clone() for n, p in make(kind, dtype).named_parameters()}
    part = LoRA(rank=3, alpha=6, targets=targets, dropout=0.1, **chosen)
    result = train(make(kind, dtype), (part,), documents, base=base)
    trained = logits(result.run.model, documents)
    final = final_weights(result, result.method.parts)
    assert {n.rsplit(".", 2)[-2] for n in final} == set(targets) and all(t.dtype == dtype for t in final.values())
    merged = make(kind, dtype)
    assert not torch.allclose(logits(merged, documents), trained, atol=1e-5)
    with torch.no_grad():
        for name, tensor in final.items():
            merged.get_parameter(name).copy_(tensor)
    attends_in_float32 = kind in ("gptj", "gpt2")
    near = {torch.float64: 1e-5 if attends_in_float32 else 1e-11, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(logits(merged, documents), trained, rtol=near, atol=near)
    part.save(run=result.run, state=result.states["lora"], folder=tmp_path)
    loaded = PeftModel.from_pretrained(make(kind, dtype), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(loaded, documents), trained, rtol=near, atol=near)
    beneath = {
        n.removeprefix("base_model.model.").replace(".base_layer.", "."): p
        for n, p in result.run.model.named_parameters()
    }
    assert all(torch.equal(beneath[name], tensor) for name, tensor in base.items())  # nothing but the adapter has moved


def test_saved_files_are_the_same_bytes_every_time(make, documents, train, tmp_path):
    for place in ("one", "two"):
        part = LoRA(rank=2, targets=("v_proj", "q_proj", "down_proj"))
        part.save(run=train(make(), (part,), documents).run, state={}, folder=tmp_path / place)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one/adapter" / name).read_bytes() == (tmp_path / "two/adapter" / name).read_bytes()
    config = json.loads((tmp_path / "one/adapter/adapter_config.json").read_text())
    assert list(config) == sorted(config) and config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_the_seed_alone_draws_the_adapter(make):
    def draw(seed, noise):
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        model = LoRA(rank=2).adapt(make(dtype=torch.float32), seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        return {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}

    first, again, other = draw(0, 1), draw(0, 2), draw(1, 1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    for name in first:
        assert torch.equal(first[name], other[name]) == ("lora_B" in name)
        assert ("lora_B" in name) == bool((first[name] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adapters_take_the_models_dtype_and_alone_are_trained(make, dtype):
    model = LoRA().adapt(make("gptj", dtype), seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(".lora_" in n for n in trained)
    assert all(p.dtype == dtype for p in model.parameters())


def test_targets_that_match_nothing_get_the_nearest_names(make):
    with pytest.raises(UserError, match=r"lora.targets: 'q_prj' is no linear layer of this model; nearest: q_proj"):
        LoRA(targets=("q_prj", "v_proj")).adapt(make(), seed=0)
    with pytest.raises(
        UserError,
        match=r"'query_key_value' is no linear.*all: fc_in, fc_out, k_proj, lm_head, out_proj, q_proj, v_proj",
    ):
        LoRA(targets=("query_key_value",)).adapt(make("gptj"), seed=0)
    with pytest.raises(UserError, match="lora.targets is empty"):
        LoRA(targets=()).adapt(make(), seed=0)
    with pytest.raises(UserError, match="'lm_head' is the head"):
        LoRA(targets=("lm_head",)).adapt(make("llama-tied"), seed=0)


def test_merging_keeps_what_another_part_has_written(make, documents, train):
    part = LoRA(rank=2)
    result = train(make(), (part,), documents)
    plain = part.finish(run=result.run, state={}, final={})
    name = next(iter(plain))
    changed = part.finish(run=result.run, state={}, final={name: result.run.base[name] + 1, "other": torch.ones(1)})
    torch.testing.assert_close(changed[name], plain[name] + 1)
    assert changed["other"] == 1
    assert part.report(run=result.run, state={}) == {
        "adapted_layers": 4,
        "trained_entries": 2 * (2 * (32 + 32) + 2 * (32 + 16)),
        "scale": 16,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_adds_rank_after_rank_in_float64(dtype, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((13, 9), (5, 9), (13, 5)))
    expected = [
        [float(weight[i, j]) + 0.7 * sum(float(b[i, k]) * float(a[k, j]) for k in range(5)) for j in range(9)]
        for i in range(13)
    ]
    wide = torch.promote_types(dtype, torch.float32)
    for threads, piece in ((1, 1 << 17), (2, 20), (1, 1)):
        monkeypatch.setattr("methods.tools.adapter.PIECE", piece)
        torch.set_num_threads(threads)
        actual = merged(weight, a=a, b=b, scale=0.7)
        torch.set_num_threads(1)
        assert actual.dtype == wide and torch.equal(
            actual, torch.tensor(expected, dtype=torch.float64).to(wide)
        )  # bit for bit


def test_the_saved_adapter_merges_to_the_same_bits(make, documents, train, tmp_path):
    for kind, chosen in (("llama-tied", {"rslora": True}), ("gptj", {}), ("gpt2", {"dora": True})):
        part = LoRA(rank=3, alpha=7.0, targets=("c_attn",) if kind == "gpt2" else ("q_proj", "v_proj"), **chosen)
        result = train(make(kind, torch.float32), (part,), documents)
        state = result.states["lora"]
        final = part.finish(run=result.run, state=state, final={})
        part.save(run=result.run, state=state, folder=tmp_path / kind)
        actual, scale, transposed = read_adapter(tmp_path / kind / "adapter")
        assert actual.keys() == final.keys()
        for name, factors in actual.items():
            assert ("magnitude" in factors) == ("dora" in chosen)
            again = merged(result.run.base[name], **factors, scale=scale, transposed=transposed)
            assert torch.equal(again, final[name])


def test_dora_gives_each_row_its_magnitude(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    weight, a, b, m = (torch.randn(*shape, generator=draw) for shape in ((13, 9), (5, 9), (13, 5), (13,)))
    whole = weight.double() + 0.7 * b.double() @ a.double()
    expected = m.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
    actual = merged(weight, a=a, b=b, scale=0.7, magnitude=m)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-7, atol=1e-9)
    turned = merged(weight.T, a=a, b=b, scale=0.7, magnitude=m, transposed=True)
    assert torch.equal(turned.T, actual) and turned.is_contiguous()
    monkeypatch.setattr("methods.tools.adapter.PIECE", 20)
    assert torch.equal(merged(weight, a=a, b=b, scale=0.7, magnitude=m), actual)
    for size in (1, 2, 7, 64):
        rows = torch.randn(3, size, generator=draw, dtype=torch.float64)
        torch.testing.assert_close(row_norms(rows), rows.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_dora_adapter_merges_to_the_base(make, documents, train, dtype):
    for kind, target in (("llama-tied", "down_proj"), ("gpt2", "c_attn")):
        part = LoRA(rank=2, targets=(target,), dora=True)
        result = train(make(kind, dtype), (part,), documents, learning_rate=1e-30)
        for name, tensor in final_weights(result, result.method.parts).items():
            base = result.run.base[name]
            torch.testing.assert_close(tensor, base.float(), rtol=1e-6, atol=0)  # a bfloat16 m would be 4e-3 away
            assert torch.equal(tensor.to(dtype), base) or dtype == torch.float32


def test_dora_trains_the_magnitudes_and_says_so(make, documents, train):
    result = train(make(), (LoRA(rank=2, dora=True),), documents)
    magnitudes = {n: w for n, w in result.run.weights.items() if n.endswith("lora_magnitude_vector.default.weight")}
    starts = result.states["lora"]["magnitudes"]
    assert magnitudes.keys() == starts.keys() and len(magnitudes) == 4
    assert all((starts[name] != magnitudes[name].detach()).all() for name in starts)
    assert result.method.reports(result.run)["lora"]["trained_entries"] == 2 * (2 * (32 + 32) + 2 * (32 + 16) + 32 + 16)


def test_dora_beside_a_penalty_of_the_update_is_refused_at_once():
    for other in ("ewc", "hierarchical", "l1", "l2_sp"):
        with pytest.raises(
            UserError, match=f"{other} and lora cannot be combined: with DoRA the effective update is not"
        ):
            registry.build({"lora": {"dora": True}, other: {}})
        registry.build({"lora": {}, other: {}})


def test_dora_goes_with_what_needs_no_update_of_the_form_s_b_a(make, documents, train):
    dora = LoRA(rank=2, dora=True)
    result = train(make(), (dora, KL(strength=5.0), WiSEFT(alpha=0.5)), documents)
    assert result.added["kl"]["tokens"] > 0 and result.added["kl"]["bytes"] == 0  # the base is the model without it
    final = final_weights(result, result.method.parts)
    for name, half in final.items():
        whole = dora.finish(run=result.run, state=result.states["lora"], final={})[name]
        torch.testing.assert_close(half, (whole + result.run.base[name]) / 2)
    with pytest.raises(UserError, match=r"DoRA on .*q_proj: the effective update is not s·B·A.*set lora.dora: false"):
        train(make(), (dora, L2SP()), documents)
