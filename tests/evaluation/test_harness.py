"""score(): what it writes, that it repeats to the byte, and that it leaves no trace."""

import json
import math
import random
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch

from evaluation import SCORING, encode, harness, lm
from evaluation.retention import forgetting, lost_in_nats
from evaluation.token_losses import HiddenRows, hidden_rows
from experiments.model.random_models import build
from methods.errors import UserError
from methods.tools.architecture import logits_of
from tests.evaluation.conftest import COPA, ENTRIES, HELLASWAG, TEXT, write_rows


@pytest.fixture(scope="module", params=["shared-prefix", "hflm"])
def scored(request, tasks_dir):
    from experiments.model.random_models import byte_tokenizer

    return request.param, *harness.score(
        model=build("llama", seed=0),
        tokenizer=byte_tokenizer(),
        tasks_dir=tasks_dir,
        scorer=request.param,
        batch_size=4,
        weights_sha256="abc",
    )


def test_shape_of_the_scores(scored):
    scorer, scores, items = scored
    assert list(scores["tasks"]) == [e["name"] for e in ENTRIES if e["role"] != "perplexity"]
    hellaswag = scores["tasks"]["hellaswag"]
    assert {k: hellaswag[k] for k in ("role", "metric", "n", "chance", "version")} == {
        "role": "retention",
        "metric": "acc_norm",
        "n": len(HELLASWAG),
        "chance": 0.25,
        "version": 1.0,
    }
    assert hellaswag["value"] == hellaswag["metrics"]["acc_norm"]
    assert set(hellaswag["metrics"]) == {"acc", "acc_norm"}
    assert set(scores["tasks"]["lambada_openai"]["metrics"]) == {"acc", "perplexity"}
    assert scores["scoring"] == {
        "scoring": SCORING,
        "scorer": scorer,
        "batch_size": 4,
        "dtype": "float32",
        "limit": None,
        **{name: version(name).removesuffix("+cpu") for name in ("lm_eval", "tokenizers", "torch", "transformers")},
    }
    assert scores["weights_sha256"] == "abc"
    assert list(items.columns) == harness.COLUMNS


def test_items_average_to_the_scores(scored):
    _, scores, items = scored
    for name, task in scores["tasks"].items():
        of_task = items[items.task == name]
        assert of_task.score.mean() == pytest.approx(task["value"])
        assert of_task.doc_id.tolist() == list(range(task["n"]))
        assert of_task.log_likelihood.lt(0).all()
        assert ((of_task.choice == of_task.gold).fillna(False) == (of_task.score == 1)).all()
    assert items[items.task == "copa"].gold.tolist() == [row["label"] for row in COPA]


def test_items_hold_no_text(scored):
    assert "Question" not in scored[2].to_csv() and "water" not in scored[2].to_csv()


