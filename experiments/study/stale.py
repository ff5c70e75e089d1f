"""What DVC cannot see: that a stage would run on other settings, files or versions than those `resolve` wrote down for it."""

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
    "base": "evaluate/{model}.json",
    "prepare": "prepare/{model}/{method}.json",
    "train": "train/{model}/{domain}/{method}.json",
    "evaluate": "evaluate/{model}.json",
    "collect": "collect/{model}/{method}.json",
    "compare": "compare.json",
}


def refuse(study, stage: str, **names: str) -> None:
    """Refuse a stage that DVC runs, where its lock would then not be true; before hours of work, where its scores would be of other versions.

    `names`: model, domain and method, as far as the stage has them. A stage that is run by hand is held to nothing.
    """
    if "DVC_STAGE" not in os.environ or stage not in FILES:
        return
    path = FILES[stage].format(**names)
    found = difference(study, path, resolve.content(study, path))
    if not found and stage in ("prepare", "train"):
        path = FILES["evaluate"].format(**names)
        found = difference(study, path, {"versions": resolve.evaluate(study, names["model"])["versions"]}, part=True)
    if found:
        raise UserError(
            f"{os.environ['DVC_STAGE']}: {found}; DVC cannot see that by itself: run `python -m experiments pipeline"
            f"{' --study ' + study.name if study.name else ''}` and then the same `dvc repro` again"
        )


def forget(study) -> str:
    """Remove work/resolved where it does not hold what it would now, so that DVC runs `resolve` again; returns what differed, or ''."""
    if not study.paths.resolved.is_dir():
        return ""
    found = next(
        filter(None, (difference(study, path, content) for path, content in resolve.contents(study).items())), ""
    )
    if found:
        shutil.rmtree(study.paths.resolved)
    return found


def difference(study, path: str, content: dict, *, part: bool = False) -> str:
    """The first entry of a resolved file that is not what it would be now, in words; '' where there is none, or no file.

    part    `content` holds some of the file's entries alone
    """
    file = study.paths.resolved / path
    if not file.is_file():
        return ""
    then, now = _flat(read_json(file)), _flat(json.loads(resolve.text(content)))
    for key in sorted(now if part else then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            was, found = (repr(values.get(key, "absent")) for values in (then, now))
            return f"{key} is {found} now, and was {was} when {file.relative_to(study.paths.root)} was written"
    return ""


def _flat(value, prefix: str = "") -> dict:
    """Nested mappings as one, by dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: found
        for name, entry in value.items()
        for key, found in _flat(entry, f"{prefix}.{name}" if prefix else str(name)).items()
    }
