"""Write the domains, tasks and general text of a study as files, split once and the same for every cell.

data/train/<domain>/train.jsonl, probe/<name>.jsonl     questions as the task renders them
data/general/importance.jsonl                           text that importance is computed on
data/evaluate/<domain>/<task>.jsonl, tasks.json         rows that lm-eval scores, and the role of each file
data/data.json                                          sources, counts, dropped duplicates, checksums
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.chance import WARNING
from evaluation.task import LocalTask, make_task, render
from experiments.data import rows, splits
from experiments.data.sameness import sameness
from experiments.study import schema
from experiments.study.schema import Domain, General, Scored, Task
from methods.errors import UserError
from methods.tools.files import sha256
from methods.tools.jsonl import place

Row = dict[str, Any]
PARTS = ("train", "evaluate", "general")


def write_data(study, out_dir: Path) -> dict[str, Any]:
    """Write the data of the domains in `study.grid` to `out_dir` and return the content of data.json.

    Raises a UserError that names the block for a missing source or column, a wrong gold answer, or an empty split.
    """
    out = Path(out_dir)
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    reader = _Reader(study=study)
    report: dict[str, Any] = {"general": _general(study.general, reader, out), "domains": {}}
    for domain in study.grid.domains:
        report["domains"][domain] = _domain(domain, study.domains[domain], reader, out)
    files = [path for part in PARTS for path in sorted((out / part).rglob("*")) if path.is_file()]
    report["files"] = {str(path.relative_to(out)): sha256(path) for path in files}
    for domain, facts in report["domains"].items():
        facts["sha256"] = {part: _digest(report["files"], f"{part}/{domain}/") for part in ("train", "evaluate")}
    (out / "data.json").write_text(json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return report


def write_rows(path: Path, lines: Iterable[Row]) -> Path:
    """Write one JSON object a line with sorted keys, so that equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True, default=str) + "\n" for line in lines)
    return path


@dataclass(kw_only=True)
class _Reader:
    """Reads each block's rows once, however many domains use them."""

    study: Any
    read_before: dict[str, rows.Rows] = field(default_factory=dict)

    def __call__(self, block: General | Scored, named: schema.Rows, *, where: str) -> rows.Rows:
        if where not in self.read_before:
            source = {"packages": self.study.packages, "prefer": self.study.data.source}
            loaded = rows.read(named, **source, where=where, emptied=block.nulls == "empty")
            shaped = rows.shape(loaded.rows, block, where=where) if isinstance(block, Scored) else loaded.rows
            self.read_before[where] = rows.Rows(rows=shaped, source=loaded.source)
        return self.read_before[where]