def test_perplexity_is_exp_of_the_mean_nats_per_token(scored, byte_tokenizer):
    _, scores, items = scored
    model, nats, tokens = build("llama", seed=0).double(), 0.0, 0
    for row in TEXT:
        for context, piece in encode.windows(list(row["text"].encode()), prefix=256, max_length=512):
            logits = model(torch.tensor([context + piece[:-1]])).logits[0, len(context) - 1 :]
            nats -= logits.log_softmax(-1).gather(1, torch.tensor(piece)[:, None]).sum().item()
            tokens += len(piece)
    size = sum(len(row["text"].encode()) for row in TEXT)
    general = scores["general"]
    assert (general["tokens"], general["bytes"], general["n"]) == (tokens, size, len(TEXT))
    assert general["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert general["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert general["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    texts = items[items.task == "general"]
    assert texts.score.sum() == pytest.approx(nats, rel=1e-5)
    assert texts.tokens.tolist() == texts.bytes.tolist() == [len(row["text"].encode()) for row in TEXT]
    empty = ["choice", "gold", "margin", "choices", "kl", "kl_reverse"]  # KL is unknown without a reference
    assert texts[empty].isna().all(axis=None) and general["kl"] is general["kl_reverse"] is None


def test_log_likelihoods_of_choices_and_what_follows_from_them(scored):
    _, scores, items = scored
    for name, task in scores["tasks"].items():
        own = items[items.task == name]
        assert task["gold_nll"] == pytest.approx(-own.log_likelihood.mean())
        assert (task["tokens"], task["bytes"]) == (own.tokens.sum(), own.bytes.sum())
        assert own.tokens.equals(own.bytes)  # the tokenizer's tokens are bytes
        if name == "lambada_openai":  # one continuation
            assert own[["margin", "choices"]].isna().all(axis=None) and "margin" not in task
            assert own.bytes.tolist() == [len(" house"), len(" d"), len(" .")]
            continue
        brier = []
        for row in own.itertuples():
            values = np.array([float(value) for value in row.choices.split(";")])
            assert values[row.gold] == pytest.approx(row.log_likelihood, rel=1e-6)
            assert row.margin == pytest.approx(values[row.gold] - np.delete(values, row.gold).max(), abs=1e-3)
            likely = torch.tensor(values).softmax(0)
            likely[row.gold] -= 1
            brier.append(likely.square().sum().item())
            if task["metric"] == "acc":
                assert (row.margin > 0) == (row.score == 1)
        assert (task["margin"], task["brier"]) == pytest.approx((own.margin.mean(), np.mean(brier)), abs=1e-4)
    assert items[items.task == "science"].bytes.tolist() == [len(f" water {i}") for i in range(7)]


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_kl_of_general_text_is_that_of_the_two_models_themselves(architecture, tasks_dir, byte_tokenizer):
    model, base = build(architecture, seed=0), build(architecture, seed=1)
    passages = harness.general_passages(tasks_dir, byte_tokenizer)
    kept = HiddenRows(rows=hidden_rows(base, passages), logits_of=logits_of(base))
    (scores, items), (again, same) = (
        harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tasks_dir, reference=reference)
        for reference in (base, kept)
    )
    assert scores == again and items.equals(same)
    texts, kl, reverse = items[items.task == "general"], 0.0, 0.0
    for row, found in zip(TEXT, texts.itertuples(), strict=True):
        own = np.zeros(2)
        for context, piece in encode.windows(list(row["text"].encode()), prefix=256, max_length=512):
            ids = torch.tensor([context + piece[:-1]])
            p, q = (each(ids).logits[0, len(context) - 1 :].double().log_softmax(-1) for each in (model, base))
            own += [(q.exp() * (q - p)).sum().item(), (p.exp() * (p - q)).sum().item()]
        assert (found.kl, found.kl_reverse) == pytest.approx(own / len(row["text"].encode()), rel=1e-4)
        kl, reverse = kl + own[0], reverse + own[1]
    general = scores["general"]
    assert (general["kl"], general["kl_reverse"]) == pytest.approx(
        np.array([kl, reverse]) / general["tokens"], rel=1e-4
    )
    itself, own = harness.score(model=base, tokenizer=byte_tokenizer, tasks_dir=tasks_dir, reference=base)
    assert itself["general"]["kl"] == itself["general"]["kl_reverse"] == 0
    assert own[own.task == "general"].kl.tolist() == [0, 0, 0]


def test_two_runs_give_the_same_bytes_and_base_against_itself_is_zero(tasks_dir, byte_tokenizer, tmp_path):
    runs = []
    for name in ("a", "b"):
        model = build("gptj", seed=0)
        found = harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tasks_dir, reference=model)
        harness.save(*found, tmp_path / name)
        runs.append(json.loads((tmp_path / name / "scores.json").read_text()))
    for file in ("scores.json", "items.csv.gz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    base = {name: task | {"chance": 0.0, "n": 1000} for name, task in runs[0]["tasks"].items()}
    same = {name: task | {"chance": 0.0, "n": 1000} for name, task in runs[1]["tasks"].items()}
    nats = lost_in_nats(*({"general": runs[0]["general"], "tasks": tasks} for tasks in (base, same)))
    assert nats["gold_nll_lost_by_task"].keys() == nats["margin_lost_by_task"].keys() == {"hellaswag"}
    assert not [
        v for value in nats.values() for v in (value.values() if isinstance(value, dict) else [value]) if v != 0
    ]
    lost = forgetting(base, same)
    assert lost["by_task"] and all(value == 0 for value in lost["by_task"].values()) and lost["forgetting"] == 0
    back = pd.read_csv(tmp_path / "a" / "items.csv.gz")
    assert list(back.columns) == harness.COLUMNS
    wide = found[1]
    for name in ("score", "log_likelihood", "margin", "kl"):
        assert back[name].tolist() == pytest.approx(wide[name].tolist(), rel=1e-6, nan_ok=True)
    assert back.doc_hash.tolist() == wide.doc_hash.str[:16].tolist() and back.doc_hash.nunique() > 10
    chosen = back.dropna(subset="choices")  # the gold's is among the choices, digit by digit
    picked = [float(row.choices.split(";")[int(row.gold)]) for row in chosen.itertuples()]
    assert picked == chosen.log_likelihood.tolist() and len(picked) > 5


def test_modes_and_random_states_are_restored(tasks_dir, byte_tokenizer):
    model = build("llama", seed=0).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tasks_dir, scorer="hflm")
    assert [module.training for module in model.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("batch_size", [1, 8])
def test_hflm_uses_the_batch_size(batch_size, tasks_dir, tmp_path, byte_tokenizer, monkeypatch):
    (tmp_path / "tasks.json").write_text(
        json.dumps(
            [
                {
                    "name": "copa",
                    "role": "retention",
                    "task": "copa",
                    "metric": "acc",
                    "chance": 0.5,
                    "file": "copa.jsonl",
                }
            ]
        )
    )
    write_rows(tmp_path / "copa.jsonl", COPA)  # 8 different requests
    model, sizes = build("llama", seed=0), []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **call: sizes.append(len(ids)) or real(ids, **call))
    harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tmp_path, scorer="hflm", batch_size=batch_size)
    assert max(sizes) == batch_size


