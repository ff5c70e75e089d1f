"""Warnings of bases that answer worse than chance: a task's chance or prompt is wrong, or the model is too weak."""

from collections.abc import Iterable

from evaluation.retention import unit_of
from evaluation.units import SHARE
from methods.tools.files import read_json

WARNING = "warning: "


def below_chance(study, model: str, tasks: Iterable[str] | None = None) -> list[str]:
    """A line for each of `tasks` (default: the grid's) that the base answers worse than chance; none before scoring."""
    file = study.paths.base(model) / "scores.json"
    if not file.is_file():
        return []
    scored = read_json(file)["tasks"]
    if tasks is None:
        blocks = {domain: study.domains[domain] for domain in study.grid.domains}
        tasks = {name for domain, block in blocks.items() for name in (domain, *block.retention, *block.transfer)}
    return [
        f"{WARNING}{model} scores {scored[name]['value']:.3f} on {name}, below its chance of "
        f"{scored[name]['chance']:g} (n {scored[name]['n']}): what is learned or forgotten there is hard to see"
        for name in sorted(tasks)
        if name in scored and unit_of(scored[name]) == SHARE and scored[name]["value"] < scored[name]["chance"]
    ]
