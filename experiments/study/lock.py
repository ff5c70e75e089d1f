"""What dvc.lock says is done: the cells whose inputs have not changed, without running DVC."""

from hashlib import md5
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from experiments.stages import resolve
from methods.errors import UserError


def stages(path: Path) -> dict[str, dict]:
    """What a dvc.lock says of each stage; nothing where it is not there. Raises UserError where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = (YAML(typ="safe").load(path) or {}).get("stages") or {}
        return {
            name: {
                "deps": [dict(d) for d in said.get("deps", []) if d["path"]],
                "outs": [dict(o) for o in said.get("outs", []) if o["path"]],
            }
            for name, said in found.items()
        }
    except (YAMLError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path} is no lock of DVC ({' '.join(str(error).split())[:300]}): it may hold marks of a merge, or be cut off; restore it "
            "with git"
        ) from error


class Lock:
    """dvc.lock beside the settings as they are now. A stage is done if DVC ran it on the very settings that
    `resolve` would write now, the stages before it are done, and its outs are there."""

    def __init__(self, study):
        path = study.paths.folder / "dvc.lock"
        self._stages = stages(path)
        self._root = study.paths.root
        self._now = {
            (study.paths.resolved / name).relative_to(self._root).as_posix(): md5(
                resolve.text(content).encode()
            ).hexdigest()
            for name, content in resolve.contents(study).items()
        }

    def recorded(self, stage: str) -> bool:
        """Whether dvc.lock has the stage on the settings and sources of now."""
        entry = self._stages.get(stage)
        return entry is not None and all(
            self._now.get(d["path"], d.get("md5")) == d.get("md5") for d in entry.get("deps", [])
        )

    def done(self, stage: str) -> bool:
        """The same, and its outs are here."""
        return self.recorded(stage) and all(
            (self._root / o["path"]).exists() for o in self._stages[stage].get("outs", [])
        )

    def cell(self, cell) -> dict[str, bool]:
        """Which stages of a cell are done, each only if those before it are."""
        ready = self.done(f"model@{cell.model}") and self.done("data")
        prepared = ready and self.done(f"prepare@{cell.model}-{cell.method}-{cell.seed}")
        trained = prepared and self.done(f"train@{cell.stage}")
        scored = trained and self.done(f"evaluate@{cell.stage}")
        return {"prepared": prepared, "trained": trained, "scored": scored}
