"""Rows of five shapes, small and ragged, laid out as the `data` stage lays them out."""

import json
from pathlib import Path

import pytest

SCIQ = [
    {
        "question": f"What is number {i}?",
        "support": "It has been said that " * (i % 4) + ("x" * 700 if i == 3 else ""),
        "distractor1": "wind",
        "distractor2": "a longer wrong answer " * (i % 3 + 1),
        "distractor3": "w",
        "correct_answer": f"water {i}",
    }
    for i in range(7)
]
HELLASWAG = [
    {
        "activity_label": "Baking",
        "ctx_a": f"A man has {i} eggs. [title] He",
        "ctx_b": "breaks them",
        "endings": ["and sings.", "into  a bowl [substeps] and stirs.", "é " * (i + 1), "then sleeps all day"],
        "label": str(i % 4),
    }
    for i in range(6)
]
LAMBADA = [
    {"text": f"The cat saw {i} dogs and then it ran to the {word}"} for i, word in enumerate(["house", "d", "."])
]
COPA = [
    {
        "premise": f"The man fell {i} times.",
        "question": "cause" if i % 2 else "effect",
        "choice1": "He slipped.",
        "choice2": "It rained for days.",
        "label": i % 2,
        "idx": i,
    }
    for i in range(4)
]
WINOGRANDE = [
    {
        "sentence": "The cup did not fit the box as _ was too big.",
        "option1": "cup",
        "option2": "the box",
        "answer": str(i % 2 + 1),
    }
    for i in range(3)
]
TEXT = [{"id": "a", "text": "Water is wet. " * 5}, {"id": "b", "text": "é"}, {"id": "c", "text": "long " * 250}]

ENTRIES = [
    {"name": "science", "role": "domain", "task": "sciq", "metric": "acc", "chance": 0.25, "rows": SCIQ},
    {
        "name": "hellaswag",
        "role": "retention",
        "task": "hellaswag",
        "metric": "acc_norm",
        "chance": 0.25,
        "rows": HELLASWAG,
    },
    {
        "name": "lambada_openai",
        "role": "retention",
        "task": "lambada_openai",
        "metric": "acc",
        "chance": 0.0,
        "rows": LAMBADA,
    },
    {"name": "copa", "role": "transfer", "task": "copa", "metric": "acc", "chance": 0.5, "rows": COPA},
    {
        "name": "winogrande",
        "role": "transfer",
        "task": "winogrande",
        "metric": "acc",
        "chance": 0.5,
        "rows": WINOGRANDE,
    },
    {
        "name": "general",
        "role": "perplexity",
        "task": "general_text",
        "metric": "perplexity",
        "chance": None,
        "rows": TEXT,
    },
]


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory) -> Path:
    """A folder as work/data/evaluate/<domain>."""
    folder = tmp_path_factory.mktemp("evaluate")
    listed = []
    for entry in ENTRIES:
        file = write_rows(folder / f"{entry['name']}.jsonl", entry["rows"])
        listed.append({key: value for key, value in entry.items() if key != "rows"} | {"file": file.name})
    (folder / "tasks.json").write_text(json.dumps(listed))
    return folder
