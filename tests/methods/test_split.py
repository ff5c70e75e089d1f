"""Adapters that start from components of the weight: which ones, and that what is trained and kept is as published."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from experiments.training.engine import final_weights
from methods.errors import UserError
from methods.milora import MiLoRA
from methods.part import Part
from methods.pissa import PiSSA
from methods.tools.adapter import merged, read_adapter
from methods.tools.effective import effective_weights, lora_layers
from methods.tools.split import matrix

TARGETS = ("q_proj", "down_proj")


def prepared(part, model, general=()):
    """The state of a part that was calibrated on a model."""
    made = part.calibrate(model=model, general=general, seed=0, progress=None)
    return {"calibration": made.calibration}


def adapted(part, model, general=()):
    return part.adapt(model, seed=0, state=prepared(part, model, general))


@pytest.fixture
def made(make):
    """made(kind, dtype): the same tiny model each time; of "gpt2", whose matrices are in × out, too."""

    def build(kind="llama-tied", dtype=torch.float64):
        if kind != "gpt2":
            return make(kind, dtype)
        config = GPT2Config(vocab_size=31, n_embd=12, n_layer=2, n_head=2, n_positions=32, eos_token_id=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return build


def logits(model, documents):
    with torch.no_grad():
        return model.eval()(input_ids=documents[0]["input_ids"][None]).logits


def in_base(name):
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


# which components


@pytest.mark.parametrize("settings", [{}, {"alpha": 12.0}, {"niter": 300}])
def test_pissa_starts_from_peft_s_own_components(make, settings):
    part = PiSSA(rank=3, targets=TARGETS, **settings)
    own = adapted(part, make(dtype=torch.float32))
    config = LoraConfig(
        r=3, lora_alpha=settings.get("alpha", 3), target_modules=list(TARGETS), init_lora_weights="pissa"
    )
    theirs = dict(lora_layers(get_peft_model(make(dtype=torch.float32), config)))
    for path, layer in lora_layers(own):
        (a, b), scale = (layer.start_A, layer.start_B), layer.scaling["default"]
        other = theirs[path]
        torch.testing.assert_close(b @ a, other.lora_B.default.weight @ other.lora_A.default.weight, rtol=0, atol=1e-5)
        residual = layer.base_layer.weight - scale * b @ a
        torch.testing.assert_close(residual, other.base_layer.weight, rtol=0, atol=1e-5)
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_milora_starts_from_the_smallest_singular_values(make, alpha):
    model = make()
    for _, layer in lora_layers(adapted(MiLoRA(rank=3, alpha=alpha, targets=TARGETS), model)):
        weight = matrix(layer.base_layer).detach()
        values, vectors = torch.linalg.eigh(weight.T @ weight if len(weight) > len(weight.T) else weight @ weight.T)
        vectors = vectors[:, :3]  # of the smallest three, ascending
        wanted = weight @ vectors @ vectors.T if len(weight) > len(weight.T) else vectors @ vectors.T @ weight
        product = layer.scaling["default"] * layer.start_B @ layer.start_A
        torch.testing.assert_close(product.detach(), wanted, rtol=0, atol=1e-6)
        norms = layer.start_A.norm(dim=1), layer.start_B.norm(dim=0)
        torch.testing.assert_close(*norms)  # √S each
        torch.testing.assert_close(
            norms[0] ** 2 * layer.scaling["default"], values[:3].flip(0).sqrt(), rtol=1e-5, atol=0
        )


def test_more_components_than_there_are_are_refused(make):
    with pytest.raises(UserError, match=r"pissa.rank is 65: model.layers.0.self_attn.q_proj is \[\d+, \d+\]"):
        adapted(PiSSA(rank=65), make())


# what is trained and kept


class PeftsOwn(Part):
    """peft's PiSSA, which trains the residual plus B·A."""

    key = "theirs"

    def adapt(self, model, *, seed, state=None):
        config = LoraConfig(r=3, lora_alpha=3, target_modules=list(TARGETS), init_lora_weights="pissa")
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def test_training_is_that_of_the_residual_and_the_adapter(make, documents, train):
    part = PiSSA(rank=3, targets=TARGETS)
    model = make(dtype=torch.float32)
    states = {"pissa": prepared(part, model)}
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = final_weights(train(model, (part,), documents, states, learning_rate=1e-3), (part,))
    theirs = train(make(dtype=torch.float32), (PeftsOwn(),), documents, learning_rate=1e-3).run.model
    for path, layer in lora_layers(theirs):
        name = in_base(f"{path}.base_layer.weight")
        weight = (
            layer.base_layer.weight
            + layer.scaling["default"] * layer.lora_B.default.weight @ layer.lora_A.default.weight
        )
        moved = (weight.detach() - base[name]).norm()
        assert (own[name] - weight.detach()).norm() < 1e-2 * moved and moved > 1e-3


