"""What a model's or an adapter's folder claims of itself is bounded before anything is made of it.

config.json may state a million layers or a vocabulary of terabytes, and transformers and peft would make them. Sizes
beyond all known models are refused from the text of the file, and afterwards the model that the config describes is
held against the weights that are there. Headers of safetensors files are checked by their own library, which refuses
one that is longer than 100 MB or claims tensors that do not fill the file.
"""

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from methods.errors import UserError
from methods.tools import model_folder, peft_adapter

if TYPE_CHECKING:
    from experiments.model.shape import Shape

_LIMITS = (  # names of settings, and what none of them exceeds
    (re.compile(r"^(n|num)_.*(layer|block|expert|head|group)|(layers|blocks|experts|heads)$|depth|replication"), 2**12),
    (re.compile(r"^r$|rank"), 2**14),
    (re.compile(r"size|dim|embd|inner|width|^n_|^num_"), 2**28),
)
_UNBOUNDED = re.compile(r"position|ctx|max|token|ids?$|window|seed|theta")
_ROOM = 2**28  # weights that any machine has room for
_BUFFERS = 2**30  # bytes; masks and tables that a model computes are smaller
_FETCHING = {"XLORA": "adapters", "SHADOW": "shadow_model"}  # kinds of adapters, and what names other models in them


def config_of(folder: Path, name: str) -> PreTrainedConfig:
    """transformers' config of a folder, as `model_folder.config_of` gives it; absurd sizes are refused, too."""
    refuse_absurd(Path(folder) / "config.json", name)
    return model_folder.config_of(folder, name)


def refuse_absurd(file: Path, name: str) -> None:
    """Refuse a JSON file with numbers that no model has, or a name of code; a damaged one is left to its reader."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    for key, value in _values(content):
        if isinstance(value, str):
            if key.endswith("implementation") and "/" in value:
                raise UserError(
                    f"{name}: {file.name} states {key}: {value!r}, program code of the hub, which is never fetched: "
                    "take the setting out"
                )
            continue
        most = next((most for names, most in _LIMITS if names.search(key) and not _UNBOUNDED.search(key)), None)
        if most is not None and abs(value) > most:
            raise UserError(
                f"{name}: {file.name} states {key}: {value}, and no model has more than {most:,}: the file is damaged "
                "or made to exhaust this machine; fetch it again from where you trust it"
            )


def refuse_other_size(shape: "Shape", folder: Path, name: str) -> None:
    """Refuse a config that describes far more weights than the folder's files hold, or tables of gigabytes.

    What differs by less, or cannot be built, is told tensor by tensor when the model is loaded.
    """
    files = model_folder.weight_files(folder)
    held = sum(prod(shape) for _, shape in model_folder.headers(files, name).values())
    try:
        described, tables = shape.parameters, sum(buffer.nbytes for buffer in shape.build().buffers())
    except UserError:
        return
    if described > 2 * held + _ROOM:  # a head that is tied is stored once
        raise UserError(
            f"{name} does not fit its config.json, which describes {described:,} weights, and its files hold "
            f"{held:,}: fetch the folder again"
        )
    if tables > max(_BUFFERS, 2 * held):
        raise UserError(
            f"{name}: its config.json asks for {tables / 2**30:.1f} GiB of masks and tables beside {held:,} weights: "
            "correct its number of positions"
        )


def refuse_adapter(folder: Path, name: str) -> None:
    """Refuse an adapter whose config has absurd sizes, or names other models that peft would load or fetch."""
    refuse_absurd(folder / peft_adapter.CONFIG, name)
    kind = str(peft_adapter.read_config(folder, name)["peft_type"])
    if kind in _FETCHING:
        raise UserError(
            f"{name} is a {kind} adapter, for which peft loads further models ({_FETCHING[kind]} in "
            f"{peft_adapter.CONFIG}), and only what a setting names is loaded: give an adapter of another kind"
        )


def look(folder: Path, name: str) -> None:
    """Refuse what a part's setting names, if it is a model or an adapter with absurd claims."""
    if peft_adapter.is_adapter(folder):
        refuse_adapter(folder, name)
    refuse_absurd(folder / "config.json", name)


def _values(value: Any, key: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Every number and text in a JSON value by the nearest name above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            kept = name.isdigit() or "." in name or key.endswith("implementation")  # the last: one for each sub-config
            yield from _values(inner, key if kept else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield key, value
