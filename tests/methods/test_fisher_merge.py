"""Fisher merging against its formula, with Fishers from one backward pass an example by the plain model."""

import pytest
import torch

from experiments.training.engine import final_weights
from methods import registry
from methods.errors import UserError
from methods.ewc import EWC
from methods.fisher_merge import FisherMerge
from methods.lora import LoRA
from methods.part import Run
from methods.tools.importance import encode


def fisher(model, rows):
    """Mean over rows of the squared gradient of Σ −log p(label), by parameter name; straight from torch."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        logits = model.eval()(row["input_ids"][None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row["labels"][1:], ignore_index=-100, reduction="sum").backward()
        for name, p in model.named_parameters():
            total[name] += 0 if p.grad is None else p.grad.square()
    return {name: value / len(rows) for name, value in total.items()}


def filled(model, weights):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights.get(name, p))
    return model


def closed_form(base, tuned, f0, f1, *, strength=1.0, normalise=True, floor=0.0):
    names = list(tuned)
    n0, n1 = (torch.cat([f[n].flatten() for n in names]).norm() if normalise else 1.0 for f in (f0, f1))
    merged = {}
    for name in names:
        a, b = strength * f0[name] / n0, (f1[name] / n1).clamp(min=floor)
        both = a + b
        merged[name] = torch.where(both > 0, (a * base[name] + b * tuned[name]) / both.clamp(min=1e-300), tuned[name])
    return merged


SETTINGS = {"samples": 4, "length": 8, "estimator": "empirical", "bits": 32, "rows": 100}


def trained(part, make, documents, train, *, kind, parts=()):
    """(base, the weights that `parts` make alone, those that they make with `part`, F₀, the run's result)."""
    base = {name: p.detach().clone() for name, p in make(kind).named_parameters()}
    tuned = final_weights(train(make(kind), parts, documents), parts)
    model = make(kind)
    for other in parts:
        model = other.adapt(model, seed=0)
    prepared = part.prepare(model=model, base=base, general=documents[::-1], seed=0, fit=None, progress=None)
    result = train(make(kind), (*parts, part), documents, {part.key: {"importance": prepared.importance}})
    return base, tuned, final_weights(result, (*parts, part)), prepared.importance, result


@pytest.mark.parametrize("kind", ["llama-tied", "gptj"])
@pytest.mark.parametrize("settings", [{}, {"strength": 3.0, "normalise": False}, {"floor": 1e-3}])
def test_it_is_the_average_by_both_fishers(make, documents, train, kind, settings):
    part = FisherMerge(**SETTINGS, **settings)
    base, tuned, merged, importance, result = trained(part, make, documents, train, kind=kind)
    cut = [{name: tensor[:8] for name, tensor in row.items()} for row in documents[::-1][:4]]
    f0, f1 = fisher(make(kind), cut), fisher(filled(make(kind), tuned), documents)
    assert merged.keys() == tuned.keys() == importance.keys()
    for name, wanted in closed_form(base, tuned, f0, f1, **settings).items():
        torch.testing.assert_close(merged[name], wanted, rtol=2e-6, atol=2e-8)  # F itself is float32
    added = result.added["fisher_merge"]  # F₁'s pass; F₀'s belongs to the preparation
    assert added["tokens"] == sum(len(row["input_ids"]) for row in documents) and added["flops"] > 0
    report = part.report(run=result.run, state=result.states["fisher_merge"])
    assert report["rows"] == len(documents) and 0 < report["share_of_tuned"] < 1


@pytest.mark.parametrize("dora", [False, True])
def test_with_an_adapter_the_merged_weights_are_averaged(make, documents, train, dora):
    part, lora = FisherMerge(**SETTINGS), LoRA(rank=2, targets=["q_proj", "up_proj"], dora=dora)
    registry.build({"lora": {"dora": dora}, "fisher_merge": {}})  # it is not refused
    base, tuned, merged, _, _ = trained(part, make, documents, train, kind="llama-tied", parts=(lora,))
    cut = [{name: tensor[:8] for name, tensor in row.items()} for row in documents[::-1][:4]]
    f0, f1 = fisher(make(), cut), fisher(filled(make(), tuned), documents)
    assert len(merged) == 4
    for name, wanted in closed_form(base, tuned, f0, f1).items():
        torch.testing.assert_close(merged[name], wanted, rtol=2e-6, atol=2e-8)


@pytest.fixture
def finished(make, documents):
    """finished(part, importance, tuned, base): what a part makes of weights, on rows without a training."""

    def run_of(part, importance, tuned, base):
        run = Run(model=make().to("meta"), weights={}, base=base, seed=0, device="cpu")
        state = {"importance": importance}
        part.begin(run=run, state=state, examples=documents)
        return part.finish(run=run, state=state, final=tuned), state

    return run_of


def test_an_entry_that_neither_needs_keeps_its_tuned_value_and_codes_are_read(make, finished):
    base = {name: p.detach().clone() for name, p in make().named_parameters()}
    name = "model.embed_tokens.weight"
    tuned = {name: base[name] + 1}
    zero = torch.zeros_like(base[name])
    part = FisherMerge(**SETTINGS | {"rows": 1})
    final, state = finished(part, {name: zero}, tuned, base)
    assert torch.equal(final[name], tuned[name])  # 0/(0 + F₁) and 0/0
    one = torch.ones_like(base[name])
    for theirs in (one, encode(one)):
        final, state = finished(part, {name: theirs}, tuned, base)
        seen = set(state["rows"][0]["input_ids"].tolist())
        # rows of tokens that were not read and of which no label was likely have a small F₁; the base's is 1/√n each
        assert len(state["rows"]) == 1 and len(seen) < 31
        assert ((final[name] >= base[name]) & (final[name] <= tuned[name])).all()
        assert (final[name] - base[name]).mean() < 0.5
    torch.testing.assert_close(final, finished(part, {name: one}, tuned, base)[0])


def test_the_ends(make, finished):
    base = {name: p.detach().clone() for name, p in make().named_parameters()}
    name = "model.norm.weight"
    tuned, one = {name: base[name] + 1}, {name: torch.ones_like(base[name])}
    assert finished(FisherMerge(**SETTINGS, strength=0.0), one, tuned, base)[0] is tuned
    far = finished(FisherMerge(**SETTINGS, strength=1e12), one, tuned, base)[0]
    torch.testing.assert_close(far[name], base[name], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="fisher_merge: no importance was prepared for model.norm.weight"):
        finished(FisherMerge(**SETTINGS), {}, tuned, base)


def test_rows_are_drawn_from_the_seed(make, documents):
    part = FisherMerge(rows=3)

    def drawn(seed):
        state = {}
        part.begin(run=Run(model=None, weights={}, base={}, seed=seed, device="cpu"), state=state, examples=documents)
        return [id(row) for row in state["rows"]]

    assert drawn(0) == drawn(0) and len(set(drawn(0))) == 3
    assert any(drawn(0) != drawn(seed) for seed in range(1, 5))


def test_the_base_is_prepared_as_ewc_prepares_it(make, documents, capsys):
    arguments = {"base": {}, "general": documents, "seed": 3, "fit": None, "progress": None}
    settings = {"samples": 50, "length": 6, "estimator": "sampled", "bits": 32}
    own = FisherMerge(**settings).prepare(model=make(), **arguments)
    told = capsys.readouterr().out
    assert "fisher_merge.samples is 50" in told and "ewc" not in told
    theirs = EWC(**settings).prepare(model=make(), **arguments)
    assert own.tokens == theirs.tokens and own.importance.keys() == theirs.importance.keys()
    assert all(torch.equal(tensor, theirs.importance[name]) for name, tensor in own.importance.items())
