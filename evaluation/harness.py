"""Scores of a model: every task of a domain through lm-eval's own evaluation, and each item's result.

`score` reads work/data/evaluate/<domain> (tasks.json and its row files) and returns what scores.json and items.csv.gz
hold. Neither `limit` nor `use_cache` of lm-eval is ever used: the first scores other rows, and the second may return
another model's answers.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lm_eval.evaluator import evaluate

from evaluation import SCORING, versions
from evaluation import lm as models
from evaluation.encode import encode_rolling
from evaluation.preserve import preserved
from evaluation.task import SEED, LocalTask, check, gold_index, make_task, quiet, render
from methods.errors import UserError
from methods.tools.files import AGAIN, read_json

__all__ = ["check", "load_tasks", "make_task", "render", "save", "score"]

ROLES = ("domain", "retention", "transfer", "perplexity")
COLUMNS = ["task", "doc_id", "doc_hash", "score", "choice", "gold", "log_likelihood"]


def entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's tasks.json. Raises UserError for a missing or damaged file."""
    file = Path(folder) / "tasks.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist: run the `data` stage first")
    listed = read_json(file, kind=list)
    for entry in listed:
        if not isinstance(entry, dict) or not {"name", "role", "task", "metric", "chance", "file"} <= entry.keys():
            raise UserError(f"{file}: {json.dumps(entry)[:80]} is no task's entry: {AGAIN}")
    return listed


def load_tasks(folder: Path) -> list[tuple[dict[str, Any], LocalTask]]:
    """The tasks of a folder's tasks.json, each with its entry; UserError for what is missing or wrong in them."""
    file = Path(folder) / "tasks.json"
    tasks = []
    for entry in entries(folder):
        if entry["role"] not in ROLES:
            raise UserError(f"{file}: task {entry['name']} has role {entry['role']!r}, not one of {', '.join(ROLES)}")
        rows = Path(folder) / entry["file"]
        tasks.append((entry, make_task(entry["name"], entry["task"], rows, metric=entry["metric"])))
    names = [entry["name"] for entry, _ in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"{file}: two tasks share a name in {sorted(names)}: rename one")
    return tasks


