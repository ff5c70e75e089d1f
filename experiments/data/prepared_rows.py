"""The `data` stage: every domain, task and general text of a study as files, split once, the same for every cell.

data/train/<domain>/train.jsonl, probe/<name>.jsonl     questions as the task renders them
data/general/importance.jsonl                           text that importance is computed on
data/evaluate/<domain>/<task>.jsonl, tasks.json         rows that lm-eval scores, and what each is for
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
from experiments.model import packages
from methods.errors import UserError
from methods.tools.jsonl import place
from methods.tools.names import unknown

Row = dict[str, Any]
_DEFAULTS = {"test": 200, "probe": 0}
_GENERAL = {"text": "text", "importance": 512, "perplexity": 128, "probe": 16}


def write_data(study: Any, out_dir: Path) -> dict[str, Any]:
    """Write the data of the domains in `study.grid` to `out_dir` and return what data.json says.

    `study` has the raw blocks of params.yaml: `domains`, `tasks`, `general`, `packages`, `data`, `grid`. Raises
    UserError naming the block for a missing source or column, a wrong gold answer, or a split without rows.
    """
    out = Path(out_dir)
    for part in ("train", "evaluate", "general"):
        shutil.rmtree(out / part, ignore_errors=True)
    reader = _Reader(study=study)
    report: dict[str, Any] = {"general": _general(study.general, reader, out), "domains": {}}
    for domain in study.grid["domains"]:
        if domain not in study.domains:
            raise unknown("domain", domain, study.domains, where="grid.domains")
        report["domains"][domain] = _domain(domain, study.domains[domain], reader, out)
    report["files"] = {
        str(path.relative_to(out)): packages.file_sha256(path)
        for part in ("train", "evaluate", "general")
        for path in sorted((out / part).rglob("*"))
        if path.is_file()
    }
    for domain, said in report["domains"].items():
        said["sha256"] = {part: _digest(report["files"], f"{part}/{domain}/") for part in ("train", "evaluate")}
    (out / "data.json").write_text(json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return report


def write_rows(path: Path, lines: Iterable[Row]) -> Path:
    """One JSON object a line, keys sorted: equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True, default=str) + "\n" for line in lines)
    return path


@dataclass(kw_only=True)
class _Reader:
    """Reads each block's rows once, however many domains use them."""

    study: Any
    read_before: dict[str, rows.Rows] = field(default_factory=dict)

    def __call__(self, block: Mapping[str, Any], key: str, *, where: str) -> rows.Rows:
        if where not in self.read_before:
            prefer = self.study.data.get("source", "pypi")
            found = rows.read(
                block.get(key) or {},
                packages=self.study.packages,
                prefer=prefer,
                where=where,
                emptied=block.get("nulls") == "empty",
            )
            self.read_before[where] = rows.Rows(rows=rows.shape(found.rows, block, where=where), source=found.source)
        return self.read_before[where]

    def has(self, block: Mapping[str, Any], key: str) -> bool:
        """Whether `key` names rows for the source in use: a hub test split is no matter of the package source."""
        return self.study.data.get("source", "pypi") in (named := block.get(key) or {}) or "jsonl" in named


