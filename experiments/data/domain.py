"""A domain: its rows split once, as training and probes read them, and kept as they are for scoring."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from evaluation import chat
from evaluation.chance import WARNING
from evaluation.labelled import TEMPLATE
from evaluation.task import make_task
from experiments.data import formats, rows, scored_tasks, splits
from experiments.data.overlaps import Held
from experiments.data.reader import Reader, Row, write_rows
from experiments.data.sameness import sameness
from experiments.data.scored_tasks import entry, facts, question, rendered, warn_of_spaces
from experiments.study.schema import Domain
from methods.errors import UserError

# the split of a domain that states none: shares of all rows, and at most so many
PROBED, SCORED = (0.05, 100), (0.1, 500)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A domain's rows, split: `train` and `probe` as training reads them, and `split` with the rows to score.

    asked     what rows of `train` and `probe` ask, by these names
    sources   where the rows come from
    """

    split: splits.Split
    train: list[Row]
    probe: list[Row]
    asked: Mapping[str, list[str]]
    sources: list[str]


def draw(domain: str, block: Domain, reader: Reader) -> Drawn:
    """Read and split the rows of a domain. Raises UserError that names the block for rows that do not fit it."""
    where = f"domains.{domain}"
    tested = rows.has(block.test_rows, prefer=reader.study.data.source)
    if block.rows is None:
        loaded, held_out = reader.of_training(domain, block)
    else:
        loaded = reader(block, block.rows, where=where)
        held_out = reader(block, block.test_rows, where=f"{where}.test_rows") if tested else None
    sources = [loaded.source, *([held_out.source] if held_out else [])]
    if block.format == "task":

        def asks(row: Row) -> str:
            return rows.text(row, block.question, where=where)

        split = splits.three_way(
            loaded.rows,
            question=asks,
            where=where,
            test_rows=held_out.rows if held_out else None,
            **block.split.model_dump(),
        )
        train, probe = (rendered(domain, block, drawn) for drawn in (split.train, split.probe))
        said = {"train": [*map(asks, split.train)], "probe": [*map(asks, split.probe)]}
        return Drawn(split=split, train=train, probe=probe, asked=said, sources=sources)
    given, asked = _standard(loaded.rows, block, reader, where=where)
    tests = None
    if held_out:
        tests, asked_there = _standard(held_out.rows, block, reader, where=f"{where}.test_rows")
        asked |= asked_there
    numbers = block.split.model_dump() if block.split else shares(len(given), tested=tested)
    if not block.split:
        scored = f"{numbers['test']} rows are scored (a tenth, at most {SCORED[1]})"
        print(
            f"data: {domain}: no `split`: {'all of `test_rows` are scored' if tested else scored}, and "
            f"{numbers['probe']} probed (a twentieth, at most {PROBED[1]})",
            flush=True,
        )
    split = splits.three_way(given, question=lambda row: asked[id(row)], where=where, test_rows=tests, **numbers)
    said = {part: [*map(formats.question, own)] for part, own in (("train", split.train), ("probe", split.probe))}
    return Drawn(split=split, train=split.train, probe=split.probe, asked=said, sources=sources)


def _standard(given: list[Row], block: Domain, reader: Reader, *, where: str) -> tuple[list[Row], dict[int, str]]:
    """The rows in the form of their format, and what identifies each, by the row's `id()`."""
    made, before, left_out = formats.standard(given, format=block.format, where=where)
    reader.note(left_out, where=where)
    if block.question:
        return made, {id(row): rows.text(old, block.question, where=where) for row, old in zip(made, before)}
    return made, {id(row): formats.question(row) for row in made}


def shares(count: int, *, tested: bool) -> dict[str, Any]:
    """The split of a domain of `count` rows that states none; `tested` ones have their own test rows."""
    probe, test = (max(1, min(round(share * count), most)) for share, most in (PROBED, SCORED))
    return {"train": "all", "probe": probe, "test": "all" if tested else test}


