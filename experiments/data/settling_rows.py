"""The rows that a model is settled on: of general text its set `settle`, and of tasks the last `settle` rows by hash.

They are chosen from the end of the order that scored rows are taken from the front of, so that another number of scored
rows does not move what a model was settled on.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from evaluation.task import doc_hash, make_task, render
from experiments.data import general_text, scored_tasks
from experiments.data.reader import Reader, Row
from methods.errors import UserError
from methods.tools.files import read_json
from methods.tools.names import unknown

GENERAL = "general"
TEXTS = ("text", "context", "choices", "gold")


def of(names: Iterable[str], reader: Reader) -> dict[str, list[Row]]:
    """The rows of each source of a mix: texts, or questions as their task renders them.

    names   `general`, and blocks under `tasks:` with `rows` of their own and a number under `settle`

    A task of whole texts, such as `general_text`, gives texts. Raises UserError that names the block for a name that is
    not known, and for a source without so many rows.
    """
    return {name: _general(reader) if name == GENERAL else _of_task(name, reader) for name in names}


def digests(sources: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """The sha256 of the texts of each source, the same whatever its rows are called."""
    texts = {name: [[row.get(key) for key in TEXTS] for row in rows] for name, rows in sources.items()}
    return {name: sha256(json.dumps(own).encode()).hexdigest() for name, own in texts.items()}


def refuse_others(sources: Mapping[str, Sequence[Row]], record: Path, *, where: str) -> None:
    """Raises UserError where a model was settled on other rows, by its settle.json, for they may be scored now."""
    made_on = read_json(record).get("rows_sha256", {}) if record.is_file() else {}
    now = digests(sources)
    if other := [name for name in made_on if made_on[name] != now.get(name)]:
        raise UserError(
            f"{where} was settled on other rows of {', '.join(other)} than its mix gives now, and may have seen what "
            "is scored: write these blocks as they were, or settle it again (`python -m experiments settle`)"
        )


def _general(reader: Reader) -> list[Row]:
    if not reader.study.general.settle:
        raise UserError("general.settle is 0, and a mix takes `general`: set it to the number of texts, such as 1000")
    return general_text.lines(reader.study.general, reader)[0]["settle"]


def _of_task(name: str, reader: Reader) -> list[Row]:
    known: dict[str, Any] = reader.study.tasks
    if name not in known:
        raise unknown("task", name, [GENERAL, *known], where="a mix")
    block = known[name]
    if block.rows is None or not block.settle:
        missing = "rows" if block.rows is None else "settle"
        raise UserError(f"tasks.{name} has no `{missing}`, and a mix takes its rows: add it, or leave the task out")
    split, _ = scored_tasks.drawn(name, reader)
    if len(split.train) < block.settle:
        raise UserError(
            f"tasks.{name}.settle is {block.settle}, and {len(split.train)} rows are left after {len(split.test)} that "
            f"are scored and {len(split.probe)} that are probed: lower one of them"
        )
    task = make_task(name, block.task, split.train, metric=block.metric)
    if task.OUTPUT_TYPE != "loglikelihood_rolling":
        return render(task)
    return [{"id": doc_hash(doc), "text": task.doc_to_target(doc)} for doc in task.eval_docs]