def test_quiet_where_nobody_watches(tasks_dir, byte_tokenizer, capfd):
    for scorer in lm.SCORERS:
        harness.score(model=build("llama", seed=0), tokenizer=byte_tokenizer, tasks_dir=tasks_dir, scorer=scorer)
    assert capfd.readouterr() == ("", "")


def test_a_model_the_shared_prefix_does_not_fit_is_scored_by_hflm_and_says_so(tasks_dir, byte_tokenizer):
    from tests.evaluation.test_shared_prefix import blind

    scores, _ = harness.score(model=blind(), tokenizer=byte_tokenizer, tasks_dir=tasks_dir)
    assert scores["scoring"]["scorer"].startswith("hflm (shared-prefix not used: its log-likelihoods differ")


def test_refusals(tasks_dir, tmp_path, byte_tokenizer):
    model = build("llama", seed=0)
    with pytest.raises(UserError, match="scorer 'fast' is unknown"):
        harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tasks_dir, scorer="fast")
    with pytest.raises(UserError, match="batch_size 0"):
        harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tasks_dir, batch_size=0)
    with pytest.raises(UserError, match="tasks.json does not exist"):
        harness.score(model=model, tokenizer=byte_tokenizer, tasks_dir=tmp_path)


def test_scores_that_are_no_numbers_are_refused_before_they_are_written(tasks_dir, byte_tokenizer, tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight[7] = 3e38  # finite, and its logits are not
    with pytest.raises(
        UserError, match="task .*, document 1: the model's score is not a finite number .*compute_dtype"
    ):
        harness.score(model=tiny_llama, tokenizer=byte_tokenizer, tasks_dir=tasks_dir)
