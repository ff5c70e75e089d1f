"""Muon against singular values and a plain loop; which tensors it moves."""

import pytest
import torch

from experiments.model.random_models import build
from methods import registry
from methods.errors import UserError
from methods.muon import Muon
from methods.tools import orthogonal
from methods.tools.process_group import Shards

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def quintic(singular_values, steps):
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        singular_values = a * singular_values + b * singular_values**3 + c * singular_values**5
    return singular_values


def expected(matrix, steps=5):
    """What Newton-Schulz makes of a matrix: the quintic of its singular values, between its singular vectors."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ torch.diag(quintic(s / s.norm(), steps)) @ vh


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_newton_schulz_is_a_quintic_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = orthogonal.newton_schulz(matrix, COEFFICIENTS, 5)
    torch.testing.assert_close(made, expected(matrix), rtol=1e-9, atol=1e-9)
    assert 0.5 < torch.linalg.svdvals(made).min() and torch.linalg.svdvals(made).max() < 1.3


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_steps_are_those_of_a_plain_loop(run_of, make, precision, nesterov, scale):
    model = make("gptj", dtype=torch.float32)
    run = run_of(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    part = Muon(precision=precision, nesterov=nesterov, scale=scale, momentum=0.9)
    rate, decay = 0.1, 0.5
    optimizer = part.optimizer(run=run, learning_rate=rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay)
    weights = {name: w.detach().double() for name, w in run.weights.items()}
    momenta, draw = {}, torch.Generator().manual_seed(1)
    others = {n: torch.nn.Parameter(w.detach().clone()) for n, w in run.weights.items()}
    adamw = torch.optim.AdamW(others.values(), lr=rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay, fused=True)
    for _ in range(3):
        for name, weight in run.weights.items():
            gradient = torch.randn(weight.shape, generator=draw)
            weight.grad, others[name].grad = gradient.clone(), gradient.clone()
            momenta[name] = 0.9 * momenta.get(name, 0.0) + 0.1 * gradient.double()
            if weight.dim() == 2:
                ahead = 0.1 * gradient + 0.9 * momenta[name] if nesterov else momenta[name]
                rows, columns = weight.shape
                size = 0.2 * max(rows, columns) ** 0.5 if scale == "match_rms_adamw" else max(1, rows / columns) ** 0.5
                weights[name] = (1 - rate * decay) * weights[name] - rate * size * expected(ahead)
        optimizer.step()
        adamw.step()
    hidden = [name for name in weights if ".h." in name and weights[name].dim() == 2]
    assert len(hidden) == 12
    for name, weight in run.weights.items():
        if name in hidden:
            moved, wanted = (w.double() - run.base[name].double() for w in (weight.detach(), weights[name]))
            assert (moved - wanted).norm() < (0.03 if precision == "bfloat16" else 1e-4) * wanted.norm(), name
        else:
            assert torch.equal(weight, others[name]), name
    assert {name for name, w in run.weights.items() if "momentum_buffer" in optimizer.state[w]} == set(hidden)


def test_muon_of_rows_is_torchs_own(run_of, make):
    """What processes that share a model compute, here with all rows in one."""
    moved = []
    for kind, more in (
        (torch.optim.Muon, {}),
        (orthogonal.Muon, {"shards": Shards(), "shapes": [(5, 8), (8, 5)], "precision": "bfloat16"}),
    ):
        draw = torch.Generator().manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((5, 8), (8, 5))]
        optimizer = kind(weights, lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw", **more)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draw)
            optimizer.step()
        moved.append(weights)
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_state_of_both_optimizers_is_kept(run_of, make):
    def stepped(steps, optimizer, run):
        draw = torch.Generator().manual_seed(3)
        for number in range(steps.stop):
            for weight in run.weights.values():
                weight.grad = torch.randn(weight.shape, generator=draw)
            if number in steps:
                optimizer.step()

    def begun():
        model = make("llama-tied", dtype=torch.float32)
        run = run_of(model, {name: p.detach().clone() for name, p in model.named_parameters()})
        return run, Muon().optimizer(run=run, learning_rate=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)

    (whole, optimizer), (again, other) = begun(), begun()
    stepped(range(0, 4), optimizer, whole)
    first_run, first = begun()
    stepped(range(0, 2), first, first_run)
    other.load_state_dict(first.state_dict())
    again.model.load_state_dict(first_run.model.state_dict())
    stepped(range(2, 4), other, again)
    for name, weight in whole.weights.items():
        assert torch.equal(again.weights[name], weight), name


def test_flops_of_newton_schulz_are_charged(make, documents, train):
    result = train(make(dtype=torch.float32), (Muon(iterations=2),), documents)
    shapes = [w.shape for name, w in result.run.weights.items() if ".layers." in name and w.dim() == 2]
    each = sum(2 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes)
    assert result.added["muon"]["flops"] == result.steps * each and result.added["muon"]["tokens"] == 0


def test_matrices_of_gpt2_are_its_own_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    from methods.muon import _matrices

    class Run:
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=17, n_positions=16))
        weights = base = dict(model.named_parameters())
        shapes = {name: p.shape for name, p in base.items()}

    assert len(_matrices(Run)) == 2 * 4 and all(".h." in name for name in _matrices(Run))


def test_moments_in_bfloat16_are_refused(make, documents, train):
    with pytest.raises(UserError, match="muon: train.moments is bfloat16, but torch keeps Muon's momentum in float32"):
        train(make(dtype=torch.float32), (Muon(),), documents, moments="bfloat16")


def test_it_is_refused_beside_adapters_and_without_matrices(run_of):
    with pytest.raises(UserError, match="lora and muon cannot be combined: muon moves whole matrices"):
        registry.build({"lora": {}, "muon": {}})
    model = build("llama", seed=0)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    with pytest.raises(UserError, match="muon: no matrix of the model's blocks is trained"):
        settings = {"learning_rate": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
        Muon().optimizer(run=run_of(model, dict(model.named_parameters())), **settings)
