"""lm-eval's names: its tasks, its groups of tasks and its tags, and the configurations of the tasks behind a name.

lm-eval's own index parses every file whole, which takes 7 s; here only the keys that name something are read (1 s).
Groups are put together by lm-eval's own code.
"""

import contextlib
import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.group import Group
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import _factory
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from evaluation.definition import refuse_keys
from evaluation.shipped import SHIPPED, named_errors, refuse_programs, refuse_unsafe
from methods.errors import UserError

NAMING = ("class", "group", "include", "tag", "task")
_KEY = re.compile(rf"""^["']?({"|".join(NAMING)})["']?[ \t]*:.*\n?(?:(?:[ \t-].*)?\n)*(?:[ \t-].+)?""", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a name of lm-eval stands for.

    tasks       the configuration of each task by its name, with the functions it names, in lm-eval's order
    aggregates  how each metric of a group is taken together; none for a single task
    version     the group's or the task's version
    """

    tasks: dict[str, dict[str, Any]]
    aggregates: tuple[AggMetricConfig, ...]
    version: Any


@functools.cache
def registry() -> dict[str, Entry]:
    """lm-eval's index of its own files: an entry for each task, group and tag."""
    entries: dict[str, Entry] = {}
    known: dict[Path, dict[str, Any]] = {}
    for file in TaskIndex._iter_yaml_files(SHIPPED):
        with contextlib.suppress(yaml.YAMLError, ValueError, OSError):  # lm-eval leaves such files out, too
            TaskIndex.process_cfg(_naming(file, known), file, entries)
    for entry in entries.values():
        entry.cfg = None  # the naming keys are not a configuration
    return entries


def _naming(file: Path, known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The keys of a file, and of those that it includes, by which lm-eval names tasks, groups and tags."""
    if file in known:
        return known[file]
    found: dict[str, Any] = {}
    for match in _KEY.finditer(file.read_text(encoding="utf-8")):
        key, value = match[1], match[0].partition(":")[2].strip()
        if re.fullmatch(r"[\w.-]+", value) and not value.isdigit():
            found[key] = value
        elif key == "task" and "\n" in value:  # the members of a group
            found[key] = []
        else:
            found[key] = "" if "!function" in value else yaml.load(match[0], Loader=yaml.CSafeLoader)[key]
    merged: dict[str, Any] = {}
    includes = found.pop("include", [])
    for included in [includes] if isinstance(includes, str) else includes:
        merged |= _naming(Path(os.path.normpath(file.parent / included)), known)
    known[file] = merged | found
    return known[file]


def kind(name: str) -> Kind | None:
    """Whether a name is a task, a group or a tag of lm-eval; None if it is neither."""
    entry = registry().get(name)
    return entry.kind if entry else None


def unknown(name: str, *, where: str = "") -> UserError:
    """A message about a name that lm-eval does not know, with the nearest names."""
    names = registry()
    alike = sorted(other for other in names if other.lower() == name.lower())  # `SciQ`
    near = alike or difflib.get_close_matches(name, sorted(names), n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists its names"
    return UserError(f"unknown task {name!r}{f' in {where}' if where else ''}: lm-eval has none of this name; {hint}")


def expanded(name: str) -> dict[str, str | dict[str, Any]]:
    """What a name is scored as: itself, or the tasks of a tag, or those of a group that lm-eval does not aggregate.

    The tasks of such a group that it changes are named GROUP-TASK, each with its configuration.
    """
    entry = registry().get(name)
    if entry is None:
        raise unknown(name)
    if entry.kind is Kind.TAG:
        return {task: task for task in sorted(entry.tags)}
    if entry.kind is not Kind.GROUP:
        return {name: name}
    with named_errors(f"group {name!r}", entry.yaml_path):
        config = _factory.load_yaml(entry.yaml_path, resolve_func=False)
    if config.get("aggregate_metric_list"):
        return {name: name}
    members: dict[str, str | dict[str, Any]] = {}
    own = {key: value for key, value in config.items() if key not in _factory.GROUP_FIELD_NAMES | {"tag"}}
    for member in config.get("task") or []:
        if isinstance(member, str) and not own:
            members |= expanded(member)
            continue
        changes = own | ({} if isinstance(member, str) else member)
        inner = changes.pop("task", None) if isinstance(member, Mapping) else member
        if not isinstance(inner, str) or kind(inner) is None or "group" in changes:
            raise UserError(
                f"{name!r} is a group whose tasks have no names of their own in lm-eval: name others, or write a block "
                "under `tasks:` for each of them"
            )
        for task, stated in expanded(inner).items():
            stated = {"include": stated} if isinstance(stated, str) else stated
            members[f"{name}-{task}"] = stated | changes
    return members


def named(task: str | Mapping[str, Any], *, name: str) -> Named:
    """The tasks behind `task`: a name of lm-eval, or `include: NAME` with keys that replace those of all its tasks.

    name   what the user calls it, for messages
    """
    changes = {} if isinstance(task, str) else {key: value for key, value in task.items() if key != "include"}
    start = task if isinstance(task, str) else task.get("include")
    refuse_keys(name, changes)
    if start is not None and not isinstance(start, str):
        raise UserError(f"task {name}: include is {start!r}: write the name of a task or group of lm-eval")
    if start is None:
        changes["task"] = name
        return Named(tasks={name: changes}, aggregates=(), version=(changes.get("metadata") or {}).get("version"))
    entry = registry().get(start)
    if entry is None:
        raise unknown(start)
    if entry.kind is Kind.TAG:
        raise UserError(_of_several(start, "a tag of several tasks"))
    with named_errors(f"task {start!r}", entry.yaml_path), _stated() as factory:
        built = factory.build(entry, overrides=changes or None, registry=dict(registry()))
    if not isinstance(built, Group):
        return Named(tasks={built.task_name: built.config}, aggregates=(), version=built.version)
    tasks = {leaf.task_name: leaf.config for leaf in _leaves(built)}
    if not built.has_aggregation:
        raise UserError(_of_several(start, "a group without a score of its own"))
    return Named(tasks=tasks, aggregates=tuple(built.aggregate_metric_list), version=built.version)


def _of_several(name: str, what: str) -> str:
    return (
        f"{name!r} is {what}, which no block under `tasks` can change: name it under a role without a block, where it "
        f"stands for its tasks, or write blocks for these ({', '.join(islice(expanded(name), 3))}, ...)"
    )


class _Stated:
    """A task's configuration in the place of the task, which would read its rows."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
        self.task_name = config["task"]
        self.version = (config.get("metadata") or {}).get("version")


class _Factory(_factory.TaskFactory):
    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> _Stated:
        # before its functions are imported, which may fetch program code
        refuse_unsafe(entry.name, _factory.load_yaml(entry.yaml_path, resolve_func=False))
        refuse_programs(entry.name, entry.yaml_path)
        return _Stated(self._load_full_config(entry, overrides))


@contextlib.contextmanager
def _stated() -> Iterator[_Factory]:
    """lm-eval's factory, which puts groups together of configurations instead of tasks."""
    own = _factory.ConfigurableTask  # which it also makes of tasks that a group itself defines
    _factory.ConfigurableTask = _Stated
    try:
        yield _Factory()
    finally:
        _factory.ConfigurableTask = own


def _leaves(group: Group) -> Iterator[_Stated]:
    for child in group:
        yield from _leaves(child) if isinstance(child, Group) else [child]
