"""Selective token masking against whole logits: what is masked, the denominator, and rows without a label left."""

import pytest
import torch
from torch.nn import functional as F

from methods import registry
from methods.errors import UserError
from methods.stm import STM

LORA = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}


def perplexities(model, row):
    """Of every token of a row but the first."""
    with torch.no_grad():
        return F.cross_entropy(
            model(row["input_ids"][None]).logits[0, :-1], row["input_ids"][1:], reduction="none"
        ).exp()


def masked(model, rows, threshold):
    """The rows with -100 in place of labels above the threshold."""
    return [
        row
        | {
            "labels": torch.cat(
                [row["labels"][:1], row["labels"][1:].where(perplexities(model, row) <= threshold, -100)]
            )
        }
        for row in rows
    ]


@pytest.fixture
def threshold(make, documents):
    """At which some labels are left and one row has none."""
    own = [perplexities(make(), row)[row["labels"][1:] != -100] for row in documents]
    return float(sorted(each.min() for each in own)[-1]) - 1e-3


class Watched(STM):
    """Keeps the gradient of the first step."""

    key = "stm"

    def before_clip(self, *, run, state, step):
        if step == 0:
            state["gradient"] = {name: w.grad.clone() for name, w in run.weights.items()}


@pytest.mark.parametrize("adapters", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("pack", [0, 20])
def test_the_gradient_is_that_of_the_mean_over_the_labels_left(make, documents, train, threshold, pack, adapters):
    parts = (*registry.build(adapters), Watched(threshold=threshold))
    result = train(make(), parts, documents, batch=6, micro_batch=2, pack=pack)
    model = registry.build(adapters)[0].adapt(make(), seed=0) if adapters else make()
    own = dict(model.named_parameters())
    gradient = result.states["stm"]["gradient"]
    with torch.no_grad():  # adapters as they were drawn: the first step moves B alone
        for name, weight in result.run.weights.items():
            if "lora_A" in name:
                own[name].copy_(weight)
    rows = masked(make(), documents, threshold)
    left = [int((row["labels"][1:] != -100).sum()) for row in rows]
    nll = sum(
        F.cross_entropy(model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], reduction="sum")
        for row in rows
    )
    for name, wanted in zip(gradient, torch.autograd.grad(nll / sum(left), [own[n] for n in gradient]), strict=True):
        torch.testing.assert_close(gradient[name], wanted, rtol=1e-9, atol=1e-12)
    labels = sum(int((row["labels"][1:] != -100).sum()) for row in documents)
    report = result.method.reports(result.run)["stm"]
    assert report == {"share_of_labels_masked": 1 - sum(left) / labels, "rows_without_labels": left.count(0)}
    assert left.count(0) > 0 and result.curve[0]["loss"] == pytest.approx(nll.item() / sum(left), rel=1e-6)
    tokens = sum(len(row["input_ids"]) for row in documents)  # a row without labels is read as any other
    assert result.tokens == result.added["stm"]["tokens"] == tokens


def test_rows_of_other_parts_are_left_alone(make, documents, train, threshold):
    result = train(make(), [STM(threshold=threshold)], documents)
    other = dict(documents[0])
    rows = [documents[1] | {"index": 1}, other]
    actual = STM(threshold=threshold).examples(run=result.run, state=result.states["stm"], rows=rows, step=0)
    assert actual[1] is other
    assert torch.equal(actual[0]["labels"], masked(make(), documents, threshold)[1]["labels"])
    assert torch.equal(rows[0]["labels"], documents[1]["labels"])  # the row itself is not written to


def test_a_start_does_not_change_what_is_masked(make, documents, train, threshold):
    other = {name: p.detach().clone() for name, p in make(seed=3).named_parameters()}
    plain, started = (
        train(make(), [STM(threshold=threshold)], documents, states={"stm": state}) for state in ({}, {"start": other})
    )
    for one, two in zip(plain.states["stm"]["labels"], started.states["stm"]["labels"], strict=True):
        assert torch.equal(one, two)


def test_a_threshold_below_every_token_is_refused(make, documents, train):
    lowest = min(float(perplexities(make(), row)[row["labels"][1:] != -100].min()) for row in documents)
    with pytest.raises(UserError, match=f"stm.threshold is 1.5, .* The lowest is {lowest:.3g}, the median"):
        train(make(), [STM(threshold=1.5)], documents)
