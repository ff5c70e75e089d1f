"""audit: what a fine-tuned model forgot of its base, from the two models alone: scores, general text, flips, movement.

    python -m experiments audit BASE TUNED --suite general --rows 200
    python -m experiments audit hub:OWNER/NAME ./checkpoint --tasks hellaswag,arc_easy --max-forgetting 0.02

BASE and TUNED are a local folder, a peft adapter's folder, hub:NAME[@REV] or a model's name in params.yaml. The page,
audit.json and flips.csv are written to results/audits/BASE--TUNED. Scores are kept in work/local/audit: those of a base
are computed once, and a second audit of the same pair takes seconds. The exit status is 0, 1 if a limit is exceeded,
and 2 for bad input.
"""

import re
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch

from analysis import spreadsheet
from analysis.report import audit as page
from analysis.words import visible
from evaluation import harness
from experiments.audit import comparison, limits, movement, tokenizers
from experiments.audit import data as datasets
from experiments.audit.architecture import compare_configs, refuse_other_architecture
from experiments.audit.models import Model, resolve
from experiments.audit.progress import Progress, told
from experiments.audit.scoring import Folders, Scores, score
from experiments.model.base import as_dtype, load_tensors
from experiments.study import config, local_files, provenance, schema
from experiments.study.paths import HERE, Paths
from experiments.training import hardware
from methods.errors import UserError
from methods.tools.files import read_json, write_json
from methods.tools.names import unknown

SUITE = "general"