def write(
    domain: str, block: Domain, reader: Reader, out: Path, *, general: Mapping[str, list[Row]], held: Held
) -> dict[str, Any]:
    """Write the rows of a domain and of the tasks that it names, and return their facts for data.json.

    general   the sets of general text, of which `probe` and `test` are written beside the domain's
    held      these and the mixes of settled models, of which no row may be here
    """
    where, drawn = f"domains.{domain}", draw(domain, block, reader)
    folder, evaluate = out / "train" / domain, out / "evaluate" / domain
    test = drawn.split.test
    write_rows(evaluate / f"{domain}.jsonl", test)
    if block.format == "task":
        made = make_task(domain, block.task, test, metric=block.metric)  # checks every row
        warn_of_spaces(where, made)
        listed, test = [entry(domain, block, "domain", made)], scored_tasks.asked([made])
        taught = {question(row) for row in drawn.train}
    else:
        listed = [_entry(domain, block)]
        taught = {sameness(formats.question(row)) for row in drawn.train}
        if (text := template(block, where)) is not None:
            for place in (folder, evaluate):
                place.mkdir(parents=True, exist_ok=True)
                (place / TEMPLATE).write_text(text, encoding="utf-8")
    more, tasks, asked = scored_tasks.write_scored(
        domain, block, reader, folder=evaluate, taught=taught, sources=drawn.sources
    )
    listed += more
    write_rows(evaluate / "general.jsonl", general["test"])
    perplexity = {"task": "general_text", "metric": "perplexity", "chance": None}
    listed.append({"name": "general", "role": "perplexity", "file": "general.jsonl"} | perplexity)
    (evaluate / "tasks.json").write_text(json.dumps(listed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    probes, probed = scored_tasks.write_probes(
        domain, block, reader, folder=folder, asked=chain.from_iterable(asked.values())
    )
    scored = {f"tasks.{name}": given for name, given in asked.items()}
    scored |= {f"tasks.{name} (probe)": given for name, given in probed.items()}
    drawn, left_out = _without_scored(where, drawn, scored)
    _refuse_shared(where, block, drawn, test=test, scored=scored, held=held)
    write_rows(folder / "train.jsonl", drawn.train)
    if block.format in ("task", "pairs"):
        _warn_of_answers(where, drawn.train, task=block.format == "task")
    for name, probe in ((domain, drawn.probe), ("general", general["probe"])):
        if probe:  # with 0 probe rows there is no file, not an empty one
            write_rows(folder / "probe" / f"{name}.jsonl", probe)
    split = drawn.split
    print(
        f"data: {domain}: {len(split.train)} train, {len(split.probe)} probe, {len(split.test)} test rows; "
        f"{len(tasks)} other tasks",
        flush=True,
    )
    for why, count, such in (
        ("as exact copies of others", split.duplicates_within, ""),
        ("because a row of an earlier set asks the same", split.duplicates_between, f", such as {split.pair}"),
        (f"because {' and '.join(left_out)} asks the same", sum(left_out.values()), ""),
    ):
        if count:
            print(f"data: {domain}: rows left out {why}: {count}{such}", flush=True)
    source, *test_source = drawn.sources
    source += "".join(f" ; test: {name}" for name in test_source)
    found = facts(block, split, source) | {"tasks": tasks, "probes": probes}
    found["duplicates"] |= {"tasks": left_out} if left_out else {}
    return found


def _without_scored(where: str, drawn: Drawn, scored: Mapping[str, list[Row]]) -> tuple[Drawn, dict[str, int]]:
    """The domain without rows to learn from, or to probe, that one of its tasks asks; how many there were, by task."""
    tasks, left_out, kept = Held(), {}, {}
    for name, given in scored.items():
        tasks.hold(name, given)
    for part in ("train", "probe"):
        given = getattr(drawn, part)
        found = {number: name for number, name, _ in tasks.shared(given, asked=drawn.asked[part])}
        for name in found.values():
            left_out[name] = left_out.get(name, 0) + 1
        stays = [number for number in range(len(given)) if number not in found]
        if given and not stays:
            raise UserError(f"{where}: its tasks ask all of its {len(given)} {part} rows: {', '.join(left_out)}")
        each = (given, getattr(drawn.split, part), drawn.asked[part])
        kept[part] = [[own[number] for number in stays] for own in each]
    rendered, split, said = ({part: own[at] for part, own in kept.items()} for at in range(3))
    return replace(drawn, split=replace(drawn.split, **split), asked=said, **rendered), left_out


def _refuse_shared(
    where: str, block: Domain, drawn: Drawn, *, test: list[Row], scored: Mapping[str, list[Row]], held: Held
) -> None:
    """Refuse a row that is in two sets, but for those that are left out of the rows to learn from."""
    remedy = "no set may hold a row of another one: take other rows for one of them"
    for part, given in (("train", drawn.train), ("probe", drawn.probe), ("test", test)):
        held.refuse(f"{where} ({part})", given, asked=drawn.asked.get(part, ()), remedy=remedy)
    for name, given in scored.items():
        held.refuse(name, given, remedy=remedy)
    retained = Held()
    for name in block.retention:
        retained.hold(f"tasks.{name}", scored[f"tasks.{name}"])
    remedy = f"what may rise cannot show what is forgotten: leave one of them out of {where}"
    retained.refuse(f"{where} (test)", test, remedy=remedy)
    others = Held()
    others.hold(f"{where} (test)", test)
    for name in (*block.transfer, *block.score, *(f"{name} (probe)" for name in block.probes)):
        given = scored[f"tasks.{name}"]
        if "(probe)" not in name:
            retained.refuse(f"tasks.{name}", given, remedy=remedy)
        others.refuse(f"tasks.{name}", given, remedy="no set may hold a row of another one: leave one of them out")
        others.hold(f"tasks.{name}", given)


def _entry(domain: str, block: Domain) -> dict[str, Any]:
    """The entry of tasks.json of a domain that is scored in nats per labelled token."""
    about = {"name": domain, "role": "domain", "file": f"{domain}.jsonl", "format": block.format}
    about |= {"task": None, "metric": "nats_per_token", "chance": None}
    return about | ({"template": TEMPLATE} if block.chat_template else {})


def template(block: Domain, where: str) -> str | None:
    """The text of the block's chat template, if it names one. Raises UserError where it is no valid template."""
    return read_template(block.chat_template, where=f"{where}.chat_template:") if block.chat_template else None


def read_template(file: str, *, where: str) -> str:
    """The chat template in a Jinja file, or in a .json file of transformers that has it as `chat_template`."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            text = json.loads(text)["chat_template"] + ""  # of several templates it is a list
        chat.refuse_template(text)
    except UserError as error:
        raise UserError(f"{where} {path} {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} {path} cannot be read ({error}): name a file of UTF-8 text") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where} {path} has no text `chat_template`: name a Jinja file, or one such as tokenizer_config.json"
        ) from error
    return text


def _warn_of_answers(where: str, trained: list[Row], *, task: bool) -> None:
    """Warn of empty training answers, and of the same answer to every question."""
    answers = [row["choices"][row["gold"]].strip() for row in trained]
    if empty := answers.count(""):
        problem = f"in {empty} of {len(answers)} training rows the answer is empty"
    elif len(answers) > 1 and len(set(answers)) == 1:
        problem = f"all {len(answers)} training rows have the same answer {answers[0][:60]!r}"
    else:
        return
    print(f"{WARNING}{where}: {problem}: check {'doc_to_target' if task else 'the column'}", flush=True)
