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
    near = difflib.get_close_matches(name, (file.stem for file in SHIPPED.rglob("*.yaml")), n=3)
    raise UserError(f"task {name!r} is not shipped with lm-eval" + (f": did you mean {', '.join(near)}?" if near else ""))
