"""What a method adds to a step of training: the steps of every method of the default study, and of EWC-LoRA, against
those of plain fine-tuning, on one and the same batch through the engine itself; then those of one method for each other
part, against plain fine-tuning or, where the method trains an adapter, against LoRA. All methods of a race train side
by side and take one step each in turn; loading, preparation and a first step are not counted. Importance is of eight
documents: a penalty costs the same whatever its values. Parts that act after training alone train nothing.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from experiments.bench import full_size, running, subject
from experiments.bench.race import Goal, Race
from experiments.bench.stepwise import Pausing, race_of_steps
from experiments.bench.stopwatch import Stopwatch
from experiments.bench.subject import Subject
from experiments.training import hooks
from experiments.training.engine import FitResult, fit
from methods import registry

TITLE = "A training step of each method"
PLAIN, LORA = "full", "lora"
ROUNDS, ROUNDS_OF_FIELD = 7, 3
TOGETHER = 2  # methods in memory beside the one they are compared with, of a model that is not tiny
LIMITS = {  # of a step with the part, against plain fine-tuning
    **dict.fromkeys(("dft", "eaft", "flow", "profit", "stm", "talr"), 1.05),
    **dict.fromkeys(("gmt", "hft", "lisa", "random_mask", "ssu"), 1.1),
    **dict.fromkeys(("asft", "kl"), 1.5),  # with a frozen copy of the base
}
LIMITS_WITH_ADAPTERS = {"kl": 1.45}  # against LoRA: the adapters are switched off for the base's predictions
ADAPTER = 1.1  # of another adapter alone, against LoRA
PHASES = {
    "forward": ("begin", "forward"),
    "backward": ("forward", "backward"),
    "penalty": ("backward", "penalty"),
    "clipping": ("penalty", "update begins"),
    "update": ("update begins", "update ends"),
    "after it": ("update ends", "end"),
}


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    on = subject.find(small=small)
    batch = on.batch()
    methods = [PLAIN, *(name for name in (*on.study.grid.methods, "ewc-lora") if name in on.study.methods)]
    title = f"{on.name}: a step of {len(batch)} rows"
    timed = _race(on, methods, title=title, against=PLAIN, rounds=rounds or ROUNDS)
    yield timed
    adapted = [name for name in timed.seconds if _has(on, name, "adapts")]
    if LORA in adapted and len(adapted) > 1:
        seconds = {name: timed.seconds[name] for name in sorted(adapted, key=lambda name: name != LORA)}
        title = f"{on.name}: the same steps against {LORA}"
        yield replace(timed, title=title, against=LORA, facts={}, seconds=seconds)
    for against, others in _field(on, methods).items():
        together = len(others) if on.tiny else TOGETHER
        for at in range(0, len(others), together):
            group = others[at : at + together]
            title = f"{on.name}: {', '.join(group)} against {against}"
            goals = [goal for name in group if (goal := _goal(on, name, against))]
            settings = {"rounds": rounds or ROUNDS_OF_FIELD, "goals": goals, "trial": on.tiny}
            yield _race(on, [against, *group], title=title, against=against, **settings)


def _race(
    on: Subject,
    names: Sequence[str],
    *,
    title: str,
    against: str,
    rounds: int,
    goals: Sequence[Goal] = (),
    trial: bool = False,
) -> Race:
    """A race of the steps of these methods on one batch, with the phases of a step and the bytes held as facts.

    trial  with the parts' settings for a tiny model, whose predictions are not what the study's are for
    """
    gc.collect()  # the models of the race before, which would else be held beside these
    batch = on.batch()
    methods = {name: () if name == PLAIN else hooks.trainers(on.study.methods[name].parts) for name in names}
    if trial:
        methods = {name: tuple(replace(part, **part.trial) for part in parts) for name, parts in methods.items()}
    common = {"device": torch.device("cpu"), "compute_dtype": on.dtype, "tokenizer": on.tokenizer}
    settings = {name: on.steps(name, batch, 1 + rounds) for name in methods}
    watches = {name: Stopwatch(common["device"]) for name in methods}
    prepared = {
        name: running.prepare(
            parts=parts, make=on.make, base=on.base, general=on.general[:8], settings=settings[name], **common
        )
        for name, parts in methods.items()
    }

    def training(name: str, pause: Callable[[], None]) -> FitResult:
        return fit(
            model=on.make(),
            parts=(*methods[name], *watches[name].parts, Pausing(pause=pause)),
            examples=batch,
            general=on.general[:8],
            seed=0,
            settings=settings[name],
            base=on.base,
            states=prepared[name].states,
            **common,
        )

    works = {name: partial(training, name) for name in methods}
    timed, results = race_of_steps(title, works, against=against, rounds=rounds)
    timed = replace(timed, goals=tuple(goals))
    timed.facts.update(on.facts(batch))
    for name, watch in watches.items():
        timed.facts[f"ms of a step, {name}"] = {
            phase: round(1e3 * median(watch.between(*marks, skip=1)), 2) for phase, marks in PHASES.items()
        }
    for name, result in results.items():
        held = full_size.held(result, prepared[name])
        timed.facts[f"bytes_held by {name}"] = {kind: count for kind, count in held.items() if count}
    return timed


def _field(on: Subject, raced: Sequence[str]) -> Mapping[str, list[str]]:
    """By what they are compared with: one method, that with the fewest parts, for each part that has not been raced."""
    done = {part.key for name in raced if name != PLAIN for part in on.study.methods[name].parts}
    field: dict[str, list[str]] = {PLAIN: [], LORA: []}
    for key in registry.built_in():
        having = [name for name, method in on.study.methods.items() if key in {part.key for part in method.parts}]
        if key in done or not having:
            continue
        name = min(having, key=lambda name: len(on.study.methods[name].parts))
        parts = on.study.methods[name].parts
        if key in {part.key for part in hooks.trainers(parts)}:
            field[LORA if _has(on, name, "adapter") else PLAIN].append(name)
    if "lora-kl" in on.study.methods:
        field[LORA].append("lora-kl")
    return {against: list(dict.fromkeys(names)) for against, names in field.items() if names}


def _goal(on: Subject, name: str, against: str) -> Goal | None:
    """How long a step of a method may be, where that is a goal."""
    others = [part.key for part in on.study.methods[name].parts if "adapter" not in part.capabilities]
    if against == LORA and not others:
        return Goal(runner=name, limit=ADAPTER)
    limits = LIMITS if against == PLAIN else LIMITS_WITH_ADAPTERS
    return Goal(runner=name, limit=limits[others[0]]) if len(others) == 1 and others[0] in limits else None


def _has(on: Subject, name: str, capability: str) -> bool:
    return name != PLAIN and any(capability in part.capabilities for part in on.study.methods[name].parts)
