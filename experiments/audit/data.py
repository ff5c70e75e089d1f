"""The rows that both models are scored on: tasks as the `data` stage writes them, and general text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.audit import kept
from experiments.data import general_text, local, rows, splits
from experiments.data.reader import Reader, write_rows
from experiments.data.scored_tasks import write_scored
from experiments.study import names_of_tasks, schema
from methods.errors import UserError
from methods.tools.files import sha256
from methods.tools.jsonl import Row, place

TEXTS = 128  # passages of general text
COLUMNS = ("text", "content", "passage", "document")  # where a file's text is looked for
GENERAL = {"name": "general", "role": "perplexity", "file": "general.jsonl", "task": "general_text"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows on the disk, in the layout of work/data/evaluate/DOMAIN.

    folder    tasks.json and one file a task
    sha256    hash of all of it, by which scores are kept
    facts     by task: source, licence, counts
    """

    folder: Path
    sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def write(*, study, work: Path, names: Sequence[str], number: int | None, text: Path | None, texts: int | None) -> Data:
    """Write the rows of the tasks `names` and of general text to a folder of `work` that is named after their content.

    study    whose tasks and general text are meant; `number` replaces its number of rows of each task
    names    tasks, groups and suites, as a domain may name them
    text     a file of one's own in place of its general text, of which `texts` passages are taken
    Raises UserError for an unknown name, and for a task or a text whose rows are not to be had.
    """
    (work / "rows").mkdir(parents=True, exist_ok=True)
    study, tasks = names_of_tasks.of(list(names), study, where="--tasks")
    if number is not None:
        limited = {name: task.model_copy(update={"test": number}) for name, task in study.tasks.items()}
        study = study.model_copy(update={"tasks": limited})
    reader = Reader(study=study)
    with TemporaryDirectory(dir=work / "rows") as fresh:
        out = Path(fresh) / "rows"
        # as a domain would name them, without rows of its own
        named = schema.Domain.model_construct(retention=tasks, task=None)
        listed, facts, _ = write_scored("audit", named, reader, folder=out, taught=set(), sources=())
        passages, facts["general"] = _own(text, texts or TEXTS) if text else _general(study, reader, texts)
        if passages:
            write_rows(out / "general.jsonl", passages)
            listed.append(GENERAL | {"metric": "perplexity", "chance": None})
        (out / "tasks.json").write_text(json.dumps(listed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        digest = kept.digest([[path.name, sha256(path)] for path in sorted(out.iterdir())])
        folder = work / "rows" / digest[:32]
        if not folder.is_dir():
            out.replace(folder)
    return Data(folder=folder, sha256=digest, facts=facts)


def _general(study, reader: Reader, number: int | None) -> tuple[list[dict], dict]:
    """The passages of `general:` that a study scores, so that the two are comparable."""
    block = study.general
    if block is None:
        return [], {}
    wanted = dict.fromkeys(general_text.SETS, 0) | {"test": number or block.test}
    drawn, _ = general_text.lines(block.model_copy(update=wanted), reader)
    source = reader(block, block.rows, where="general").source
    return drawn["test"], {"source": source, "licence": block.licence}


def _own(file: Path, number: int) -> tuple[list[dict], dict]:
    """Passages of a file: the first `number` distinct ones by hash."""
    loaded = _read(file)
    column = _column(loaded.rows, file)
    texts = [str(row[column]).strip() for row in loaded.rows]
    by_hash = {splits.text_hash(text): text for text in reversed(texts) if text}
    chosen = sorted(by_hash)[:number]
    if not chosen:
        raise UserError(f"--text {file}: every text in column {column!r} is empty")
    return [{"id": key, "text": by_hash[key]} for key in chosen], {"source": loaded.source, "licence": ""}


def _read(file: Path) -> rows.Rows:
    """The rows of a file of `rows: {local: …}`; the passages of a text file are divided by empty lines."""
    if file.suffix.lower() not in local.TEXTS or not file.is_file():
        block = schema.Rows.model_validate({"local": str(file)})
        return rows.read(block, packages={}, prefer="pypi", where="--text")
    try:
        whole = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    passages = [passage.strip() for passage in re.split(r"\n\s*\n", whole) if passage.strip()]
    if not passages:
        raise UserError(f"--text {file} is empty")
    found = [Row({"text": passage}, at=f"{file} passage {number}") for number, passage in enumerate(passages, 1)]
    return rows.Rows(rows=found, source=f"text:{file}")


def _column(found: Sequence[dict], file: Path) -> str:
    """The column that holds the text: one with a usual name, or the only one with texts."""
    holding = [name for name in found[0] if all(isinstance(row.get(name), str) for row in found)]
    for name in (*COLUMNS, *(holding if len(holding) == 1 else ())):
        if name in holding:
            return name
    raise UserError(
        f"--text {file}: {place(found[0], 1)} has the columns {', '.join(found[0])}, and it is not clear which of them "
        f"is the text: call it {COLUMNS[0]!r}"
    )
