"""export: write a finished cell as an ordinary Hugging Face folder, for `lm_eval --model_args pretrained=DIR`."""

from pathlib import Path

from experiments.model import tuned
from methods.errors import UserError
from methods.tools.files import read_json


def main(study, cell, folder: str) -> None:
    """Write the cell's weights to a new folder. Raises UserError unless their hash is the one in train.json."""
    source, target = study.paths.weights(cell), Path(folder)
    if not source.is_dir():
        raise UserError(f"{cell.name} has no weights here: run `dvc repro train@{cell.stage}` first")
    if target.exists():
        raise UserError(f"{target} already exists: name a new folder")
    recorded = read_json(study.paths.run(cell) / "train.json", "weights_sha256")["weights_sha256"]
    digest = tuned.weights_sha256(source)
    if digest != recorded:
        raise UserError(
            f"{cell.name}: the weights at {source} ({digest[:12]}) are not those of train.json ({recorded[:12]}): "
            f"run `dvc repro train@{cell.stage}`"
        )
    tuned.write_folder(source, folder=study.paths.model(cell.model), target=target)
    command = f"lm_eval --model hf --model_args pretrained={target} --tasks sciq"
    print(f"wrote {cell.name} to {target}; score it with: {command}")
