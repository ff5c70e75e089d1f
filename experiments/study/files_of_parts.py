"""The files that parts read, looked at before anything runs."""

from collections.abc import Iterator
from pathlib import Path

from experiments.model import claims
from methods.errors import UserError
from methods.part import Part
from methods.settings import declared
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
                for setting, path in _named(part):
                    claims.look(Path(path).expanduser(), f"{part.key}.{setting}: {path}")
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


def _named(part: Part) -> Iterator[tuple[str, str]]:
    """The settings of a part that name files or folders, with each path."""
    for field in declared(part):
        value = getattr(part, field.name)
        if field.metadata.get("path") and value:
            yield from ((field.name, path) for path in (value if isinstance(value, list | tuple) else [value]))


def _bases(part: Part) -> Iterator[tuple[str, str]]:
    """The folders of adapters that a part reads, and the names of their bases, where they give one."""
    for _, path in _named(part):
        if peft_adapter.is_adapter(path) and (base := peft_adapter.base_of(Path(path))):
            yield path, base
