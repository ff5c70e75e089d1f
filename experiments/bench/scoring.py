"""Scoring as `evaluate` does it, with the shared-prefix scorer and with lm-eval's own HFLM: the first tenth of every
set of the default study (a fixed sample: rows lie in the order of their hashes), from rows to scores. Both through
lm-eval's evaluation and with what is done to both here (its templates compiled once, attention by products). Untimed:
the answers of both in the model's own dtype over all the study's rows, probe rows and as many training rows as make
2,000, and in float32 over a few.
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from evaluation import harness, lm, probe, shared_prefix
from evaluation.task import quiet
from experiments.bench.race import Goal, Race, race
from experiments.model import weights
from experiments.model.random_models import build, byte_tokenizer
from experiments.study import config
from methods.tools import jsonl
from methods.tools.files import write_json

TITLE = "Scoring with a shared prefix against lm-eval's own forward passes"
SHARE = 10  # one row in so many is timed
EXACT = 4  # rows of a set that are compared in float32
ANSWERS = 2000  # rows whose answers are compared


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    study = config.load()
    with TemporaryDirectory() as place:
        timed = Path(place) / "evaluate"
        domain = study.grid.domains[0]
        folder, tasks = study.paths.model(study.grid.models[0]), study.paths.data / "evaluate" / domain
        real = not small and (folder / "base.json").is_file() and (tasks / "tasks.json").is_file()
        if real:
            name, tokenizer, make = folder.name, weights.load_tokenizer(folder), partial(weights.load_model, folder)
            train = study.paths.data / "train" / domain
            probes = (file for file in sorted((train / "probe").glob("*.jsonl")) if file.name != "general.jsonl")
            others = [*probes, train / "train.jsonl"]
        else:
            tasks, others = Path(place) / "all", []
            name, tokenizer, make = _random(tasks, small=small)
        _first(tasks, timed, share=4 if small else SHARE)
        model = make(dtype="auto" if real else torch.bfloat16)
        batch_size = study.evaluate.batch_size
        score = partial(harness.score, model=model, tokenizer=tokenizer, tasks_dir=timed, batch_size=batch_size)
        rows = [row for task in _with_choices(tasks) for row in harness.render(task)]
        rows += [row for file in others for row in jsonl.read(file)]
        items = probe.encoded(rows[: 8 if small else ANSWERS], tokenizer)
        few = probe.encoded([row for task in _with_choices(timed) for row in harness.render(task)[:EXACT]], tokenizer)
        facts = {"model": name, "rows_timed": sum(len(task.rows) for _, task in harness.load_tasks(timed))}
        facts |= _plan(items, batch_size) | _answers(model, tokenizer, items, batch_size)
        facts |= _difference(make(dtype=torch.float32), tokenizer, few, batch_size)
        yield race(
            f"scores of {name}, {facts['rows_timed']} rows",
            {"HFLM": partial(score, scorer="hflm"), "shared prefix": partial(score, scorer="shared-prefix")},
            against="HFLM",
            rounds=rounds or (1 if small else 3),
            warm=0,
            facts=facts,
            goals=[] if small else [Goal(runner="shared prefix", limit=2, faster=True)],
        )


def _with_choices(folder: Path) -> list[Any]:
    return [task for _, task in harness.load_tasks(folder) if task.OUTPUT_TYPE != "loglikelihood_rolling"]


def _first(tasks: Path, to: Path, *, share: int) -> None:
    """The first 1/share of the rows of every set of a folder, as a folder of the same kind."""
    to.mkdir()
    for entry in json.loads((tasks / "tasks.json").read_text(encoding="utf-8")):
        lines = (tasks / entry["file"]).read_text(encoding="utf-8").rstrip("\n").split("\n")
        (to / entry["file"]).write_text("\n".join(lines[: max(1, len(lines) // share)]) + "\n", encoding="utf-8")
    (to / "tasks.json").write_bytes((tasks / "tasks.json").read_bytes())


def _both(model: Any, tokenizer: Any, items: Sequence[Any], batch_size: int) -> list[list[tuple[float, bool]]]:
    """(nats, greedy) of every choice: HFLM's, then the shared prefix's."""
    requests = [(("", ""), list(context), list(choice)) for item in items for context, choice in item.requests]
    scorers = (lm.build(model, tokenizer, scorer=name, batch_size=batch_size)[0] for name in ("hflm", "shared-prefix"))
    with quiet():
        return [scorer._loglikelihood_tokens(requests, disable_tqdm=True) for scorer in scorers]


def _answers(model: Any, tokenizer: Any, items: Sequence[Any], batch_size: int) -> dict[str, Any]:
    """How many rows are answered otherwise, and what that does to the accuracy, in points."""
    gold = np.array([1 if len(item.requests) == 1 else item.gold for item in items])
    chosen = []
    for answers in map(iter, _both(model, tokenizer, items, batch_size)):
        own = [[next(answers) for _ in item.requests] for item in items]
        chosen.append(np.array([_pick(item, scores) for item, scores in zip(items, own)]))
    differ = int((chosen[0] != chosen[1]).sum())
    right = [picks == gold for picks in chosen]
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "answers": len(items),
        "answers_that_differ": differ,
        "answers_that_differ_percent": round(100 * differ / len(items), 3),
        "accuracy_difference_points": round(100 * float(right[1].mean() - right[0].mean()), 3),
    }


def _pick(item: Any, scores: Sequence[tuple[float, bool]]) -> int:
    """The choice with the largest nats; of a single choice, whether it is what greedy decoding writes."""
    if len(scores) == 1:
        return int(scores[0][1])
    return int(np.argmax(np.array([nats for nats, _ in scores]) / (item.norm or 1)))


def _difference(model: Any, tokenizer: Any, items: Sequence[Any], batch_size: int) -> dict[str, Any]:
    theirs, ours = _both(model, tokenizer, items, batch_size)
    return {
        "choices_in_float32": len(ours),
        "largest_difference_in_float32_nats": max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs)),
        "greedy_that_differ_in_float32": sum(a != b for (_, a), (_, b) in zip(ours, theirs)),
    }


def _plan(items: Sequence[Any], batch_size: int) -> dict[str, Any]:
    """Tokens of the requests one by one, of the plan's forward passes, and the share of these that is padding."""
    requests = [request for item in items for request in item.requests]
    passes = shared_prefix.plan(requests, max_length=2048, tokens=batch_size * lm.TOKENS_PER_BATCH_SIZE)
    real = sum(row.length for rows in passes for row in rows)
    padded = sum(len(rows) * rows[0].length for rows in passes)
    return {
        "tokens_one_by_one": sum(len(context) + len(choice) - 1 for context, choice in requests),
        "tokens_shared": real,
        "padded_percent": round(100 * (1 - real / padded), 2),
    }


