"""SDFT against whole logits: the sampled rows, the teacher that lags behind, and what both cost."""

import pytest
import torch
from torch.nn import functional as F

from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from experiments.training import loss
from experiments.training.engine import fit
from experiments.training.settings import TrainSettings
from methods import registry
from methods.errors import UserError
from methods.sdft import SDFT
from methods.tools import answers

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


def train(part, *, parts=(), general=(), architecture="llama", blocks=None, rows=None, config=None, **settings):
    model = build(architecture, seed=1, dtype=settings.pop("dtype", torch.float64), **(config or {}))
    chosen = {"batch": 3, "micro_batch": 2, "learning_rate": 3e-2, "clip": 0.0, "probes": 0, "warmup": 0.0}
    return fit(
        model=model,
        parts=(*registry.build(blocks or {}), *parts, part),
        general=general,
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


def test_other_rows_are_learned_as_usual_and_share_the_denominator(monkeypatch):
    monkeypatch.setattr(Watched, "seen", {})
    part = Watched(template="{answer}{prompt}", tokens=7)
    replayed = registry.build({"replay": {"share": 0.4, "mode": "add"}})[0]
    texts = [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in domain()]
    result = train(part, parts=(replayed,), general=texts, epochs=0.5)
    seen, model = part.seen[0], result.run.model.eval()
    mean = seen["weights"]
    rows = seen["rows"]
    assert {"index" in row for row in rows} == {True, False}
    nll, divergence, count = 0.0, 0.0, 0
    put(model, mean)  # the teacher is the model itself in the first step
    for row, asked in zip(rows, seen["asked"], strict=True):
        ours = model(row["input_ids"][None]).logits[0, :-1]
        learned = row["labels"][1:] != -100
        count += int(learned.sum())
        if "index" not in row:
            nll = nll + F.cross_entropy(ours[learned], row["labels"][1:][learned], reduction="sum")
            continue
        x, a = asked["input_ids"][:-5].tolist(), asked["input_ids"][-5:].tolist()
        y = row["input_ids"][len(x) :].tolist()
        with torch.no_grad():
            theirs = model(torch.tensor([a + x + y])).logits[0, -len(y) - 1 : -1]
        divergence = divergence + kl(theirs, ours[learned])
    names = list(seen["gradient"])
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad((nll + divergence) / count, [parameters[name] for name in names])
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(seen["gradient"][name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_the_frozen_base_as_a_teacher_stays_where_it_was(monkeypatch):
    monkeypatch.setattr(Watched, "seen", {})
    part = Watched(teacher="base", template=TEMPLATE, tokens=7)
    result = train(part, epochs=1.0)
    model = result.run.model.eval()
    wanted = brute_force(model, result.run.base, part.seen[1], reverse=False)
    for name, gradient in zip(part.seen[1]["gradient"], torch.autograd.grad(wanted, list(model.parameters()))):
        torch.testing.assert_close(part.seen[1]["gradient"][name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    assert "mean" not in result.states["sdft"]


def test_the_mean_is_float32_and_of_what_is_trained_alone(monkeypatch):
    monkeypatch.setattr(Watched, "seen", {})
    # a step of it is far below what a bfloat16 weight can move by
    part = Watched(template=TEMPLATE, rate=1e-4, tokens=3)
    result = train(part, dtype=torch.bfloat16, blocks=LORA, epochs=1.5, learning_rate=1e-3)
    seen = part.seen
    mean = {name: weight.clone() for name, weight in seen[0]["weights"].items()}
    for step in (1, 2):
        for name, weight in seen[step]["weights"].items():
            mean[name] += 1e-4 * (weight - mean[name])
    own = result.states["sdft"]["mean"]
    assert own.keys() == result.run.weights.keys() and all("lora_" in name for name in own)
    for name, weight in own.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, mean[name], rtol=1e-6, atol=1e-12)
    assert any(not torch.equal(weight, seen[0]["weights"][name]) for name, weight in own.items())
    assert result.added["sdft"]["bytes"] == sum(4 * weight.numel() for weight in own.values())


@pytest.mark.parametrize("teacher", ["ema", "base"])
@pytest.mark.parametrize("blocks", [{}, LORA])
def test_beside_sam_what_the_teacher_read_in_bfloat16_is_compared_in_float32(blocks, teacher, monkeypatch):
    monkeypatch.setattr(Watched, "seen", {})
    part = Watched(template=TEMPLATE, tokens=7, teacher=teacher)
    result = train(part, dtype=torch.bfloat16, blocks=blocks | {"sam": {"rho": 1e-4}}, epochs=0.5)
    seen, model = part.seen[0], result.run.model.double().eval()
    wanted = brute_force(model, seen["weights"], seen, reverse=False)  # the teacher is the model in the first step
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(wanted, [parameters[name] for name in seen["gradient"]])
    own, right = (torch.cat([g.flatten().double() for g in every]) for every in (seen["gradient"].values(), gradients))
    assert (own - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize("end", [True, False])
def test_answers_end_as_the_domains_do_and_fit_into_its_longest_row(end, monkeypatch):
    monkeypatch.setattr(Watched, "seen", {})
    rows = domain(end)
    train(Watched(tokens=12, stop="\ufffd"), rows=rows, epochs=3.0, batch=6)  # half of the bytes are no text
    longest, stopped, whole = max(len(row["input_ids"]) for row in rows), [], []
    for step in Watched.seen.values():
        for row, asked in zip(step["rows"], step["asked"], strict=True):
            y = row["input_ids"][len(asked["input_ids"]) - 5 :].tolist()
            assert 1 <= len(y) <= 12 and len(row["input_ids"]) <= longest and EOS_ID not in y[:-1]
            stopped.append(bytes(min(token, 255) for token in y[:-1]).isascii())
            whole.append(len(row["input_ids"]) == longest)
    assert all(stopped) if not end else not all(stopped)
    assert any(whole) and not all(whole)


def test_what_the_teacher_reads_fits_into_the_models_positions(monkeypatch):
    monkeypatch.setattr(Watched, "seen", {})
    part = Watched(template="{prompt}{answer}" + "." * 40 + "{prompt}", tokens=6)
    result = train(part, config={"max_position_embeddings": 30}, epochs=0.5)
    read = answers.filled(result.run, part.template, prompt=list(range(40, 60)), answer=[33, 34], tokens=6)
    assert read == [*b"." * 4, *range(40, 60)]


@pytest.mark.parametrize(
    "template", ["{prompt}", "{answer} {gold}", "{answer", "{answer}{}", "{answer!r}", "{answer}{prompt:>9}"]
)
def test_a_template_that_names_something_else_is_refused(template):
    with pytest.raises(UserError, match="sdft.template is "):
        SDFT(template=template)


@pytest.mark.parametrize("other", ["self_sft", "stm", "flow", "eaft", "talr", "dft", "asft", "profit"])
def test_parts_that_act_on_the_domains_answers_are_refused_beside_it(other):
    with pytest.raises(UserError, match=f"(sdft and {other}|{other} and sdft) cannot be combined: .*answers"):
        registry.build({"sdft": {}, other: {}})
