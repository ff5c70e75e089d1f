"""Controls: what a method that trains on general text is compared with, so that its data are not taken for its remedy.

A part that trains on general text before the domain (`preparation` with `training`) starts from, or holds on to, what
that text taught. Its control is the same method with the part at its neutral setting, such as strength 0, after the
same preparation: plain fine-tuning from the same start. A part that trains on general text beside the domain
(capability "general", and tokens that it adds or puts in the domain's place) has the method without it, or with it at
its neutral setting, as its control.
"""

from analysis.families import family
from evaluation.chance import WARNING
from experiments.stages import resolve
from methods.part import Part


def look(study) -> list[str]:
    """A warning for each method of the grid that trains on general text and has no control there."""
    lines = []
    for method, control in of_grid(study).items():
        if control:
            continue
        part, named = _trained_on_general(study, method)[0], _named(study, method)
        what = f"the same preparation with {_off(part)}" if _warms(part) else "the same method without that part"
        why = f"{named} is not its control" if named else "the grid has no control for it"
        lines.append(
            f"{WARNING}methods.{method}.{part.key} trains on general text, and {why} ({what}): the report cannot tell "
            "what the method does from what that text does"
        )
    return lines


def of_grid(study) -> dict[str, str]:
    """Each method of the grid that trains on general text -> its control in the grid, '' if there is none."""
    return {method: _control(study, method) for method in study.grid.methods if _trained_on_general(study, method)}


def _trained_on_general(study, method: str) -> list[Part]:
    """The parts of a method that train on general text, if not at neutral settings; those before the domain first."""
    parts = [part for part in study.methods[method].parts if _warms(part) or _mixes(part)]
    return sorted((part for part in parts if not _is_neutral(part)), key=lambda part: not _warms(part))


def _mixes(part: Part) -> bool:
    added = part.added()  # `kl` with `text: domain` has the capability and adds nothing
    return "general" in part.capabilities and bool(added.trained or added.replaced)


def _warms(part: Part) -> bool:
    return any(made.training is not None for made in part.preparation())


def _is_neutral(part: Part) -> bool:
    return isinstance(part.neutral, dict) and part.neutral.items() <= part.settings().items()


def _off(part: Part) -> str:
    """What turns a part off: 'hierarchical.strength 0.0'."""
    differing = {name: value for name, value in part.neutral.items() if part.settings()[name] != value}
    return " and ".join(f"{part.key}.{name} {value}" for name, value in differing.items())


def _named(study, method: str) -> str:
    return study.controls.get(method) or study.controls.get(family(method)) or ""


def _control(study, method: str) -> str:
    """The control of a method, of the family that `controls` names if it does; at the same rate if there is one."""
    named = _named(study, method)
    among = [name for name in study.grid.methods if name != method]
    among = [name for name in among if named in (name, family(name))] if named else among
    found = [name for name in among if _is_control(study, name, method)]
    return next((name for name in found if _training(study, name) == _training(study, method)), next(iter(found), ""))


def _training(study, method: str) -> list:
    """The training settings of a method on every model and domain."""
    pairs = [(model, domain) for model in study.grid.models for domain in study.grid.domains]
    return [study.settings(model=model, domain=domain, method=method) for model, domain in pairs]


def _is_control(study, name: str, method: str) -> bool:
    own, theirs = ({part.key: part for part in study.methods[one].parts} for one in (method, name))
    for part in _trained_on_general(study, method):
        del own[part.key]
        other = theirs.pop(part.key, None)
        if _warms(part) if other is None else not _is_neutral(other):
            return False
        if _warms(part) and any(
            resolve.prepare(study, model, name) != resolve.prepare(study, model, method) for model in study.grid.models
        ):
            return False
    return own == theirs
