"""Adapters that start from components of the weight: which ones, and that what is trained and kept is as published."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens

from experiments.training.engine import final_weights
from methods.corda import CorDA
from methods.errors import UserError
from methods.lora_null import LoRANull
from methods.milora import MiLoRA
from methods.part import Part
from methods.pissa import PiSSA
from methods.tools.adapter import merged, read_adapter, saved_entries
from methods.tools.covariance import covariances
from methods.tools.effective import effective_weights, lora_layers
from methods.tools.process_group import Shards
from methods.tools.split import matrix

TARGETS = ("q_proj", "down_proj")


def prepared(part, model, general=()):
    """The state of a part that was calibrated on a model."""
    made = part.calibrate(model=model, general=general, seed=0, progress=None)
    return {"calibration": made.calibration}


def adapted(part, model, general=()):
    return part.adapt(model, seed=0, state=prepared(part, model, general))


def logits(model, documents):
    with torch.no_grad():
        return model.eval()(input_ids=documents[0]["input_ids"][None]).logits


def in_base(name):
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


# which components


@pytest.mark.parametrize("settings", [{}, {"alpha": 12.0}, {"niter": 1000}])
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


def test_corda_starts_from_peft_s_own_components(make):
    part = CorDA(rank=3, targets=TARGETS, alpha=12.0)
    model, theirs = make(dtype=torch.float32), make(dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    given = {}
    for name, layer in part._layers(theirs).items():
        x = torch.randn(200, layer.in_features, generator=draw) * torch.linspace(0.5, 2, layer.in_features)
        given[name] = layer.covariance_matrix = x.T @ x / 200
        layer.corda_method, layer.rank = "kpm", 3
    config = LoraConfig(
        r=3,
        lora_alpha=12.0,
        target_modules=list(TARGETS),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )
    collect_eigens(theirs, config, verbose=False)
    crop_corda_eigens(theirs, config)
    theirs = dict(lora_layers(get_peft_model(theirs, config)))
    layers = part._layers(model)
    made = part._made(layers, {name: c.double() for name, c in given.items()}, progress=None, shards=Shards())
    for path, layer in lora_layers(part.adapt(model, seed=0, state={"calibration": made})):
        product = layer.start_B @ layer.start_A
        other = theirs[path].lora_B.default.weight @ theirs[path].lora_A.default.weight
        torch.testing.assert_close(product, other, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            layer.base_layer.weight - layer.scaling["default"] * product,
            theirs[path].base_layer.weight,
            rtol=0,
            atol=1e-5,
        )


def test_lora_null_starts_where_general_text_is_smallest(make, text):
    part, model = LoRANull(rank=3, targets=("q_proj",)), make()
    layers = part._layers(model)
    found = covariances(model, layers, text)
    for path, layer in lora_layers(adapted(part, model, text)):
        weight = layer.base_layer.weight.detach()
        null = torch.linalg.svd(found[path.removeprefix("base_model.model.")]).U[:, -3:]
        product = layer.start_B @ layer.start_A
        torch.testing.assert_close(product, weight @ null @ null.T, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.start_A.norm(dim=1), layer.start_B.norm(dim=0))  # √S each


@pytest.mark.parametrize("part", [CorDA, LoRANull])
def test_passes_change_no_component(make, text, part):
    one, three = (
        part(rank=2, targets=TARGETS, passes=passes).calibrate(model=make(), general=text, seed=0, progress=None)
        for passes in (1, 3)
    )
    assert all(torch.equal(three.calibration[name], tensor) for name, tensor in one.calibration.items())
    assert three.tokens == 3 * one.tokens == 3 * sum(len(document["input_ids"]) for document in text)
    assert one.notes == {"layers": 4, "documents": 30, "documents_asked": 256}


def test_too_little_text_and_too_many_passes_are_refused(make, text):
    with pytest.raises(UserError, match=r"corda reads 4 tokens, and model.layers.*down_proj has 48 inputs"):
        adapted(CorDA(samples=1, targets=("down_proj",)), make(), text)
    with pytest.raises(UserError, match="lora_null.passes is 3, and there are 2 layers"):
        adapted(LoRANull(passes=3, targets=("q_proj",)), make(), text)


def test_a_factor_that_is_kept_is_not_trained_and_the_adapter_has_one_rank(make, documents, text, train, tmp_path):
    part = LoRANull(rank=3, targets=("q_proj",), freeze_down=True)
    states = {part.key: prepared(part, make(), text)}
    result = train(make(), (part,), documents, states, weight_decay=0.1)
    assert all(".lora_B." in name for name in result.run.weights) and len(result.run.weights) == 2
    final = final_weights(result, (part,))
    part.save(run=result.run, state={}, folder=tmp_path)
    pairs, scale, _ = read_adapter(tmp_path / "adapter")
    assert saved_entries(result.run.model) == sum(t.numel() for pair in pairs.values() for t in pair.values())
    for weight in effective_weights(result.run):
        (layer,) = [layer for path, layer in lora_layers(result.run.model) if path == weight.layer]
        assert torch.equal(layer.lora_A.default.weight, layer.start_A) and len(pairs[weight.name]["a"]) == 3
        moved = (layer.lora_B.default.weight - layer.start_B) @ layer.start_A
        torch.testing.assert_close(final[weight.name] - result.run.base[weight.name], moved.detach())
        direction = torch.randn(moved.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        result.run.weights[weight.b].grad = None
        weight.pull(direction)
        torch.testing.assert_close(result.run.weights[weight.b].grad, direction @ layer.start_A.T)
        torch.testing.assert_close(weight.value(), moved.detach())


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
@pytest.mark.parametrize("chosen", [PiSSA, MiLoRA, CorDA, LoRANull])
def test_merged_and_saved_adapters_compute_what_was_trained(
    made, documents, text, train, tmp_path, chosen, kind, dtype
):
    targets = ("c_attn", "c_proj") if kind == "gpt2" else ("q_proj", "v_proj")
    part = chosen(rank=3, alpha=5.0, targets=targets, dropout=0.1)
    base = {n: p.detach().clone() for n, p in made(kind, dtype).named_parameters()}
    states = {part.key: prepared(part, made(kind, dtype), text)}
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
    saved = sum(tensor.numel() for factors in pairs.values() for tensor in factors.values())
    assert saved_entries(result.run.model) == saved
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
    ids = torch.arange(2, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, make(dtype=torch.bfloat16)(input_ids=ids).logits)
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
