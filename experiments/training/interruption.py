"""What of a run is kept in a checkpoint, and how the run goes on from it.

Kept are the weights, whatever has changed in the optimizer, in every part's state and in the model's other tensors
(experiments/training/snapshot.py), what a part's `keep` names, and as JSON the step (which stands for the learning rate and the place in the
data), random states and the curve. Where a change is of a kind that cannot be kept, no checkpoint is written, and that is said.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from experiments.training.log import Log
from experiments.training.random_state import random_state, set_random_state
from experiments.training.resume import Resume
from experiments.training.snapshot import Beginning, Unkeepable
from methods.part import Part, Run

OPTIMIZER, MODEL = "its optimizer", "its model"  # no part's key has a space


class Interruption:
    """One run, all of it ready for its first step, and its checkpoints."""

    def __init__(
        self,
        resume: Resume,
        *,
        run: Run,
        parts: Sequence[Part],
        states: Mapping[str, dict],
        optimizer: torch.optim.Optimizer,
        log: Log,
    ) -> None:
        self._resume, self._run, self._parts, self._states, self._optimizer, self._log = (
            resume,
            run,
            parts,
            states,
            optimizer,
            log,
        )
        apart = (run, run.base, run.shards, run.moments, optimizer, *parts, *run.model.modules())
        self._begun = {
            name: Beginning(value, place=place, weights=run.weights, apart=apart)
            for name, (place, value) in self._changing().items()
        }
        self._named = self._by_parts()

    def go_on(self) -> int:
        """Put everything back as it was; returns the number of steps behind the run, 0 where there is no checkpoint of it."""
        room = {place: tensor for begun in self._begun.values() for place, tensor in begun.room().items()}
        found = self._resume.load(into=self._weights() | self._named, room=room, device=self._run.device)
        steps = 0
        if found is not None:
            tensors, position = found
            for name, begun in self._begun.items():
                self._set(name, begun.restore(position["changes"][name], tensors))
            for name in ("curve", "seconds", "tokens", "flops", "added"):
                setattr(self._log, name, position[name])
            set_random_state(position["random"], self._run.device)
            steps = position["step"]
        for begun in self._begun.values():
            begun.settle()
        return steps

    def keep(self, step: int) -> None:
        """Write a checkpoint of the run with `step` steps behind it."""
        tensors, changes, problem = self._weights(), {}, None
        try:
            named = self._by_parts()
            if odd := sorted(named.keys() ^ self._named.keys()):
                raise Unkeepable(
                    f"the part's `keep` names {odd[0]} at one step and not at another: it must name the same tensors throughout"
                )
            tensors |= named
            for name, (_, value) in self._changing().items():
                changes[name], changed = self._begun[name].changes(value)
                tensors |= changed
        except Unkeepable as error:
            problem = str(error)
        self._resume.save(
            tensors,
            {
                "step": step,
                "curve": self._log.curve,
                "seconds": self._log.seconds,
                "tokens": self._log.tokens,
                "flops": self._log.flops,
                "added": self._log.added,
                "random": random_state(self._run.device),
                "changes": changes,
            },
            problem=problem,
        )

    def _weights(self) -> dict[str, Tensor]:
        return {f"weights/{name}": weight.detach() for name, weight in self._run.weights.items()}

    def _by_parts(self) -> dict[str, Tensor]:
        return {
            f"{part.key}/{name}": tensor
            for part in self._parts
            for name, tensor in part.keep(run=self._run, state=self._states[part.key]).items()
        }

    def _changing(self) -> dict[str, tuple[str, object]]:
        """What is looked through for changes, and how its place begins."""
        found: dict[str, tuple[str, object]] = {
            OPTIMIZER: ("optimizer", self._optimizer_tree()),
            MODEL: ("model", self._others()),
        }
        for part in self._parts:
            state = self._states[part.key]
            kept = {name: value for name, value in state.items() if name not in part.scratch} if part.scratch else state
            found[part.key] = f"{part.key}: state", kept
        return found

    def _others(self) -> dict[str, Tensor]:
        """The model's tensors that are not trained, which a part may change all the same."""
        model, trained = self._run.model, self._run.weights
        return {
            name: tensor
            for tensors in (model.named_parameters(), model.named_buffers())
            for name, tensor in tensors
            if name not in trained
        }

    def _optimizer_tree(self) -> dict:
        """What an optimizer holds: its state by the weights' names, its groups, tensors of its own that it trains, and its attributes."""
        names = {id(weight): name for name, weight in self._run.weights.items()}
        own = {}
        for number, group in enumerate(self._optimizer.param_groups):
            for index, tensor in enumerate(group["params"]):
                if id(tensor) not in names:
                    names[id(tensor)] = f"group {number}, tensor {index}"
                    own[names[id(tensor)]] = tensor
        left_out = {"state", "param_groups", *getattr(type(self._optimizer), "scratch", ())}
        return {
            "state": {names.get(id(key), key): value for key, value in self._optimizer.state.items()},
            "own": own,
            "groups": [
                {name: value for name, value in group.items() if name != "params"}
                for group in self._optimizer.param_groups
            ],
            "attributes": {name: value for name, value in vars(self._optimizer).items() if name not in left_out},
        }

    def _set(self, name: str, back: dict) -> None:
        """Give back what was not put back in place."""
        if name == OPTIMIZER:
            tensors = dict(self._run.weights) | back["own"]
            state = {
                tensors.get(key, key) if isinstance(key, str) else key: value for key, value in back["state"].items()
            }
            self._optimizer.state.clear()
            self._optimizer.state.update(state)
            for group, values in zip(self._optimizer.param_groups, back["groups"], strict=True):
                group.update(values)
            vars(self._optimizer).update(back["attributes"])
        elif name == MODEL:
            there = self._others()
            for path in [path for path, tensor in back.items() if tensor is not there.get(path)]:
                module, _, own = path.rpartition(".")
                setattr(self._run.model.get_submodule(module), own, back[path])
        else:
            (part,) = (part for part in self._parts if part.key == name)
            state = self._states[name]
            found = {key: state[key] for key in part.scratch if key in state} | back
            state.clear()
            state.update(found)
