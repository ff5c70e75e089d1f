"""Estimate the tokens of a study's data before a tokenizer is here, from characters, or by assumption without rows."""

import json
from pathlib import Path
from typing import Any

from evaluation.rendered import read_jsonl
from experiments.study.schema import Domain, Model
from methods.tools.files import read_json
from methods.tools.jsonl import read as read_rows

CHARACTERS_PER_TOKEN = 4.0
BYTES = 1.0  # the same of the tokenizer that random models have
# What is assumed of data that is not here yet.
ROWS = 10_000  # training rows of a domain that takes all there are
ASKED, DOCUMENT = 400, 1000  # characters of a question with all of its choices, and of a document
SCORED = 1_000_000  # characters of a task that is scored on all of its rows


def characters_per_token(model: Model) -> float:
    return BYTES if model.source.startswith("random:") else CHARACTERS_PER_TOKEN


def tokens(text: str, characters: float = CHARACTERS_PER_TOKEN) -> int:
    return max(1, round(len(text) / characters))


def general_text(study, *, characters: float = CHARACTERS_PER_TOKEN) -> list[int] | None:
    """Tokens of each document of general text; None where it is not here yet."""
    path = study.paths.data / "general" / "importance.jsonl"
    return [tokens(row["text"], characters) for row in read_jsonl(path)] if path.is_file() else None


def train_rows(study, domain: str, *, length: int, characters: float = CHARACTERS_PER_TOKEN) -> tuple[list[int], int]:
    """Tokens of each training row, cut at `length`, and the number of labelled tokens of all rows.

    Rows that are not here yet count as half of `length`, all of it labelled.
    """
    path = study.paths.data / "train" / domain / "train.jsonl"
    if path.is_file():
        rows = [of_row(row, characters) for row in read_jsonl(path)]
        if study.domains[domain].format == "text":
            whole = sum(own for own, _ in rows)
            return [length] * (whole // length) + [whole % length] * (whole % length > 0), whole
        answers = [min(answer, length) for _, answer in rows]
        return [min(whole, length) for whole, _ in rows], sum(answers)
    split = study.domains[domain].split
    lengths = [length // 2] * (split.train if split and isinstance(split.train, int) else ROWS)
    return lengths, sum(lengths)


def of_row(row: dict, characters: float = CHARACTERS_PER_TOKEN) -> tuple[int, int]:
    """Tokens of a training row, and of what is labelled in it."""
    if "messages" in row:
        answers = [tokens(turn["content"], characters) for turn in row["messages"] if turn["role"] == "assistant"]
        return sum(tokens(turn["content"], characters) for turn in row["messages"]), sum(answers)
    if "text" in row:
        return tokens(row["text"], characters), tokens(row["text"], characters)
    answer = tokens(row["choices"][row["gold"]], characters)
    return tokens(row["context"], characters) + answer, answer


def scored(study, domain: str, *, characters: float = CHARACTERS_PER_TOKEN) -> int:
    """Tokens to score for a cell of the domain.

    Before the rows are here they are the numbers of rows that the study asks for, each of an assumed length.
    """
    folder = study.paths.data / "evaluate" / domain
    if not folder.is_dir():
        return int(_asked_for(study, study.domains[domain]) / characters)
    entries = read_json(folder / "tasks.json", kind=list)
    return int(sum(_asked(folder / entry["file"], entry) for entry in entries) / characters)


def _asked_for(study, block: Domain) -> int:
    """Characters of the rows that a domain's block, its tasks and general text ask for."""
    named = [study.tasks[name] for role in ("retention", "transfer", "score") for name in getattr(block, role)]
    counts = [block.split.test if block.split else "all", *(task.test or study.data.test for task in named)]
    return study.general.test * DOCUMENT + sum(SCORED if count == "all" else ASKED * count for count in counts)


def _asked(file: Path, entry: dict[str, Any]) -> float:
    """Bytes of the rows that are scored, with the few-shot examples before each."""
    if "num_fewshot" not in entry:
        return file.stat().st_size
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for row in read_rows(file):
        sizes["doc" in row].append(len(json.dumps(row)))
    shown = sum(sizes[False]) / max(len(sizes[False]), 1)
    return sum(sizes[True]) + entry["num_fewshot"] * shown * len(sizes[True])
