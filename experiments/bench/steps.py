"""What a method adds to a step of training: the steps of every method of the default study, and of EWC-LoRA, against
those of plain fine-tuning, on one and the same batch through the engine itself. All methods train side by side and take
one step each in turn; loading, preparation and a first step are not counted. Importance is of one document: a penalty
costs the same whatever its values.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from experiments.bench import full_size, running, subject
from experiments.bench.race import Race
from experiments.bench.stepwise import Pausing, race_of_steps
from experiments.bench.stopwatch import Stopwatch
from experiments.training.engine import FitResult, fit

TITLE = "A training step of each method"
PLAIN, LORA = "full", "lora"
ROUNDS = 7
PHASES = {
    "forward": ("begin", "forward"),
    "backward": ("forward", "backward"),
    "penalty": ("backward", "penalty"),
    "clipping": ("penalty", "update begins"),
    "update": ("update begins", "update ends"),
    "after it": ("update ends", "end"),
}


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    on, rounds = subject.find(small=small), rounds or ROUNDS
    batch = on.batch()
    methods = {PLAIN: ()} | {
        name: on.study.methods[name].parts for name in (*on.study.grid.methods, "ewc-lora") if name in on.study.methods
    }
    common = {"device": torch.device("cpu"), "compute_dtype": on.dtype}
    settings = {name: on.steps(name, batch, 1 + rounds) for name in methods}
    watches = {name: Stopwatch(common["device"]) for name in methods}
    prepared = {
        name: running.prepare(
            parts=parts, make=on.make, base=on.base, general=on.general[:1], settings=settings[name], **common
        )
        for name, parts in methods.items()
    }

    def training(name: str, pause: Callable[[], None]) -> FitResult:
        return fit(
            model=on.make(),
            parts=(*methods[name], *watches[name].parts, Pausing(pause=pause)),
            examples=batch,
            seed=0,
            settings=settings[name],
            base=on.base,
            states=prepared[name].states,
            **common,
        )

    title = f"{on.name}: a step of {len(batch)} rows"
    timed, results = race_of_steps(
        title, {name: partial(training, name) for name in methods}, against=PLAIN, rounds=rounds
    )
    timed.facts.update(on.facts(batch))
    for name, watch in watches.items():
        timed.facts[f"ms of a step, {name}"] = {
            phase: round(1e3 * median(watch.between(*marks, skip=1)), 2) for phase, marks in PHASES.items()
        }
    for name, result in results.items():
        held = full_size.held(result, prepared[name])
        timed.facts[f"bytes_held by {name}"] = {kind: count for kind, count in held.items() if count}
    yield timed
    adapted = [name for name, parts in methods.items() if any("adapts" in part.capabilities for part in parts)]
    if LORA in adapted and len(adapted) > 1:
        seconds = {name: timed.seconds[name] for name in sorted(adapted, key=lambda name: name != LORA)}
        title = f"{on.name}: the same steps against {LORA}"
        yield replace(timed, title=title, against=LORA, facts={}, seconds=seconds)
