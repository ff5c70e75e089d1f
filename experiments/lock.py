"""What dvc.lock says is done: the cells whose inputs have not changed, without running DVC."""

from hashlib import md5

from ruamel.yaml import YAML

from experiments.stages import resolve


class Lock:
    """dvc.lock beside the settings as they are now. A stage is done if DVC ran it on the very settings that
    `resolve` would write now, the stages before it are done, and its outs are there."""

    def __init__(self, study):
        path = study.paths.folder / "dvc.lock"
        loaded = YAML(typ="safe").load(path) if path.is_file() else None
        self._stages = (loaded or {}).get("stages", {})
        self._root = study.paths.root
        self._now = {(study.paths.resolved / name).relative_to(self._root).as_posix(): md5(resolve.text(content).encode()).hexdigest()
                     for name, content in resolve.contents(study).items()}

    def done(self, stage: str) -> bool:
        entry = self._stages.get(stage)
        if entry is None or not all((self._root / out["path"]).exists() for out in entry.get("outs", [])):
            return False
        return all(self._now.get(dep["path"], dep["md5"]) == dep["md5"] for dep in entry.get("deps", []) if "md5" in dep)

    def cell(self, cell) -> dict[str, bool]:
        """Which stages of a cell are done, each only if those before it are."""
        ready = self.done(f"model@{cell.model}") and self.done("data")
        prepared = ready and self.done(f"prepare@{cell.model}-{cell.method}-{cell.seed}")
        trained = prepared and self.done(f"train@{cell.stage}")
        scored = trained and self.done(f"evaluate@{cell.stage}")
        return {"prepared": prepared, "trained": trained, "scored": scored}
