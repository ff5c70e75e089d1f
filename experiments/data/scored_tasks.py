"""The tasks that a domain names: rows that are scored for each role, and rows that are probed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evaluation.chance import WARNING
from evaluation.task import LocalTask, make_task, render
from experiments.data import splits
from experiments.data.reader import Reader, Row, write_rows
from experiments.data.sameness import sameness
from experiments.study.schema import Domain, Scored, Task
from methods.errors import UserError
from methods.tools.files import sha256


def write_scored(
    domain: str, block: Domain, reader: Reader, *, folder: Path, taught: set[str], sources: Iterable[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write the rows of each task that the domain names under a role: their entries of tasks.json, and their facts.

    taught   questions of the domain's training rows, as `question` gives them
    sources  where the domain's own rows come from
    """
    where = f"domains.{domain}"
    listed: list[dict[str, Any]] = []
    tasks: dict[str, Any] = {}
    seen: dict[tuple, str] = {}
    for role in ("retention", "transfer", "score"):
        for name in getattr(block, role):
            task, drawn, source = _task(name, reader)
            same = isinstance(task.task, str) and task.task == block.task
            if same or source in sources:
                raise UserError(
                    f"{where}.{role} lists {name!r}, which is the domain's own task or rows: "
                    "training data cannot show retention or transfer"
                )
            file = write_rows(folder / f"{name}.jsonl", drawn.test)
            made = make_task(name, task.task, drawn.test, metric=task.metric)
            content = (sha256(file), json.dumps(task.task, sort_keys=True), task.metric)
            if content in seen:
                raise UserError(
                    f"{where}: tasks {seen[content]!r} and {name!r} have the same rows, prompt and metric "
                    "and would count twice: leave one of them out"
                )
            seen[content] = name
            _refuse_taught(made, taught, where=f"{where}.{role} lists {name!r}")
            warn_of_spaces(f"tasks.{name}", made)
            listed.append(entry(name, task, role))
            tasks[name] = facts(task, drawn, source) | {"role": role}
    return listed, tasks


def write_probes(domain: str, block: Domain, reader: Reader, *, folder: Path) -> dict[str, Any]:
    """Write the probe rows of each task that the domain names under `probes`, and return their facts."""
    where = f"domains.{domain}"
    probes = {}
    for name in block.probes:
        task, drawn, _ = _task(name, reader)
        scored = {question(row) for row in rendered(name, task, drawn.test)}
        probe = [row for row in rendered(name, task, drawn.probe) if question(row) not in scored]
        if not probe:
            raise UserError(
                f"{where}.probes lists {name!r}, but no rows are left for its probe after its "
                f"{len(drawn.test)} test rows: lower tasks.{name}.test, or raise its `probe`"
            )
        write_rows(folder / "probe" / f"{name}.jsonl", probe)
        probes[name] = {"n": len(probe), "duplicates": {"between": len(drawn.probe) - len(probe)}}
    return probes


def _task(name: str, reader: Reader) -> tuple[Task, splits.Split, str]:
    block = reader.study.tasks[name]
    loaded = reader(block, block.rows, where=f"tasks.{name}")
    return block, splits.sample(loaded.rows, test=block.test, probe=block.probe), loaded.source


def warn_of_spaces(where: str, task: LocalTask) -> None:
    """Warn of choices that begin with a space although the delimiter before them ends with one."""
    delimiter = task.config.target_delimiter
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or not delimiter.endswith(" "):
        return
    docs = task.eval_docs
    if doubled := sum(any(choice.startswith(" ") for choice in task.doc_to_choice(doc)) for doc in docs):
        print(
            f"{WARNING}{where}: in {doubled} of {len(docs)} rows a choice begins with a space after target_delimiter "
            f'{delimiter!r}, which gives two spaces: strip the choices, or write `target_delimiter: ""` in the task',
            flush=True,
        )


def rendered(name: str, block: Scored, drawn: list[Row]) -> list[Row]:
    """The rows as lm-eval's task renders them: {"id", "context", "choices", "gold"}."""
    return render(make_task(name, block.task, drawn, metric=block.metric)) if drawn else []


def question(row: Row) -> str:
    """The question of a rendered row as a key to compare; without its few-shot examples, which differ between rows."""
    return sameness(row.get("asked", row["context"]))


def _refuse_taught(task: LocalTask, taught: set[str], *, where: str) -> None:
    """Refuse a task if most of its questions are training questions, whatever its name or file; warn if some are."""
    try:
        asked = render(task)
    except UserError:  # choices inside the context: training prompts are never of this kind
        return
    if not (known := [row for row in asked if question(row) in taught]):
        return
    problem = (
        f"{where}, but {len(known)} of its {len(asked)} test rows ask the same as training rows of the domain, "
        f"such as {known[0]['context'][-80:]!r}"
    )
    if len(known) > len(asked) / 2:
        raise UserError(f"{problem}: training data cannot show retention or transfer; choose other rows")
    print(f"{WARNING}{problem}", flush=True)


def entry(name: str, block: Scored, role: str) -> dict[str, Any]:
    stated = {"task": block.task, "metric": block.metric, "chance": block.chance}
    return {"name": name, "role": role, "file": f"{name}.jsonl"} | stated


def facts(block: Scored, split: splits.Split, source: str) -> dict[str, Any]:
    counts = {"train": len(split.train), "probe": len(split.probe), "test": len(split.test)}
    duplicates = {"within": split.duplicates_within, "between": split.duplicates_between}
    duplicates |= {"pair": split.pair} if split.pair else {}
    return {"source": source, "licence": block.licence, "n": counts, "duplicates": duplicates}
