"""SDFT against whole logits: the sampled rows, the teacher that lags behind, and what both cost."""

import pytest
import torch

from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from experiments.training import loss
from experiments.training.engine import fit
from experiments.training.settings import TrainSettings
from methods import registry
from methods.sdft import SDFT

LORA = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}
RATE = 0.3
TEMPLATE = "Q{prompt}: {answer}\n\n{prompt}"


def domain(end=True):
    draw = torch.Generator().manual_seed(5)
    rows = []
    for size in (19, 14, 22, 17, 15, 20):
        ids = torch.randint(32, 127, (size,), generator=draw)
        ids[-1] = EOS_ID if end else ids[-1]
        labels = ids.clone()
        labels[: size - 5] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


class Watched(SDFT):
    """Notes each step's rows, weights and gradient."""

    key = "sdft"
    seen = {}

    def examples(self, *, run, rows, step, **arguments):
        weights = {name: w.detach().clone() for name, w in run.weights.items()}
        made = super().examples(run=run, rows=list(rows), step=step, **arguments)
        self.seen[step] = {"rows": made, "asked": rows, "weights": weights}
        return made

    def before_clip(self, *, run, state, step):
        self.seen[step]["gradient"] = {name: w.grad.clone() for name, w in run.weights.items()}


def train(part, *, architecture="llama", blocks=None, rows=None, dtype=torch.float64, config=None, **settings):
    model = build(architecture, seed=1, dtype=dtype, **(config or {}))
    chosen = {"batch": 3, "micro_batch": 2, "learning_rate": 3e-2, "clip": 0.0, "probes": 0, "warmup": 0.0}
    return fit(
        model=model,
        parts=(*registry.build(blocks or {}), part),
        examples=rows or domain(),
        settings=TrainSettings(**(chosen | settings)),
        seed=0,
        base={name: p.detach().clone() for name, p in model.named_parameters()},
        tokenizer=byte_tokenizer(),
    )


def put(model, weights):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in weights:
                p.copy_(weights[name])


def kl(p, q):
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()


def brute_force(model, teacher_weights, seen, *, reverse):
    """The mean KL of a step, row by row, from whole logits of rows that are put together here as bytes."""
    pairs, count = [], 0
    for row, asked in zip(seen["rows"], seen["asked"], strict=True):
        x, a = asked["input_ids"][:-5].tolist(), asked["input_ids"][-5:].tolist()
        y = row["input_ids"][len(x) :].tolist()
        assert row["input_ids"][: len(x)].tolist() == x and row["index"] == asked["index"]
        assert row["labels"].tolist() == [-100] * len(x) + y
        context = [*b"Q", *x, *b": ", *a, *b"\n\n", *x]
        pairs.append((x, context, y))
        count += len(y)
    put(model, teacher_weights)
    with torch.no_grad():
        theirs = [model(torch.tensor([c + y])).logits[0, len(c) - 1 : -1] for _, c, y in pairs]
    put(model, seen["weights"])
    ours = [model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1] for x, _, y in pairs]
    return sum(kl(o, t) if reverse else kl(t, o) for o, t in zip(ours, theirs, strict=True)) / count


@pytest.mark.parametrize(
    ("architecture", "blocks", "config", "direction", "settings"),
    [
        ("llama", {}, {}, "forward", {}),
        ("llama", {}, {"tie_word_embeddings": False}, "reverse", {}),
        ("llama", LORA, {}, "forward", {"pack": 64}),
        ("gptj", {}, {}, "forward", {"checkpointing": True}),
    ],
)
def test_a_steps_gradient_is_that_of_whole_logits(architecture, blocks, config, direction, settings, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4)  # several chunks, which are computed again in backward
    monkeypatch.setattr(Watched, "seen", {})
    part = Watched(rate=RATE, direction=direction, template=TEMPLATE, tokens=7)
    result = train(part, architecture=architecture, blocks=blocks, config=config, epochs=1.5, **settings)
    seen, model = part.seen, result.run.model.eval()
    mean = seen[0]["weights"]
    for step in (1, 2):
        mean = {name: (1 - RATE) * mean[name] + RATE * w for name, w in seen[step]["weights"].items()}
    for name, weight in result.states["sdft"]["mean"].items():
        torch.testing.assert_close(weight, mean[name])
    wanted = brute_force(model, mean, seen[2], reverse=direction == "reverse")
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(wanted, [parameters[name] for name in seen[2]["gradient"]])
    for (name, own), gradient in zip(seen[2]["gradient"].items(), gradients, strict=True):
        torch.testing.assert_close(own, gradient, rtol=1e-6, atol=1e-9, msg=name)
