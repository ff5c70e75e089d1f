"""sweep: add a method block to the study's params.yaml for each of several values of one setting.

    python -m experiments sweep ewc ewc.strength 1e2..1e6 --points 5
    python -m experiments sweep mofo mofo.fraction 0.05,0.1,0.2
    python -m experiments sweep full train.learning_rate x2

writes `ewc-s1: {like: ewc, ewc: {strength: 100.0}}` and so on after `ewc`, adds the names to grid.methods and rewrites
dvc.yaml. `x2` stands for the values on either side of the method's own, half and twice of it: with them a chosen
setting has a curve of gain against loss around it. The cells are ordinary ones, and they share a preparation that does
not depend on the setting. Which block of a family is reported is chosen on probe rows (analysis/chosen.py), so every
family should have the same number of blocks.
"""

import typing
from collections import Counter
from dataclasses import fields
from math import isfinite
from pathlib import Path
from sys import float_info
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from analysis.families import families, family, member
from experiments.commands import plan
from experiments.stages import resolve
from experiments.study import cells, config, pipeline, whole
from experiments.study.params_text import read_yaml, with_methods
from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.settings import declared
from methods.tools.names import unknown

POINTS = 5
MOST_POINTS = 100
BUDGET = ("epochs", "length")  # training settings that change the tokens of training, which are equal for all methods
DIGITS = 4  # significant digits of a value between the ends of a range


def main(study, *, method: str, knob: str, values: str, points: int | None = None, linear: bool = False) -> None:
    """Write the blocks and dvc.yaml, and print the families of the grid and the expected cost.

    values   `LOW..HIGH`, with `points` (5) values of equal ratio, or of equal distance if `linear`; a list `A,B,C`; or
             `xR`, the method's own value divided and multiplied by R

    Raises UserError and leaves params.yaml unchanged for a method, setting or value that does not exist or that its
    part refuses, and if a block of that name has other settings.
    """
    blocks = make(study, method=method, knob=knob, values=values, points=points, linear=linear)
    path = study.paths.params
    present = read_yaml(path).get("methods") or {}
    for name, block in blocks.items():
        if present.get(name, block) != block:
            raise UserError(
                f"{path.name} already has a block {name}, {present[name]}, which is not {block}: delete the blocks "
                f"{method}-s… and their names in grid.methods, or give the new sweep a family of its own: add "
                f"`{method}-b: {{like: {method}}}` to methods: and sweep that"
            )
    new = {name: block for name, block in blocks.items() if name not in present}
    added = [name for name in blocks if name not in study.grid.methods]
    if new or added:
        text = with_methods(path.read_text(), blocks=new, grid=added, behind=method, where=path.name)
        _check(study, text)
        whole.write_text(path, text)
        study = config.load(study.name, root=study.paths.root)
    part, setting = knob.split(".", 1)
    for name, block in blocks.items():
        print(f"{name}: {knob} = {block[part][setting]}" + ("" if name in new else " (already present)"))
    print(f"{len(new)} new blocks in {path.relative_to(study.paths.root)}, {len(added)} new names in grid.methods")
    pipeline.main(study)
    for line in counts(study):
        print(line)
    print(cost(study, list(blocks)))


def make(study, *, method: str, knob: str, values: str, points: int | None, linear: bool) -> dict[str, dict]:
    """The blocks by name; the method's own value gets none if the method is in the grid, because it is that trial."""
    if method not in study.methods:
        raise unknown("method", method, study.methods)
    if family(method) != method and family(method) in study.methods:
        raise UserError(f"{method} is a block of a sweep: sweep {family(method)}")
    part, dot, setting = knob.partition(".")
    if not (part and dot and setting):
        raise UserError(f"knob {knob!r}: write PART.SETTING, such as ewc.strength, or train.learning_rate")
    kind, own = _knob(study, method, part, setting)
    if values.startswith("x"):
        wanted = beside(own[0] if own else None, values, knob=knob, whole=kind is int)
    else:
        wanted = spread(values, knob=knob, whole=kind is int, points=points, linear=linear)
    if kind is float:
        wanted = [float(value) if _number(value) else value for value in wanted]
    if double := [value for value, count in Counter(wanted).items() if count > 1]:
        hint = "; the setting is a whole number: use fewer points" if kind is int else ""
        raise UserError(f"{knob} {values}: {double[0]} comes twice, in {', '.join(map(str, wanted))}{hint}")
    if method in study.grid.methods:
        wanted = [value for value in wanted if value not in own]
    if not wanted:
        raise UserError(f"{knob} {values}: {method} has this value itself: there is nothing to add")
    return {member(method, k): {"like": method, part: {setting: value}} for k, value in enumerate(wanted, 1)}


def beside(own: Any, values: str, *, knob: str, whole: bool) -> list:
    """The values on either side of a method's own: `x2` stands for half and twice of it."""
    try:
        ratio = float(values[1:])
    except ValueError:
        raise UserError(f"{knob} {values}: write x and a number above 1, such as x2") from None
    if not 1 < ratio < float("inf"):
        raise UserError(f"{knob} {values}: the values on either side need a number above 1, such as x2")
    if not _number(own) or not own:
        raise UserError(
            f"{knob} {values}: the method's own value is {own!r}, which has no sides: write a range LOW..HIGH, or a "
            "list A,B,C"
        )
    if not isfinite(own * ratio):
        raise UserError(f"{knob} {values}: {own} times {ratio:g} is too large a number: take a smaller one, such as x2")
    around = [float(f"{value:.{DIGITS}g}") for value in (own / ratio, own * ratio)]
    return [round(value) for value in around] if whole else around


