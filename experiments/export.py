"""A finished cell as an ordinary Hugging Face folder, for `lm_eval --model hf --model_args pretrained=DIR`."""

import shutil
from pathlib import Path

from experiments import weights
from experiments.errors import UserError
from experiments.files import need_room, read_json


def main(study, cell, folder: str) -> None:
    """Copy the cell's weights, checked against the hash its results name, to a new folder."""
    source, target = study.paths.weights(cell), Path(folder)
    if not (source / "model.safetensors").is_file():
        raise UserError(f"{cell.name} has no weights here: run `dvc repro train@{cell.stage}` first")
    if target.exists():
        raise UserError(f"{target} exists already: name a new folder")
    recorded = read_json(study.paths.run(cell) / "train.json")["weights_sha256"]
    found = weights.tensor_sha256(source)
    if found != recorded:
        raise UserError(f"{cell.name}: the weights at {source} ({found[:12]}) are not those of train.json ({recorded[:12]}): run `dvc repro`")
    need_room(target.parent.resolve(), sum(p.stat().st_size for p in source.rglob("*") if p.is_file()), str(target))
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    print(f"wrote {cell.name} to {target}; score it with: lm_eval --model hf --model_args pretrained={target} --tasks sciq")
