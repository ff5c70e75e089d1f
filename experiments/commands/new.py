"""new: begin a study of one's own from a model and a file of rows.

    python -m experiments new support --model smollm2-135m --rows conversations.jsonl
    python -m experiments new recipes --model hub:OWNER/NAME --rows recipes.csv --columns prompt=title,completion=steps

It reads the file as the `data` stage would, finds the format and the columns, chooses the split and the length of a
row, and writes experiments/studies/NAME/params.yaml, with comments, and its dvc.yaml. What it does not write is the
root's. Nothing is fetched, and an existing study is never changed.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.chance import WARNING
from experiments.data import domain, local, token_lengths
from experiments.data import rows as sources
from experiments.data.guess import Guess, guess
from experiments.data.reader import Reader
from experiments.data.token_lengths import Lengths
from experiments.study import ahead, clashes, config, first_params, pipeline, schema
from experiments.study.first_params import Begun
from experiments.study.named_model import named
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE, Paths
from experiments.study.validation import validate
from methods.errors import UserError
from methods.tools.jsonl import Row
from methods.tools.names import checked

METHODS = ("full", "lora", "replay", "wise-ft")
SCORED = 1000  # rows of each task whose block states no number
PROBED = 2  # retention tasks that are probed
FEWEST = 10  # rows of a file
FEW = 100  # scored rows below which an interval is wide
# trials of methods that the root does not tune, by one of their parts
TRIED = {
    "kl": {"kl.strength": [0.03, 0.1, 0.3, 1.0]},
    "replay": {"replay.share": [0.05, 0.1, 0.2, 0.4]},
    "wise_ft": {"wise_ft.alpha": [0.2, 0.4, 0.6, 0.8]},
}
SHOWN = 500  # letters of a row


def main(
    name: str,
    *,
    model: str,
    rows: str,
    format: str | None = None,
    columns: str | None = None,
    encoding: str | None = None,
    chat_template: str | None = None,
    methods: str | None = None,
    retention: str | None = None,
    seeds: str = "0",
    root: Path = HERE,
) -> None:
    """Write the study. Raises UserError, and leaves nothing behind, for a name, file or format that cannot be used."""
    paths = Paths(study=checked("study", name), root=root)
    clashes.refuse_study(name)
    if paths.folder.exists():
        raise UserError(
            f"the study {name} exists already and is not changed: choose another name, or edit "
            f"experiments/studies/{name}/params.yaml"
        )
    options = {"model": model, "rows": rows, "format": format, "columns": columns, "encoding": encoding}
    options |= {
        "chat-template": chat_template,
        "methods": methods,
        "retention": retention,
        "seeds": None if seeds == "0" else seeds,
    }
    default = config.load(root=root)
    if name == "general":
        raise UserError("a study cannot be called 'general', as its domain would be: general text is scored under it")
    chosen = named(model, default)
    block = _rows_block(rows, root, encoding)
    found, loaded = _looked_at(block, rows, format=format, columns=columns)
    template = _template(chat_template, found)
    if len(loaded) < FEWEST:
        raise UserError(
            f"--rows {rows} has {len(loaded)} row{'s'[: len(loaded) != 1]}, and needs at least {FEWEST}: they are "
            "divided into rows to train on, to probe and to score"
        )
    chosen_methods = _names(methods) if methods else [one for one in METHODS if one in default.methods]
    begun = Begun(
        name=name,
        command=_command(name, options),
        model=chosen.name,
        block=chosen.block,
        domain=_domain(found, loaded, block, chat_template),
        split=domain.shares(len(loaded), tested="test_rows" in block),
        retention=_names(retention) if retention is not None else default.domains[default.grid.domains[0]].retention,
        methods=chosen_methods,
        seeds=_seeds(seeds),
        data={} if default.data.model_dump() == schema.Data().model_dump() else dict(default.data.as_written),
        train=default.train.as_written,
        tune=_tune(default, chosen_methods),
        where_chosen=f"{', '.join(default.grid.domains)} on {', '.join(default.grid.models)}",
    )
    study = _built(begun, paths)
    drawn = domain.draw(name, study.domains[name], Reader(study=study))
    lengths = token_lengths.count(drawn.train, chosen.tokenizer, template=template)
    length = token_lengths.choose(lengths, format=found.format, positions=chosen.positions)
    begun = replace(
        begun,
        counts=", ".join(
            f"{len(part):,} to {use}"
            for part, use in ((drawn.train, "train on"), (drawn.probe, "probe"), (drawn.split.test, "score"))
        ),
        data=begun.data | ({"test": SCORED} if _whole_tasks(study) and "test" not in begun.data else {}),
        probes=[one for one in study.domains[name].retention if study.tasks[one].probe][:PROBED],
        length=length,
        about_length=lengths.words,
    )
    study = _built(begun, paths)
    warnings = ahead.look(study) + _about_rows(found, lengths, length, scored=len(drawn.split.test))
    _write(study, first_params.text(begun))
    print(f"{rows}: format {found.format}, of the column{'s'[: len(found.reads) > 1]} {', '.join(found.reads)}")
    print(f"first row: {json.dumps(loaded[0], ensure_ascii=False, default=str)[:SHOWN]}")
    print(f"rows: {begun.counts}; {lengths.words}", *warnings, sep="\n")
    print(f"wrote experiments/studies/{name}/params.yaml and dvc.yaml\n\nnext:\n{_next(study)}")


def _whole_tasks(study) -> list[str]:
    """The retention tasks of which all rows would be scored."""
    names = study.domains[study.name].retention
    return [name for name in names if study.tasks[name].test is None and study.data.test == "all"]


def _about_rows(found: Guess, lengths: Lengths, length: int, *, scored: int) -> list[str]:
    warnings = []
    if found.format != "text" and (longer := lengths.share_above(length)) > token_lengths.REST:
        warnings.append(
            f"{WARNING}{longer:.0%} of the rows are longer than train.length ({length}): they are cut or left out, as "
            "docs/your-data.md says"
        )
    if scored < FEW:
        warnings.append(f"{WARNING}{scored} rows are scored: differences on them have wide intervals")
    return warnings


def _command(name: str, options: dict[str, str | None]) -> str:
    """The command, on one line."""
    given = [word for option, value in options.items() if value is not None for word in (f"--{option}", value)]
    return " ".join(shlex.join(["python", "-m", "experiments", "new", name, *given]).split())


def _rows_block(rows: str, root: Path, encoding: str | None) -> dict[str, Any]:
    """The keys `rows` and, for a saved data set with a train and a test split, `test_rows`."""
    path = Path(rows).expanduser()
    if not path.exists():
        raise UserError(f"--rows {rows}: there is no such file or folder; give a path from the project's root")
    inside = path.resolve().is_relative_to(root.resolve())
    place = path.resolve().relative_to(root.resolve()).as_posix() if inside else str(path.absolute())
    if not (path / "dataset_dict.json").is_file():
        return {"rows": {"local": {"path": place, "encoding": encoding}} if encoding else place}
    splits = local.splits(path)
    first = "train" if "train" in splits else splits[0]
    found = {"rows": {"local": {"path": place, "split": first}}}
    return found | ({"test_rows": {"local": {"path": place, "split": "test"}}} if "test" in splits != first else {})


def _looked_at(block: dict[str, Any], rows: str, *, format: str | None, columns: str | None) -> tuple[Guess, list[Row]]:
    """What the rows are, and the rows themselves. What was left out is said later, by the reader of the domain."""
    where = f"--rows {rows}"
    own = _columns(columns)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = sources.read(validate(schema.Rows, block["rows"]), packages={}, prefer="hub", where=where)
        renamed = sources.shape(loaded.rows, schema.Shaped(columns=own), where=where)
    found = guess(renamed, where=where, format=format)
    reads = tuple(own.get(name, name) for name in found.reads)
    merged = {new: own.get(old, old) for new, old in found.columns.items()}
    return replace(found, reads=reads, columns=own | merged), loaded.rows


def _columns(given: str | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in _names(given or "")]
    if wrong := [new for new, sign, old in pairs if not (new and sign and old)]:
        raise UserError(f"--columns {given!r}: {wrong[0]!r} is no NEW=OLD: write such as prompt=question")
    if len({new for new, _, _ in pairs}) < len(pairs):
        raise UserError(f"--columns {given!r} names a new column twice: name each once")
    return {new.strip(): old.strip() for new, _, old in pairs}


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def _seeds(given: str) -> list[int]:
    if not _names(given) or not all(re.fullmatch("[0-9]{1,19}", seed) for seed in _names(given)):
        raise UserError(f"--seeds {given!r}: write whole numbers from 0, such as 0,1,2")
    return [int(seed) for seed in _names(given)]


def _domain(found: Guess, rows: list[Row], block: dict[str, Any], chat_template: str | None) -> dict[str, Any]:
    """The keys of the domain; a line is put between a prompt and a completion that nothing divides."""
    keys: dict[str, Any] = {"format": found.format, **block}
    columns = dict(found.columns)
    if found.format == "pairs" and len(found.reads) == 2 and _joined(rows, *found.reads):
        keys["set"] = {"completion": f"\n{{{{{found.reads[1]}}}}}"}
        columns.pop("completion", None)
    if columns:
        keys["columns"] = columns
    if chat_template:
        keys["chat_template"] = chat_template
    return keys | found.block


def _joined(rows: list[Row], prompt: str, completion: str) -> bool:
    ends = [(str(row.get(prompt) or " ")[-1], str(row.get(completion) or " ")[0]) for row in rows]
    joined = sum(not (one.isspace() or other.isspace()) for one, other in ends)
    return completion.isidentifier() and joined > len(rows) / 2


def _tune(default, methods: list[str]) -> dict[str, Any]:
    """The root's trials, and some for its methods that it does not tune, of a setting of one of their parts."""
    tried = {name: default.tune.methods[name] for name in methods if name in default.tune.methods}
    for name in methods:
        parts = [part.key for part in default.methods[name].parts] if name in default.methods else []
        if name not in tried and (own := next((part for part in parts if part in TRIED), None)):
            tried[name] = TRIED[own]
    return {**default.tune.as_written, "methods": {name: tried[name] for name in methods if name in tried}}


