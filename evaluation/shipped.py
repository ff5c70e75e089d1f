"""Where the YAML file of a task lies that lm-eval, or this project, ships."""

import difflib
import functools
import re
from pathlib import Path

import lm_eval.tasks

from experiments.errors import UserError

SHIPPED = Path(lm_eval.tasks.__file__).parent
OWN = Path(__file__).parent / "tasks"  # tasks lm-eval has no YAML for, such as `general_text`
# a task's folder almost always begins with the first word of its name; these are looked for where they are
HOMES = {"boolq": "super_glue", "copa": "super_glue", "social_iqa": "siqa"}


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


_KEY = re.compile(r"""^["']?(task|group|tag)["']?:(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)  # a value, or the list below it
_WORD = re.compile(r"[\w.+-]*\w")


def _not_shipped(name: str) -> str:
    """What to do about a name that is no task: for a group its tasks, else the nearest names. Reads all of lm-eval's files."""
    tasks: set[str] = set()
    members: set[str] = set()
    groups: set[str] = set()
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
        return f"task {name!r} is a group of lm-eval's tasks, not one task: give each of its tasks a block of its own{such}"
    near = difflib.get_close_matches(name, sorted(tasks), n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "check the name in lm-eval's list of tasks"
    return f"task {name!r} is not shipped with lm-eval: {hint}"
