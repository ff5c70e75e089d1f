"""The paths of a study's files, in one place, so that dvc.yaml and the code agree."""

import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Paths:
    """The files of the study `study` ('' is the default study) in the project's root."""

    study: str = ""
    root: Path = HERE

    @property
    def folder(self) -> Path:
        """The folder of params.yaml and dvc.yaml."""
        return self.root / "experiments" / "studies" / self.study if self.study else self.root

    @property
    def params(self) -> Path:
        return self.folder / "params.yaml"

    @property
    def work(self) -> Path:
        return self.root / "work" / self.study

    @property
    def results(self) -> Path:
        return self.root / "results" / self.study

    def model(self, model: str) -> Path:
        return self.work / "models" / model

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def resolved(self) -> Path:
        return self.work / "resolved"

    def prepared(self, *, model: str, method: str, seed: int) -> Path:
        return self.work / "prepared" / model / method / f"seed{seed}"

    def prepare_costs(self, *, model: str, method: str, seed: int) -> Path:
        return self.results / "prepared" / model / method / f"seed{seed}" / "prepare.json"

    def weights(self, cell) -> Path:
        return self.work / "cells" / cell.name / "weights"

    def run(self, cell) -> Path:
        return self.results / "runs" / cell.name

    def base(self, model: str) -> Path:
        return self.results / "base" / model

    def adapter(self, model: str) -> Path:
        """The committed adapter of a settled model, the same for every study; settle.json lies beside it."""
        return self.root / "results" / "settled" / model / "adapter.safetensors"

    def tuning(self, model: str, domain: str) -> Path:
        return self.results / "tuning" / model / f"{domain}.json"

    def failure(self, cell) -> Path:
        return self.results / "failures" / f"{cell.name}.json"

    @property
    def summary(self) -> Path:
        return self.results / "summary"

    @property
    def local(self) -> Path:
        """Caches and logs, never an output of a stage."""
        # `dvc exp run --temp` runs in a copy without ignored files; DVC_ROOT then names the real root
        return Path(os.environ.get("DVC_ROOT", self.root)) / "work" / "local"

    @property
    def trained(self) -> Path:
        """Trained weights that are kept for cells that differ only in `finish`."""
        return self.local / "trained" / (self.study or "default")

    @property
    def running(self) -> Path:
        """A file for each stage that runs; of this root alone, whose results they are about."""
        return self.root / "work" / "local" / "running" / (self.study or "default")

    @property
    def resume(self) -> Path:
        """Checkpoints of interrupted runs."""
        return self.local / "resume" / (self.study or "default")
