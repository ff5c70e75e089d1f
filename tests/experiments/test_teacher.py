"""The model at other weights as a teacher, answers that end, and what rows that a part changes cost."""

from dataclasses import dataclass, replace

import pytest
import torch

from experiments.model.random_models import EOS_ID, build, byte_tokenizer
from experiments.training.engine import fit
from experiments.training.flops import Flops
from experiments.training.hooks import labelled
from methods import registry
from methods.part import Part
from tests import goldens

LORA = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.5}}


def train(part, *, dtype=torch.float32, blocks=None, config=None, examples=None, **settings):
    model = build("llama", seed=1, dtype=dtype, **(config or {}))
    return fit(
        model=model,
        parts=(part, *registry.build(blocks or {})),
        examples=examples or goldens.texts(6, seed=12, labelled=True),
        settings=replace(goldens.SETTINGS, **({"epochs": 1.0, "batch": 3, "micro_batch": 2} | settings)),
        seed=5,
        base={name: p.detach().clone() for name, p in model.named_parameters()},
        tokenizer=byte_tokenizer(),
    )


def part_with(**hooks):
    """A part whose hooks are the given functions of their arguments."""
    own = {name: (lambda self, hook=hook, **given: hook(**given)) for name, hook in hooks.items()}
    return dataclass(frozen=True, kw_only=True)(type("Own", (Part,), own | {"key": "own"}))()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [{}, LORA])
def test_a_teachers_states_are_those_of_a_model_with_its_weights(blocks, dtype):
    rows, found = goldens.texts(5, seed=3, labelled=True), {}

    def ready(run, state, **_):
        draw = torch.Generator().manual_seed(0)
        noise = {name: 0.1 * torch.randn(w.shape, generator=draw) for name, w in run.weights.items()}
        state["weights"] = {name: w.detach() + noise[name] for name, w in run.weights.items()}
        state["teacher"] = run.teacher(state["weights"])

    def look(run, state, rows, step):
        if step:
            before = {name: w.detach().clone() for name, w in run.weights.items()}
            held = {name: w.clone() for name, w in state["weights"].items()}
            module = {name: p.detach().clone() for name, p in run.model.named_parameters()}
            found["states"] = state["teacher"].states(asked)
            found["logits"] = state["teacher"].logits(found["states"][0])
            assert run.model.training
            assert all(torch.equal(run.weights[name], w) for name, w in before.items())
            assert all(torch.equal(state["weights"][name], w) for name, w in held.items())
            assert all(torch.equal(p, module[name]) for name, p in run.model.named_parameters())
        return rows

    part, asked = part_with(optimizer_ready=ready, examples=look), rows
    result = train(part, dtype=dtype, blocks=blocks, config={"tie_word_embeddings": False})
    model = result.run.model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in result.states["own"]["weights"]:
                p.copy_(result.states["own"]["weights"][name])
        for row, states in zip(rows, found["states"], strict=True):
            out = model(row["input_ids"][None], output_hidden_states=True)
            asked = row["labels"][1:] != -100
            close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(states, out.hidden_states[-1][0, :-1][asked], **close)
            if row is rows[0]:
                torch.testing.assert_close(found["logits"], out.logits[0, :-1][asked], **close)
    weights = result.run.weights
    held = sum(4 * w.numel() for w in weights.values())
    head = 0 if blocks else model.lm_head.weight.numel() * dtype.itemsize
    assert result.added["own"]["bytes"] == held + head
    assert result.added["own"]["tokens"] == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("blocks", [{}, LORA])
def test_the_references_states_are_the_bases(blocks):
    rows, found = goldens.texts(5, seed=3, labelled=True), []

    def look(run, rows, **_):
        found.append(run.reference.states(asked))
        return rows

    asked = rows
    train(part_with(examples=look), blocks=blocks, learning_rate=0.1)
    base = build("llama", seed=1).eval()
    for row, states in zip(rows, found[-1], strict=True):
        with torch.no_grad():
            wanted = base(row["input_ids"][None], output_hidden_states=True).hidden_states[-1][0, :-1]
        torch.testing.assert_close(states, wanted[row["labels"][1:] != -100], rtol=1e-5, atol=1e-5)


def test_a_continuation_ends_with_the_token_that_completes_a_text():
    prompts, found = [[index] for index in range(40)], {}

    def ask(run, **_):
        common = {"prompts": prompts, "tokens": 12}
        found["free"] = run.sample(**common, ended=True)
        found["until"] = run.sample(**common, until=("e", "xyz", "\x01"), ended=True)
        found["text"] = [run.decode(ids) for ids in found["free"]]

    train(part_with(begin=ask), epochs=0.5)
    cut = 0
    for free, until, text in zip(found["free"], found["until"], found["text"], strict=True):
        at = next((place + 1 for place, token in enumerate(free) if token in (ord("e"), 1)), len(free))
        assert until == free[:at]
        cut += at < len(free)
        assert text == bytes(token for token in free if token < 256).decode(errors="replace")
    assert cut
    assert any(free[-1] == EOS_ID for free in found["free"])
    assert all(EOS_ID not in free[:-1] for free in found["free"])


def test_a_changed_row_counts_as_the_domains_and_the_change_is_the_parts():
    """A row twice as long, one without a label more, one left out, one added."""

    def change(rows, **_):
        first, second, *_ = rows
        longer = {name: first[name].repeat(2) for name in ("input_ids", "labels")} | {"index": first["index"]}
        labels = second["labels"].clone()
        labels[-1] = -100
        own = {"input_ids": torch.arange(7), "labels": torch.arange(7)}
        seen.extend([first, second, rows[2], longer, second | {"labels": labels}, own])
        return [longer, second | {"labels": labels}, own]

    seen = []
    result = train(part_with(examples=change), epochs=0.5)
    first, second, left, longer, fewer, own = seen
    assert result.tokens == len(first["input_ids"]) + len(second["input_ids"])
    added = result.added["own"]
    assert added["tokens"] == len(first["input_ids"]) + 7 and added["left_out"] == len(left["input_ids"])
    flops = Flops(build("llama", seed=1))

    def step(rows):
        return flops.step(lengths=[len(row["input_ids"]) for row in rows], labelled=labelled(rows))

    assert result.flops == pytest.approx(step([first, second]))
    assert result.flops + added["flops"] == pytest.approx(step([longer, fewer, own]))


@pytest.mark.parametrize("epochs", [1.0, 2.5])
def test_rows_that_are_drawn_anew_count_as_the_domains(epochs):
    def draw(examples, epoch, **_):
        return [{name: row[name][1 + epoch :] for name in ("input_ids", "labels")} for row in examples]

    rows = goldens.texts(6, seed=12, labelled=True)
    result = train(part_with(epoch=draw), examples=rows, epochs=epochs)
    plain = train(part_with(), examples=rows, epochs=epochs)
    seen = {1.0: [6], 2.5: [6, 6, 3]}[epochs]
    assert result.added["own"]["tokens"] == -sum(count * (1 + epoch) for epoch, count in enumerate(seen))
    if epochs == 1.0:
        assert (result.tokens, result.flops) == (plain.tokens, plain.flops)
