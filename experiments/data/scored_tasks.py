"""The tasks that a domain names: rows that are scored for each role, and rows that are probed."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import guessing
from evaluation.chance import WARNING
from evaluation.task import LocalTask, make_task, render
from experiments.data import lm_eval_rows, splits
from experiments.data.reader import Reader, Row, write_rows
from experiments.data.sameness import sameness
from experiments.study.schema import Domain, Scored, Task
from methods.errors import UserError
from methods.tools.files import sha256


def write_scored(
    domain: str, block: Domain, reader: Reader, *, folder: Path, taught: set[str], sources: Iterable[str]
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, list[Row]]]:
    """Write the rows of each task that the domain names under a role.

    Their entries of tasks.json, their facts, and their rows as they are asked, as far as they have one context.

    taught   questions of the domain's training rows, as `question` gives them
    sources  where the domain's own rows come from
    """
    where = f"domains.{domain}"
    listed: list[dict[str, Any]] = []
    tasks: dict[str, Any] = {}
    asked_by: dict[str, list[Row]] = {}
    seen: dict[tuple, str] = {}
    held: dict[tuple, tuple[str, str]] = {}
    for role in ("retention", "transfer", "score"):
        for name in getattr(block, role):
            written = _written(name, role, reader, folder=folder)
            # a group may hold it, which may still be scored as a whole
            by_group = written.entry.get("documents") and role != "score"
            inside = [one.config.task for one in written.tasks] if by_group else []
            same = isinstance(block.task, str) and block.task in [written.entry["task"], *inside]
            if same or written.facts["source"] in sources:
                raise UserError(
                    f"{where}.{role} lists {name!r}, which is the domain's own task or rows, or a group with them: "
                    "training data cannot show retention or transfer"
                )
            stated = [written.entry[key] for key in ("task", "metric")]
            content = (sha256(folder / written.entry["file"]), json.dumps(stated, sort_keys=True))
            if content in seen:
                raise UserError(
                    f"{where}: tasks {seen[content]!r} and {name!r} have the same rows, prompt and metric "
                    "and would count twice: leave one of them out"
                )
            seen[content] = name
            _refuse_shared(written, role, held, where=where)
            asked_by[name] = asked(written.tasks)
            _refuse_taught(asked_by[name], taught, where=f"{where}.{role} lists {name!r}")
            if not written.entry.get("documents"):  # what lm-eval's own tasks write is not the user's
                warn_of_spaces(f"tasks.{name}", written.tasks[0])
            listed.append(written.entry)
            tasks[name] = written.facts | {"role": role}
    return listed, tasks, asked_by


def write_probes(
    domain: str, block: Domain, reader: Reader, *, folder: Path, asked: Iterable[Row]
) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """Write the probe rows of each task that the domain names under `probes`: their facts, and the rows.

    asked   rows that are scored, of which none is probed
    """
    where = f"domains.{domain}"
    probes, written = {}, {}
    everywhere = {question(row) for row in asked}
    for name in block.probes:
        task = reader.study.tasks[name]
        if task.rows is None:
            scored_rows, drawn_rows = lm_eval_rows.rendered(name, task, reader.of_lm_eval(name))
        else:
            split, _ = drawn(name, reader)
            scored_rows, drawn_rows = rendered(name, task, split.test), rendered(name, task, split.probe)
        scored = everywhere | {question(row) for row in scored_rows}
        probe = [row for row in drawn_rows if question(row) not in scored]
        if not probe:
            raise UserError(
                f"{where}.probes lists {name!r}, but no rows are left for its probe after its "
                f"{len(scored_rows)} test rows: lower tasks.{name}.test, or raise its `probe`"
            )
        write_rows(folder / "probe" / f"{name}.jsonl", probe)
        probes[name] = {"n": len(probe), "duplicates": {"between": len(drawn_rows) - len(probe)}}
        written[name] = probe
    return probes, written


@dataclass(frozen=True, kw_only=True)
class _Written:
    """A task whose rows are written: its entry of tasks.json, its facts for data.json, and lm-eval's tasks of it."""

    entry: dict[str, Any]
    facts: dict[str, Any]
    tasks: list[Any]


