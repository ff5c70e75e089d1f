"""clean-cells: delete the weights of finished cells from work/, DVC's cache and the local store; results stay."""

import shutil

from experiments.study.advice import of_study
from experiments.study.lock import stages
from experiments.study.paths import HERE
from methods.tools.files import read_json


def main(study) -> None:
    freed = 0
    for name, stage in stages(study.paths.folder / "dvc.lock").items():
        outs = stage.get("outs", []) if name.startswith("train@") else []
        freed += sum(_drop(out["md5"]) for out in outs if out["path"].endswith("/weights"))
    for folder in (study.paths.work / "cells", study.paths.trained):
        freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)
        shutil.rmtree(folder, ignore_errors=True)
    text = f"freed {freed / 2**30:.2f} GiB of cell weights; results stay, and `dvc repro` trains again what is needed"
    print(of_study(text, study.name))


def _drop(md5: str) -> int:
    """Delete a folder's listing and its safetensors from DVC's cache, and return the number of bytes."""
    cache = HERE / ".dvc" / "cache" / "files" / "md5"
    listing = cache / md5[:2] / md5[2:]
    if not listing.is_file():
        return 0
    freed = 0
    for entry in read_json(listing, kind=list):
        path = cache / entry["md5"][:2] / entry["md5"][2:]
        if entry["relpath"].endswith(".safetensors") and path.is_file():
            freed += path.stat().st_size
            path.unlink()
    listing.unlink()
    return freed