def _domain(domain: str, block: Mapping[str, Any], reader: _Reader, out: Path) -> dict[str, Any]:
    where = f"domains.{domain}"
    found = reader(block, "rows", where=where)
    held_out = reader(block, "test_rows", where=f"{where}.test_rows") if reader.has(block, "test_rows") else None
    wanted = block.get("split") or {}
    if missing := [part for part in ("train", "probe", "test") if part not in wanted]:
        raise UserError(
            f"{where}: `split` must say how many rows are for train, probe and test; {missing[0]} is missing"
        )
    expression = block.get("question")
    if not expression:
        raise UserError(f"{where}: `question` must name the column (or template) whose text the split goes by")
    split = splits.three_way(
        found.rows,
        question=lambda row: rows.text(row, expression, where=where),
        where=where,
        test_rows=held_out.rows if held_out else None,
        **wanted,
    )
    folder, trained = out / "train" / domain, _rendered(domain, block, split.train)
    write_rows(folder / "train.jsonl", trained)
    _one_answer(where, trained)
    for name, asked in (
        (domain, _rendered(domain, block, split.probe)),
        ("general", _lines(reader.study.general, reader)["probe"]),
    ):
        if asked:  # 0 probe rows are no set, not an empty one
            write_rows(folder / "probe" / f"{name}.jsonl", asked)
    evaluate = out / "evaluate" / domain
    write_rows(evaluate / f"{domain}.jsonl", split.test)
    listed = [_entry(domain, block, "domain")]
    _two_spaces(where, make_task(domain, block["task"], split.test, metric=block["metric"]))  # which checks every row
    tasks, taught, told = {}, {_asked(row) for row in trained}, {}
    for role in ("retention", "transfer"):
        for name in block.get(role) or []:
            if name in (domain, "general") or name in tasks:
                raise UserError(f"{where}.{role} lists {name!r}, which is evaluated already: name each task once")
            task, drawn, source = _task(name, reader, where=f"{where}.{role}")
            same = isinstance(task["task"], str) and task["task"] == block["task"]
            if same or source == found.source or (held_out and source == held_out.source):
                raise UserError(
                    f"{where}.{role} lists {name!r}, which is the domain's own task or rows: what is "
                    "trained on cannot show retention or transfer"
                )
            file = write_rows(evaluate / f"{name}.jsonl", drawn.test)
            made = make_task(name, task["task"], drawn.test, metric=task["metric"])
            thing = (packages.file_sha256(file), json.dumps(task["task"], sort_keys=True), task["metric"])
            if thing in told:
                raise UserError(
                    f"{where}: tasks {told[thing]!r} and {name!r} are the same rows with the same prompt and metric, and would count "
                    "twice: leave one of them out"
                )
            told[thing] = name
            _not_taught(made, taught, where=f"{where}.{role} lists {name!r}")
            _two_spaces(f"tasks.{name}", made)
            listed.append(_entry(name, task, role))
            tasks[name] = _said(task, drawn, source) | {"role": role}
    write_rows(evaluate / "general.jsonl", _lines(reader.study.general, reader)["perplexity"])
    listed.append(
        {
            "name": "general",
            "role": "perplexity",
            "task": "general_text",
            "metric": "perplexity",
            "chance": None,
            "file": "general.jsonl",
        }
    )
    (evaluate / "tasks.json").write_text(json.dumps(listed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    probes = {}
    for name in block.get("probes") or []:
        task, drawn, _ = _task(name, reader, where=f"{where}.probes")
        scored = {_asked(row) for row in _rendered(name, task, drawn.test)}
        probe = [row for row in _rendered(name, task, drawn.probe) if _asked(row) not in scored]
        if not probe:
            raise UserError(
                f"{where}.probes lists {name!r}, but no rows are left for its probe behind its "
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
        print(f"data: {domain}: rows left out as whole copies of others: {split.duplicates_within}", flush=True)
    if split.duplicates_between:
        print(
            f"data: {domain}: rows left out because a row of an earlier set asks the same: {split.duplicates_between}, such as {split.pair}",
            flush=True,
        )
    sources = found.source + (f" ; test: {held_out.source}" if held_out else "")
    return _said(block, split, sources) | {"tasks": tasks, "probes": probes}


def _task(name: str, reader: _Reader, *, where: str) -> tuple[Mapping[str, Any], splits.Split, str]:
    if name not in reader.study.tasks:
        raise unknown("task", name, reader.study.tasks, where=where)
    block = _DEFAULTS | dict(reader.study.tasks[name])
    found = reader(block, "rows", where=f"tasks.{name}")
    return block, splits.sample(found.rows, test=block["test"], probe=block["probe"]), found.source


def _two_spaces(where: str, task: LocalTask) -> None:
    """Warn of choices that begin with a space which the delimiter in front of them brings already."""
    delimiter = task.config.target_delimiter
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or not delimiter.endswith(" "):
        return
    docs = task.eval_docs
    if doubled := sum(any(choice.startswith(" ") for choice in task.doc_to_choice(doc)) for doc in docs):
        print(
            f"warning: {where}: in {doubled} of {len(docs)} rows a choice begins with a space, and target_delimiter {delimiter!r} stands before it: "
            'two spaces are asked for; strip the choices, or write `target_delimiter: ""` in the task',
            flush=True,
        )


def _one_answer(where: str, trained: list[Row]) -> None:
    """Warn of answers to train on that say nothing: none at all, or the same one to every question."""
    answers = [row["choices"][row["gold"]].strip() for row in trained]
    if empty := answers.count(""):
        print(
            f"{WARNING}{where}: in {empty} of {len(answers)} training rows the answer has no text: check doc_to_target",
            flush=True,
        )
    elif len(answers) > 1 and len(set(answers)) == 1:
        print(
            f"{WARNING}{where}: all {len(answers)} training rows have the one answer {answers[0][:60]!r}: check doc_to_target",
            flush=True,
        )


def _rendered(name: str, block: Mapping[str, Any], drawn: list[Row]) -> list[Row]:
    """The rows as lm-eval's task puts them: {"id", "context", "choices", "gold"}."""
    return render(make_task(name, block["task"], drawn, metric=block["metric"])) if drawn else []


def _asked(row: Row) -> str:
    """What a rendered row asks, to compare with others; few-shot examples are drawn for each row."""
    return sameness(row.get("asked", row["context"]))


def _not_taught(task: LocalTask, taught: set[str], *, where: str) -> None:
    """Refuse a task most of whose questions are trained on, whatever name or file its rows have; say so of fewer."""
    try:
        asked = render(task)
    except UserError:  # choices that stand in the context: a prompt of another kind than any that is trained on
        return
    if not (known := [row for row in asked if _asked(row) in taught]):
        return
    said = f"{where}, but {len(known)} of its {len(asked)} test rows ask what training rows of the domain ask, such as {known[0]['context'][-80:]!r}"
    if len(known) > len(asked) / 2:
        raise UserError(f"{said}: what is trained on cannot show retention or transfer; choose other rows")
    print(f"{WARNING}{said}", flush=True)


def _entry(name: str, block: Mapping[str, Any], role: str) -> dict[str, Any]:
    if missing := [key for key in ("task", "metric", "chance") if block.get(key) is None]:
        kind = "domains" if role == "domain" else "tasks"
        raise UserError(f"{kind}.{name} has no `{missing[0]}`: every block states task, metric and chance")
    return {
        "name": name,
        "role": role,
        "task": block["task"],
        "metric": block["metric"],
        "chance": block["chance"],
        "file": f"{name}.jsonl",
    }


def _general(block: Mapping[str, Any], reader: _Reader, out: Path) -> dict[str, Any]:
    drawn = _lines(block, reader)
    write_rows(out / "general" / "importance.jsonl", drawn["importance"])
    return {
        "source": reader(block, "rows", where="general").source,
        "licence": block.get("licence", ""),
        "n": {name: len(drawn[name]) for name in ("importance", "probe", "perplexity")},
        "duplicates": {"within": drawn["copies"], "between": 0},
    }


def _lines(block: Mapping[str, Any], reader: _Reader) -> dict[str, Any]:
    """General text in three disjoint sets of {"id", "text"}: importance and probe from one half, perplexity the other."""
    block = _GENERAL | dict(block)
    found = reader(block, "rows", where="general")
    for number, row in enumerate(found.rows, 1):
        if isinstance(row.get(block["text"]), list | dict):
            raise UserError(
                f"general: {place(row, number)}, column {block['text']!r} is no text, but a list or an object: write a template as "
                f"`text`, such as \"{{{{{block['text']} | join(' ')}}}}\""
            )
    texts = [rows.text(row, block["text"], where="general").strip() for row in found.rows]
    if limit := block.get("max_words"):
        texts = [" ".join(text.split()[:limit]) if len(text.split()) > limit else text for text in texts]
    first, second, copies = splits.halves(text for text in texts if text)
    ends = {
        "importance": (first, 0, block["importance"]),
        "perplexity": (second, 0, block["perplexity"]),
        "probe": (first, block["importance"], block["probe"]),
    }
    drawn: dict[str, Any] = {"copies": copies}
    for name, (half, start, number) in ends.items():
        chosen = half[start : start + number]
        if len(chosen) < number or (not number and name != "probe"):
            raise UserError(
                f"general.{name} asks for {number} texts and {len(chosen)} can be had (the texts give halves "
                f"of {len(first)} and {len(second)}): lower it, or name more text"
            )
        drawn[name] = [{"id": splits.text_hash(text), "text": text} for text in chosen]
    return drawn


def _said(block: Mapping[str, Any], split: splits.Split, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "licence": block.get("licence", ""),
        "n": {"train": len(split.train), "probe": len(split.probe), "test": len(split.test)},
        "duplicates": {"within": split.duplicates_within, "between": split.duplicates_between}
        | ({"pair": split.pair} if split.pair else {}),
    }


def _digest(files: Mapping[str, str], prefix: str) -> str:
    listed = "".join(f"{name} {sha}\n" for name, sha in sorted(files.items()) if name.startswith(prefix))
    return hashlib.sha256(listed.encode()).hexdigest()
