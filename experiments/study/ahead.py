"""What can be known of a study before anything is fetched, made or trained: `plan` and `resolve` refuse it here, or warn of it.

Looked at are the names of lm-eval's tasks, where rows and models come from, the models' configs, and the rows themselves: as
the `data` stage made them, and where they lie on this machine, whatever that stage would say of them. Nothing is fetched.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evaluation.chance import WARNING, below_chance
from experiments.data import rows
from experiments.model import packages, random_models, vocabulary, weights
from experiments.model.positions import (
    longest_document,
    longest_row,
    refuse_documents_without_a_label,
    refuse_long_documents,
    refuse_long_rows,
)
from experiments.model.shape import Shape, shape_of
from experiments.study.clashes import ROLES
from experiments.study.schema import General, Rows, Scored
from experiments.training import memory
from methods.errors import UserError
from methods.tools import model_folder

LARGE = 2**25  # bytes of rows that are read ahead; of more, the `data` stage tells


def look(study) -> list[str]:
    """What to warn of, a line each. Raises UserError naming the block, or the rows' own file, of what could not run."""
    _rows(study)
    _tasks(study)
    for model in study.grid.models:
        _model(study, model)
    warnings = [
        f"{WARNING}domains.{domain} has no retention tasks: forgetting shows in the perplexity of general text alone"
        for domain in study.grid.domains
        if not study.domains[domain].retention
    ]
    with _data(study) as (folder, said):
        for model in study.grid.models:
            if folder is not None and (shape := known_shape(study, model)) and (tokenizer := _tokenizer(study, model)):
                refuse_long(study, model=model, shape=shape, tokenizer=tokenizer, data=folder)
                refuse_encoding(study, model=model, shape=shape, tokenizer=tokenizer, data=folder)
    return warnings + said + [line for model in study.grid.models for line in below_chance(study, model)]


def refuse_long(study, *, model: str, shape: Shape, tokenizer: Any, data: Path) -> None:
    """Raises UserError where a method of the grid would train on, or prepare from, more tokens at once than the model has positions,
    or prepare from documents in which there is nothing to predict."""
    general = data / "general" / "importance.jsonl"
    documents = longest_document(general, tokenizer) if general.is_file() else 0
    parts = [part for method in study.grid.methods for part in study.methods[method].parts]
    if documents and any(part.preparation() or "general" in part.capabilities for part in parts):
        refuse_documents_without_a_label(documents, count=study.general.importance)
    if shape.positions is None:
        return
    files = {domain: data / "train" / domain / "train.jsonl" for domain in study.grid.domains}
    rows_of = {
        domain: longest_row(file, tokenizer, shape.positions) for domain, file in files.items() if file.is_file()
    }
    for method in study.grid.methods:
        refuse_long_documents(study, model=model, method=method, shape=shape, longest=documents)
        if not any("provides_weights" in part.capabilities for part in study.methods[method].parts):
            for domain, longest in rows_of.items():
                refuse_long_rows(study, model=model, domain=domain, method=method, shape=shape, longest=longest)


def refuse_encoding(study, *, model: str, shape: Shape, tokenizer: Any, data: Path) -> None:
    """Raises UserError where the tokenizer is not the model's, or leaves an answer to train on without a token or an end."""
    try:
        vocabulary.check(rows=shape.config.get_text_config().vocab_size, tokenizer=tokenizer)
        trained = [
            name
            for name in study.grid.methods
            if not any("provides_weights" in part.capabilities for part in study.methods[name].parts)
        ]
        for domain in study.grid.domains:
            if trained and (file := data / "train" / domain / "train.jsonl").is_file():
                vocabulary.refuse_answers(domain=domain, file=file, tokenizer=tokenizer)
    except UserError as error:
        raise UserError(f"models.{model}: {error}") from error


def known_shape(study, model: str) -> Shape | None:
    """The model's shape; None where its size is not known before it is fetched."""
    block, folder = study.models[model], study.paths.model(model)
    kind = block.source.partition(":")[0]
    if kind in ("hub", "pypi") and not block.architecture and not (folder / "config.json").is_file():
        return None
    try:
        return shape_of(model, block, folder)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith("models.") else f"models.{model}: {error}") from error


def _rows(study) -> None:
    """Every block of rows that the grid reads has a source for `data.source`; its wheel has a checksum, its file is there."""
    for path, named in _rows_blocks(study).items():
        kind = rows.choose(named, prefer=study.data.source, where=path)
        if kind == "pypi":
            if not (named.pypi.path or named.pypi.requests):
                raise UserError(f"{path}.pypi has neither `path` nor `requests`: say which rows of the wheel are read")
            try:
                packages.checksum(study.packages, named.pypi.package)
            except UserError as error:
                raise UserError(f"{path}.pypi: {error}") from error
        if kind == "jsonl" and not Path(named.jsonl.path).is_file():
            raise UserError(
                f"{path}.jsonl is {named.jsonl.path!r}: there is no such file; give the path of a JSONL file, from the "
                "project's root"
            )


def _tasks(study) -> None:
    from evaluation.task import config_of  # imports lm-eval

    for where, block in _used(study).items():
        if isinstance(block, Scored):
            try:
                config_of(where.partition(".")[2], block.task)
            except UserError as error:
                raise UserError(f"{where}.task: {error}") from error


