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

import pandas as pd
import torch
from lm_eval.evaluator import evaluate

from evaluation import SCORING, answers, documents, groups, texts, versions
from evaluation import chat_template as templates
from evaluation import lm as models
from evaluation.lm import TOKENS_PER_BATCH_SIZE
from evaluation.preserve import preserved
from evaluation.task import HASH_DIGITS, SEED, LocalTask, check, make_task, quiet, render
from evaluation.texts import Texts
from evaluation.token_losses import HiddenRows, Labelled, token_losses
from methods.errors import UserError
from methods.tools.files import AGAIN, read_json

__all__ = ["check", "load_tasks", "make_task", "render", "save", "score"]

ROLES = ("domain", "retention", "transfer", "score", "perplexity")
NUMBERS = ["log_likelihood", "margin", "tokens", "bytes", "kl", "kl_reverse"]
COLUMNS = ["task", "doc_id", "doc_hash", "score", "choice", "gold", *NUMBERS, "choices"]
WHOLE = ("choice", "gold", "tokens", "bytes")
TYPES = {column: "Int64" if column in WHOLE else "float64" for column in COLUMNS[3:-1]}


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
    """The lm-eval tasks of a folder's tasks.json, each with its entry, which those of a group share.

    A domain of another format than `task` is none of them. Raises UserError for what is missing or wrong.
    """
    file, listed = Path(folder) / "tasks.json", entries(folder)
    for entry in listed:
        if entry["role"] not in ROLES:
            raise UserError(f"{file}: task {entry['name']} has role {entry['role']!r}, not one of {', '.join(ROLES)}")
    names = [entry["name"] for entry in listed]
    if len(set(names)) < len(names):
        raise UserError(f"{file}: two tasks share a name in {sorted(names)}: rename one")
    return [(entry, task) for entry in listed if "format" not in entry for task in _tasks(entry, folder)]


def _tasks(entry: Mapping[str, Any], folder: Path) -> list[LocalTask]:
    """The task of an entry, or those of its group."""
    if entry.get("documents"):
        return documents.load(entry, folder)
    task = make_task(entry["name"], entry["task"], Path(folder) / entry["file"], metric=entry["metric"])
    task.chat = entry["role"] != "domain"  # which is asked as it was trained
    return [task]


