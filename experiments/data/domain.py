"""A domain: its rows split once, rendered for training and probes, and kept as they are for scoring."""

import json
from pathlib import Path
from typing import Any

from evaluation.chance import WARNING
from evaluation.task import make_task
from experiments.data import general_text, rows, scored_tasks, splits
from experiments.data.reader import Reader, Row, write_rows
from experiments.data.scored_tasks import entry, facts, question, rendered, warn_of_spaces
from experiments.study.schema import Domain


def write(domain: str, block: Domain, reader: Reader, out: Path) -> dict[str, Any]:
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
    folder, trained = out / "train" / domain, rendered(domain, block, split.train)
    write_rows(folder / "train.jsonl", trained)
    _warn_of_answers(where, trained)
    general = general_text.lines(reader.study.general, reader)
    for name, probe in ((domain, rendered(domain, block, split.probe)), ("general", general["probe"])):
        if probe:  # with 0 probe rows there is no file, not an empty one
            write_rows(folder / "probe" / f"{name}.jsonl", probe)
    evaluate = out / "evaluate" / domain
    write_rows(evaluate / f"{domain}.jsonl", split.test)
    listed = [entry(domain, block, "domain")]
    warn_of_spaces(where, make_task(domain, block.task, split.test, metric=block.metric))  # checks every row
    taught = {question(row) for row in trained}
    sources = [loaded.source, *([held_out.source] if held_out else [])]
    more, tasks = scored_tasks.write_scored(domain, block, reader, folder=evaluate, taught=taught, sources=sources)
    listed += more
    write_rows(evaluate / "general.jsonl", general["perplexity"])
    perplexity = {"task": "general_text", "metric": "perplexity", "chance": None}
    listed.append({"name": "general", "role": "perplexity", "file": "general.jsonl"} | perplexity)
    (evaluate / "tasks.json").write_text(json.dumps(listed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    probes = scored_tasks.write_probes(domain, block, reader, folder=folder)
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
    source = loaded.source + (f" ; test: {held_out.source}" if held_out else "")
    return facts(block, split, source) | {"tasks": tasks, "probes": probes}


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
