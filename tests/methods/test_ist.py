"""IST: which blocks move, what a trial measures, and what the scores learn from it."""

import copy
import math

import pytest
import torch

from methods.errors import UserError
from methods.ist import IST, updated
from methods.lora import LoRA
from methods.part import Part

LORA = LoRA(rank=2)


class Watch(Part):
    """Keeps the trained tensors, the scores and the state of IST after each step."""

    key = "watch"

    def begin(self, *, run, state, **_):
        state["seen"] = [{name: weight.detach().clone() for name, weight in run.weights.items()}]

    def after_step(self, *, run, state, **_):
        state["seen"].append({name: weight.detach().clone() for name, weight in run.weights.items()})


def test_a_step_moves_the_blocks_that_are_drawn_and_no_others(make, documents, train):
    parts = (LORA, IST(every=2), Watch())
    result = train(make(num_hidden_layers=8), parts, documents * 3, weight_decay=0.1)
    state, seen = result.states["ist"], result.states["watch"]["seen"]
    moved = [
        {int(name.split(".layers.")[1].split(".")[0]) for name in after if not torch.equal(after[name], before[name])}
        for before, after in zip(seen, seen[1:])
    ]
    assert all(len(blocks) == 2 for blocks in moved) and len(set(map(frozenset, moved))) > 1
    assert state["steps"] == [sum(block in blocks for blocks in moved) for block in range(8)]


def test_a_trial_is_the_loss_with_weaker_adapters_and_is_charged(make, documents, train, monkeypatch):
    rounds = []

    def recording(scores, *, sets, losses, rate):
        rounds.append((sets, losses))
        return updated(scores, sets=sets, losses=losses, rate=rate)

    monkeypatch.setattr("methods.ist.updated", recording)
    model = make(num_hidden_layers=4)
    result = train(model, (LoRA(rank=2, dropout=0.2), IST(every=3), Watch()), documents, batch=2)
    assert len(rounds) == 1 and len(rounds[0][0]) == 3  # of three steps the last one
    rows = [documents[i] for i in _last_rows(result, documents)]
    before = result.states["watch"]["seen"][2]
    for suppressed, loss in zip(*rounds[0], strict=True):
        assert len(suppressed) == 2
        trial = copy.deepcopy(result.run.model).eval()
        with torch.no_grad():
            for name, weight in before.items():
                weaker = 0.25 if ".lora_B." in name and int(name.split(".layers.")[1][0]) in suppressed else 1.0
                trial.get_parameter(name).copy_(weaker * weight)
            nll = [
                -torch.log_softmax(trial(row["input_ids"][None]).logits[0, i - 1], -1)[row["labels"][i]]
                for row in rows
                for i in range(1, len(row["labels"]))
                if row["labels"][i] != -100
            ]
        assert loss == pytest.approx(torch.stack(nll).mean().item(), rel=1e-6)
    assert len(set(rounds[0][1])) > 1
    assert result.added["ist"]["tokens"] == 3 * sum(len(row["input_ids"]) for row in rows)
    assert IST().added().read == pytest.approx(0.3) and IST(choice="random").added().read == 0


def _last_rows(result, documents):
    """The rows of the last step: the engine's own order of the epoch."""
    from experiments.training.batches import epoch_order

    return epoch_order([len(row["input_ids"]) for row in documents], 2, 0, 0)[2]


def test_scores_rise_where_suppressing_did_no_harm():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    sets, losses = [[0, 1], [1, 2], [0, 3]], [1.0, 2.5, 0.7]
    rewards = torch.tensor([math.exp(-loss) for loss in losses], dtype=torch.float64)
    objective = sum(
        (reward - rewards.mean()) * torch.sigmoid(scores)[chosen].sum()
        for reward, chosen in zip(rewards, sets, strict=True)
    )
    (slope,) = torch.autograd.grad(objective, scores)
    after = updated(scores.detach(), sets=sets, losses=losses, rate=10.0)
    torch.testing.assert_close(after, scores.detach() + 10 * slope)
    assert after[3] > scores[3] and after[2] < scores[2]  # without 3 the loss was lowest, without 2 highest


def test_what_matters_trains_and_what_does_not_is_suppressed(make, documents, train, monkeypatch):
    chosen = []
    monkeypatch.setattr("methods.ist.updated", lambda scores, *, sets, **_: chosen.extend(sets) or scores)

    class Known(IST):
        key = "ist"

        def begin(self, *, run, state, examples, general=()):
            super().begin(run=run, state=state, examples=examples)
            state["scores"] = torch.tensor([60.0, 60.0, 60.0, -60.0], dtype=torch.float64)

    trained = train(make(num_hidden_layers=4), (LORA, Known(every=1, trials=2)), documents)
    assert trained.states["ist"]["steps"] == [0, 0, 0, 3]
    assert all(3 not in blocks for blocks in chosen) and len(chosen) == 6


def test_scores_however_large_can_be_drawn_from(make, documents, train):
    result = train(make(num_hidden_layers=4), (LORA, IST(every=1, rate=1e12)), documents)
    assert result.states["ist"]["scores"].abs().max() > 1e3 and sum(result.states["ist"]["steps"]) == 3


def test_a_step_of_replayed_text_alone_tries_nothing(make, documents, train):
    class Replaced(Part):
        key = "replaced"
        phase = "data"

        def examples(self, *, rows, step, **_):
            return [{name: row[name] for name in ("input_ids", "labels")} for row in rows] if step else rows

    result = train(make(num_hidden_layers=4), (LORA, Replaced(), IST(every=1, trials=2)), documents)
    charged = result.added["ist"]["tokens"]
    assert sum(result.states["ist"]["steps"]) == 3 and charged == 2 * result.tokens > 0


def test_the_scale_is_put_back_exactly(make, documents, train):
    result = train(make(num_hidden_layers=4), (LoRA(rank=3, alpha=0.7), IST(every=1)), documents)
    layers = [module for module in result.run.model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 8 and all(layer.scaling == {"default": 0.7 / 3} for layer in layers)


def test_random_choice_scores_nothing(make, documents, train):
    result = train(make(num_hidden_layers=4), (LORA, IST(choice="random", every=1)), documents)
    assert sum(result.states["ist"]["steps"]) == 3 and not result.states["ist"]["scores"].any()
    assert result.added["ist"]["tokens"] == 0


def test_without_adapters_it_says_what_to_do(make, documents, train):
    with pytest.raises(UserError, match="ist: the method has no adapters to choose from: add `lora`"):
        train(make(), (IST(),), documents)