def spread(values: str, *, knob: str, whole: bool, points: int | None, linear: bool) -> list:
    """The values that the text stands for, in its order; `whole` rounds those between the ends of a range."""
    ends = values.split("..")
    if len(ends) == 1:
        if points is not None or linear:
            raise UserError(f"{knob} {values}: --points and --linear are for a range LOW..HIGH, not for a list")
        return [_scalar(piece.strip(), knob=knob) for piece in values.split(",")]
    try:
        low, high = map(float, ends)
    except ValueError:
        raise UserError(f"{knob} {values!r}: write a range LOW..HIGH, such as 1e2..1e6, or a list A,B,C") from None
    count = POINTS if points is None else points
    if not 2 <= count <= MOST_POINTS:
        raise UserError(f"--points {count}: a range has two ends: give 2 to {MOST_POINTS}")
    if not low < high < float("inf"):
        raise UserError(f"{knob} {values}: a range goes from the lower to the higher end")
    if low <= 0 and not linear:
        raise UserError(
            f"{knob} {values}: equal ratios need ends above 0; --linear spaces values evenly, and a list A,B,C may "
            "contain 0"
        )
    if not isfinite(high - low if linear else high / low):
        raise UserError(f"{knob} {values}: the ends are too far apart: write a range that a setting can have")
    steps = [step / (count - 1) for step in range(count)]
    spaced = [low + (high - low) * s if linear else low * (high / low) ** s for s in steps]
    spaced = [low, *(float(f"{value:.{DIGITS}g}") for value in spaced[1:-1]), high]
    return [round(value) for value in spaced] if whole else spaced


def counts(study) -> list[str]:
    """The number of blocks of each family in the grid, and a warning if these numbers differ."""
    blocks = {name: len(members) for name, members in families(study.grid.methods).items()}
    lines = ["trials by family: " + ", ".join(f"{name} {count}" for name, count in blocks.items())]
    if len(set(blocks.values())) > 1:
        most = max(blocks.values())
        fewer = [name for name, count in blocks.items() if count < most]
        lines.append(
            "warning: the numbers differ, and a method with more trials is chosen from more: "
            f"sweep {', '.join(fewer)} until each has {most}"
        )
    return lines


def cost(study, methods: list[str]) -> str:
    """The cost that `plan` predicts for the cells of these methods, in one line; a shared preparation counts once."""
    made = plan.make(study, patterns=[f"*/{method}/*" for method in methods])
    seconds, seen = 0.0, set()  # None: not known of the architecture
    for cell in (c for c in made["cells"] if not c["cached"]["scored"]):
        model, _, method, seed = cell["cell"].split("/")
        settings = resolve.text(resolve.prepare(study, model, method))
        key = (model, settings, resolve.seeded(study.methods[method].parts) and seed)
        known = None not in (seconds, cell["seconds"])
        seconds = seconds + cell["seconds"] - (cell["seconds_prepare"] if key in seen else 0.0) if known else None
        seen.add(key)
    total = made["total"]
    minutes = "time unknown" if seconds is None else f"about {seconds / 60:.1f} min"
    peak = "unknown" if total["peak_memory_bytes"] is None else f"{total['peak_memory_bytes'] / 2**30:.2f} GiB"
    return (
        f"{total['to_run']} of {total['cells']} cells to run: {minutes}, disk {total['disk_bytes'] / 2**20:.0f} MiB, "
        f"peak memory {peak}"
        + (f"; {total['too_large']} do not fit here" if total["too_large"] else "")
        + f"; `python -m experiments plan{' --study ' + study.name if study.name else ''}` shows each"
    )


def _knob(study, method: str, part: str, setting: str) -> tuple[Any, list]:
    """The type of a setting, and the method's own values of it."""
    if part == "train":
        kinds = {field.name: field.type for field in fields(TrainSettings)}
        if setting not in kinds:
            raise unknown("setting", setting, kinds, where="train")
        if setting in BUDGET:
            raise UserError(
                f"train.{setting} changes the tokens of training, and methods are compared at equal tokens "
                "(docs/rules.md): give another budget a study of its own"
            )
        pairs = [(model, domain) for model in study.grid.models for domain in study.grid.domains]
        used = {getattr(study.settings(model=model, domain=domain, method=method), setting) for model, domain in pairs}
        return kinds[setting], list(used) if len(used) == 1 else []
    by_key = {own.key: own for own in study.methods[method].parts}
    if part not in by_key:
        raise unknown("part", part, ["train", *by_key], where=f"methods.{method}")
    names = [field.name for field in declared(by_key[part])]
    if setting not in names:
        raise unknown("setting", setting, names, where=part)
    return typing.get_type_hints(type(by_key[part]))[setting], [by_key[part].settings()[setting]]


def _check(study, text: str) -> None:
    """Load the new text as a study, so that every part checks its settings, before the old file is replaced."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / study.paths.params.name
        file.write_text(text)
        new = config.build(read_yaml(file), paths=study.paths)
    for cell in cells.grid(new):
        new.settings(model=cell.model, domain=cell.domain, method=cell.method)
        new.prepare_settings(model=cell.model, method=cell.method)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scalar(text: str, *, knob: str) -> Any:
    """One value of a list as params.yaml would read it."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if not abs(value) <= float_info.max:  # `isfinite` fails on a whole number beyond it
            raise UserError(f"{knob}: {text[:60]!r} is not a finite number")
        return value
    try:
        value = YAML(typ="safe", pure=True).load(text) if text else None
    except (YAMLError, ValueError, LookupError):
        value = None
    if not isinstance(value, str | bool):
        raise UserError(f"{knob}: {text!r} is not a value: write a range LOW..HIGH or a list A,B,C")
    return value