def score(
    *,
    model: torch.nn.Module,
    tokenizer: Any,
    tasks_dir: Path,
    scorer: str = "shared-prefix",
    batch_size: int = 16,
    weights_sha256: str | None = None,
    kept: Path | None = None,
    reference: torch.nn.Module | HiddenRows | None = None,
    chat_template: bool | str = False,
    fewshot_as_multiturn: bool | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """(scores, items) of `model` on the tasks of `tasks_dir`.

    scorer     "shared-prefix" (forward passes of 64·batch_size padded tokens) or "hflm" (lm-eval's own, batch_size
               sequences each)
    kept       a folder in which shared-prefix keeps token ids for the next model
    reference  the base, or its hidden rows of `general_passages`, for KL on general text; the base itself is its own
    chat_template         prompts are written in the tokenizer's own template (True) or in the text of one, but for the
                          domain's own, which is asked as it was trained
    fewshot_as_multiturn  examples are turns of their own; by default with a chat template, as in lm-eval

    Random states and train/eval modes are left as they were. Nothing in the result differs between two runs on the same
    weights, rows, versions and kind of machine. items' score is the row's part in the number that models are compared
    by, turned so that more is better, empty where the metric is one of the set (evaluation/measure.py), and of a
    general passage its nats. `choice` is the one the task's metric picks; the other columns are explained in
    evaluation/answers.py and evaluation/texts.py. A written answer (GSM8K) has a score by the entry's metric and filter
    (`exact_match,strict-match`) alone, and scores' `metrics` hold those of all filters.
    """
    tasks: dict[str, list[LocalTask]] = {}
    for entry, task in load_tasks(tasks_dir):
        tasks.setdefault(entry["name"], []).append(task)
    listed = entries(tasks_dir)
    # before a template is chosen for prompts: a domain of conversations is scored in the one it was trained in
    read = {entry["name"]: _texts(entry, tasks, tasks_dir, tokenizer) for entry in listed if _is_text(entry)}
    chat = {"chat_template": templates.choose(tokenizer, chat_template)} if chat_template else {}
    if chat:
        chat["fewshot_as_multiturn"] = fewshot_as_multiturn is not False
    with preserved(model), quiet():
        language_model, scorer = models.build(model, tokenizer, scorer=scorer, batch_size=batch_size, kept=kept)
        asked = {_key(entry, task): task for entry in listed if not _is_text(entry) for task in tasks[entry["name"]]}
        results = _evaluated(language_model, asked, **chat)
        losses = {
            entry["name"]: token_losses(
                model,
                read[entry["name"]].sequences,
                reference=reference if entry["role"] == "perplexity" else None,
                tokens=pass_tokens(batch_size),
                max_length=language_model.max_length,
                description="scoring text",
            )
            for entry in listed
            if _is_text(entry)
        }
    scores: dict[str, Any] = {"tasks": {}}
    items = []
    for entry in listed:
        name = entry["name"]
        if entry["role"] == "perplexity":
            scores["general"], rows = texts.general(read[name], losses[name])
        elif "format" in entry:
            scores["tasks"][name], rows = texts.domain(entry, read[name], losses[name])
        else:
            scores["tasks"][name], rows = _answered(entry, tasks[name], results, language_model.answer_tokens)
        items += rows
    scores["scoring"] = {
        "scoring": SCORING,
        "scorer": scorer,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "limit": None,
        **chat,
        **versions(),
    }
    scores["weights_sha256"] = weights_sha256
    _refuse_no_numbers(items)
    return scores, pd.DataFrame(items, columns=COLUMNS).astype(TYPES)


def general_passages(tasks_dir: Path, tokenizer: Any) -> list[Labelled]:
    """The general passages among the tasks of a folder, as `score` reads them."""
    listed = [entry for entry in entries(tasks_dir) if entry["role"] == "perplexity"]
    read = (texts.passages(e["name"], task, tokenizer) for e in listed for task in _tasks(e, tasks_dir))
    return [passage for one in read for passage in one.sequences]


def pass_tokens(batch_size: int) -> int:
    """Padded tokens of a forward pass over texts."""
    return batch_size * TOKENS_PER_BATCH_SIZE


def _key(entry: Mapping[str, Any], task: LocalTask) -> str:
    """The name under which lm-eval scores a task: two groups may hold the same one."""
    return f"{entry['name']}/{task.config.task}" if "weight_by_size" in entry else entry["name"]


def _evaluated(
    language_model: Any, tasks: Mapping[str, LocalTask], *, chat_template: str = "", fewshot_as_multiturn: bool = False
) -> dict[str, Any]:
    """What lm-eval returns of tasks by name."""
    for task in tasks.values():
        task.set_fewshot_seed(SEED)
    torch.manual_seed(SEED)
    if not tasks:
        return {}
    return evaluate(
        language_model,
        {"tasks": dict(tasks)},
        bootstrap_iters=0,
        apply_chat_template=bool(chat_template),
        fewshot_as_multiturn=fewshot_as_multiturn,
    )


def _is_text(entry: Mapping[str, Any]) -> bool:
    """Whether an entry's texts are scored token by token, and not by lm-eval."""
    return entry["role"] == "perplexity" or "format" in entry


def _texts(entry: Mapping[str, Any], tasks: Mapping[str, list[LocalTask]], folder: Path, tokenizer: Any) -> Texts:
    if "format" in entry:
        return texts.labelled(entry, Path(folder), tokenizer)
    (task,) = tasks[entry["name"]]
    return texts.passages(entry["name"], task, tokenizer)


def _answered(
    entry: Mapping[str, Any], tasks: list[LocalTask], results: Mapping[str, Any], tokens: Mapping[tuple[str, str], int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the entry's score, items) of a task that lm-eval evaluated, or of a group's tasks."""
    name, answered, asked = entry["name"], [], []
    for task in tasks:
        key = _key(entry, task)
        samples = sorted(results["samples"][key], key=lambda sample: sample["doc_id"])
        samples = [sample for sample in samples if sample["filter"] == task.measure.filter]
        items = [answers.item(name, task, sample, tokens=tokens) for sample in samples]
        reported = {"n": len(samples)} | _reported(name, task, results["results"][key], samples)
        answered.append((task.config.task, reported, items))
        asked += samples
    reported, items = groups.together(answered, entry)
    about = {key: entry[key] for key in ("role", "metric", "chance")}
    about |= {"version": entry.get("version", tasks[0].VERSION), "prompt": _prompt(asked)}
    return about | reported | answers.summary(items), items


def save(scores: Mapping[str, Any], items: pd.DataFrame, folder: Path) -> None:
    """Write scores.json and items.csv.gz; equal scores give equal bytes.

    Items are written with 7 significant digits and the first 16 of each hash, because they are kept in git.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(scores, indent=2, sort_keys=True, allow_nan=False) + "\n"
    (Path(folder) / "scores.json").write_text(text, encoding="utf-8")
    items = items.assign(doc_hash=items["doc_hash"].str[:HASH_DIGITS])
    form = {"index": False, "float_format": answers.DIGITS, "compression": {"method": "gzip", "mtime": 0}}
    items.to_csv(Path(folder) / "items.csv.gz", **form)


def _refuse_no_numbers(items: list[dict[str, Any]]) -> None:
    for item in items:
        finite = all(math.isfinite(item.get(key) or 0.0) for key in ("score", "kl", "kl_reverse"))
        if not finite or math.isnan(item.get("log_likelihood") or 0.0):
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


def _prompt(samples: list[Mapping[str, Any]]) -> str:
    """A digest of the rows, prompts, choices or generation settings, and right answers.

    Scores of one name are comparable if this digest and their metric are equal.
    """
    requests = [[sample["doc_hash"], sample["arguments"], sample["target_hash"]] for sample in samples]
    return hashlib.sha256(json.dumps(requests, sort_keys=True, default=str).encode()).hexdigest()[:16]