def main(
    base: str,
    tuned: str,
    *,
    suite: str | None = None,
    tasks: str | None = None,
    rows: int | None = None,
    text: str | None = None,
    text_rows: int | None = None,
    out: str | None = None,
    max_forgetting: float | None = None,
    max_nll_lost: float | None = None,
    confidence: bool = False,
    same_base: bool = False,
    chat_template: bool | str = False,
    device: str = "auto",
    dtype: str | None = None,
    batch_size: int | None = None,
    root: Path = HERE,
) -> int:
    """Score both models, compare them, write and print the page, and return the exit status."""
    allowed = limits.checked(max_forgetting=max_forgetting, max_nll_lost=max_nll_lost, confidence=confidence)
    for name, number in (("--rows", rows), ("--text-rows", text_rows), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: it must be a whole number from 1")
    if out and Path(out).suffix != ".html":
        raise UserError(f"--out {out}: name the page, which ends in .html")
    began, study, where = perf_counter(), _study(root), hardware.device(device)
    work, progress = study.paths.local / "audit", Progress()
    names = _tasks(study, suite, tasks)
    one = resolve(base, study=study, work=work)
    other = resolve(tuned, study=study, work=work, beside=one, same_base=same_base)
    refuse_other_architecture(one, other)
    differ = tokenizers.compare(one.tokenizer, other.tokenizer)
    progress.step(f"rows of {', '.join(names)}, and general text")
    data = _data(study, work, names, rows, text, text_rows)
    block = schema.Evaluate(**({"batch_size": batch_size} if batch_size else {}))
    settings = block.model_dump(exclude={"improve"})  # which is of a study's base
    templates = _templates(chat_template, one, other)
    computing = _dtype(dtype, [one, other], where)
    read = [harness.general_passages(data.folder, model.tokenizer) for model in (one, other)]
    same_ids = differ.same_vocabulary and read[0] == read[1]
    with Folders(work) as folders:
        how = {"data": data, "folders": folders, "work": work, "settings": settings, "dtype": computing, "where": where}
        same = _same(one, other)
        before = progress.scoring(one.given, lambda: score(one, template=templates[0], **how), after=0 if same else 1)
        if same:
            after = _itself(before)
        else:
            reference = one if same_ids and one.rows == other.rows else None
            how |= {"template": templates[1], "reference": reference}
            after = progress.scoring(other.given, lambda: score(other, **how), after=0, like=before)
        progress.step("movement of the weights")
        with told(other.given):
            moved = movement.measure(one, other, folders=folders, work=work, where=where)
    found = comparison.compare(before, after, same=same, same_ids=same_ids)
    asked = {"rows": rows, "text": text, "chat_template": bool(chat_template)}
    flips = comparison.flipped(before, after, data)
    record = found | {
        "base": _about(one, before),
        "tuned": _about(other, after),
        "plain_prompts": bool(other.tokenizer.chat_template) and not chat_template,
        "tokenizers": differ.sentences,
        "configs": compare_configs(one, other),
        "movement": moved,
        "flips": flips,
        "verdict": limits.verdict(found, allowed),
        "settings": settings | asked | {"dtype": _name(computing), "device": where.type},
        "sources": data.facts,
        "scoring": after.scores["scoring"],
        "seconds": perf_counter() - began,
        "hardware": hardware.describe(where),
        "versions": provenance.versions(),
        "git": provenance.git(root),
        "when": provenance.now(),
    }
    written = _write(record, out=out, results=study.paths.results)
    print(visible(page.summary(record)))
    print(f"wrote {written}")
    return int(bool(record["verdict"]["exceeded"]))


def _study(root: Path):
    """The default study, whose models, tasks and suites may be named; without a params.yaml, an empty one."""
    paths = Paths(root=root)
    if paths.params.is_file():
        return config.load("", root=root)
    empty = dict.fromkeys(("models", "tasks", "domains", "packages", "suites"), {})
    return config.Study.model_construct(
        **empty, general=None, data=schema.Data(), evaluate=schema.Evaluate(), paths=paths
    )


def _tasks(study, suite: str | None, tasks: str | None) -> list[str]:
    """The names of the tasks to score."""
    if suite and tasks:
        raise UserError("--suite and --tasks are both given: give one of them")
    if tasks:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not names:
            raise UserError(f"--tasks {tasks!r} names no task: write names with commas between them")
        return list(dict.fromkeys(names))
    if (suite := suite or SUITE) not in study.suites:
        raise UserError(f"{unknown('suite', suite, study.suites)}; --tasks A,B,C names tasks without a suite")
    return [suite]


def _data(
    study, work: Path, names: list[str], number: int | None, text: str | None, texts: int | None
) -> datasets.Data:
    own = Path(text).expanduser() if text else None
    return datasets.write(study=study, work=work, names=names, number=number, text=own, texts=texts)


def _templates(wanted: bool | str, one: Model, other: Model) -> tuple[bool | str, bool | str]:
    """The chat template of each model's prompts: its own, that of a file, or the other's where it has none."""
    if isinstance(wanted, str):
        text = local_files.text(wanted, where="--chat-template")
        return text, text
    if not wanted:
        return False, False
    own = [model.tokenizer.chat_template for model in (one, other)]
    if own == [None, None]:
        raise UserError(
            f"--chat-template: neither {one.given} nor {other.given} has a chat template: name a file with one, or "
            "leave it out"
        )
    for model, mine, theirs in ((one, own[0], other), (other, own[1], one)):
        if mine is None:
            print(f"{model.given} has no chat template: that of {theirs.given} is used", flush=True)
    return own[0] or own[1], own[1] or own[0]


def _dtype(wanted: str | None, models: list[Model], where: torch.device) -> torch.dtype:
    """The dtype that both are computed in: the one asked for, else the wider of what suits each checkpoint."""
    if wanted:
        return as_dtype(wanted)
    chosen = [hardware.compute_dtype(_checkpoint_dtype(model), where) for model in models]
    return torch.promote_types(*chosen)


def _checkpoint_dtype(model: Model) -> torch.dtype:
    tensors = load_tensors(model.folder)
    return next((t.dtype for t in map(tensors.__getitem__, tensors) if t.is_floating_point()), torch.float32)


def _same(one: Model, other: Model) -> bool:
    """Whether the two models predict the same of every text."""
    alike = ("weights", "config_sha256", "tokenizer_sha256")
    return all(getattr(one, key) == getattr(other, key) for key in alike)


def _itself(base: Scores) -> Scores:
    """The scores of the base as those of the tuned model, whose predictions are the same."""
    general = base.items["task"] == comparison.GENERAL
    items = base.items.assign(**{name: general.map({True: 0.0, False: None}) for name in ("kl", "kl_reverse")})
    return replace(base, items=items, seconds=0.0, again=True)


def _about(model: Model, scores: Scores) -> dict[str, Any]:
    return {
        "given": model.given,
        "weights_sha256": scores.scores["weights_sha256"],
        "dtype": _name(_checkpoint_dtype(model)),
        "tokenizer_sha256": model.tokenizer_sha256,
        "seconds_scoring": scores.seconds,
        "kept": scores.again,
        **model.about,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(record: dict[str, Any], *, out: str | None, results: Path) -> Path:
    """Write the page, and audit.json and flips.csv beside it; an audit of other weights is not written over."""
    if out:
        file = Path(out).expanduser()
        stem = "" if file.stem == "audit" else f"{file.stem}."
    else:
        pair = "--".join(re.sub(r"[^A-Za-z0-9._-]+", "-", _short(record[who]["given"])) for who in ("base", "tuned"))
        folder, stem = results / "audits" / pair, ""
        if _other(folder / "audit.json", record):
            folder = folder.with_name(f"{pair}-{record['tuned']['weights_sha256'][:8]}")
        file = folder / "audit.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    flips = pd.DataFrame(record["flips"], columns=comparison.FLIP)
    (file.parent / f"{stem}flips.csv").write_text(spreadsheet.text(flips), encoding="utf-8")
    write_json(file.parent / (f"{stem}json" if stem else "audit.json"), record)
    return page.write(record, path=file, flips=f"{stem}flips.csv")


def _short(given: str) -> str:
    """What a model is called in the name of a folder: the last part of a path, all of a name on the hub."""
    return given.removeprefix("hub:") if given.startswith("hub:") else Path(given).expanduser().resolve().name


def _other(file: Path, record: dict[str, Any]) -> bool:
    """Whether the file is an audit of other weights."""
    try:
        known = read_json(file, "base", "tuned")
        return any(known[who]["weights_sha256"] != record[who]["weights_sha256"] for who in ("base", "tuned"))
    except (UserError, KeyError, TypeError):
        return False
