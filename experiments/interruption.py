"""What of a run is kept in a checkpoint, and how the run goes on from it: weights, the optimizer's and the parts' tensors,
and beside them as JSON the step (which stands for the learning rate and the place in the data), random states and the curve."""

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.log import Log
from experiments.random_state import random_state, set_random_state
from experiments.resume import Resume
from methods.part import Part, Run


def kept(resume: Resume, *, run: Run, parts: Sequence[Part], states: dict, optimizer: torch.optim.Optimizer, log: Log, step: int) -> None:
    """Write a checkpoint of a run that has `step` steps behind it."""
    moments = {f"optimizer/{name}/{key}": value for name, weight in run.weights.items()
               for key, value in optimizer.state.get(weight, {}).items()}  # fmt: skip
    resume.save(_changing(run, parts, states) | moments,
                {"step": step, "curve": log.curve, "seconds": log.seconds, "tokens": log.tokens, "flops": log.flops,
                 "random": random_state(run.device)})  # fmt: skip


def gone_on(resume: Resume, *, run: Run, parts: Sequence[Part], states: dict, optimizer: torch.optim.Optimizer, log: Log) -> int:
    """Put everything back as it was; returns the number of steps behind the run, 0 where there is no checkpoint of it."""
    found = resume.load(into=_changing(run, parts, states), device=run.device)
    if found is None:
        return 0
    tensors, position = found
    for name, weight in run.weights.items():
        here = f"optimizer/{name}/"
        entries = {key.removeprefix(here): value for key, value in tensors.items() if key.startswith(here)}
        if entries:
            optimizer.state[weight] = entries
    log.curve, log.seconds, log.tokens, log.flops = (position[key] for key in ("curve", "seconds", "tokens", "flops"))
    set_random_state(position["random"], run.device)
    return position["step"]


def _changing(run: Run, parts: Sequence[Part], states: dict) -> dict[str, Tensor]:
    """Every tensor that is there before the first step and changes with the steps."""
    tensors = {f"weights/{name}": weight.detach() for name, weight in run.weights.items()}
    for part in parts:
        tensors |= {f"{part.key}/{key}": tensor for key, tensor in part.keep(run=run, state=states[part.key]).items()}
    return tensors
