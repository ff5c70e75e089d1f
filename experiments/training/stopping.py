"""Probes of a run: when it is probed, when a rule on the probes ends it, and which of its weights the rule keeps.

A change is a probe's value minus that of step 0, before any training. Nats and perplexity are worse when they rise,
accuracy when it falls. A limit is the largest change for the worse that is allowed, written with its sign:
{general_nll: +0.1, sciq: -0.05}. The rule reads the curve alone, so that a run that resumes decides as one that was
never interrupted, and before it acts a run has the same bits as a run without it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from experiments.training.log import Log
from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.part import Run
from methods.tools.names import unknown

PREFIX = "probe_"  # of a probe's columns in the curve


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`train.stop` and `train.keep` of one cell.

    stop   the limit of each measure, by its name
    best   the measure whose least value names the step that is kept; None: the last step is
    where  the path of `stop` or `keep` in a message
    """

    stop: Mapping[str, float]
    best: str | None = None
    where: str = "train"

    def past(self, first: Mapping[str, float], values: Mapping[str, float]) -> dict[str, float]:
        """The changes that are past their limits; one that is not a number is."""
        changes = {name: values[name] - first[name] for name in self.stop}
        return {name: change for name, change in changes.items() if not _within(change, name, self.stop[name])}

    def best_step(self, probed: Mapping[int, Mapping[str, float]]) -> int | None:
        """Of the probed steps at which every limit holds, the earliest with the least value of `best`."""
        if self.best is None:
            return None
        first, values = probed[0], {0: probed[0][self.best]}  # at step 0 nothing has changed
        for step, row in probed.items():
            if row[self.best] == row[self.best] and not (step and self.past(first, row)):
                values[step] = row[self.best]
        return min(values, key=lambda step: (values[step] != values[step], values[step], step))

    def check(self, names: Collection[str]) -> None:
        """Raise UserError for a measure that is not among the probed `names`, and for a limit of the other sign."""
        for name, limit in self.stop.items():
            if name not in names:
                raise unknown("probe", name, names, where=f"{self.where}.stop")
            if limit * _worse(name) < 0:
                kind = (
                    "accuracy is worse when it falls" if limit > 0 else "nats and perplexity are worse when they rise"
                )
                raise UserError(f"{self.where}.stop.{name} is {limit:g}, but {kind}: write {-limit:+g}")
        if self.best is not None and self.best not in names:
            raise UserError(
                f"{self.where}.keep is 'best', which is the probed step with the least {self.best}, and no rows of the "
                "domain are probed: give it `split.probe`, or leave `keep` out"
            )


def _worse(name: str) -> int:
    """+1 where a rise of a measure is worse, -1 where a fall is."""
    return 1 if name.endswith("_nll") or name == "perplexity" else -1


def _within(change: float, name: str, limit: float) -> bool:
    return change * _worse(name) <= abs(limit)


def rule_of(settings: TrainSettings, *, domain: str, where: str = "train") -> Rule | None:
    """The rule of a cell; None where it has none. Raises UserError for one that could never act.

    where   the block that states it
    """
    if not settings.acts_on_probes:
        return None
    if settings.probes in (0, 1):
        which = "only the first and the last step are" if settings.probes else "no step is"
        raise UserError(
            f"{where} has a rule on probes, but `probes` is {settings.probes}, so that {which} probed: "
            "set it to doubling, or to 2 or more"
        )
    return Rule(stop=settings.stop or {}, best=f"{domain}_nll" if settings.keep == "best" else None, where=where)


def due(times: int | Literal["doubling"], *, steps: int) -> set[int]:
    """After how many steps a run of `steps` is probed, without its last one.

    A model forgets most in its first steps, so those are probed most often: 0, 1, 2, 4, 8, … with "doubling". A number
    gives so many probes at equal distances.
    """
    if times == "doubling":
        return {0, *(2**i for i in range(steps.bit_length()) if 2**i < steps)} if steps else set()
    return {round(i * steps / times) for i in range(times)}


