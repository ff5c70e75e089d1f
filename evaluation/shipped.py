"""The tasks that lm-eval and this project ship: their YAML files, their configurations, and packages they lack."""

import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

from methods.errors import UserError, chain, shortened

SHIPPED = Path(lm_eval.tasks.__file__).parent
OWN = Path(__file__).parent / "tasks"  # tasks lm-eval has no YAML for, such as `general_text`
# before a task's Python imports evaluate, which would download program code for its metrics
os.environ["HF_EVALUATE_OFFLINE"] = "1"
# a task's folder almost always begins with the first word of its name; these are looked for where they are
HOMES = {"boolq": "super_glue", "copa": "super_glue", "social_iqa": "siqa"}
# how a task's Python evaluates a text; sympy's parse_expr is eval, and `model.eval()` is another thing
_RUNS = re.compile(
    r"(?<![\w.])(?:eval|exec)(?=\()|\bparse_expr\b|\bsubprocess\b(?=\.)|\bos\.system\b|\bpickle\.loads?\b"
)


@functools.cache
def shipped_yaml(name: str) -> Path:
    """The YAML file that defines task `name`: ours, else lm-eval's, found by its text (lm-eval's index takes 7 s)."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"task {name!r} is not a name: write a task of lm-eval, or a mapping of its YAML keys")
    wanted = re.compile(rf"""^["']?task["']?:\s*["']?{re.escape(name)}["']?\s*$""", re.MULTILINE)
    home = HOMES.get(name) or re.split(r"[_-]", name)[0] + "*"
    for folder in (OWN, *sorted(SHIPPED.glob(home)), SHIPPED):
        for file in sorted(folder.rglob("*.yaml")):
            if wanted.search(file.read_text(encoding="utf-8", errors="ignore")):
                return file
    raise UserError(_not_shipped(name))


def shipped_config(name: str) -> dict[str, Any]:
    """The task's YAML file with the functions that it names, whose files are run. Raises UserError if that fails."""
    file = shipped_yaml(name)
    with named_errors(f"task {name!r}", file):
        refuse_unsafe(name, load_yaml(file, resolve_func=False))
        refuse_programs(name, file)
        return dict(load_yaml(file))


def refuse_unsafe(name: str, config: Mapping[str, Any]) -> None:
    if config.get("unsafe_code"):
        raise UserError(
            f"task {name!r} runs the programs that a model writes (unsafe_code), and these are never run here: "
            "choose another task"
        )


def refuse_programs(name: str, file: Path) -> None:
    """Refuse the task in `file` if its functions run a text as a program, such as an answer that a model wrote.

    Functions that would fetch data of NLTK when they are imported ask for it in vain: with the data on this machine
    they do not ask, and otherwise their UserError says how to fetch it.
    """
    sources = {one: one.read_text(encoding="utf-8") for one in sorted(file.parent.glob("[!_]*.py"))}
    if runs := [f"{match[0]} in {one.name}" for one, text in sources.items() if (match := _RUNS.search(text))]:
        raise UserError(
            f"task {name!r} runs texts as programs ({runs[0]}), also those that a model writes, which is never done "
            "here: choose another task"
        )
    if any("nltk.download" in text for text in sources.values()):
        import nltk  # takes a second

        def refuse(resource: str, *_: Any, **__: Any) -> None:
            raise UserError(
                f"task {name!r} needs the data {resource!r} of NLTK, which is not on this machine: fetch it with "
                f"`python -m nltk.downloader {resource}`, or choose another task"
            )

        nltk.download = refuse


@contextlib.contextmanager
def named_errors(what: str, file: Path) -> Iterator[None]:
    """Turn whatever the reading of a task's file and its functions raises into a UserError that names the task."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(lacks_package(what, error)) from error
    except Exception as error:  # the task's own Python may raise anything
        if "module script" in str(error):  # in evaluate's message about program code that is not on this machine
            raise UserError(
                f"{what} has a metric that is code of others, which the library evaluate would download and run, and "
                "Holdfast does not: choose another task"
            ) from error
        raise UserError(
            f"{what} cannot be used: reading {file.relative_to(SHIPPED.parent.parent)} and its functions gives "
            f"{shortened(error)}"
        ) from error


def lacks_package(what: str, error: ImportError) -> str:
    """A message that says what to install, because `what` needs a package that is not installed."""
    failed = [one for one in chain(error) if isinstance(one, ImportError)]
    module = next((name for one in failed if (name := (one.name or "").partition(".")[0])), "")
    installed = sys.modules.get(module) or any(type(one) is ImportError and one.name == module for one in failed)
    if not module or installed:  # an installed package of another version
        return f"{what} needs Python code that cannot be imported: {' '.join(str(error).split())[:300]}"
    needed = [need.partition(";")[0].strip() for need in requires("lm_eval") or () if "extra ==" in need]
    named = {re.split(r"[^\w.-]", need)[0].lower().replace("-", "_"): need for need in needed}
    distribution = _PACKAGES.get(module, module)
    package = named.get(module.lower()) or named.get(distribution.replace("-", "_")) or distribution
    if "antlr4" in package:
        return f"{what} needs antlr4 4.11, and DVC, which runs the stages, needs 4.9: choose another task"
    return (
        f"{what} needs the Python package {module}, which is not installed: `pip install '{package}'`, "
        "or choose another task"
    )


# distributions of modules that go by another name
_PACKAGES = {
    "antlr4": "antlr4-python3-runtime",
    "sklearn": "scikit-learn",
    "kstar_planner": "kstar-planner",
    "bert_score": "bert-score",
    "iso639": "iso639-lang",
    "pkg_resources": "setuptools",
}
# a key's value, or the list below it
_KEY = re.compile(r"""^["']?(task|group|tag)["']?:(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)
_WORD = re.compile(r"[\w.+-]*\w")


def _not_shipped(name: str) -> str:
    """A message about a name that is no task: a group's tasks, or the nearest names. Reads all of lm-eval's files."""
    tasks, members, groups = set(), set(), set()
    for file in SHIPPED.rglob("*.yaml"):
        named: dict[str, list[str]] = {"task": [], "group": [], "tag": []}
        for key, value in _KEY.findall(file.read_text(encoding="utf-8", errors="ignore")):
            named[key] += [] if "{" in value else _WORD.findall(value)
        groups.update(named["group"] + named["tag"])
        if not named["group"]:  # the `task:` of a group lists its members
            tasks.update(named["task"])
        if name in named["tag"] or (name in named["group"] and named["task"]):
            members.update(named["task"])
    if name in groups:
        own = sorted(task for task in tasks if task.startswith(f"{name}_")) or sorted(members & tasks)
        such = f", such as {', '.join(own[:3])}" if own else ""
        return f"task {name!r} is a group of lm-eval's tasks, not one task: write a block for each of its tasks{such}"
    alike = sorted(task for task in tasks if task.lower() == name.lower())  # `SciQ`
    near = alike or difflib.get_close_matches(name, sorted(tasks), n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "check the name in lm-eval's list of tasks"
    return f"task {name!r} is not shipped with lm-eval: {hint}"
