"""FLOW's weights and the loss of a step against their formula by whole logits."""

import math
from statistics import median

import pytest
import torch
from torch.nn import functional as F

from experiments.commands import plan
from methods import registry
from methods.flow import FLOW
from tests.experiments.test_prepare import load

LORA = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}


def sums(model, rows):
    """(Σ nll, number) of each row's labels."""
    return [
        (
            F.cross_entropy(model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], reduction="sum"),
            int((row["labels"][1:] != -100).sum()),
        )
        for row in rows
    ]


class Watched(FLOW):
    """Keeps the gradient of the first step."""

    key = "flow"

    def before_clip(self, *, run, state, step):
        if step == 0:
            state["gradient"] = {name: w.grad.clone() for name, w in run.weights.items()}


@pytest.mark.parametrize("adapters", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("pack", [0, 20])
@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_the_gradient_is_that_of_the_weighed_rows(make, documents, train, strength, pack, adapters):
    parts = (*registry.build(adapters), Watched(strength=strength))
    result = train(make(), parts, documents, batch=6, micro_batch=4, pack=pack)
    model = registry.build(adapters)[0].adapt(make(), seed=0) if adapters else make()
    own, gradient = dict(model.named_parameters()), result.states["flow"]["gradient"]
    with torch.no_grad():  # the first step moves B alone
        for name, weight in result.run.weights.items():
            if "lora_A" in name:
                own[name].copy_(weight)
    each = sums(model, documents)
    losses = [nll.item() / count for nll, count in each]
    temperature = median(losses)
    weights = [math.exp(-strength * loss / temperature) for loss in losses]
    loss = sum(weight * nll for weight, (nll, _) in zip(weights, each)) / sum(count for _, count in each)
    for name, wanted in zip(gradient, torch.autograd.grad(loss, [own[n] for n in gradient]), strict=True):
        torch.testing.assert_close(gradient[name], wanted, rtol=1e-5, atol=1e-8)  # scores are float32
    assert result.method.reports(result.run)["flow"] == {"temperature": pytest.approx(temperature, rel=1e-6)}
    assert result.added["flow"]["tokens"] == sum(len(row["input_ids"]) for row in documents)


def test_the_median_row_weighs_a_third_and_rows_of_other_parts_one(make, documents, train):
    """With an odd number of rows one of them is the median: w = exp(−1)."""
    seen = []

    class Weighing(FLOW):
        key = "flow"

        def examples(self, *, run, state, rows, step):
            other = {"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor([3, 4, 5])}
            return [*super().examples(run=run, state=state, rows=rows, step=step), other]

        def token_weights(self, **arguments):
            weights = super().token_weights(**arguments)
            seen.extend(weights.tolist())
            return weights

    train(make(), [Weighing()], documents[:5], batch=5, micro_batch=3)
    weights = sorted(set(seen))  # of five rows, and 1 of the row without an index
    assert len(weights) == 6 and weights[-1] == 1.0
    assert weights[2] == pytest.approx(math.exp(-1), rel=1e-6)


def test_a_row_without_labels_takes_no_part(make, documents, train):
    nothing = documents[0] | {"labels": torch.full_like(documents[0]["labels"], -100)}
    with_it = train(make(), [FLOW()], [*documents[1:], nothing])
    without = train(make(), [FLOW()], documents[1:])
    assert with_it.states["flow"]["temperature"] == pytest.approx(without.states["flow"]["temperature"], rel=1e-6)
    assert all(math.isfinite(line["loss"]) for line in with_it.curve)


def test_what_the_base_reads_before_the_first_step_is_planned_once(tmp_path):
    """Two epochs: the rows are read once, also where a second part has them scored."""

    def change(raw):
        raw["methods"] = {"full": {}, "flow": {"flow": {}}, "both": {"flow": {}, "stm": {"threshold": 99.0}}}
        raw["grid"]["methods"] = list(raw["methods"])
        raw["train"]["epochs"] = 2.0
        raw["models"]["llama-tiny"]["config"] = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 99000}

    full, flow, both = plan.make(load(tmp_path, change))["cells"]
    assert full["tokens"] == flow["tokens"] and full["tokens_added"] == 0
    assert both["tokens_added"] == 2 * flow["tokens_added"] == full["tokens"]
    assert flow["seconds_train"] > full["seconds_train"]
