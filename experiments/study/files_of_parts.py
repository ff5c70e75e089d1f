"""The files that parts read, looked at before anything runs."""

from collections.abc import Iterator
from pathlib import Path

from experiments.model import claims
from methods import registry
from methods.errors import UserError
from methods.part import Part
from methods.tools import model_folder, peft_adapter


def look(study, *, model: str) -> list[str]:
    """A line for each adapter among the files that was made for a base of another name; it is not refused for that.

    Raises UserError for files that a part could not work with, by the shapes of the base's tensors if the base is here.
    """
    made = sorted(study.paths.model(model).glob("*.safetensors"))
    shapes = {name: shape for name, (_, shape) in model_folder.headers(made, f"models.{model}").items()}
    _, _, source = study.models[model].source.partition(":")
    lines = []
    for method in study.grid.methods:
        for part in study.methods[method].parts:
            try:
                for path in registry.paths(part, None):
                    claims.look(Path(path).expanduser(), f"{part.key}: {path}")
                part.look(shapes=shapes)
            except UserError as error:
                raise UserError(f"methods.{method}.{error} (model {model})") from error
            lines += [
                f"methods.{method}.{part.key}: {path} was made for {base}, as its adapter_config.json says, and is "
                f"merged into {model} ({source}): go on if these are the same model"
                for path, base in _bases(part)
                if not any(peft_adapter.alike(base, name) for name in (model, source.partition("@")[0]))
            ]
    return lines


def _bases(part: Part) -> Iterator[tuple[str, str]]:
    """The folders of adapters that a part reads, and the names of their bases, where they give one."""
    for path in registry.paths(part, None):
        if peft_adapter.is_adapter(path) and (base := peft_adapter.base_of(Path(path))):
            yield path, base