def _random(folder: Path, *, small: bool) -> tuple[str, Any, Any]:
    """A random Llama on rows of random words in `folder`: (its name, tokenizer, how it is made)."""
    draw, count = random.Random(0), 8 if small else 60

    def text(words):
        return " ".join("".join(draw.choices("etaoinshr", k=draw.randint(2, 8))) for _ in range(words))

    rows = {
        "sciq": [
            {"question": text(8) + "?", "support": text(30), "correct_answer": text(2)}
            | {f"distractor{i}": text(2) for i in (1, 2, 3)}
            for _ in range(count)
        ],
        "hellaswag": [
            {
                "activity_label": text(1),
                "ctx_a": text(12),
                "ctx_b": text(3),
                "endings": [text(9) for _ in range(4)],
                "label": str(draw.randrange(4)),
            }
            for _ in range(count)
        ],
    }
    folder.mkdir()
    common = {"role": "retention", "metric": "acc", "chance": 0.25}
    entries = [{"name": task, "task": task, "file": f"{task}.jsonl"} | common for task in rows]
    write_json(folder / "tasks.json", entries)
    for task, own in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    sizes = {} if small else {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8}
    make = partial(build, "llama", seed=0, **sizes)
    return f"random Llama of {sum(p.numel() for p in make().parameters()) / 1e6:.2g} M weights", byte_tokenizer(), make
