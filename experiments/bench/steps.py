"""What a method adds to a step of training: the steps of every method of the default study, and of EWC-LoRA, against
those of plain fine-tuning, on one and the same batch through the engine itself. All methods train side by side and take
one step each in turn; loading, preparation and a first step are not counted. Importance is of one document: a penalty
costs the same whatever its values.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

from experiments.bench.race import Race, race

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
    import torch

    from experiments.bench import full_size, running, subject
    from experiments.bench.stepwise import Pausing, Stepwise
    from experiments.bench.stopwatch import Stopwatch
    from experiments.training.engine import fit
    from methods.tools.process_group import Shards

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
            parts=parts, make=on.make, general=on.general[:1], settings=settings[name], shards=Shards(), **common
        )
        for name, parts in methods.items()
    }

    def training(name: str) -> Callable:
        return lambda pause: fit(
            model=on.make(),
            parts=(*methods[name], *watches[name].parts, Pausing(pause=pause)),
            examples=batch,
            seed=0,
            settings=settings[name],
            base=on.base,
            states=prepared[name].states,
            **common,
        )

    runs = {name: Stepwise(training(name)) for name in methods}
    with contextlib.redirect_stderr(io.StringIO()):  # a bar for each of several fits
        for run in runs.values():
            run.go()
        found = race(
            f"{on.name}: a step of {len(batch)} rows",
            {name: run.go for name, run in runs.items()},
            against=PLAIN,
            rounds=rounds,
            warm=0,
        )
        for run in runs.values():
            run.go()
    found.facts.update(
        {
            "tokens a step": sum(len(e["input_ids"]) for e in batch),
            "weights": sum(t.numel() for t in on.base.values()),
            "computed in": str(on.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
    )
    for name, watch in watches.items():
        found.facts[f"ms of a step, {name}"] = {
            phase: round(1e3 * median(watch.between(*marks, skip=1)), 2) for phase, marks in PHASES.items()
        }
    for name, run in runs.items():
        found.facts[f"bytes_held by {name}"] = {
            kind: count for kind, count in full_size.held(run.result, prepared[name]).items() if count
        }
    yield found
    if adapted := [
        name
        for name in methods
        if any("adapts" in part.capabilities for part in methods[name]) and name != LORA and LORA in methods
    ]:
        yield replace(
            found,
            title=f"{on.name}: the same steps against {LORA}",
            against=LORA,
            facts={},
            seconds={name: found.seconds[name] for name in (LORA, *adapted)},
        )
