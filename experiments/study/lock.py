"""Read from dvc.lock which cells are done and unchanged, without running DVC."""

from hashlib import md5
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from experiments.stages import resolve
from experiments.study.md5 import folder_md5 as folder_md5  # read by the stage `model`
from methods.errors import UserError


def stages(path: Path) -> dict[str, dict]:
    """The entries of a dvc.lock by stage; empty without the file. Raises UserError if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        entries = (YAML(typ="safe").load(path) or {}).get("stages") or {}
        return {
            name: {kind: [dict(file) for file in entry.get(kind, []) if file["path"]] for kind in ("deps", "outs")}
            for name, entry in entries.items()
        }
    except (YAMLError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path} is not a lock of DVC ({' '.join(str(error).split())[:300]}): "
            "it may have merge markers or be cut off; restore it with git"
        ) from error


class Lock:
    """dvc.lock compared with the current settings.

    A stage is done if DVC ran it with the settings that `resolve` would write now, the stages before it are done, and
    its outputs exist.
    """

    def __init__(self, study):
        path = study.paths.folder / "dvc.lock"
        self._stages = stages(path)
        self._root = study.paths.root
        folder = study.paths.resolved.relative_to(self._root)
        texts = {(folder / name).as_posix(): resolve.text(c) for name, c in resolve.contents(study).items()}
        self._now = {name: md5(text.encode()).hexdigest() for name, text in texts.items()}

    def recorded(self, stage: str) -> bool:
        """Whether dvc.lock has the stage with the current settings and sources."""
        if stage not in self._stages:
            return False
        deps = self._stages[stage].get("deps", [])
        return all(self._now.get(dep["path"], dep.get("md5")) == dep.get("md5") for dep in deps)

    def done(self, stage: str) -> bool:
        """Whether the stage is recorded and its outputs exist."""
        outs = self._stages.get(stage, {}).get("outs", [])
        return self.recorded(stage) and all((self._root / out["path"]).exists() for out in outs)

    def cell(self, cell) -> dict[str, bool]:
        """Which stages of a cell are done; each counts only if those before it are done."""
        ready = self.done(f"model@{cell.model}") and self.done("data")
        prepared = ready and self.done(f"prepare@{cell.model}-{cell.method}-{cell.seed}")
        trained = prepared and self.done(f"train@{cell.stage}")
        scored = trained and self.done(f"evaluate@{cell.stage}")
        return {"prepared": prepared, "trained": trained, "scored": scored}