def told(record: Mapping[str, Any]) -> str:
    """What a rule did (`Probes.record`), in a sentence."""
    stopped, kept, limits = record["stopped_at"], record["kept_step"], record["rule"]["stop"]
    past = ", ".join(f"{n} changed by {change:+.3g}, limit {limits[n]:+g}" for n, change in record["past"].items())
    done = f"stopped at step {stopped} of {record['steps_planned']}" if stopped else "went to its last step"
    weights = f"; the weights are those of step {kept}" if record["rule"]["keep"] == "best" else ""
    return f"{done}{f' ({past})' if past else ''}{weights}"


class Probes:
    """Probes one run, outside timed training, and applies its rule.

    probe    probe(model) → {name: value}; None: the run is not probed
    times    `train.probes` (`due`); the last step is probed, too
    steps    of the whole run

    weights  the trained tensors of the best step so far, by name, on the CPU; none where the last step is kept.
             A checkpoint holds them.
    """

    def __init__(
        self,
        probe: Callable[[nn.Module], dict[str, float]] | None,
        *,
        rule: Rule | None,
        times: int | Literal["doubling"],
        steps: int,
        run: Run,
        trained: Any,
        log: Log,
    ) -> None:
        self._probe, self._rule, self._run, self._trained, self._log = probe, rule, run, trained, log
        self._steps = steps
        self._due = due(times, steps=steps) if probe else set()
        self.stopped_at: int | None = None  # steps that were done when the rule ended the run
        best = rule is not None and rule.best is not None
        self.weights = {n: torch.empty_like(w, device="cpu") for n, w in run.weights.items()} if best else {}
        if rule is not None and probe is None:
            rule.check(())

    def end_run(self, step: int) -> bool:
        """Probe the run if it is due after `step` steps; whether the rule ends it there."""
        if step not in self._due:
            return False
        with self._log.pause():
            if step == 0:
                self._log.curve.append({"step": 0, "tokens": 0, "seconds": 0.0})
            past = self._look()
        if past and step:
            self.stopped_at = step
        return self.stopped_at is not None

    def finish(self) -> None:
        """Probe the run after its last step, and give it the weights of the best one, if the rule keeps that."""
        if self._due and self._log.curve and self.stopped_at is None:
            self._look()
        if self.weights and self._log.curve:
            with torch.no_grad():
                for name, weight in self._run.weights.items():
                    weight.copy_(self.weights[name])
            self._trained.update_model()

    def record(self) -> dict[str, Any]:
        """What the rule did, as JSON; a run that has a rule, and a step, is probed."""
        probed, rule = self._probed(), self._rule
        last = max(probed)
        kept = last if rule.best is None else rule.best_step(probed)
        measures = [*rule.stop, *([rule.best] if rule.best not in (None, *rule.stop) else [])]
        steps = {"first": 0, "last": last, "kept": kept}
        return {
            "rule": {"stop": dict(rule.stop), "keep": "last" if rule.best is None else "best"},
            "stopped_at": self.stopped_at,
            "past": rule.past(probed[0], probed[last]),
            "kept_step": kept,
            "values": {name: {place: probed[step][name] for place, step in steps.items()} for name in measures},
            "steps_planned": self._steps,
        }

    def _look(self) -> dict[str, float]:
        """Add the probe's values to the last step of the curve; the changes that are past the rule's limits."""
        values, rule, row = self._trained.compute(self._probe), self._rule, self._log.curve[-1]
        if rule is not None:  # all processes decide by the same numbers
            values = self._run.shards.broadcast(values)
            rule.check(values)
        row |= {PREFIX + name: value for name, value in values.items()}
        if rule is None:
            return {}
        probed = self._probed()
        if self.weights and rule.best_step(probed) == row["step"]:
            for name, weight in self._run.weights.items():
                self.weights[name].copy_(weight.detach())
        return rule.past(probed[0], values)

    def _probed(self) -> dict[int, dict[str, float]]:
        """The values of every probed step of the curve."""
        rows = {row["step"]: {k[len(PREFIX) :]: row[k] for k in row if k.startswith(PREFIX)} for row in self._log.curve}
        return {step: values for step, values in rows.items() if values}
