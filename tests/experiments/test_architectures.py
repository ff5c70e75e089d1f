"""Architectures that this project was not adapted to: what it computes of each equals the model's own forward pass."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from evaluation import shared_prefix
from evaluation.token_losses import HiddenRows, token_losses
from experiments.model import trial, tuned, weights
from experiments.model.attention import with_sdpa
from experiments.model.base import load_tensors
from experiments.model.random_models import byte_tokenizer
from experiments.model.reference import reference
from experiments.model.shape import Shape
from experiments.study.schema import Model
from experiments.training import memory
from experiments.training.batches import collate
from experiments.training.engine import final_weights, fit
from experiments.training.flops import Flops
from experiments.training.loss import summed_nll
from experiments.training.preparation import Fitting
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.lora import LoRA
from methods.part import Run
from methods.tools import architecture, checkpoint
from methods.tools.effective import effective_weights
from methods.tools.fisher import diagonal_fisher

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.18,
}
ALTERNATE = ["sliding_attention", "full_attention"]
KINDS = {
    "gpt_neox": {},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 10.0,
        "layer_types": ALTERNATE,
        "sliding_window": 4,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ALTERNATE, "sliding_window": 4},
    "phi3": {},
    "olmo2": {},
    "granite": {
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.25,
    },
    "cohere": {"logit_scale": 0.0625},
    "stablelm": {},
}


def build(kind, **changed):
    config = CONFIG_MAPPING[kind](**COMMON | KINDS.get(kind, {}) | changed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_sdpa(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:  # norms and biases that are nothing would hide where they are left out
                    p.add_(0.1 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return build(request.param)


def documents(sizes=(9, 5, 12, 7), labelled=2):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (size,), generator=draw) for size in sizes]
    return [{"input_ids": ids, "labels": ids.clone().index_fill_(0, torch.arange(labelled), -100)} for ids in rows]


def own_sums(model):
    """Σ nll of each document by the model's own loss, and the gradients of its parameters."""
    for example in documents():
        model.zero_grad(set_to_none=True)
        total = model(input_ids=example["input_ids"][None], labels=example["labels"][None]).loss * int(
            (example["labels"][1:] != -100).sum()
        )
        total.backward()
        yield total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)