def _model(study, model: str) -> None:
    block = study.models[model]
    kind, _, rest = block.source.partition(":")
    folder = Path(rest).expanduser()
    if kind == "path" and (folder / "adapter_config.json").is_file():
        model_folder.config_of(folder, f"models.{model}: {rest}")  # says that it is an adapter
    if (
        kind == "path"
        and not (folder / "config.json").is_file()
        and not (study.paths.model(model) / "config.json").is_file()
    ):
        raise UserError(f"models.{model}.source is {block.source!r}: {model_folder.no_config(folder)}")
    if kind == "pypi":
        try:
            packages.checksum(study.packages, rest.partition("/")[0])
        except UserError as error:
            raise UserError(f"models.{model}.source: {error}") from error
    if study.device != "cpu" and torch.cuda.is_available() and (block.processes or 1) > torch.cuda.device_count():
        raise UserError(
            f"models.{model}.processes is {block.processes}, and this machine has {torch.cuda.device_count()} CUDA devices: "
            "each process takes one"
        )
    _files(study, model)
    if (shape := known_shape(study, model)) is None:
        return
    if shape.positions is not None:
        _answers_fit(study, model, shape.positions)
    for method in study.grid.methods:
        if adapters := memory.adapting(study.methods[method].parts):
            try:
                shape.build(parts=adapters)
            except UserError as error:
                raise UserError(f"methods.{method}.{error} (model {model})") from error


def _files(study, model: str) -> None:
    """What parts read beside the base, against the base's tensors where it was made."""
    made = sorted(study.paths.model(model).glob("*.safetensors"))
    shapes = {name: shape for name, (_, shape) in model_folder.headers(made, f"models.{model}").items()}
    for method in study.grid.methods:
        for part in study.methods[method].parts:
            try:
                part.look(shapes=shapes)
            except UserError as error:
                raise UserError(f"methods.{method}.{error} (model {model})") from error


def _answers_fit(study, model: str, positions: int) -> None:
    """Written answers leave room for their prompt, as scoring asks (evaluation/lm.py)."""
    from lm_eval.models.utils import normalize_gen_kwargs

    from evaluation.task import config_of

    for where, block in _used(study).items():
        config = config_of(where.partition(".")[2], block.task) if isinstance(block, Scored) else {}
        if config.get("output_type") == "generate_until":
            tokens = normalize_gen_kwargs(dict(config.get("generation_kwargs") or {}))["max_gen_toks"]
            if tokens >= positions:
                raise UserError(
                    f"{where}.task: an answer may have {tokens} tokens, but {model} takes {positions} in all: lower "
                    "`generation_kwargs: {max_gen_toks: ...}` of the task, or choose a model that takes more"
                )


def _tokenizer(study, model: str):
    """The model's tokenizer, where it is on this machine."""
    kind, _, rest = study.models[model].source.partition(":")
    for folder in (study.paths.model(model), *([Path(rest).expanduser()] if kind == "path" else [])):
        if (folder / "config.json").is_file():
            return weights.load_tokenizer(folder)
    return random_models.byte_tokenizer() if kind == "random" else None


@contextlib.contextmanager
def _data(study) -> Iterator[tuple[Path | None, list[str]]]:
    """The folder of the study's data and what is to be warned of in it: made anew where all rows that a domain reads are on
    this machine, else as the `data` stage left it. Raises what that stage would raise."""
    from experiments.data.prepared_rows import write_data

    domains = [domain for domain in study.grid.domains if _near(study, domain)]
    if not domains or _bytes(study) > LARGE:
        yield (study.paths.data if study.paths.data.is_dir() else None), []
        return
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(said):
            write_data(
                study.model_copy(update={"grid": study.grid.model_copy(update={"domains": domains})}), Path(folder)
            )
        yield Path(folder), [line for line in said.getvalue().splitlines() if line.startswith(WARNING)]


def _near(study, domain: str) -> bool:
    """Whether all rows that a domain reads lie on this machine as files."""
    source = study.data.source
    return all(
        rows.choose(named, prefer=source, where=path) == "jsonl"
        for path, named in _rows_blocks(study, [domain]).items()
    )


def _used(study, domains: list[str] | None = None) -> dict[str, General | Scored]:
    """Every block with rows that the grid's domains read, by its path."""
    used: dict[str, General | Scored] = {"general": study.general}
    for domain in domains or study.grid.domains:
        block = study.domains[domain]
        used[f"domains.{domain}"] = block
        used |= {f"tasks.{name}": study.tasks[name] for role in ROLES for name in getattr(block, role)}
    return used


def _rows_blocks(study, domains: list[str] | None = None) -> dict[str, Rows]:
    """Every block of rows that the grid's domains read, by its path."""
    used = _used(study, domains)
    tests = {f"{where}.test_rows": getattr(block, "test_rows", Rows()) for where, block in used.items()}
    return {f"{where}.rows": block.rows for where, block in used.items()} | {
        path: named for path, named in tests.items() if rows.has(named, prefer=study.data.source)
    }


def _bytes(study) -> int:
    files = [Path(named.jsonl.path) for named in _rows_blocks(study).values() if named.jsonl]
    return sum(file.stat().st_size for file in files if file.is_file())
