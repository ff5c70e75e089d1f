"""Parts by name: the built-in ones and those that other packages bring by the entry point `holdfast.parts`."""

import functools
import importlib
import importlib.util
import itertools
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import methods
from methods.errors import UserError
from methods.part import REGISTERED, Part, in_order
from methods.settings import declared, refuse
from methods.tools.names import unknown


def parts() -> dict[str, type[Part]]:
    """Every part by key, in alphabetical order: those in this folder, and those of other packages.

    Raises UserError where an entry point does not load.
    """
    for module in pkgutil.iter_modules(methods.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"methods.{module.name}")
    _load_entry_points(tuple(sys.path))
    return dict(sorted(REGISTERED.items()))


def part(key: str) -> type[Part]:
    """The part under this key. Raises UserError where there is none."""
    known = parts()
    if key not in known:
        raise unknown("part", key, known)
    return known[key]


def built_in() -> list[str]:
    """Keys of the parts in this folder."""
    return [key for key, part in parts().items() if part.__module__.rpartition(".")[0] == methods.__name__]


@functools.cache  # one look through the installed packages for each search path
def _load_entry_points(search_path: tuple[str, ...]) -> None:
    for point in entry_points(group="holdfast.parts"):
        try:
            part = point.load()
        except UserError:
            raise
        except Exception as error:  # whatever a stranger's module does when it is imported
            raise UserError(
                f"the part {point.name!r} ({point.value}) does not load: {type(error).__name__}: {error}"
            ) from error
        if isinstance(part, ModuleType):
            own = [known.__qualname__ for known in REGISTERED.values() if known.__module__ == part.__name__]
            raise UserError(
                f"the part {point.name!r} ({point.value}) is a module: name the class in it, "
                f'{point.name} = "{part.__name__}:{own[0] if own else "CLASS"}"'
            )
        if part not in REGISTERED.values():
            raise UserError(f"the part {point.name!r} ({point.value}) is not registered: put @register on the class")


def build(block: Mapping[str, Any] | None, *, where: str = "") -> tuple[Part, ...]:
    """The parts of a method block `{part: {setting: value}}`, in the order in which their hooks are called.

    Raises UserError naming what is wrong with its path below `where`, such as methods.lora.
    """
    known, built = parts(), []
    for key in block or {}:
        if key not in known:
            raise unknown("part", key, known, where=where)
    for key, settings in sorted((block or {}).items()):
        path = f"{where}.{key}" if where else key
        refuse(settings, dict | None, where=path)
        names = [field.name for field in declared(known[key])]
        for name in settings or {}:
            if name in known[key].removed:
                raise UserError(f"{path}.{name} no longer exists: {known[key].removed[name]}")
            if name not in names:
                raise unknown("setting", name, names, where=path)
        try:
            built.append(known[key](**(settings or {})))
        except UserError as error:  # what a part itself refuses begins with its key
            raise UserError(f"{where}.{error}" if where else str(error)) from error
    place = f"{where}: " if where else ""
    for one, other in itertools.combinations(built, 2):
        if reason := clash(one, other):
            raise UserError(f"{place}{one.key} and {other.key} cannot be combined: {reason}")
    return in_order(built)


ALONE = {  # capabilities that one part of a method may have
    "optimizer": "each brings an optimizer; keep one",
    "adapter": "each wraps linear layers with an adapter; keep one",
}


def clash(one: Part, other: Part) -> str:
    """Why two parts cannot be parts of one method; empty where they can."""
    for part, beside in ((one, other), (other, one)):
        if "provides_weights" in part.capabilities:
            return "given weights are not trained"
        for name, reason in part.excludes.items():
            if name == beside.key or name in beside.capabilities:
                return reason
    return next((why for name, why in ALONE.items() if name in one.capabilities & other.capabilities), "")


def refuse_alone(parts: Sequence[Part]) -> None:
    """Raises UserError for a part that cannot run without another one; any adapter does where it names one."""
    for part in parts:
        for key in part.beside:
            others = [other for other in parts if other is not part]
            adapts = "adapter" in REGISTERED[key].capabilities
            if not any(other.key == key or (adapts and "adapter" in other.capabilities) for other in others):
                raise UserError(f"{part.key}: it runs beside another part: add `{key}` to the method's block")


def phase_settings(part: Part, phase: str | None) -> dict[str, Any]:
    """JSON-able settings in force that the phase depends on: "prepare", or all of them for "train" and None."""
    values = part.settings()
    wanted = [f.name for f in declared(part) if phase != "prepare" or f.metadata["phase"] == "prepare"]
    return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in wanted}


def paths(part: Part, phase: str | None) -> list[str]:
    """Files and folders that settings of the part name (`setting(path=True)`), as far as the phase depends on them."""
    values = phase_settings(part, phase)
    named = [values[f.name] for f in declared(part) if f.metadata.get("path") and values.get(f.name)]
    return [path for value in named for path in (value if isinstance(value, list) else [value])]


def source_files(part: Part | type[Part]) -> list[Path]:
    """The part's own module and those in `shares`: a change of their code (source_code.py) makes its cells stale."""
    kind = part if isinstance(part, type) else type(part)
    return [Path(importlib.util.find_spec(name).origin) for name in (kind.__module__, *kind.shares)]
