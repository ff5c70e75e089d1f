"""Detect what DVC cannot see: settings, files or versions that differ from those that `resolve` wrote for a stage."""

import json
import os
import shutil

from experiments.stages import resolve
from methods.errors import UserError
from methods.tools.files import read_json

# the resolved file that a stage depends on in dvc.yaml
FILES = {
    "model": "model/{model}.json",
    "data": "data.json",
    "base": "base/{model}.json",
    "prepare": "prepare/{model}/{method}.json",
    "train": "train/{model}/{domain}/{method}.json",
    "evaluate": "evaluate/{model}.json",
    "collect": "collect/{model}/{method}.json",
    "compare": "compare.json",
}


def refuse(study, stage: str, **names: str) -> None:
    """Refuse a stage that DVC runs if dvc.lock would be wrong after it.

    A stage with hours of work is also refused if its scores would be of other versions. A stage that is run by hand is
    not checked.

    names  model, domain and method, as far as the stage has them
    """
    if "DVC_STAGE" not in os.environ or stage not in FILES:
        return
    path = FILES[stage].format(**names)
    changed = difference(study, path, resolve.content(study, path))
    if not changed and stage in ("prepare", "train"):
        path = FILES["evaluate"].format(**names)
        changed = difference(study, path, {"versions": resolve.evaluate(study, names["model"])["versions"]}, part=True)
    if changed:
        raise UserError(
            f"{os.environ['DVC_STAGE']}: {changed}; DVC cannot see that by itself: run `python -m experiments pipeline"
            f"{' --study ' + study.name if study.name else ''}` and then the same `dvc repro` again"
        )


def forget(study) -> str:
    """Remove work/resolved if it is outdated, so that DVC runs `resolve` again; return what differed, or ''."""
    if not study.paths.resolved.is_dir():
        return ""
    differences = (difference(study, path, content) for path, content in resolve.contents(study).items())
    changed = next(filter(None, differences), "")
    if changed:
        shutil.rmtree(study.paths.resolved)
    return changed


def difference(study, path: str, content: dict, *, part: bool = False) -> str:
    """The first entry of a resolved file that would be different now, in words; '' if there is none, or no file.

    part  `content` has only some of the file's entries
    """
    file = study.paths.resolved / path
    if not file.is_file():
        return ""
    then, now = _flat(read_json(file)), _flat(json.loads(resolve.text(content)))
    for key in sorted(now if part else then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            was, is_now = (repr(values.get(key, "absent")) for values in (then, now))
            return f"{key} is {is_now} now, and was {was} when {file.relative_to(study.paths.root)} was written"
    return ""


def _flat(value, prefix: str = "") -> dict:
    """Nested mappings as one mapping with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat = {}
    for name, entry in value.items():
        flat |= _flat(entry, f"{prefix}.{name}" if prefix else str(name))
    return flat
