"""Parts that weigh the tokens of the loss, against whole logits: weights, gradient and denominator."""

import pytest
import torch
from torch.nn import functional as F

from experiments.training import loss
from methods import registry
from methods.part import Part


class Watched(Part):
    """The rows and weights of the second step, in which nothing is at its start any more, and its gradient."""

    key = "watched"
    phase = "mask"

    def begin(self, *, state, **_):
        state |= {"rows": {}, "weights": {}, "gradient": {}}

    def examples(self, *, run, state, rows, step):
        state["rows"][step] = rows
        state["weights"][step] = {name: weight.detach().clone() for name, weight in run.weights.items()}
        return rows

    def before_clip(self, *, run, state, step):
        state["gradient"][step] = {name: weight.grad.clone() for name, weight in run.weights.items()}


@pytest.fixture
def watch(make, documents, train):
    """watch(block, chunk=): what `Watched` saw of a run with these parts, and the model."""

    def run(block, **settings):
        parts = (*registry.build(block), Watched())
        result = train(make(), parts, documents, **({"batch": 4, "micro_batch": 2, "learning_rate": 5e-2} | settings))
        return result.states["watched"], result

    return run


def labelled_logits(model, row):
    """Logits (labelled tokens, vocabulary) and labels of a row, by the whole model."""
    logits, labels = model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:]
    return logits[labels != -100], labels[labels != -100]


def assert_step(seen, model, weights_of, *, step=1):
    """The gradient of `step` is that of Σ w·nll over the step's labelled tokens, divided by their number."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in seen["weights"][step]:
                p.copy_(seen["weights"][step][name])
    total, count = 0.0, 0
    for row in seen["rows"][step]:
        logits, labels = labelled_logits(model, row)
        weights = weights_of(torch.softmax(logits.detach(), -1), labels)
        total = total + (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
        count += len(labels)
    parameters = dict(model.named_parameters())
    gradient = seen["gradient"][step]
    for name, wanted in zip(gradient, torch.autograd.grad(total / count, [parameters[n] for n in gradient])):
        torch.testing.assert_close(gradient[name], wanted, rtol=1e-7, atol=1e-9)


def label_probability(probabilities, labels):
    return probabilities[torch.arange(len(labels)), labels]


def entropy(probabilities):
    return torch.stack([-(p * p.log()).sum() for p in probabilities])


def top_entropy(probabilities, top):
    largest = probabilities.sort(dim=-1, descending=True).values[:, :top]
    return entropy(largest / largest.sum(-1, keepdim=True))


WEIGHTS = {
    "dft": ({"dft": {}}, label_probability),
    "dft-power": ({"dft": {"power": 0.5}}, lambda p, y: label_probability(p, y).sqrt()),
    "deft": (
        {"dft": {"adaptive": True}},
        lambda p, y: torch.stack([row[label] ** sum(v * v for v in row) for row, label in zip(p, y)]),
    ),
    "eaft": ({"eaft": {}}, lambda p, y: top_entropy(p, 20) / 3),
    "eaft-others": ({"eaft": {"top": 4, "power": 2.0, "divisor": 1.0}}, lambda p, y: top_entropy(p, 4) ** 2),
    "eaft-all": ({"eaft": {"top": None}}, lambda p, y: entropy(p) / 3),
    "profit": ({"profit": {"threshold": 0.03}}, lambda p, y: (label_probability(p, y) >= 0.03).double()),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_steps_gradient_is_that_of_weighted_whole_logits(watch, make, name, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 3)  # several chunks, which are computed again in backward
    block, weights_of = WEIGHTS[name]
    seen, _ = watch(block)
    assert_step(seen, make(), weights_of)


def test_defts_own_loss_has_this_gradient():
    logits = torch.randn(9, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9)
    p = torch.softmax(logits, -1)
    alpha = p.detach().square().sum(-1)
    published = -((label_probability(p, labels) ** alpha - 1) / (alpha + 1e-6)).sum()
    weights = WEIGHTS["deft"][1](p.detach(), labels)
    ours = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (published, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)


def test_tokens_that_profit_leaves_out_stay_in_the_denominator_and_come_back(watch, make):
    """Which tokens are learned is decided anew in each step, and the loss that is shown has no weights."""
    seen, result = watch({"profit": {"threshold": 0.03}}, epochs=3.0)
    learned = {}
    for step, rows in seen["rows"].items():
        model = make()
        model.load_state_dict(
            seen["weights"][step] | {"lm_head.weight": seen["weights"][step]["model.embed_tokens.weight"]}
        )
        for row in rows:
            logits, labels = labelled_logits(model, row)
            kept = (label_probability(torch.softmax(logits, -1), labels) >= 0.03).tolist()
            learned.setdefault(row["index"], []).append(kept)
    assert any(len(set(map(tuple, each))) > 1 for each in learned.values())
    every = [kept for each in learned.values() for kept in each[0]]
    assert 0 < sum(every) < len(every)
    assert result.added == {} or result.added["profit"]["tokens"] == 0
