"""A model as a person names it on the command line, and what is known of it on this machine without the network."""

import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import PreTrainedTokenizerBase

from experiments.model import claims, random_models, weights
from experiments.model.shape import shape_of
from experiments.study.params_text import read_yaml
from experiments.study.paths import Paths
from experiments.study.schema import Model
from experiments.study.validation import validate
from methods.errors import UserError
from methods.tools import model_folder
from methods.tools.names import LONGEST, unknown


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model by name.

    block      its keys under `models:`; None for a block of the root's
    tokenizer  None where it is not on this machine
    positions  the longest text that it takes, where that is known
    """

    name: str
    block: dict[str, Any] | None
    tokenizer: PreTrainedTokenizerBase | None
    positions: int | None


def named(given: str, default) -> Named:
    """The model of a name under `models:` of the default study, of hub:OWNER/NAME[@REVISION], or of a local folder.

    A revision of the hub that is in its cache here is pinned to its commit. Raises UserError for anything else, and for
    a folder that is no causal language model.
    """
    if given in default.models:
        return _known(given, None, default.models[given], converted=default.paths.model(given))
    folder = Path(given.removeprefix("path:")).expanduser()
    if given.startswith("hub:"):
        source = given
        if cached := _cached(given):
            source = f"{given.partition('@')[0]}@{cached.name}"
    elif given and folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(model_folder.no_config(folder))
        claims.config_of(folder, given)  # refuses an adapter
        model_folder.refuse_incomplete(folder, given)
        if not model_folder.weight_files(folder):
            raise UserError(model_folder.no_weights(folder, given))
        source = f"path:{_from_root(folder, default.paths.root)}"
    elif given.startswith("random:"):
        source = given
    else:
        raise UserError(_nothing(given, default))
    if same := [name for name, block in default.models.items() if block.as_written == {"source": source}]:
        return named(same[0], default)
    name = _name(source)
    block = {"source": source}
    return _known(f"{name}-own" if name in default.models else name, block, validate(Model, block, where="--model"))


def of_study(study, model: str) -> Named:
    """A model of the study's grid. Where only the default study has it yet, from the same block, it is that one."""
    block, default = study.models[model], Paths(root=study.paths.root)
    converted = study.paths.model(model)
    if not (converted / "config.json").is_file() and default.params.is_file():
        if read_yaml(default.params).get("models", {}).get(model) == block.as_written:
            converted = default.model(model)
    return _known(model, None, block, converted=converted)


def _known(name: str, keys: dict[str, Any] | None, block: Model, *, converted: Path | None = None) -> Named:
    """The model with its tokenizer and its longest text, as far as they are here."""
    kind, _, rest = block.source.partition(":")
    folders = [converted] if converted else []
    folders += [Path(rest).expanduser()] if kind == "path" else []
    folders += filter(None, [_cached(block.source)]) if kind == "hub" else []
    here = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    tokenizer = random_models.byte_tokenizer() if kind == "random" else None
    if here:
        with suppress(UserError) if kind == "hub" else nullcontext():  # the cache may hold a part of the files
            tokenizer = weights.load_tokenizer(here)
    positions = None
    if here or kind == "random" or block.architecture:
        positions = shape_of(name, block, here or Path()).positions
    return Named(name=name, block=keys, tokenizer=tokenizer, positions=positions)


def _cached(source: str) -> Path | None:
    """The folder of a model in the hub's cache on this machine, if there is one; its name is the commit."""
    name, _, revision = source.removeprefix("hub:").partition("@")
    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision or "main")
    except huggingface_hub.errors.HFValidationError as error:
        raise UserError(
            f"{source} is no model: write a model of the hub as hub:OWNER/NAME, or hub:OWNER/NAME@REVISION"
        ) from error
    return Path(found).parent if isinstance(found, str) else None


def _from_root(folder: Path, root: Path) -> str:
    inside = folder.resolve().is_relative_to(root.resolve())
    return folder.resolve().relative_to(root.resolve()).as_posix() if inside else str(folder.absolute())


def _name(source: str) -> str:
    """A name for the block, from the last part of a source."""
    last = source.partition("@")[0].rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:LONGEST] or "model"


def _nothing(given: str, default) -> str:
    if Path(given).expanduser().is_file():
        return f"--model {given} is a file: give the folder that it is in"
    if given.count("/") == 1 and not given.startswith((".", "/", "~")):
        return f"--model {given}: there is no such folder; write hub:{given} for a model of the hub"
    if "/" in given:
        return f"--model {given}: there is no such folder; correct the path, or write hub:OWNER/NAME"
    return (
        f"{unknown('model', given, default.models, where='the root')}; a folder is written ./{given}, a model of the "
        "hub hub:OWNER/NAME"
    )
