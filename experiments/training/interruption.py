"""Saves a run's checkpoints, and resumes an interrupted run from one.

A checkpoint holds the weights, the best step's weights where a rule keeps them, the tensors that a part's `keep` names,
whatever has changed in the optimizer, the parts' states, the model's other tensors and the random generators
(experiments/training/snapshot.py), and as JSON the number of steps, which gives the learning rate and the position in
the data, and the curve. Where a change cannot be restored no checkpoint is written, and a message says so.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from experiments.training.hooks import Hooks
from experiments.training.log import Log
from experiments.training.random_state import random_state, set_random_state
from experiments.training.resume import Resume
from experiments.training.snapshot import Snapshot, Unkeepable, restore
from methods.part import Run

LOGGED = ("curve", "seconds", "tokens", "flops", "added")


class Interruption:
    """One run, ready for its first step, and its checkpoints."""

    def __init__(
        self,
        resume: Resume,
        *,
        run: Run,
        method: Hooks,
        optimizer: torch.optim.Optimizer,
        log: Log,
        best: Mapping[str, Tensor] = {},
    ) -> None:
        self._best = {f"best/{name}": tensor for name, tensor in best.items()}
        self._resume, self._run, self._parts, self._states = resume, run, method.parts, method.states
        self._optimizer, self._log = optimizer, log
        apart = (run, run.base, run.shards, run.moments, *method.parts, *run.model.modules())
        self._snapshot = partial(Snapshot, weights=run.weights, apart=apart)
        self._begun = self._snapshot(self._values())
        self._kept = self._kept_by_parts()

    def restore(self) -> int:
        """Put everything back as the newest checkpoint has it; the number of steps done, 0 where there is none."""
        into = self._weights() | self._kept
        checkpoint, steps = self._resume.newest(into), 0
        if checkpoint is not None:
            checkpoint.read_into(into)
            values = restore(self._begun, checkpoint.position["changes"], checkpoint.tensor)
            self._set_model(values["model"])
            for part in self._parts:
                state, back = self._states[part.key], values[f"{part.key}: state"]
                for key in state.keys() - back.keys() - set(part.scratch):
                    del state[key]
                state.update(back)
            set_random_state(values["random"], self._run.device)
            vars(self._log).update(checkpoint.position["log"])
            steps = checkpoint.position["step"]
        self._begun.objects = {}  # what a part drops from now on is not held
        return steps

    def save(self, step: int) -> None:
        """Write a checkpoint of the run after `step` steps."""
        kept, changes, changed, problem = self._kept_by_parts(), {}, {}, None
        try:
            if odd := sorted(kept.keys() ^ self._kept.keys()):
                raise Unkeepable(
                    f"the part's `keep` names {odd[0]} at one step and not at another: "
                    "it must name the same tensors throughout"
                )
            snapshot = self._snapshot(self._values(), begun=self._begun)
            changes, changed = snapshot.changes, snapshot.tensors
        except Unkeepable as error:
            problem = str(error)
        log = {name: getattr(self._log, name) for name in LOGGED}
        position = {"step": step, "log": log, "changes": changes}
        self._resume.save(self._weights() | kept | changed, position, problem=problem)

    def _weights(self) -> dict[str, Tensor]:
        return {f"weights/{name}": weight.detach() for name, weight in self._run.weights.items()} | self._best

    def _kept_by_parts(self) -> dict[str, Tensor]:
        return {
            f"{part.key}/{name}": tensor.detach()
            for part in self._parts
            for name, tensor in part.keep(run=self._run, state=self._states[part.key]).items()
        }

    def _values(self) -> dict[str, object]:
        """Everything that is compared with the beginning, by place."""
        values = {"optimizer": self._optimizer, "model": self._others()}
        for part in self._parts:
            state = self._states[part.key]
            values[f"{part.key}: state"] = {key: value for key, value in state.items() if key not in part.scratch}
        return values | {"random": random_state(self._run.device)}

    def _others(self) -> dict[str, Tensor]:
        """The model's tensors that are not trained, which a part may change all the same."""
        model, trained = self._run.model, self._run.weights
        every = [*model.named_parameters(), *model.named_buffers()]
        return {name: tensor for name, tensor in every if name not in trained}

    def _set_model(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the model the tensors that were not restored in place."""
        there = self._others()
        for name, tensor in tensors.items():
            if tensor is not there.get(name):
                module, _, own = name.rpartition(".")
                setattr(self._run.model.get_submodule(module), own, tensor)