def _built(begun: Begun, paths: Paths) -> Any:
    """The study of the file that would be written."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        file.write_text(first_params.text(begun), encoding="utf-8")
        return config.build(read_yaml(file), paths=paths)


def _template(given: str | None, found: Guess) -> str | None:
    """The text of the chat template, if one is given."""
    if given is None:
        return None
    if found.format != "chat":
        raise UserError(f"--chat-template: rows of the format {found.format} have no turns: leave it out")
    return domain.read_template(given, where="--chat-template")


def _write(study, text: str) -> None:
    """Write params.yaml and dvc.yaml; the folder is there with both or not at all."""
    folder = study.paths.folder
    try:
        folder.mkdir(parents=True)
        study.paths.params.write_text(text, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()):
            pipeline.main(study)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _next(study) -> str:
    name, (model,) = study.name, study.grid.models
    lines = [
        (f"python -m experiments show {name} --study {name}", "some rows as training sees them"),
        (f"python -m experiments plan --study {name}", "cells, time, memory and disk"),
        (f"make study NAME={name}", f"everything, up to the report in results/{name}/summary"),
    ]
    if ahead.known_shape(study, model) is None:
        lines.insert(1, (f"dvc repro experiments/studies/{name}/dvc.yaml:model@{model}", "fetch the model, for `plan`"))
    width = max(len(command) for command, _ in lines)
    return "\n".join(f"  {command:{width}}  # {use}" for command, use in lines)