def _domain(domain: str, block: Domain, reader: _Reader, out: Path) -> dict[str, Any]:
    where = f"domains.{domain}"
    loaded = reader(block, block.rows, where=where)
    tested = rows.has(block.test_rows, prefer=reader.study.data.source)
    held_out = reader(block, block.test_rows, where=f"{where}.test_rows") if tested else None
    split = splits.three_way(
        loaded.rows,
        question=lambda row: rows.text(row, block.question, where=where),
        where=where,
        test_rows=held_out.rows if held_out else None,
        **block.split.model_dump(),
    )
    folder, trained = out / "train" / domain, _rendered(domain, block, split.train)
    write_rows(folder / "train.jsonl", trained)
    _warn_of_answers(where, trained)
    general = _lines(reader.study.general, reader)
    for name, probe in ((domain, _rendered(domain, block, split.probe)), ("general", general["probe"])):
        if probe:  # with 0 probe rows there is no file, not an empty one
            write_rows(folder / "probe" / f"{name}.jsonl", probe)
    evaluate = out / "evaluate" / domain
    write_rows(evaluate / f"{domain}.jsonl", split.test)
    listed = [_entry(domain, block, "domain")]
    _warn_of_spaces(where, make_task(domain, block.task, split.test, metric=block.metric))  # checks every row
    tasks, taught, seen = {}, {_question(row) for row in trained}, {}
    for role in ("retention", "transfer"):
        for name in getattr(block, role):
            task, drawn, source = _task(name, reader)
            same = isinstance(task.task, str) and task.task == block.task
            if same or source == loaded.source or (held_out and source == held_out.source):
                raise UserError(
                    f"{where}.{role} lists {name!r}, which is the domain's own task or rows: "
                    "training data cannot show retention or transfer"
                )
            file = write_rows(evaluate / f"{name}.jsonl", drawn.test)
            made = make_task(name, task.task, drawn.test, metric=task.metric)
            content = (sha256(file), json.dumps(task.task, sort_keys=True), task.metric)
            if content in seen:
                raise UserError(
                    f"{where}: tasks {seen[content]!r} and {name!r} have the same rows, prompt and metric "
                    "and would count twice: leave one of them out"
                )
            seen[content] = name
            _refuse_taught(made, taught, where=f"{where}.{role} lists {name!r}")
            _warn_of_spaces(f"tasks.{name}", made)
            listed.append(_entry(name, task, role))
            tasks[name] = _facts(task, drawn, source) | {"role": role}
    write_rows(evaluate / "general.jsonl", general["perplexity"])
    perplexity = {"task": "general_text", "metric": "perplexity", "chance": None}
    listed.append({"name": "general", "role": "perplexity", "file": "general.jsonl"} | perplexity)
    (evaluate / "tasks.json").write_text(json.dumps(listed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    probes = {}
    for name in block.probes:
        task, drawn, _ = _task(name, reader)
        scored = {_question(row) for row in _rendered(name, task, drawn.test)}
        probe = [row for row in _rendered(name, task, drawn.probe) if _question(row) not in scored]
        if not probe:
            raise UserError(
                f"{where}.probes lists {name!r}, but no rows are left for its probe after its "
                f"{len(drawn.test)} test rows: lower tasks.{name}.test, or raise its `probe`"
            )
        write_rows(folder / "probe" / f"{name}.jsonl", probe)
        probes[name] = {"n": len(probe), "duplicates": {"between": len(drawn.probe) - len(probe)}}
    print(
        f"data: {domain}: {len(split.train)} train, {len(split.probe)} probe, {len(split.test)} test rows; "
        f"{len(tasks)} other tasks",
        flush=True,
    )
    if split.duplicates_within:
        print(f"data: {domain}: rows left out as exact copies of others: {split.duplicates_within}", flush=True)
    if split.duplicates_between:
        print(
            f"data: {domain}: rows left out because a row of an earlier set asks the same: {split.duplicates_between}, "
            f"such as {split.pair}",
            flush=True,
        )
    sources = loaded.source + (f" ; test: {held_out.source}" if held_out else "")
    return _facts(block, split, sources) | {"tasks": tasks, "probes": probes}


def _task(name: str, reader: _Reader) -> tuple[Task, splits.Split, str]:
    block = reader.study.tasks[name]
    loaded = reader(block, block.rows, where=f"tasks.{name}")
    return block, splits.sample(loaded.rows, test=block.test, probe=block.probe), loaded.source


def _warn_of_spaces(where: str, task: LocalTask) -> None:
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


def _warn_of_answers(where: str, trained: list[Row]) -> None:
    """Warn of empty training answers, and of the same answer to every question."""
    answers = [row["choices"][row["gold"]].strip() for row in trained]
    if empty := answers.count(""):
        problem = f"in {empty} of {len(answers)} training rows the answer is empty"
    elif len(answers) > 1 and len(set(answers)) == 1:
        problem = f"all {len(answers)} training rows have the same answer {answers[0][:60]!r}"
    else:
        return
    print(f"{WARNING}{where}: {problem}: check doc_to_target", flush=True)


def _rendered(name: str, block: Scored, drawn: list[Row]) -> list[Row]:
    """The rows as lm-eval's task renders them: {"id", "context", "choices", "gold"}."""
    return render(make_task(name, block.task, drawn, metric=block.metric)) if drawn else []


def _question(row: Row) -> str:
    """The question of a rendered row as a key to compare; without its few-shot examples, which differ between rows."""
    return sameness(row.get("asked", row["context"]))


def _refuse_taught(task: LocalTask, taught: set[str], *, where: str) -> None:
    """Refuse a task if most of its questions are training questions, whatever its name or file; warn if some are."""
    try:
        rendered = render(task)
    except UserError:  # choices inside the context: training prompts are never of this kind
        return
    if not (known := [row for row in rendered if _question(row) in taught]):
        return
    problem = (
        f"{where}, but {len(known)} of its {len(rendered)} test rows ask the same as training rows of the domain, "
        f"such as {known[0]['context'][-80:]!r}"
    )
    if len(known) > len(rendered) / 2:
        raise UserError(f"{problem}: training data cannot show retention or transfer; choose other rows")
    print(f"{WARNING}{problem}", flush=True)


def _entry(name: str, block: Scored, role: str) -> dict[str, Any]:
    stated = {"task": block.task, "metric": block.metric, "chance": block.chance}
    return {"name": name, "role": role, "file": f"{name}.jsonl"} | stated


def _general(block: General, reader: _Reader, out: Path) -> dict[str, Any]:
    drawn = _lines(block, reader)
    write_rows(out / "general" / "importance.jsonl", drawn["importance"])
    return {
        "source": reader(block, block.rows, where="general").source,
        "licence": block.licence,
        "n": {name: len(drawn[name]) for name in ("importance", "probe", "perplexity")},
        "duplicates": {"within": drawn["copies"], "between": 0},
    }


def _lines(block: General, reader: _Reader) -> dict[str, Any]:
    """General text in three disjoint sets: importance and probe from one half, perplexity from the other.

    Each text is {"id", "text"}.
    """
    loaded = reader(block, block.rows, where="general")
    for number, row in enumerate(loaded.rows, 1):
        if isinstance(row.get(block.text), list | dict):
            raise UserError(
                f"general: {place(row, number)}, column {block.text!r} is a list or an object, not a text: "
                f"write a template as `text`, such as \"{{{{{block.text} | join(' ')}}}}\""
            )
    texts = [rows.text(row, block.text, where="general").strip() for row in loaded.rows]
    if limit := block.max_words:
        texts = [" ".join(text.split()[:limit]) if len(text.split()) > limit else text for text in texts]
    first, second, copies = splits.halves(text for text in texts if text)
    ends = {
        "importance": (first, 0, block.importance),
        "perplexity": (second, 0, block.perplexity),
        "probe": (first, block.importance, block.probe),
    }
    drawn: dict[str, Any] = {"copies": copies}
    for name, (half, start, number) in ends.items():
        chosen = half[start : start + number]
        if len(chosen) < number or (not number and name != "probe"):
            raise UserError(
                f"general.{name} is {number} texts, and {len(chosen)} are available (the text has halves "
                f"of {len(first)} and {len(second)}): lower it, or add more text"
            )
        drawn[name] = [{"id": splits.text_hash(text), "text": text} for text in chosen]
    return drawn


def _facts(block: Scored, split: splits.Split, source: str) -> dict[str, Any]:
    counts = {"train": len(split.train), "probe": len(split.probe), "test": len(split.test)}
    duplicates = {"within": split.duplicates_within, "between": split.duplicates_between}
    duplicates |= {"pair": split.pair} if split.pair else {}
    return {"source": source, "licence": block.licence, "n": counts, "duplicates": duplicates}


def _digest(files: Mapping[str, str], prefix: str) -> str:
    listed = "".join(f"{name} {sha}\n" for name, sha in sorted(files.items()) if name.startswith(prefix))
    return hashlib.sha256(listed.encode()).hexdigest()
