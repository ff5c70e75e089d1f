"""flips: print the questions that most runs answered correctly before tuning and wrongly after it.

    python -m experiments flips 'MODEL/DOMAIN/*' --top 10

Results contain only hashes. The text is rendered from the local rows of work/data, as lm-eval scored it, and is printed
but never stored.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.comparable import guarded
from analysis.load import load_cells
from analysis.statistics.flips import by_task, flips, most_forgotten, total
from analysis.words import visible
from evaluation.harness import load_tasks
from evaluation.task import HASH_DIGITS, LocalTask, doc_hash, gold_index, render
from experiments.study import cells
from methods.errors import UserError

WIDTH = 110


def main(study, *, patterns: Sequence[str] = (), top: int = 10) -> None:
    """Print the `top` most forgotten questions per (model, domain) of the cells that match a pattern; default: all.

    Raises UserError if a pattern matches no cell, if no matching cell has items, or if the local rows are other rows
    than those that were scored.
    """
    if top < 1:
        raise UserError(f"--top {top}: it must be a whole number from 1")
    chosen = [cell.name for cell in cells.matching(study, patterns)]
    loaded = guarded(load_cells(study.paths.results, chosen))
    shown = False
    for model, domain in loaded.comparisons:
        items = flips(loaded, model=model, domain=domain)
        if not items.empty:
            print(text(items, folder=study.paths.data / "evaluate" / domain, title=f"{model} on {domain}", top=top))
            shown = True
    if not shown:
        raise UserError(
            f"none of {len(chosen)} cells has scored items and a scored base: run `dvc repro` to score them"
        )


def text(items: pd.DataFrame, *, folder: Path, title: str, top: int) -> str:
    """The most forgotten questions of `items` (analysis/statistics/flips.py) in words.

    folder  tasks.json and the scored rows
    """
    worst = most_forgotten(items, top=top)
    runs = items["cell"].nunique()
    if worst.empty:
        by = f" by two or more of {runs} runs" if runs > 1 else ""
        return f"{title}: no correct answer of the base was lost{by}\n"
    scored = [(entry["name"], task) for entry, task in load_tasks(folder) if entry["name"] in set(worst["task"])]
    texts = {(name, row["id"][:HASH_DIGITS]): row for name, task in scored for row in questions(task)}
    pieces = [*_counts(items), ""]
    pieces += [f"{title}: correct answers of the base that most of {runs} run{'s' if runs > 1 else ''} lost", ""]
    for number, item in enumerate(worst.itertuples(), 1):
        row = texts.get((item.task, item.doc_hash[:HASH_DIGITS]))
        if row is None:
            raise UserError(
                f"{folder} has no row {item.doc_hash[:12]} of {item.task}: these are not the rows that were scored; "
                "make them again with `dvc repro data`"
            )
        own = items[(items["task"] == item.task) & (items["doc_hash"] == item.doc_hash) & items["lost"]]
        pieces += [
            f"{number}. {item.task} {item.doc_hash[:12]}: lost by {item.lost_by} of {item.of} "
            f"({', '.join(item.methods)})",
            *_wrapped(row["context"]),
            *_wrapped(f"correct: {row['choices'][row['gold']].strip()}"),
            *_instead(own, row["choices"]),
            "",
        ]
    return "\n".join(pieces)


def _counts(items: pd.DataFrame) -> list[str]:
    """What each method lost and gained on the retention tasks that count, and the same less what guessing explains."""
    lines = []
    for method, row in total(by_task(items)).iterrows():
        counts = [
            f"{row[key]:.3g} {key}" + ("" if pd.isna(known := row[f"{key}_known"]) else f" ({known:.1f} less guessing)")
            for key in ("lost", "gained")
        ]
        lines.append(f"{method}: of {row['right']:.4g} correct answers on the retention tasks, {' and '.join(counts)}")
    return lines


def questions(task: LocalTask) -> list[dict]:
    """Every row of the task as {"id", "context", "choices", "gold"}.

    Of a task whose choices are part of the context, each choice is the whole text.
    """
    if not task.multiple_input:
        return render(task)
    rows = []
    for doc in task.eval_docs:
        choices = [
            f"{choice}{task.config.target_delimiter}{task.doc_to_target(doc)}" for choice in task.doc_to_choice(doc)
        ]
        rows.append({"id": doc_hash(doc), "context": "", "choices": choices, "gold": gold_index(task, doc)})
    return rows


def _instead(lost: pd.DataFrame, choices: list[str]) -> list[str]:
    """The choices of the runs that lost the item; nothing for generated answers and tasks with one choice."""
    known = lost.dropna(subset=["choice"])
    if len(choices) < 2:
        return []
    lines = []
    for choice, rows in known.groupby("choice", sort=True):
        runs = ", ".join(cell.split("/", 2)[2] for cell in rows["cell"])
        lines += _wrapped(f"chosen: {choices[int(choice)].strip()}  [{runs}]")
    return lines


def _wrapped(passage: str) -> list[str]:
    lines = [line for part in passage.splitlines() for line in textwrap.wrap(visible(part), WIDTH - 3)]
    return [f"   {line}" for line in lines]
