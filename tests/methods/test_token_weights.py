"""Parts that weigh the tokens of the loss, against whole logits: weights, gradient and denominator."""

import pytest
import torch
from torch.nn import functional as F

from experiments.training import loss
from methods import registry
from methods.errors import UserError
from methods.part import Part
from methods.talr import TALR


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


def assert_step(seen, model, weights_of, *, step=1, rtol=1e-7, atol=1e-9):
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
        torch.testing.assert_close(gradient[name], wanted, rtol=rtol, atol=atol)


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


# TALR, whose exponent is a statistic of the whole step


def talr_tau(model, rows):
    means = []
    for row in rows:
        logits, labels = labelled_logits(model, row)
        if len(labels):
            means.append(float(F.cross_entropy(logits.detach(), labels)))
    means.sort()
    middle = len(means) // 2
    return means[middle] if len(means) % 2 else (means[middle - 1] + means[middle]) / 2


@pytest.fixture
def documents_without_labels(documents):
    """One of them has no label; batches of four and of three have a median of either kind."""
    documents[1]["labels"] = torch.full_like(documents[1]["labels"], -100)
    return documents


@pytest.mark.parametrize("floor", [0.01, 0.3])
@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({"micro_batch": 4}, False),
        ({"micro_batch": 2}, True),
        ({"pack": 64}, False),
        ({"pack": 16}, True),
        ({"batch": 3, "micro_batch": 3}, False),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_talrs_exponent_is_the_median_of_the_whole_step(
    watch, make, documents_without_labels, settings, scores, floor, monkeypatch
):
    """However the step is cut; a pass is added where it has several micro-batches, and charged."""
    monkeypatch.setattr(loss, "CHUNK", 5)
    seen, result = watch({"talr": {"floor": floor}}, **settings)
    model = make()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(seen["weights"][1][name])
    tau = talr_tau(model, seen["rows"][1])
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if scores else {}  # scores are float32
    assert_step(seen, make(), lambda p, y: (label_probability(p, y) ** (1 / tau)).clamp(min=floor), **tolerance)
    lengths = [[len(row["input_ids"]) for row in rows] for rows in seen["rows"].values()]
    several = (lambda step: sum(step) > 16) if "pack" in settings else (lambda step: len(step) > 2)
    read = sum(sum(step) for step in lengths if scores and several(step))
    assert result.added["talr"]["tokens"] == read and bool(read) == scores


def test_a_part_that_adds_rows_later_leaves_the_exponent_as_it_is(make, documents, train):
    """Although the step is then cut into two micro-batches, of which the second one alone would give another one."""
    taus = []

    class Adding(Part):
        key = "adding"
        phase = "loss"

        def examples(self, *, rows, **_):
            return [*rows, {"input_ids": torch.arange(2, 9), "labels": torch.arange(2, 9)}]

        def batch_weights(self, *, nll, **_):
            return torch.ones_like(nll)

    class Seen(TALR):
        key = "talr"

        def batch_weights(self, *, nll, **arguments):
            weights = super().batch_weights(nll=nll, **arguments)
            taus.extend((-nll / weights.log()).tolist())
            return weights

    train(make(), (Seen(floor=0.0), Adding()), documents, batch=4, micro_batch=4, epochs=0.5)
    assert len(taus) > 10 and max(taus) - min(taus) < 1e-5 * min(taus)


def test_weights_of_tokens_and_of_micro_batches_are_multiplied(watch, make):
    seen, _ = watch({"dft": {}, "talr": {}}, micro_batch=4)
    model = make()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(seen["weights"][1][name])
    tau = talr_tau(model, seen["rows"][1])
    assert_step(seen, make(), lambda p, y: label_probability(p, y) ** (1 + 1 / tau))


# ASFT


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("estimator", ["full", "label"])
def test_asft_is_dft_with_a_kl_to_the_base(watch, make, documents, estimator, adapters, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 3)
    lora = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}} if adapters else {}
    seen, result = watch({"asft": {"strength": 0.3, "estimator": estimator}} | lora)
    model, base, total, count = result.run.model, make(), 0.0, 0
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in seen["weights"][1].items():
            parameters[name].requires_grad_().copy_(weight)
    for row in seen["rows"][1]:
        logits, labels = labelled_logits(model, row)
        theirs = torch.log_softmax(labelled_logits(base, row)[0].detach(), -1)
        ours = torch.log_softmax(logits, -1)
        own, other = label_probability(ours, labels), label_probability(theirs, labels)
        if estimator == "full":
            kl = (theirs.exp() * (theirs - ours)).sum(-1)
        else:
            kl = (other - own).exp() - (other - own) - 1
        total = total + (-own.detach().exp() * own + 0.3 * kl).sum()
        count += len(labels)
    gradient = seen["gradient"][1]
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if estimator == "full" else {"rtol": 1e-5, "atol": 1e-7}
    for name, wanted in zip(gradient, torch.autograd.grad(total / count, [parameters[n] for n in gradient])):
        torch.testing.assert_close(gradient[name], wanted, **tolerance)
    added = result.added["asft"]
    assert added["tokens"] == sum(len(row["input_ids"]) for row in documents)
    assert added["bytes"] == (0 if adapters else sum(p.numel() * 8 for p in base.parameters()))


def test_asft_is_refused_beside_dft():
    with pytest.raises(UserError, match="asft and dft cannot be combined: asft weighs tokens"):
        registry.build({"asft": {}, "dft": {}})
