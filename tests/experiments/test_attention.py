"""GPT-J on SDPA against transformers' own eager attention, wherever a model of ours is used."""

import copy
import json
import math
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJFlashAttention2

from experiments.model import attention
from experiments.model.attention import BLOCK, LONGEST, GPTJSdpaAttention, products, with_sdpa
from experiments.model.random_models import build
from experiments.model.weights import load_model

LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
RIGHT = LEFT.flip(1)


def eager(model):
    """A plain transformers model with the same weights and eager attention."""
    config = copy.deepcopy(model.config)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    assert all(type(block.attn) is GPTJAttention for block in plain.transformer.h)
    return plain.eval()


def both(dtype=torch.float32, **config):
    model = build("gptj", seed=0, dtype=dtype, **config)
    assert all(type(block.attn) is GPTJSdpaAttention for block in model.transformer.h)
    return model, eager(model)


def ids(rows=2, tokens=9):
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(1))


def same(found, wanted, dtype=torch.float32):
    # eager attention computes float64's scores in float32
    close = {torch.float32: 1e-5, torch.float64: 2e-6}[dtype]
    torch.testing.assert_close(found, wanted, rtol=0, atol=close)


@pytest.mark.parametrize("mask", [None, torch.ones_like(LEFT), LEFT, RIGHT], ids=["none", "ones", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_equal_eager(mask, dtype):
    model, plain = both(dtype)
    found, wanted = (m(ids(), attention_mask=mask).logits for m in (model, plain))
    real = torch.ones_like(LEFT) if mask is None else mask
    same(found[real.bool()], wanted[real.bool()], dtype)
    assert found.isfinite().all()


@pytest.mark.parametrize("mask", [None, LEFT])
def test_bf16_is_as_near_to_the_truth_as_eager(mask):
    model, plain = both(torch.bfloat16, n_embd=64, n_layer=4)
    truth = eager(model).float()(ids(), attention_mask=mask).logits
    real = torch.ones_like(LEFT).bool() if mask is None else mask.bool()
    ours, theirs = ((m(ids(), attention_mask=mask).logits - truth)[real].square().mean().sqrt() for m in (model, plain))
    assert theirs > 0 and ours < 1.5 * theirs


def test_scores_of_float64_are_computed_in_float64():
    attention = build("gptj", seed=0, dtype=torch.float64).transformer.h[0].attn
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    found, _ = attention._attn(q, k, v)
    torch.testing.assert_close(found, scores.softmax(-1) @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["additive", "boolean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_of_ones_own(dtype, kind):
    """A tree: the last four tokens see the first five and themselves."""
    model, plain = both(dtype)
    allowed = torch.ones(9, 9).tril().bool()
    allowed[5:, 5:] = torch.eye(4).bool()
    allowed = allowed.expand(2, 1, 9, 9)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    found = model(ids(), attention_mask=allowed if kind == "boolean" else additive).logits
    wanted = plain(ids(), attention_mask=additive).logits
    if dtype == torch.bfloat16:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.1)
    else:
        same(found, wanted, dtype)
    assert (wanted - plain(ids()).logits).abs().max() > 0.1


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["none", "left"])
def test_a_cache_with_fewer_queries_than_keys(cut, mask):
    model, plain = both()
    tokens, cache = ids(), DynamicCache(config=model.config)
    positions = torch.arange(9).expand(2, 9) if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    pieces = []
    for piece in (slice(0, cut), slice(cut, 9)):
        seen = None if mask is None else mask[:, : piece.stop]
        pieces.append(
            model(tokens[:, piece], attention_mask=seen, position_ids=positions[:, piece], past_key_values=cache).logits
        )
    wanted = plain(tokens, attention_mask=mask, position_ids=positions, use_cache=True).logits
    real = torch.ones_like(LEFT).bool() if mask is None else mask.bool()
    same(torch.cat(pieces, dim=1)[real], wanted[real])


def test_a_cache_longer_than_what_is_in_it():
    model, plain = both()
    tokens, cache = ids(), StaticCache(config=model.config, max_cache_len=16)
    first = model(tokens[:, :6], past_key_values=cache).logits
    then = model(tokens[:, 6:7], past_key_values=cache).logits
    last = model(tokens[:, 7:], past_key_values=cache).logits
    same(torch.cat([first, then, last], dim=1), plain(tokens).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(use_cache):
    model, plain = both()
    asked = {
        "attention_mask": LEFT,
        "max_new_tokens": 8,
        "do_sample": False,
        "use_cache": use_cache,
        "pad_token_id": 257,
    }
    assert torch.equal(model.generate(ids(), **asked), plain.generate(ids(), **asked))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
def test_gradients_equal_eager(mask, checkpointing):
    model, plain = both()
    labels = ids() if mask is None else ids().masked_fill(mask == 0, -100)
    if mask is LEFT:
        labels[1, 4] = -100  # padding would predict it
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (model, plain):
        m.train()  # no dropout by default
        m(ids(), attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_attention_dropout_in_training_alone():
    model, plain = both(attn_pdrop=0.5)
    same(model(ids()).logits, plain(ids()).logits)
    model.train()

    def drawn(seed):
        torch.manual_seed(seed)
        return model(ids()).logits

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    kept = build("gptj", seed=0, attn_pdrop=0.0).train()
    assert torch.equal(kept(ids()).logits, kept(ids()).logits)


def test_saved_files_are_plain(tmp_path):
    model, plain = both()
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    config = (tmp_path / "ours" / "config.json").read_text()
    assert "sdpa" not in config.lower() and json.loads(config)["architectures"] == ["GPTJForCausalLM"]
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")  # transformers alone
    assert type(there.transformer.h[0].attn) is GPTJAttention
    back = load_model(tmp_path / "ours", dtype="auto")
    assert type(back.transformer.h[0].attn) is GPTJSdpaAttention
    assert torch.equal(back(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(how):
    model, _ = both()
    twin = how(model)
    assert type(twin.transformer.h[1].attn) is GPTJSdpaAttention and twin.config._attn_implementation == "sdpa"
    assert torch.equal(twin(ids(), attention_mask=LEFT).logits, model(ids(), attention_mask=LEFT).logits)
    torch.nn.init.zeros_(twin.transformer.h[0].attn.out_proj.weight)
    assert not torch.equal(twin(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("first", ["sdpa", "peft"])
def test_adapters(first):
    model, plain = both()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    theirs = get_peft_model(copy.deepcopy(plain), config)
    torch.manual_seed(3)
    ours = get_peft_model(model, config) if first == "sdpa" else with_sdpa(get_peft_model(copy.deepcopy(plain), config))
    assert type(ours.get_base_model().transformer.h[0].attn) is GPTJSdpaAttention
    same(
        ours.eval()(ids(), attention_mask=LEFT).logits[LEFT.bool()],
        theirs.eval()(ids(), attention_mask=LEFT).logits[LEFT.bool()],
    )
    for m in (ours, theirs):
        m(ids(), labels=ids()).loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if b.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    same(ours.merge_and_unload()(ids()).logits, theirs.merge_and_unload()(ids()).logits)


def test_the_model_itself_and_twice_is_once():
    _, plain = both()
    parameters = dict(plain.named_parameters())
    assert with_sdpa(plain) is plain and with_sdpa(plain) is plain
    assert all(p is parameters[n] for n, p in plain.named_parameters())
    assert plain.config._attn_implementation == "sdpa"


def test_other_models_are_left_as_they_are():
    llama = build("llama", seed=0)
    kinds = [type(m) for m in llama.modules()]
    assert with_sdpa(llama) is llama and [type(m) for m in llama.modules()] == kinds
    assert llama.config._attn_implementation == "sdpa"
    _, flash = both()
    flash.config._attn_implementation = "flash_attention_2"
    for block in flash.transformer.h:
        block.attn.__class__ = GPTJFlashAttention2  # as it is where flash_attn is installed
    assert with_sdpa(flash) is flash and type(flash.transformer.h[0].attn) is GPTJFlashAttention2
    assert flash.config._attn_implementation == "flash_attention_2"


def attended(attend, *, heads=6, groups=2, tokens=7, keys=7, mask=None, dtype=torch.float64, **others):
    """What an attention gives and its gradients of queries, keys and values."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, t, 8, dtype=dtype, generator=draw).requires_grad_()
        for n, t in ((heads, tokens), (groups, keys), (groups, keys))
    )
    mixed, _ = attend(GPTJAttention, q, k, v, mask, scaling=0.3, **others)
    mixed.backward(torch.randn(mixed.shape, dtype=dtype, generator=draw))
    return mixed.detach(), q.grad, k.grad, v.grad


def by_hand(module, q, k, v, mask, *, scaling, **others):
    """The formula, a head and a query at a time."""
    rows = []
    for b in range(len(q)):
        for t in range(q.shape[2]):
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = scaling * k[b, g] @ q[b, h, t]
                if mask is None and q.shape[2] > 1:
                    scores = torch.where(torch.arange(len(scores)) <= t, scores, -torch.inf)
                elif mask is not None and mask.dtype == torch.bool:
                    scores = torch.where(mask[b, 0, t], scores, -torch.inf)
                elif mask is not None:
                    scores = scores + mask[b, 0, t]
                rows.append(scores.softmax(-1) @ v[b, g])
    return torch.stack(rows).view(len(q), q.shape[2], q.shape[1], -1), None


SEEN = (
    torch.tensor([[1, 1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1]]).bool()[:, None, None] & torch.ones(7, 7).tril().bool()
)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(
    "mask",
    [None, SEEN, torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~SEEN, -1e9)],
    ids=["causal", "bool", "additive"],
)
def test_products_are_the_formula(mask, groups):
    for found, wanted in zip(attended(products, groups=groups, mask=mask), attended(by_hand, groups=groups, mask=mask)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_values_of_another_width_than_keys():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 7, width, generator=draw, dtype=torch.float64)
        for heads, width in ((6, 8), (2, 8), (2, 5))
    )
    (found, _), (wanted, _) = (attend(GPTJAttention, q, k, v, None, scaling=0.3) for attend in (products, by_hand))
    assert found.shape == (2, 7, 6, 5)
    torch.testing.assert_close(found, wanted.view(2, 7, 6, 5), rtol=0, atol=1e-12)


def test_a_module_that_is_not_causal_sees_everything_without_a_mask():
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = False, 1
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, _ = products(module, q, k, v, None, scaling=0.3)
    torch.testing.assert_close(found, ((0.3 * q @ k.mT).softmax(-1) @ v).transpose(1, 2), rtol=0, atol=1e-12)


def test_products_stand_in_for_sdpa_under_its_own_name():
    """Some models do something else under any other name: Falcon's attention then takes no mask for no causality."""
    assert AttentionInterface()["sdpa"] is products


def test_products_of_one_query_behind_a_cache_see_all_of_it():
    for found, wanted in zip(attended(products, tokens=1), attended(by_hand, tokens=1)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [{"tokens": 3}, {"tokens": LONGEST + 1, "keys": LONGEST + 1}, {"dropout": 0.5}])
def test_what_products_do_not_compute_is_sdpa_s(case, monkeypatch):
    asked = []
    sdpa = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *a, **k: asked.append(k["dropout"]) or sdpa(*a, **k)
    )
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups, module.training = True, 3, True
    q, k, v = (
        torch.randn(1, n, t, 8)
        for n, t in ((6, case.get("tokens", 7)), (2, case.get("keys", 7)), (2, case.get("keys", 7)))
    )
    products(module, q, k, v, None, scaling=0.3, dropout=case.get("dropout", 0.0))
    assert asked == [case.get("dropout", 0.0)]


@pytest.mark.parametrize("mask", [None, "additive", "boolean", "one row"])
@pytest.mark.parametrize("tokens", [LONGEST + 1, LONGEST + 2 * BLOCK, 1])
def test_a_long_text_in_blocks_of_queries(tokens, mask):
    """Without gradients; against scores of all pairs at once."""
    keys = max(tokens, LONGEST + 5) if mask or tokens == 1 else tokens
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 8, generator=draw, dtype=torch.float64)
        for heads, n in ((6, tokens), (2, keys), (2, keys))
    )
    allowed = (
        torch.ones(tokens, keys).tril(keys - tokens).bool()
        if mask is None
        else torch.rand(2, 1, tokens, keys, generator=draw) < 0.5
    )
    allowed = (allowed[:, :, :1] if mask == "one row" else allowed) | (torch.arange(keys) == 0)
    given = {None: None, "boolean": allowed}.get(
        mask, torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, -1e9)
    )
    wide = [t.repeat_interleave(3, 1) for t in (k, v)]
    scores = (0.3 * q @ wide[0].mT).masked_fill(~allowed, -torch.inf)
    with torch.no_grad():
        found, _ = products(torch.nn.Module(), q, k, v, given, scaling=0.3)
    torch.testing.assert_close(found, (scores.softmax(-1) @ wide[1]).transpose(1, 2), rtol=0, atol=1e-12)