def test_loss_and_gradient_are_those_of_its_own_forward(model, monkeypatch):
    monkeypatch.setattr("experiments.training.loss.CHUNK", 10)  # of 25 labels
    value, wanted = 0.0, {}
    for one, gradients in own_sums(model):
        value += one
        wanted = {name: wanted.get(name, 0) + gradient for name, gradient in gradients.items()}
    batch = collate(documents())
    loss = summed_nll(
        architecture.hidden_states(model, batch["input_ids"], None), batch["labels"], architecture.logits_of(model)
    )
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    whole = sum(g.square().sum() for g in wanted.values()).sqrt()
    for name, p in model.named_parameters():
        if name in wanted:
            assert (p.grad - wanted[name]).norm() <= 1e-5 * whole, name
        else:
            assert p.grad is None, name
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_a_token_changes_nothing_before_it(model):
    ids = documents()[2]["input_ids"][None]
    other = ids.clone()
    other[0, -1] = 96 - other[0, -1]
    torch.testing.assert_close(model(other).logits[:, :-1], model(ids).logits[:, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@torch.no_grad()
def test_kl_from_its_kept_states_is_that_of_whole_softmaxes(model, tmp_path):
    model.save_pretrained(tmp_path / "base", save_original_format=False)  # as the `model` stage writes it
    byte_tokenizer().save_pretrained(tmp_path / "base")
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    sequences = [(row["input_ids"].tolist(), (row["labels"] != -100).tolist()) for row in documents()]
    where = {"dtype": torch.float32, "device": torch.device("cpu"), "kept": tmp_path / "kept"}
    base = reference(tmp_path / "base", key=("",), sequences=sequences, tokens=64, **where)
    assert isinstance(base, HiddenRows)
    for (ids, labels), found in zip(sequences, token_losses(other, sequences, reference=base, tokens=64)):
        p, q = (each(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for each in (other, model))
        at = torch.tensor(labels[1:])
        kl, reverse = (q.exp() * (q - p)).sum(-1)[at].sum(), (p.exp() * (p - q)).sum(-1)[at].sum()
        assert (found.kl, found.kl_reverse) == pytest.approx((kl.item(), reverse.item()), rel=1e-3, abs=1e-5)
        assert found.kl > 1e-4


def test_fisher_is_that_of_a_loop_over_examples(model):
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _, gradients in own_sums(model):
        for name, gradient in gradients.items():
            wanted[name] += gradient.square() / len(documents())
    mask = {"attention_mask": collate(documents())["attention_mask"]}
    found = diagonal_fisher(model, [collate(documents()) | mask])
    whole = sum(f.square().sum() for f in wanted.values()).sqrt()
    for name in wanted:
        torch.testing.assert_close(
            found[name],
            wanted[name],
            rtol=1e-3,
            atol=1e-7 * whole.item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@torch.no_grad()
def test_scores_are_those_of_its_own_forward(model):
    requests = [([5, 6, 7, 8, 9, 10], [11, 12, 13]), ([5, 6, 7, 8, 9, 10], [14, 15]), ([20, 21], [22])]
    for (context, continuation), (value, _) in zip(
        requests, shared_prefix.log_likelihoods(model, requests, max_length=64), strict=True
    ):
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        assert value == pytest.approx(
            -F.cross_entropy(logits, torch.tensor(continuation), reduction="sum").item(), abs=1e-3
        )


def test_it_is_accepted_and_left_as_it_was(model):
    before, state = {name: p.detach().clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    model.train()
    trial.check(model)
    assert all(module.training for module in model.modules()) and all(
        p.requires_grad and p.grad is None for p in model.parameters()
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and torch.equal(
        torch.get_rng_state(), state
    )
    model.eval()


def linear_layers(model, number=2):
    """Last names of some linear layers inside the blocks, as lora.targets takes them."""
    (_, block), *_ = architecture.blocks(model)
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in block.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }
    )[:number]


UNLIKE = ("gpt_neox", "gpt2", "opt", "falcon", "mixtral", "gemma2")


@pytest.mark.parametrize(
    "kind, method",
    [(kind, "ewc") for kind in KINDS]
    + [pytest.param(kind, "hierarchical", marks=() if kind in UNLIKE else pytest.mark.thorough) for kind in KINDS],
)
def test_the_chain_from_plan_to_score(kind, method):
    """What `plan`, `prepare`, `train` and `evaluate` need of a model: EWC on all weights, hierarchical on adapters."""
    model = build(kind)
    settings = TrainSettings(batch=2, micro_batch=2, length=12, learning_rate=1e-3, probes=0)
    blocks = {
        "ewc": {"ewc": {"samples": 4, "length": 12, "strength": 10.0}},
        "hierarchical": {
            "lora": {"rank": 2, "targets": linear_layers(model)},
            "hierarchical": {"samples": 4, "length": 12},
        },
    }[method]
    parts, states = registry.build(blocks), {}
    shape, base = Shape(config=model.config), {name: p.detach().clone() for name, p in model.named_parameters()}
    for phase in ("prepare", "train"):
        predicted = memory.predict(
            phase=phase,
            shape=shape,
            parts=parts,
            settings=settings,
            checkpoint_dtype=torch.float32,
            compute_dtype=torch.float32,
            device_type="cpu",
        )
        assert predicted["total"] > predicted["activations"] > 0
    assert Flops(shape.build(parts=memory.adapting(parts))).step(lengths=(12,), labelled=1) > 0
    assert tuned.expected_bytes(shape=shape, parts=parts, checkpoint=torch.float32) > 0

    def fresh():
        twin = with_sdpa(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32))
        twin.load_state_dict(model.state_dict())
        return twin.eval()

    for part in parts:
        adapted = fresh()
        for other in parts:
            adapted = other.adapt(adapted, seed=0)
        prepared = part.prepare(
            model=adapted,
            base=base,
            general=documents(labelled=0),
            seed=0,
            progress=None,
            fit=Fitting(None, settings=settings, base=base, device="cpu", name="prepare"),
        )
        if prepared:
            states[part.key] = {
                key: getattr(prepared, key) for key in ("importance", "start", "carry") if getattr(prepared, key)
            }
    result = fit(model=fresh(), parts=parts, examples=documents(), settings=settings, seed=0, base=base, states=states)
    assert result.flops > 0 and all(row["mfu"] for row in result.curve)
    tuned_model = fresh()
    final = final_weights(result, parts)
    with torch.no_grad():
        for name, p in tuned_model.named_parameters():
            p.copy_(final.get(name, p))
    batch = collate(documents())
    # what is merged computes what was trained
    trained, kept = (
        m(batch["input_ids"]).logits[batch["attention_mask"].bool()] for m in (result.run.model, tuned_model)
    )
    torch.testing.assert_close(kept, trained, rtol=1e-3, atol=1e-4)
    assert (kept - model(batch["input_ids"]).logits[batch["attention_mask"].bool()]).abs().max() > 1e-5


OTHERS = {
    "llama": {},
    "gemma": {"head_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4},
    "gpt_bigcode": {"attn_pdrop": 0.0},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "starcoder2": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "nemotron": {},
    "smollm3": {},
    "exaone4": {},
    "ernie4_5": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "apertus": {},
    "arcee": {},
    "cohere2": {},
    "phi": {},
    "persimmon": {},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "biogpt": {},
    "olmo": {},
    "olmo3": {},
    "granitemoe": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "lm_head_bias": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "diffllama": {},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.0},
    "mamba": {"state_size": 8},
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", OTHERS)
def test_more_architectures_train_as_their_own_loss_says(kind):
    model = build(kind, **OTHERS[kind])
    trial.check(model)
    value = sum(value for value, _ in own_sums(model))
    settings = TrainSettings(batch=4, micro_batch=4, length=12, learning_rate=1e-9, probes=0)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in model.modules():  # its loss in training would be another one
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    result = fit(model=model, parts=(), examples=documents(), settings=settings, seed=0, base=base)
    asked = sum(int((example["labels"][1:] != -100).sum()) for example in documents())
    assert result.curve[0]["loss"] == pytest.approx(value / asked, rel=1e-5)


def test_effective_update_of_a_weight_that_is_kept_the_other_way_round():
    """GPT-2's Conv1D, in × out: what peft merges, and a dense gradient's way to the factors as autograd goes it."""
    plain = dict(build("gpt2").named_parameters())
    model = LoRA(rank=3, targets=("c_attn", "c_proj")).adapt(build("gpt2"), seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draw))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run = Run(
        model=model,
        weights=trained,
        base=plain,
        seed=0,
        device="cpu",
        shapes={name: p.shape for name, p in trained.items()},
    )
    weights = effective_weights(run)
    assert {weight.transposed for weight in weights} == {True} and len(weights) == 6
    for weight in weights:
        direction = torch.randn(plain[weight.name].shape, generator=draw)
        a, b = trained[weight.a], trained[weight.b]
        wanted = torch.autograd.grad(((weight.scaling * b @ a).T * direction).sum(), (a, b))
        weight.pull(direction, scale=0.5)
        for p, gradient in zip((a, b), wanted):
            torch.testing.assert_close(p.grad, 0.5 * gradient, rtol=1e-4, atol=1e-4)
    values = {weight.name: weight.value() for weight in weights}
    merged = dict(model.merge_and_unload().named_parameters())
    for name, value in values.items():
        torch.testing.assert_close(merged[name].detach() - plain[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_tensors_are_named_as_parameters_whatever_a_checkpoint_names_them(kind, tmp_path):
    """The head of one is `embed_out` in files, the experts of the other are many tensors there."""
    model, moved = build(kind, vocab_size=258), build(kind, vocab_size=258)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.5)
    names = {name for name, _ in model.named_parameters()}
    for saved, folder in ((model, "theirs"), (moved, "given")):
        saved.save_pretrained(tmp_path / folder)
        byte_tokenizer().save_pretrained(tmp_path / folder)
    assert set(load_tensors(tmp_path / "theirs")) != names
    weights.materialise(
        name="mine", block=Model(source=f"path:{tmp_path / 'theirs'}"), packages={}, out_dir=tmp_path / "base"
    )
    base = load_tensors(tmp_path / "base")
    assert set(base) == names
    run = Run(model=model, weights={}, base=base, seed=0, device="cpu")
    found = checkpoint.load(str(tmp_path / "given"), run, where="given.path")
    assert all(torch.equal(found[name], p) for name, p in moved.named_parameters())
    tuned.keep(tmp_path / "cell", folder=tmp_path / "base", base=base, final=found)
    back, _ = tuned.load(tmp_path / "cell", folder=tmp_path / "base", dtype=torch.float32)
    assert all(torch.equal(p, dict(moved.named_parameters())[name]) for name, p in back.named_parameters())


def looking_ahead(model):
    """Attention that sees what comes."""
    for block in model.model.layers:
        forward = block.self_attn.forward
        block.self_attn.forward = lambda *a, forward=forward, **k: forward(*a, **k | {"is_causal": False})


def smoothing(model):
    """A loss that is not −log p(label)."""
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(
        logits[0, :-1], labels[0, 1:], label_smoothing=0.1
    )


def stopping(model):
    """A gradient that the model's own loss does not have: its logits use hidden states that training does not."""
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(
        hidden if hidden.shape[1] == trial.TOKENS else hidden.detach() + hidden.mean() * 0
    )


def raising(model):
    def fail(*_, **__):
        raise RuntimeError("this kernel needs a GPU")

    model.model.layers[1].mlp.forward = fail


@pytest.mark.parametrize(
    "wrong, said",
    [
        (looking_ahead, "its attention is not causal"),
        (smoothing, "the training loss"),
        (stopping, "the gradients of its own loss"),
        (raising, "raises RuntimeError: this kernel needs a GPU"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_an_architecture_that_differs_is_refused_by_name(wrong, said, large, monkeypatch):
    model = build("granite", attention_dropout=1e-9 * (1 + large))  # a config that no other test has had accepted
    wrong(model)
    monkeypatch.setattr(trial, "LARGE", 0 if large else 1 << 60)
    with pytest.raises(UserError, match="GraniteForCausalLM .model_type granite.") as refused:
        trial.check(model)
    assert said in str(refused.value)


def test_of_a_large_model_the_first_blocks_are_tried_and_then_all(monkeypatch):
    monkeypatch.setattr(trial, "LARGE", 0)
    calls = []
    for changed, wanted in ({"num_hidden_layers": 5}, [1, 1, 0, 0, 0]), ({"num_hidden_layers": 4}, [1, 1, 1, 1]):
        model = build("llama", **changed)
        calls.clear()
        for i, block in enumerate(model.model.layers):
            block.register_forward_hook(lambda *_, i=i: calls.append(i))
        if changed["num_hidden_layers"] == 4:  # which does not run without its last block
            model.model.norm.register_forward_hook(lambda *_, model=model: model.model.layers[3] and None)
        trial.check(model)
        assert [i in calls for i in range(len(wanted))] == list(map(bool, wanted))
        assert len(model.model.layers) == len(wanted)


def test_what_is_not_known_of_an_architecture_keeps_nothing_from_training(monkeypatch):
    """A model that reads numbers on its way, as those do that do not run on tensors without any."""
    model = build("stablelm", attention_dropout=1e-9)
    forward = type(model.model).forward

    def reading(self, *arguments, **named):
        assert float(self.norm.weight.sum()) != 0
        return forward(self, *arguments, **named)

    monkeypatch.setattr(type(model.model), "forward", reading)
    settings = TrainSettings(batch=2, micro_batch=2, length=12, learning_rate=1e-3, probes=0)
    predicted = memory.refuse(
        what="training",
        available=1,
        phase="train",
        shape=Shape(config=model.config),
        parts=(),
        settings=settings,
        checkpoint_dtype=torch.float32,
        compute_dtype=torch.float32,
        device_type="cpu",
    )
    assert set(predicted.values()) == {None}
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit(model=model, parts=(), examples=documents(), settings=settings, seed=0, base=base)
    assert result.flops is None and [row["mfu"] for row in result.curve] == [None, None]
    assert all(row["loss"] > 0 for row in result.curve)


HYBRID = {
    "qwen3_5_text": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "jamba": {"mamba_d_state": 8},
}
ERNIE = {"moe_num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}


@pytest.mark.parametrize("kind", HYBRID)
def test_adapters_may_stand_in_later_blocks_alone(kind):
    """Attention begins in the third block or later, and some of these configs cannot be shortened."""
    shape = Shape(config=CONFIG_MAPPING[kind](**COMMON | {"num_hidden_layers": 8} | HYBRID[kind]))
    parts = registry.build({"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}})
    adapted = {
        name.partition(".self_attn")[0] for name, p in shape.build(parts=parts).named_parameters() if p.requires_grad
    }
    assert adapted and not any(name.endswith("layers.0") for name in adapted)
    asked = {
        "shape": shape,
        "parts": parts,
        "settings": TrainSettings(batch=2, micro_batch=2, length=12, learning_rate=1e-3),
        "checkpoint_dtype": torch.float32,
        "compute_dtype": torch.float32,
        "device_type": "cpu",
    }
    predicted = memory.predict(phase="train", **asked)
    assert (predicted["total"] is None) if kind == "jamba" else predicted["total"] > predicted["activations"] > 0


@pytest.mark.parametrize(
    ("kind", "changed", "targets", "said"),
    [
        (
            "llama4_text",
            OTHERS["llama4_text"],
            ["router"],
            "lora: its adapters would adapt model.layers.0.feed_forward.router .* a Llama4Router",
        ),
        (
            "ernie4_5_moe",
            ERNIE,
            ["gate_proj"],
            "lora: Ernie4_5_MoeForCausalLM cannot be adapted as this block says: .*gate_proj",
        ),
        (
            "ernie4_5_moe",
            ERNIE,
            ["gate_proj", "up_proj"],
            "lora: its adapters would adapt model.layers.1.mlp.experts .* a Ernie4_5_MoeExperts",
        ),
        (
            "mamba",
            OTHERS["mamba"],
            ["out_proj"],
            "lora: MambaForCausalLM cannot be adapted as this block says: .*'out_proj' is incompatible",
        ),
    ],
)
def test_layers_that_are_no_plain_matrix_are_refused_by_name(kind, changed, targets, said):
    with pytest.raises(UserError, match=said):
        Shape(config=CONFIG_MAPPING[kind](**COMMON | changed)).build(
            parts=registry.build({"lora": {"rank": 2, "targets": targets}})
        )
