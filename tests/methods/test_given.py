"""A checkpoint made elsewhere: its weights come out whole, and what does not fit is refused by name."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from methods.errors import UserError
from methods.given import Given


@pytest.fixture
def base(make):
    return {n: p.detach().clone() for n, p in make("llama-tied", torch.bfloat16).named_parameters()}


@pytest.fixture
def saved(make, tmp_path):
    make("llama-tied", torch.bfloat16, seed=1).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_its_weights_come_out_whole(make, base, saved, run_of):
    part = Given(path=str(saved))
    run = run_of(make("llama-tied", torch.bfloat16), base)
    part.begin(run=run, state={}, examples=[])
    final = part.finish(run=run, state={}, final={"model.norm.weight": torch.zeros(1)})
    tuned = dict(make("llama-tied", torch.bfloat16, seed=1).named_parameters())
    assert final.keys() == base.keys()
    assert all(t.dtype == torch.float32 and torch.equal(t.bfloat16(), tuned[n]) for n, t in final.items())
    assert part.report(run=run, state={}) == {"path": str(saved)}


def test_the_engine_trains_nothing_for_it(make, saved, documents, train):
    from experiments.training.engine import final_weights

    part = Given(path=str(saved))
    result = train(make("llama-tied", torch.bfloat16), (part,), documents)
    tuned = dict(make("llama-tied", torch.bfloat16, seed=1).named_parameters())
    assert result.steps == result.tokens == 0
    assert all(torch.equal(t.bfloat16(), tuned[n]) for n, t in final_weights(result, (part,)).items())


def test_shards_a_repeated_tied_head_and_old_buffers_fit(base, make, tmp_path):
    tensors = {n: p.detach() for n, p in make("llama-tied", torch.bfloat16, seed=1).named_parameters()}
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    part = Given(path=str(tmp_path))
    final = part.finish(run=type("Run", (), {"base": base})(), state={}, final={})
    assert all(torch.equal(final[n], tensors[n].float()) for n in base)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="lacks b.safetensors, which its index names"):
        part.begin(run=None, state={}, examples=[])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight: it is not a checkpoint of this base"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"model.norm.weight has shape \[33\], the base's is \[32\]",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(40, 32)}),
            r"model.embed_tokens.weight has shape \[40, 32\].*experiments audit",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(31, 32)}),
            "has tensors that the base does not have: lm_head.weight: .*experiments audit",
        ),
        (lambda t: t.update(x=torch.ones(1), y=torch.ones(1)), "has tensors that the base does not have: x and 1 more"),
    ],
)
def test_what_does_not_fit_is_named(base, tmp_path, change, message):
    tensors = dict(base)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        Given(path=str(tmp_path)).finish(run=type("Run", (), {"base": base})(), state={}, final={})


def test_folders_without_safetensors_are_named(base, tmp_path):
    with pytest.raises(UserError, match="given.path is missing"):
        Given()
    with pytest.raises(UserError, match="no such folder"):
        Given(path=str(tmp_path / "absent")).begin(run=None, state={}, examples=[])
    (tmp_path / "outer/checkpoint-20").mkdir(parents=True)
    (tmp_path / "outer/checkpoint-20/adapter_config.json").touch()
    with pytest.raises(UserError, match="given.path: .* give the one inside it, such as .*outer/checkpoint-20"):
        Given(path=str(tmp_path / "outer")).begin(run=None, state={}, examples=[])
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="no model.safetensors; nothing else is read"):
        Given(path=str(tmp_path)).begin(run=None, state={}, examples=[])
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match="adapter_config.json is no adapter's config"):
        Given(path=str(tmp_path)).begin(run=None, state={}, examples=[])
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="is no safetensors file, or damaged"):
        Given(path=str(tmp_path)).finish(run=type("Run", (), {"base": base})(), state={}, final={})


def saved_adapter(model, folder, *, tokens=31, config=LoraConfig, **settings):
    """An adapter as peft's own script leaves it, with trained tensors that are not zero."""
    if tokens != 31:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    settings = settings if config is not LoraConfig else {"r": 3, "init_lora_weights": False} | settings
    adapted = get_peft_model(model, config(**{"task_type": "CAUSAL_LM"} | settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def drawn():
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about embeddings and heads
        torch.manual_seed(3)
        yield


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("llama-tied", torch.bfloat16, {}),
        ("llama-untied", torch.float64, {"use_rslora": True, "target_modules": "all-linear"}),
        ("llama-tied", torch.bfloat16, {"use_dora": True, "modules_to_save": ["norm"]}),
        ("llama-untied", torch.float16, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama-tied", torch.float32, {"trainable_token_indices": [3, 30]}),
        ("gptj", torch.bfloat16, {"target_modules": ["q_proj", "fc_in"]}),
    ],
)
def test_an_adapter_gives_the_weights_that_peft_merges(make, run_of, tmp_path, kind, dtype, settings):
    wide = torch.promote_types(dtype, torch.float32)
    part = Given(path=saved_adapter(make(kind, dtype).to(wide), tmp_path, **settings))
    base = {n: p.detach().clone() for n, p in make(kind, dtype).named_parameters()}
    kept = {n: t.clone() for n, t in base.items()}
    part.look(shapes={n: list(t.shape) for n, t in base.items()})
    run = run_of(make(kind, dtype).to(torch.bfloat16), base)  # computed in another dtype, as on a GPU
    found = part.finish(run=run, state={}, final={})
    theirs = PeftModel.from_pretrained(make(kind, dtype).to(wide), tmp_path, autocast_adapter_dtype=False)
    theirs = dict(theirs.merge_and_unload().named_parameters())
    assert found.keys() == base.keys() and all(t.dtype == wide for t in found.values())
    assert all(torch.equal(found[n], theirs[n]) for n in found)
    assert any(not torch.equal(found[n], base[n].to(wide)) for n in found)
    assert all(torch.equal(base[n], kept[n]) for n in base)


def test_an_adapters_update_is_its_factors_product(make, base, run_of, tmp_path):
    part = Given(path=saved_adapter(make("llama-tied", torch.float32), tmp_path, lora_alpha=6))
    found = part.finish(run=run_of(make("llama-tied", torch.bfloat16), base), state={}, final={})
    factors, layer = load_file(tmp_path / "adapter_model.safetensors"), "model.layers.1.self_attn.q_proj."
    a, b = (factors[f"base_model.model.{layer}lora_{key}.weight"] for key in "AB")
    assert torch.allclose(found[f"{layer}weight"], base[f"{layer}weight"].float() + 2 * b @ a, atol=1e-6)
    about = {"path": str(tmp_path), "adapter": "LORA, r 3, lora_alpha 6", "adapter_of": None}
    assert part.report(run=None, state={}) == about


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ({}, {"tokens": 34, "modules_to_save": ["embed_tokens"]}, r"shape \[34, 32\], .*experiments audit"),
        ({}, {"tokens": 34, "trainable_token_indices": [33]}, r"\[34, 32\].*experiments audit"),
        ({}, {"modules_to_save": ["lm_head"]}, "does not have: lm_head.weight: .*experiments audit"),
        ({"hidden_size": 64}, {}, r"an adapter of another model: its update of .* is \[64, 64\], and that of the base"),
        ({"num_hidden_layers": 3}, {}, "the base has no model.layers.2.self_attn.q_proj.weight, which it adapts"),
        ({}, {"task_type": "SEQ_CLS"}, "an adapter for SEQ_CLS"),
        ({}, {"config": PromptTuningConfig, "num_virtual_tokens": 2}, "is a PROMPT_TUNING adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_at_once(make, base, tmp_path, made, settings, message):
    part = Given(path=saved_adapter(make("llama-tied", torch.float32, **made), tmp_path, **settings))
    with pytest.raises(UserError, match=f"given.path: .*{message}"):
        part.look(shapes={n: list(t.shape) for n, t in base.items()})


def test_an_adapter_is_never_unpickled_and_its_head_stays_tied(make, base, run_of, tmp_path):
    part = Given(path=saved_adapter(make("llama-tied", torch.float32), tmp_path, target_modules=["embed_tokens"]))
    with pytest.raises(UserError, match="the merged model predicts something else"):
        part.finish(run=run_of(make("llama-tied", torch.bfloat16), base), state={}, final={})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="given.path: .* LORA adapter without .*adapter_model.bin can run code"):
        part.look(shapes={})
