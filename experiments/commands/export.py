"""export: write a finished cell as an ordinary Hugging Face folder, for `lm_eval --model_args pretrained=DIR`.

Without a folder the weights are rebuilt and compared with their hash, and nothing is written: a disk may have no room
for a second copy of a full-size model. Either way memory holds two tensors at a time, not the model.
"""

from pathlib import Path

from experiments.model import delta, tuned
from methods.errors import UserError
from methods.tools.files import read_json


def main(study, cell, folder: str | None = None) -> None:
    """Write the cell's weights to a new folder. Raises UserError unless their hash is the one in train.json."""
    source, base = study.paths.weights(cell), study.paths.model(cell.model)
    if not source.is_dir():
        raise UserError(f"{cell.name} has no weights here: run `dvc repro train@{cell.stage}` first")
    if folder and Path(folder).exists():
        raise UserError(f"{folder} already exists: name a new folder")
    recorded = read_json(study.paths.run(cell) / "train.json", "weights_sha256")["weights_sha256"]
    digest = tuned.weights_sha256(source)
    if digest != recorded:
        raise UserError(
            f"{cell.name}: the weights at {source} ({digest[:12]}) are not those of train.json ({recorded[:12]}): "
            f"run `dvc repro train@{cell.stage}`"
        )
    if not folder:
        tensors, digest = tuned.tensors(source, folder=base)
        entries = sum(tensor.numel() for _, tensor in delta.verified(tensors, sha256=digest, what=source))
        print(f"{cell.name}: its {entries:,} weights have the hash of train.json; nothing was written")
        return
    tuned.write_folder(source, folder=base, target=Path(folder))
    command = f"lm_eval --model hf --model_args pretrained={folder} --tasks sciq"
    print(f"wrote {cell.name} to {folder}; score it with: {command}")
