"""Check blocks of params.yaml against their typed models; what is wrong is one UserError with the path of the key."""

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from experiments.study.blocks import Block, Form
from experiments.study.schema import Model
from methods.errors import UserError
from methods.settings import describe, hint, shown
from methods.tools.names import checked, unknown

HASHES = ("adapter_sha256", "sha256")  # of `settle:`, which are written when the adapter was made
# of a settled model they are those of the block that it is made of
SOURCE_KEYS = ("source", "sha256", "bin_sha256", "dtype", "config", "architecture", "seed")


def validate(kind: type[Block], raw: Any, *, where: str = "") -> Any:
    """Build the typed block of `raw`. Raises UserError with the path of the first mistake, below `where`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error, kind, raw, where) from error


def _refusal(error: ValidationError, kind: Any, value: Any, where: str) -> UserError:
    """One sentence for pydantic's errors: the path as it is written, the value, what it must be, or the nearest key."""
    first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")  # a misspelt key is also missing
    *_, key, last = None, None, *first["loc"]
    path, metadata = [where] if where else [], ()
    for step in first["loc"]:
        if isinstance(kind, type) and issubclass(kind, Block) and step in kind.model_fields:
            kind, metadata = kind.model_fields[step].annotation, kind.model_fields[step].metadata
        elif get_origin(kind) is dict and last != "[key]":
            kind = get_args(kind)[1]
            metadata = getattr(kind, "__metadata__", ())
        else:
            break
        path.append(step)
        value = value.get(step) if isinstance(value, dict) else value
    if last == "[key]":
        metadata = getattr(get_args(kind)[0], "__metadata__", ())
    name, form = ".".join(path), next((entry for entry in metadata if isinstance(entry, Form)), None)
    if last == "[key]":
        return UserError(f"{name} names {key!r}: it must be {form.words}") if form else checked(f"{name}:", key)
    if first["type"] == "extra_forbidden" and last in getattr(kind, "renamed", {}):
        new, given = kind.renamed[last], shown(value.get(last))
        return UserError(f"{name}.{last} is called `{new}` now: write `{new}: {given}` in its place")
    if first["type"] == "extra_forbidden":
        return unknown("key", last, kind.model_fields, where=name or "params.yaml")
    if first["type"] == "missing":
        above = ".".join(path[:-1]) or "params.yaml"
        return UserError(f"{above} has no `{last}`: add it{f' ({form.words})' if form else ''}")
    if first["type"] == "too_short":
        return UserError(f"{name} is empty: name at least one")
    kind = dict if get_origin(kind) is dict or isinstance(kind, type) and issubclass(kind, Block) else kind
    words = form.words + form.hint(value) if form else describe(kind)
    return UserError(f"{name or 'params.yaml'} is {shown(value)}: it must be {words}{hint(value, kind)}")


def check_models(models: Mapping[str, Model]) -> None:
    """Refuse a model whose keys do not go together."""
    for name, model in models.items():
        if (model.source is None) == (model.settle is None):
            raise UserError(f"models.{name} needs one of `source` and `settle`: the second makes it of another block")
        if model.settle is not None:
            _check_settled(name, model, models)
        elif model.source.startswith("pypi:") and not model.sha256:
            raise UserError(f"models.{name} has no `sha256`: a pypi source needs that of its file in the wheel")
        if beside := {"seed", "dtype", "architecture"} & model.config.keys():
            raise UserError(
                f"models.{name}.config names `{min(beside)}`: write it in the block beside `config`, which takes "
                "transformers' own names"
            )


def _check_settled(name: str, model: Model, models: Mapping[str, Model]) -> None:
    """Refuse a settled model of an unknown or of another settled model, and one that says how to make itself."""
    start = getattr(model.settle, "from")
    if start not in models:
        raise unknown("model", start, models, where=f"models.{name}.settle.from")
    if models[start].settle is not None:
        raise UserError(f"models.{name}.settle.from names {start!r}, which is settled itself: name the block it is of")
    if own := [key for key in SOURCE_KEYS if key in model.as_written]:
        raise UserError(f"models.{name} has `{own[0]}`, which is that of models.{start}: leave it out")


def with_sources(models: Mapping[str, Model]) -> dict[str, Model]:
    """The models, in which a settled one has the keys of the block that it is made of where it does not write them."""
    whole = {}
    for name, model in models.items():
        taken = {}
        if model.settle is not None:
            start = models[getattr(model.settle, "from")]
            taken = {key: getattr(start, key) for key in start.model_fields_set - model.model_fields_set}
        whole[name] = model.model_copy(update=taken)
    return whole
