"""KL to the base against full logits, in one process and two, with adapters and without."""

import copy

import pytest
import torch
from torch.nn import functional as F

from experiments.training import loss
from methods import registry
from methods.kl import KL

STRENGTH, TEMPERATURE = 0.7, 1.5
LORA = {"rank": 2, "targets": ["q_proj", "v_proj"]}


@pytest.fixture
def general():
    draw = torch.Generator().manual_seed(9)
    rows = [torch.randint(2, 31, (size,), generator=draw) for size in (11, 6, 17)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in rows]


def brute_force(model, base, rows, *, text):
    """The loss of a step by whole logits, row by row: nll and the mean KL of each kind of row."""
    nll, count, sums = 0.0, 0, {"domain": [], "general": []}
    for row in rows:
        ids, labels = row["input_ids"][None], row["labels"]
        ours, theirs = (m(ids).logits[0, :-1].double() for m in (model, base))
        asked = labels[1:] != -100
        nll = nll + F.cross_entropy(ours[asked], labels[1:][asked], reduction="sum") if asked.any() else nll
        count += int(asked.sum())
        p, q = (torch.softmax(logits / TEMPERATURE, -1) for logits in (theirs, ours))
        each = (p * (p.log() - q.log())).sum(-1)
        kind = "domain" if "index" in row else "general"
        sums[kind].append(each[asked] if kind == "domain" else each)
    kinds = ("domain", "general") if text == "both" else (text,)
    penalty = sum(torch.cat(sums[kind]).mean() for kind in kinds)
    return nll / count + STRENGTH * TEMPERATURE**2 * penalty


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("text", ["domain", "general", "both"])
def test_a_steps_gradient_is_that_of_whole_logits(make, documents, general, text, adapters, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 3)  # several chunks, which are computed again in backward
    from experiments.training.engine import fit
    from experiments.training.settings import TrainSettings

    seen = {}

    class Watched(KL):
        key = "kl"

        def examples(self, *, rows, step, **arguments):
            seen[step] = super().examples(rows=rows, step=step, **arguments)
            return seen[step]

        def before_clip(self, *, run, state, step):
            if step == 1:  # the weights have moved: the KL is not at its minimum, where its gradient is 0
                seen["gradient"] = {name: w.grad.clone() for name, w in run.weights.items()}
                seen["weights"] = {name: w.detach().clone() for name, w in run.weights.items()}

    settings = {"strength": STRENGTH, "text": text, "temperature": TEMPERATURE, "share": 0.6, "length": 9}
    parts = (*registry.build({"lora": LORA} if adapters else {}), Watched(**settings))
    model, base = make(), make()
    result = fit(
        model=model,
        parts=parts,
        examples=documents,
        general=general,
        settings=TrainSettings(batch=4, micro_batch=2, learning_rate=5e-2, clip=0.0, probes=0),
        seed=0,
        base={name: p.detach().clone() for name, p in base.named_parameters()},
    )
    trained = result.run.model
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if name in seen["weights"]:
                p.copy_(seen["weights"][name])
    wanted = brute_force(trained, base, seen[1], text=text)
    names = list(seen["gradient"])
    parameters = dict(trained.named_parameters())
    for name, gradient in zip(names, torch.autograd.grad(wanted, [parameters[n] for n in names]), strict=True):
        torch.testing.assert_close(seen["gradient"][name], gradient, rtol=1e-6, atol=1e-8)
    added = result.added["kl"]
    own = [row for step in (0, 1) for row in seen[step] if "index" not in row]
    read = sum(len(row["input_ids"]) for step in (0, 1) for row in seen[step])
    assert added["tokens"] == read + sum(len(row["input_ids"]) for row in own)
    assert result.tokens == sum(len(row["input_ids"]) for row in documents)
    assert added["bytes"] == (0 if adapters else sum(p.numel() * 8 for p in base.parameters()))
    assert bool(own) == (text != "domain")


def test_general_text_is_a_share_of_the_domains_tokens(make, documents, general, run_of):
    part, model = KL(text="general", share=0.5, length=7), make()
    run, state = run_of(model, dict(model.named_parameters())), {}
    part.begin(run=run, state=state, examples=documents, general=general)
    rows = [row | {"index": index} for index, row in enumerate(documents)]
    first, again, later = (part.examples(run=run, state=state, rows=copy.deepcopy(rows), step=s) for s in (0, 0, 1))
    own = [row["input_ids"] for row in first if "index" not in row]
    assert abs(sum(map(len, own)) - sum(len(row["input_ids"]) for row in documents) / 2) <= 1
    assert max(map(len, own)) <= 7
    same = [a["input_ids"].tolist() == b["input_ids"].tolist() for a, b in zip(first, again, strict=True)]
    assert all(same)
    assert [row["input_ids"].tolist() for row in later] != [row["input_ids"].tolist() for row in first]
