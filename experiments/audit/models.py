"""The two models of an audit, from what a person may name: a folder, an adapter's folder, the hub, a model by name.

A model is looked at without loading it: which files it consists of, their hash, its config and its tokenizer. Each is a
folder in Hugging Face layout; an adapter's becomes one when it is merged (experiments/audit/adapters.py).
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from experiments.audit import adapters, kept, tokenizers
from experiments.model import claims, hub, vocabulary, weights
from experiments.model.shape import Shape
from experiments.stages.model import make
from experiments.study.local_files import remembered
from methods.errors import UserError
from methods.tools import files as disk
from methods.tools import model_folder, peft_adapter
from methods.tools.names import unknown

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_ADAPTER = [peft_adapter.CONFIG, peft_adapter.WEIGHTS]


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model that is known and not loaded.

    given       as the person wrote it
    folder      its config and weights; of an adapter those of its base
    adapter     the adapter's folder, which is to be merged into `folder`, or None
    names       what an adapter_config.json may call it
    rows        tokens in its embedding
    weights     identity: of a folder the hash of its weights (`weights.tensor_sha256`)
    about       facts for the page: the hub's commit, the adapter's base
    """

    given: str
    folder: Path
    names: frozenset[str]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha256: str
    rows: int
    weights: str
    config_sha256: str
    adapter: Path | None = None
    base: "Model | None" = None
    about: Mapping[str, Any] = field(default_factory=dict)


def resolve(given: str, *, study, work: Path, beside: Model | None = None, same_base: bool = False) -> Model:
    """The model that a person named; UserError names what is wrong with it.

    study       whose `models:` may be named
    work        folder for remembered hashes
    beside      BASE, into which an adapter given as TUNED is merged
    same_base   an adapter's base is `beside`, whatever its adapter_config.json says
    """
    known = study.models
    if given.startswith("hub:"):
        folder, about = _from_hub(given.removeprefix("hub:"), work)
        names = {given.removeprefix("hub:").partition("@")[0]}
    elif given in known:
        folder, names, about = _by_name(given, study)
    elif given and Path(given).expanduser().is_dir():
        folder, about = Path(given).expanduser(), {}
        names = {str(folder), folder.resolve().name}
    else:
        raise UserError(_nothing(given, known))
    if peft_adapter.is_adapter(folder):
        return _adapted(given, folder, names, about, study=study, work=work, beside=beside, same_base=same_base)
    names = frozenset(names | _names_inside(folder))
    return _whole(given, folder, names, about, work=work, beside=beside)


def _nothing(given: str, known: Mapping[str, Any]) -> str:
    if Path(given).expanduser().is_file():
        return f"{given} is a file, not a model: give the folder that it is in"
    if given.count("/") == 1 and not given.startswith((".", "/", "~")):
        return f"{given} is no folder here: write hub:{given} for a model on the hub, or correct the path"
    if "/" in given:
        return f"{given} is no folder: correct the path, or write hub:OWNER/NAME for a model on the hub"
    return f"{unknown('model', given, known)}; a folder is written ./{given}, a model on the hub hub:OWNER/NAME"


