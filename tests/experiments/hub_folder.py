"""A folder in the hub's layout: data sets as their repositories hold them, Parquet files by configuration and a README
that names them.
"""

from pathlib import Path

import pandas as pd
import yaml

ANSWERS = ["and sings.", "into  a bowl [substeps] and stirs.", "é twice", "then sleeps all day"]


def put(hub: Path, name: str, configs: dict[str, dict[str, list[dict]]]) -> None:
    """The repository OWNER/NAME with rows by configuration and split."""
    folder, listed = hub / name, []
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            pd.DataFrame(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n# Rows\n")


def murder(number: int) -> dict:
    choices = ["Ann", "Ben the second", "Cy"][: 2 + number % 2]
    asked = {"narrative": f"{number} people met.", "question": "Who did it?", "choices": str(choices)}
    return asked | {"answer_index": number % 2, "answer_choice": choices[number % 2]}


def problem(number: int) -> dict:
    return {"question": f"What is {number}+{number}?", "answer": f"Twice {number}.\n#### {2 * number}"}


def ending(number: int) -> dict:
    asked = {
        "ind": number,
        "activity_label": "Baking",
        "ctx_a": f"A man has {number} eggs. [title] He",
        "ctx_b": "eats",
    }
    return asked | {"ctx": "unused", "endings": ANSWERS, "label": str(number % 4)}


def truth(number: int) -> dict:
    choices = [f"It is {number}.", "It is a cat.", "None", "All"][: 2 + number % 3]
    return {
        "question": f"What is {number}?",
        "mc1_targets": {"choices": choices, "labels": [1] + [0] * len(choices[1:])},
    }


def anatomy(number: int) -> dict:
    answer = 9 if number == 2 else number % 4  # which is no choice: lm-eval counts it as wrong
    return {"question": f"Which bone is {number}?", "choices": ["a", "b", "c", "d"], "answer": answer}


def sentence(number: int) -> dict:
    context = None if number == 4 else f"The {number}"  # which lm-eval writes as the word None
    return {"context": context, "ending_good": " dogs bark.", "ending_bad": f" dogs barks now{'!' * (number % 2)}"}


def made(hub: Path) -> Path:
    def rows(row, count: int, start: int = 0) -> list[dict]:
        return [row(number) for number in range(start, start + count)]

    sizes = {"murder_mysteries": 3, "object_placements": 6, "team_allocation": 2}
    put(hub, "TAUR-Lab/MuSR", {"default": {split: rows(murder, n) for split, n in sizes.items()}})
    put(hub, "openai/gsm8k", {"main": {"train": rows(problem, 9, 10), "test": rows(problem, 2)}})
    put(hub, "Rowan/hellaswag", {"default": {"train": rows(ending, 3, 9), "validation": rows(ending, 5)}})
    put(hub, "truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows(truth, 5)}})
    put(hub, "cais/mmlu", {"anatomy": {"test": rows(anatomy, 3), "dev": rows(anatomy, 5, 20)}})
    word_orders = ["S_O_V", "S_PossPRN_O_V", "S_PossPRN_PossN_O_V"]
    word_orders += [order.replace("S_", "S_ne_", 1) for order in word_orders]
    put(
        hub,
        "jmichaelov/bhs",
        {f"hindi-{order}": {"test": rows(sentence, 1 + n, n)} for n, order in enumerate(word_orders)},
    )
    cats = [{"doc_id": str(n), "text": f"The cat {n} sat on the ", "value": "mat"} for n in range(2)]
    put(hub, "hazyresearch/based-squad", {"default": {"validation": cats}})
    unanswered = {"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    answered = unanswered | {"id": "2", "answers": {"text": ["c"], "answer_start": [0]}}
    put(hub, "lighteval/squad_v2", {"default": {split: [answered, unanswered] for split in ("train", "validation")}})
    return hub