@pytest.mark.parametrize(
    "kind, dtype", [("llama-tied", torch.float64), ("gptj", torch.float32), ("gpt2", torch.float32)]
)
@pytest.mark.parametrize("chosen", [PiSSA, MiLoRA])
def test_merged_and_saved_adapters_compute_what_was_trained(made, documents, train, tmp_path, chosen, kind, dtype):
    targets = ("c_attn", "c_proj") if kind == "gpt2" else ("q_proj", "v_proj")
    part = chosen(rank=3, alpha=5.0, targets=targets, dropout=0.1)
    base = {n: p.detach().clone() for n, p in made(kind, dtype).named_parameters()}
    states = {part.key: prepared(part, made(kind, dtype), documents)}
    start = logits(part.adapt(made(kind, dtype), seed=0, state=states[part.key]), documents)
    assert torch.equal(start, logits(made(kind, dtype), documents))
    result = train(made(kind, dtype), (part,), documents, states, base=base)
    trained = logits(result.run.model, documents)
    assert not torch.allclose(trained, start, atol=1e-4)
    final = final_weights(result, (part,))
    near = 1e-11 if dtype == torch.float64 else 1e-4
    for weight in effective_weights(result.run):
        torch.testing.assert_close(weight.value(), final[weight.name] - base[weight.name], rtol=near, atol=near)
    part.save(run=result.run, state={}, folder=tmp_path)
    pairs, scale, transposed = read_adapter(tmp_path / "adapter")
    for name, factors in pairs.items():
        assert len(factors["a"]) == 6
        assert torch.equal(merged(base[name], **factors, scale=scale, transposed=transposed), final[name])
    loaded = PeftModel.from_pretrained(made(kind, dtype), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(loaded, documents), trained, rtol=near, atol=near)
    plain = made(kind, dtype)
    with torch.no_grad():
        for name, tensor in final.items():
            plain.get_parameter(name).copy_(tensor)
    torch.testing.assert_close(logits(plain, documents), trained, rtol=near, atol=near)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_pulls_as_autograd_does_and_is_zero_at_the_start(made, run_of, drawn, kind):
    base = {n: p.detach() for n, p in made(kind).named_parameters()}
    model = adapted(PiSSA(rank=3, alpha=5.0, targets=("c_attn",) if kind == "gpt2" else TARGETS), made(kind))
    run = run_of(model, base)
    assert all((weight.value() == 0).all() for weight in effective_weights(run))
    drawn(model)
    parameters = dict(model.named_parameters())
    for w in effective_weights(run):
        layer = model.get_submodule(w.layer)
        a, b = parameters[w.a], parameters[w.b]
        value = w.scaling * (b @ a - layer.start_B @ layer.start_A)
        value = value.T if w.transposed else value
        torch.testing.assert_close(w.value(), value.detach())
        direction = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ga, gb = torch.autograd.grad((value * direction).sum(), (a, b))
        w.pull(direction, scale=0.5)
        torch.testing.assert_close(a.grad, 0.5 * ga)
        torch.testing.assert_close(b.grad, 0.5 * gb)


def test_small_steps_of_large_components_are_not_rounded_away_in_bfloat16(make):
    """As B·A·x − B₀·A₀·x they would be: these products are as large as the layer's output."""
    model = adapted(PiSSA(rank=8, targets=("q_proj",)), make(dtype=torch.bfloat16))
    (_, layer), *_ = lora_layers(model)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    x = torch.randn(16, a.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).bfloat16()
    with torch.no_grad():
        b.view(-1)[0] *= 1.01
        moved = (b.double() - layer.start_B.double()) @ a.double() @ x.double().T
        result = layer.lora_variant["default"].forward(
            layer, active_adapter="default", x=x, result=torch.zeros(16, len(b), dtype=x.dtype)
        )
    assert moved.norm() > 0
    assert (result.double().T - moved).norm() < 0.01 * moved.norm()