def _from_hub(rest: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """The folder in the hub's cache of OWNER/NAME[@REVISION]; an adapter's as well as a whole model's."""
    name, _, revision = rest.partition("@")
    small = hub.snapshot(name, revision=revision or "main", patterns=[*weights.TOKENIZER_FILES], copy_to=work)
    if not (small / "adapter_config.json").is_file():
        claims.config_of(small, f"hub:{name}")  # refused before gigabytes are fetched
    patterns = [*weights.TOKENIZER_FILES, *weights.SAFETENSORS, *_ADAPTER]
    folder = hub.snapshot(name, revision=small.name, patterns=patterns, copy_to=work, copy_bytes=0)
    return folder, {"commit": folder.name}


def _by_name(name: str, study) -> tuple[Path, set[str], dict[str, Any]]:
    """The converted folder of a model under `models:`, which is made where it is not there."""
    block, folder = study.models[name], study.paths.model(name)
    if not (folder / "base.json").is_file():
        print(f"model {name!r} is not converted yet: {block.source} is read", flush=True)
        make(study, name, folder)
    if (source := disk.read_json(folder / "base.json").get("source")) != block.source:
        raise UserError(
            f"model {name!r}: {folder} was made of {source}, and params.yaml says {block.source}: run `dvc repro "
            f"model@{name}`"
        )
    kind, _, rest = block.source.partition(":")
    named = {name}
    if block.settle is None:  # a settled model is not the one that its source names
        named.add(rest.partition("@")[0] if kind == "hub" else rest)
    return folder, named, {"source": block.source} | ({"note": block.note} if block.note else {})


def _names_inside(folder: Path) -> set[str]:
    """Names of the model that its own config.json or base.json gives."""
    named = set()
    for file, key in (("config.json", "_name_or_path"), ("base.json", "source")):
        with suppress(UserError):  # a damaged config.json is refused by name when it is read for the model
            value = disk.read_json(folder / file).get(key)
            named |= {value.removeprefix("hub:").partition("@")[0]} if isinstance(value, str) and value else set()
    return named


def _whole(
    given: str, folder: Path, names: frozenset[str], about: Mapping[str, Any], *, work: Path, beside: Model | None
) -> Model:
    """A folder with all weights; refused by name where it is not a causal language model in safetensors."""
    if not (folder / "config.json").is_file():
        raise UserError(model_folder.no_config(folder))
    config = claims.config_of(folder, given)
    model_folder.refuse_incomplete(folder, given)
    tensors = model_folder.weight_files(folder)
    if not tensors:
        raise UserError(model_folder.no_weights(folder, given))
    model_folder.refuse_codes(model_folder.headers(tensors, given), given)
    claims.refuse_other_size(Shape(config=config), folder, given)
    rows = config.get_text_config().vocab_size
    tokenizer = _tokenizer(given, folder, rows=rows, instead=beside)
    digest = remembered(tensors, folder=work / "hashes", name="weights", compute=lambda: weights.tensor_sha256(folder))
    return Model(
        given=given,
        folder=folder,
        names=names,
        config=config,
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizers.sha256(tokenizer),
        rows=rows,
        weights=digest,
        config_sha256=_config_sha256(folder),
        about=about,
    )


def _tokenizer(
    given: str, folder: Path, *, rows: int, config: PreTrainedConfig | None = None, instead: Model | None = None
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, or that of `instead` where weights alone were saved; every token needs its row."""
    if instead and not any((folder / name).is_file() for name in _TOKENIZER):
        print(f"{given} has no tokenizer: that of {instead.given} is used", flush=True)
        return instead.tokenizer
    tokenizer = weights.load_tokenizer(folder, config=config)
    try:
        notes = vocabulary.check(rows=rows, tokenizer=tokenizer)
    except UserError as error:
        raise UserError(f"{given}: {error}") from error
    for sentence in notes:
        print(f"{given}: {sentence}", flush=True)
    return tokenizer


def _config_sha256(folder: Path) -> str:
    """Hash of the files beside the weights that decide what a model computes and where an answer ends."""
    found = [folder / name for name in ("config.json", "generation_config.json") if (folder / name).is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in found)).hexdigest()


def _adapted(
    given: str, folder: Path, names: set[str], about: dict, *, study, work: Path, beside: Model | None, same_base: bool
) -> Model:
    """An adapter beside its base: BASE, BASE's own base where that is an adapter too, or the folder it names."""
    claims.refuse_adapter(folder, given)
    config = peft_adapter.read_config(folder, given)
    named = config.get("base_model_name_or_path") or None
    base = _base_of(given, named, study=study, work=work, beside=beside, same_base=same_base)
    adapters.refuse_other_shapes(folder, given, base)
    rows = max(adapters.embedding_rows(folder, base) or 0, base.config.get_text_config().vocab_size)
    has = any((folder / name).is_file() for name in _TOKENIZER)
    tokenizer = _tokenizer(given, folder, rows=rows, config=base.config) if has else base.tokenizer
    file = folder / peft_adapter.WEIGHTS
    digest = remembered([file], folder=work / "hashes", name="file", compute=lambda: disk.sha256(file))
    return Model(
        given=given,
        folder=base.folder,
        adapter=folder,
        base=base,
        names=frozenset(names),
        config=base.config,
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizers.sha256(tokenizer),
        rows=rows,
        weights=kept.digest([base.weights, digest, config, adapters.VERSION]),
        config_sha256=base.config_sha256,
        about=about | {"adapter_of": named, "adapter": peft_adapter.described(config)},
    )


def _base_of(given: str, named: str | None, *, study, work: Path, beside: Model | None, same_base: bool) -> Model:
    """The model that an adapter belongs to."""
    candidates = [model for model in (beside, beside and beside.base) if model]
    if candidates and (same_base or named is None):
        if named is None and not same_base:
            print(
                f"{given} names no base (adapter_config.json): it is taken for an adapter of {beside.given}", flush=True
            )
        return candidates[0]
    here = _here(named, study=study, work=work)
    for model in candidates:
        alike = any(peft_adapter.alike(named, name) for name in model.names)
        if alike if here is None else here.weights == model.weights:
            return model
    if candidates:
        wanted = f"hub:{named}" if here is None and re.fullmatch(r"[\w.-]+/[\w.-]+", named) else named
        raise UserError(
            f"{given} is an adapter of another model: its adapter_config.json names {named!r} as its base, and BASE is "
            f"{beside.given}{', whose weights are others' if here is not None else ''}. Give {wanted} as BASE; if BASE "
            "is that model under another name, say so with --same-base"
        )
    if here is None and named and given.startswith("hub:"):
        return resolve(f"hub:{named}", study=study, work=work)
    if here is None:
        raise UserError(
            f"{given} is an adapter of {named or 'a base that it does not name'}, which is no folder here and no model "
            "of params.yaml: give an adapter as TUNED beside its base, or merge it (peft's merge_and_unload, then "
            "save_pretrained) and give that folder"
        )
    return here


def _here(named: str | None, *, study, work: Path) -> Model | None:
    """The base that an adapter names, where it is on this machine: as a folder, or under `models:`."""
    if named is None or not (named in study.models or Path(named).expanduser().is_dir()):
        return None
    return resolve(named, study=study, work=work)