def _written(name: str, role: str, reader: Reader, *, folder: Path) -> _Written:
    task = reader.study.tasks[name]
    if task.rows is not None:
        split, source = drawn(name, reader)
        write_rows(folder / f"{name}.jsonl", split.test)
        made = make_task(name, task.task, split.test, metric=task.metric)
        return _Written(entry=entry(name, task, role, made), facts=facts(task, split, source), tasks=[made])
    named = reader.of_lm_eval(name)
    lm_eval_rows.write(folder / f"{name}.jsonl", named)
    own, made = lm_eval_rows.entry(name, task, role, named, folder=folder)
    return _Written(entry=own, facts=lm_eval_rows.facts(task, named), tasks=made)


def _refuse_shared(written: _Written, role: str, held: dict[tuple, tuple[str, str]], *, where: str) -> None:
    """Refuse two roles for one of lm-eval's tasks, which groups may hold; warn if it counts twice under one role.

    held  the name and role under which each task was there first; those of `written` are added
    """
    if not written.entry.get("documents"):
        return
    name, stated = written.entry["name"], written.entry["task"]
    changes = {} if isinstance(stated, str) else {key: value for key, value in stated.items() if key != "include"}
    alike = json.dumps([changes, written.entry["metric"]], sort_keys=True)
    shared: dict[tuple[str, str], str] = {}
    for task in (one.config.task for one in written.tasks):
        first = held.setdefault((task, alike), (name, role))
        if first != (name, role):
            shared.setdefault(first, task)
    for (other, its_role), task in shared.items():
        problem = f"{where}: {task} is in {other!r} under `{its_role}` and in {name!r} under `{role}`"
        if its_role != role:
            raise UserError(f"{problem}: leave one of them out")
        print(f"{WARNING}{problem}, and counts twice", flush=True)


def drawn(name: str, reader: Reader) -> tuple[splits.Split, str]:
    """The scored and the probed rows of a task with rows of its own, as `train` those of a mix, and their source."""
    block = reader.study.tasks[name]
    loaded = reader(block, block.rows, where=f"tasks.{name}")
    test = block.test or reader.study.data.test
    return splits.sample(loaded.rows, test=test, probe=block.probe, settle=block.settle), loaded.source


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


def rendered(name: str, block: Scored, given: list[Row]) -> list[Row]:
    """The rows as lm-eval's task renders them: {"id", "context", "choices", "gold"}."""
    return render(make_task(name, block.task, given, metric=block.metric)) if given else []


def question(row: Row) -> str:
    """The question of a rendered row as a key to compare; without its few-shot examples, which differ between rows."""
    return sameness(row.get("asked", row["context"]))


def asked(tasks: Iterable[LocalTask]) -> list[Row]:
    """The rows of tasks as they are asked; without those whose choices are in the context."""
    rows: list[Row] = []
    for task in tasks:
        with contextlib.suppress(UserError):  # training prompts are never of this kind
            rows += render(task)
    return rows


def _refuse_taught(asked: Sequence[Row], taught: set[str], *, where: str) -> None:
    """Refuse a task if most of its questions are training questions, whatever its name or file."""
    known = [row for row in asked if question(row) in taught]
    if len(known) > len(asked) / 2:
        raise UserError(
            f"{where}, but {len(known)} of its {len(asked)} test rows ask the same as training rows of the domain, "
            f"such as {known[0]['context'][-80:]!r}: training data cannot show retention or transfer; choose other rows"
        )


def entry(name: str, block: Scored, role: str, task: LocalTask) -> dict[str, Any]:
    """The entry of tasks.json; metric and chance level are the task's where the block states none."""
    chance = guessing.chance(task) if block.chance is None else block.chance
    stated = {"task": block.task, "metric": task.metric, "chance": chance}
    return {"name": name, "role": role, "file": f"{name}.jsonl"} | stated


def facts(block: Scored, split: splits.Split, source: str) -> dict[str, Any]:
    trained = 0 if isinstance(block, Task) else len(split.train)  # those of a task are a mix's
    counts = {"train": trained, "probe": len(split.probe), "test": len(split.test)}
    duplicates = {"within": split.duplicates_within, "between": split.duplicates_between}
    duplicates |= {"pair": split.pair} if split.pair else {}
    return {"source": source, "licence": block.licence, "n": counts, "duplicates": duplicates}
