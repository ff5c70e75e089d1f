"""Probes against the definition, and the trace they must not leave."""

import json
import math
import random

import numpy as np
import pytest
import torch

from evaluation import encode
from evaluation.probe import load_probes, probe
from experiments.model.random_models import build
from methods.errors import UserError
from tests.evaluation.conftest import TEXT, write_rows

ROWS = [
    {"id": "1", "context": "Question: a?\nAnswer:", "choices": [" one", " two words", " x"], "gold": 1},
    {"id": "2", "context": "Q: bbbb\nA:", "choices": [" yes", " no"], "gold": 0},
    {"id": "3", "context": "ends in space ", "choices": [" y", " maybe not"], "gold": 1},
]
ONE = [{"id": "4", "context": "The cat sat on the", "choices": [" mat"], "gold": 0}]


def brute(model, tokenizer, context, choice):
    """(nats, tokens, greedy) of a choice by one plain forward pass."""
    ids, start = encode.encode_pair(tokenizer, context, choice)
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    target = torch.tensor(ids[start:])
    value = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
    return -value, len(target), bool((logits.argmax(-1) == target).all())


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "science.jsonl", ROWS)
    write_rows(tmp_path / "normed.jsonl", [r | {"norm": [len(c) - 1 for c in r["choices"]]} for r in ROWS])
    write_rows(tmp_path / "lambada.jsonl", ONE)
    write_rows(tmp_path / "general.jsonl", TEXT)
    return tmp_path


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gptj"])
@torch.no_grad()
def test_probe_is_what_it_says(name, folder, byte_tokenizer, request):
    model = request.getfixturevalue(name)
    found = probe(model=model, sets=load_probes(folder, byte_tokenizer))
    for key, lengths in (
        ("science", lambda row: [1] * len(row["choices"])),
        ("normed", lambda row: [len(c) - 1 for c in row["choices"]]),
    ):
        right = nats = tokens = 0
        for row in ROWS:
            costs = [brute(model, byte_tokenizer, row["context"], choice) for choice in row["choices"]]
            per = [cost[0] / length for cost, length in zip(costs, lengths(row))]
            right += per.index(min(per)) == row["gold"]
            nats, tokens = nats + costs[row["gold"]][0], tokens + costs[row["gold"]][1]
        assert found[key] == right / len(ROWS)
        assert found[f"{key}_nll"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["lambada"] == float(brute(model, byte_tokenizer, "The cat sat on the", " mat")[2])
    total = count = 0
    for row in TEXT:
        for context, continuation in encode.windows(
            byte_tokenizer.encode(row["text"]), prefix=byte_tokenizer.eos_token_id, max_length=512
        ):
            logits = model(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :]
            total -= logits.double().log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
            count += len(continuation)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["general_nll"] == pytest.approx(total / count, rel=1e-5)
    right = {"science", "normed", "lambada"}
    assert set(found) == right | {f"{name}_nll" for name in (*right, "general")} | {"perplexity"}


@torch.no_grad()
def test_written_answers_have_the_nats_of_the_solution_and_its_end(tmp_path, byte_tokenizer, tiny_llama):
    rows = [
        {"context": "Q: 1+1?\nA:", "choices": [" 1+1=2\n#### 2"], "gold": 0, "end": True},
        {"context": "Q: long?\nA:", "choices": [" x" * 400], "gold": 0, "end": True},
    ]
    write_rows(tmp_path / "math.jsonl", rows)
    found = probe(model=tiny_llama, sets=load_probes(tmp_path, byte_tokenizer))
    assert set(found) == {"math_nll"}  # no accuracy: that takes generation
    nats = tokens = 0
    for row, kept in zip(
        rows, (len(rows[0]["choices"][0]) + 1, 512)
    ):  # the model takes 512: the rest of the solution is cut
        solution = [*row["choices"][0].encode(), byte_tokenizer.eos_token_id][:kept]
        ids = [*row["context"].encode(), *solution][-513:]
        logits = tiny_llama(torch.tensor([ids[:-1]])).logits[0, -kept:].double()
        nats -= logits.log_softmax(-1).gather(1, torch.tensor(solution)[:, None]).sum().item()
        tokens += kept
    assert found["math_nll"] == pytest.approx(nats / tokens, abs=1e-5)


def test_probe_leaves_modes_random_states_and_gradients_as_they_were(folder, byte_tokenizer):
    model = build("gptj", seed=0, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    sets = load_probes(folder, byte_tokenizer)
    model.train()
    model.transformer.h[0].eval()  # a frozen block
    modes = [module.training for module in model.modules()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = probe(model=model, sets=sets)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert probe(model=model, sets=sets) == first  # no dropout in it


def test_missing_and_empty_sets(tmp_path, byte_tokenizer):
    with pytest.raises(UserError, match="no probe sets"):
        load_probes(tmp_path, byte_tokenizer)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="a.jsonl is empty"):
        load_probes(tmp_path, byte_tokenizer)


def test_a_line_separator_inside_a_text_is_not_a_new_row(tmp_path, byte_tokenizer):
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": "a b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(load_probes(tmp_path, byte_tokenizer)["general"]) == 1