def score(
    *,
    model: torch.nn.Module,
    tokenizer: Any,
    tasks_dir: Path,
    scorer: str = "shared-prefix",
    batch_size: int = 16,
    weights_sha256: str | None = None,
    kept: Path | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(scores, items) of `model` on the tasks of `tasks_dir`.

    scorer: "shared-prefix" (forward passes of 64·batch_size padded tokens) or "hflm" (lm-eval's own, batch_size
    sequences each). kept: a folder in which shared-prefix keeps token ids for the next model. Random states and
    train/eval modes are left as they were. Nothing in the result differs between two runs on the same weights, rows,
    versions and kind of machine. items' score is the row's part in the number that models are compared by, turned so
    that more is better, empty where the metric is one of the set (evaluation/measure.py); log_likelihood is the gold
    choice's, in nats; `choice` is the one the task's metric picks. A written answer (GSM8K) has neither: its items hold
    the score by the entry's metric and filter (`exact_match,strict-match`) alone, and scores' `metrics` those of all
    filters.
    """
    tasks = load_tasks(tasks_dir)
    with preserved(model), quiet():
        language_model, scorer = models.build(model, tokenizer, scorer=scorer, batch_size=batch_size, kept=kept)
        for _, task in tasks:
            task.set_fewshot_seed(SEED)
        torch.manual_seed(SEED)
        named = {entry["name"]: task for entry, task in tasks}
        results = evaluate(language_model, {"tasks": named}, bootstrap_iters=0)
    scores: dict[str, Any] = {"tasks": {}}
    items = []
    for entry, task in tasks:
        name, samples = entry["name"], results["samples"][entry["name"]]
        samples.sort(key=lambda sample: sample["doc_id"])
        if entry["role"] == "perplexity":
            scores["general"], rows = _general(name, task, samples, tokenizer)
            items += rows
            continue
        samples = [sample for sample in samples if sample["filter"] == task.measure.filter]
        about = {key: entry[key] for key in ("role", "metric", "chance")}
        about |= {"n": len(samples), "version": task.VERSION, "prompt": _prompt(samples)}
        scores["tasks"][name] = about | _reported(name, task, results["results"][name], samples)
        items += [_item(name, task, sample) for sample in samples]
    scores["scoring"] = {
        "scoring": SCORING,
        "scorer": scorer,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "limit": None,
        **versions(),
    }
    scores["weights_sha256"] = weights_sha256
    _refuse_no_numbers(items)
    frame = pd.DataFrame(items, columns=COLUMNS)
    return scores, frame.astype({"choice": "Int64", "gold": "Int64", "score": "float64"})


def save(scores: Mapping[str, Any], items: pd.DataFrame, folder: Path) -> None:
    """Write scores.json and items.csv.gz; equal scores give equal bytes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(scores, indent=2, sort_keys=True, allow_nan=False) + "\n"
    (Path(folder) / "scores.json").write_text(text, encoding="utf-8")
    items.to_csv(Path(folder) / "items.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})


def _refuse_no_numbers(items: list[dict[str, Any]]) -> None:
    for item in items:
        if not math.isfinite(item["score"] or 0.0) or math.isnan(item.get("log_likelihood") or 0.0):
            raise UserError(
                f"task {item['task']}, document {item['doc_id'] + 1}: the model's score is not a finite number (score "
                f"{item['score']}, log-likelihood {item.get('log_likelihood')}): its activations overflow in this "
                "dtype, or its weights are damaged; state compute_dtype: float32 or bfloat16 in the model's block"
            )


def _reported(
    name: str, task: LocalTask, results: Mapping[str, Any], samples: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """The metric's value, what it is (`Measure.of`), and all metrics of the task."""
    value = float(results[f"{task.measure.metric},{task.measure.filter}"])
    if not math.isfinite(value):
        raise UserError(
            f"task {name}: lm-eval's {task.measure.metric} of these answers is {value}, which cannot be compared: "
            "choose another metric"
        )
    metrics = {
        key.removesuffix(",none"): float(number)
        for key, number in sorted(results.items())
        if "," in key and "_stderr" not in key and isinstance(number, int | float) and math.isfinite(number)
    }
    passed = [sample[task.measure.metric] for sample in samples]
    return {"value": value, "metrics": metrics} | task.measure.of(value, passed)


def _item(name: str, task: LocalTask, sample: Mapping[str, Any]) -> dict[str, Any]:
    part, passed = task.measure.part, sample[task.measure.metric]
    item = {"task": name, "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"]}
    item["score"] = None if part is None else part(passed)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices, gold = task.doc_to_choice(sample["doc"]), gold_index(task, sample["doc"])
        picked = _choice(task.measure.metric, choices, sample["filtered_resps"], gold)
        item |= {"choice": picked, "gold": gold, "log_likelihood": float(sample["filtered_resps"][gold][0])}
    elif task.OUTPUT_TYPE == "loglikelihood":
        ((value, greedy),) = sample["filtered_resps"]
        item |= {"choice": 0 if greedy else None, "gold": 0, "log_likelihood": value}
    return item


def _choice(metric: str, choices: list[str], answers: list[tuple[float, bool]], gold: int) -> int | None:
    """The choice that a metric counts as the model's, as lm-eval computes it from (nats, greedy) of each choice."""
    if metric == "exact_match":  # what the model would write: none of the choices, as a rule
        greedy = [number for number, (_, likeliest) in enumerate(answers[: len(choices)]) if likeliest]
        return gold if gold in greedy else next(iter(greedy), None)
    values = np.array([value for value, _ in answers])
    scores = values[: len(choices)]
    if metric == "acc_mutual_info":  # those without the question follow
        scores = scores - values[len(choices) :]
    if metric in ("acc_norm", "acc_bytes"):
        scores = scores / [len(choice if metric == "acc_norm" else choice.encode()) for choice in choices]
    return int(np.argmax(scores))


def _prompt(samples: list[Mapping[str, Any]]) -> str:
    """A digest of the rows, prompts, choices or generation settings, and right answers.

    Scores of one name are comparable if this digest and their metric are equal.
    """
    requests = [[sample["doc_hash"], sample["arguments"], sample["target_hash"]] for sample in samples]
    return hashlib.sha256(json.dumps(requests, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _general(
    name: str, task: LocalTask, samples: list[Mapping[str, Any]], tokenizer: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Perplexity exp(nats / tokens) and bits per byte, nats / (bytes · ln 2), over all texts together."""
    rows, size = [], 0
    for sample in samples:
        text, value = task.doc_to_target(sample["doc"]), float(sample["filtered_resps"][0])
        size += len(text.encode())
        row = {"task": name, "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"], "score": -value}
        rows.append(row | {"gold": len(encode_rolling(tokenizer, text)[1]), "log_likelihood": value})
    nats, tokens = math.fsum(row["score"] for row in rows), sum(row["gold"] for row in rows)
    if not tokens:
        raise UserError(
            f"{name}: its {len(rows)} texts have no token to score, because this tokenizer adds no token before them: "
            "give longer texts"
        )
    return {
        "perplexity": math.exp(min(nats / tokens, 700.0)),  # JSON has no infinity
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / (size * math.log(2)),
        "tokens": tokens,
        "bytes": size,
        "n": len(rows),
        "prompt": _prompt(samples),
    }, rows
