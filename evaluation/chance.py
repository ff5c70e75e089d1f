"""Warnings of bases that answer worse than chance, because a task's chance or prompt is wrong or the model is poor."""

from collections.abc import Iterable

from evaluation.retention import SHARE, unit_of
from methods.tools.files import read_json

WARNING = "warning: "


def below_chance(study, model: str, tasks: Iterable[str] | None = None) -> list[str]:
    """A line for each task (default: the grid's) that the base answers worse than chance; none before it is scored."""
    file = study.paths.base(model) / "scores.json"
    if not file.is_file():
        return []
    scored = read_json(file)["tasks"]
    if tasks is None:
        tasks = {
            name
            for domain in study.grid.domains
            for name in (domain, *study.domains[domain].retention, *study.domains[domain].transfer)
        }
    return [
        f"{WARNING}{model} scores {scored[name]['value']:.3f} on {name}, below its chance of "
        f"{scored[name]['chance']:g} (n {scored[name]['n']}): what is learned or forgotten there is hard to see"
        for name in sorted(tasks)
        if name in scored and unit_of(scored[name]) == SHARE and scored[name]["value"] < scored[name]["chance"]
    ]
