"""Let the parts of a method prepare: first on the bare model (`calibrate`), then on the adapted one (`prepare`)."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.training import allocator, services
from experiments.training.engine import FitResult, fit
from experiments.training.flops import Flops, of_pass
from experiments.training.resume import Resume
from experiments.training.settings import TrainSettings
from methods.part import Part, Prepared, Row, adapted, in_order, overrides
from methods.tools.process_group import Shards


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a hook of one part has prepared, the seconds inside the hook, and the FLOPs (None: not known).

    FLOPs are those of every `fit` and of all text that is sampled, and those of the other passes that the part states,
    over the documents that are there.
    """

    part: Part
    prepared: Prepared
    seconds: float
    flops: float | None


def prepare(
    parts: Sequence[Part],
    *,
    make: Callable[[bool], nn.Module],
    general: Sequence[Row],
    base: Mapping[str, Tensor],
    seed: int,
    settings: TrainSettings,
    resume: Callable[[str], Resume],
    progress: Callable[..., Any] | None = None,
    shards: Shards = Shards(),
    tokenizer: Any = None,
    fitting: "Callable[..., Fitting] | None" = None,
    **placed: Any,
) -> Iterator[Preparation]:
    """One preparation after the other, so that each can be stored and freed before the next one begins.

    make      make(trains) → a new bare model; `trains`: the part gives it to `fit`, which cuts it among the processes
    settings  of training, for parts that train while they prepare
    resume    by a part's key, where it keeps what it has so far
    tokenizer for parts that sample text
    fitting   makes what parts train with, by default `Fitting`
    placed    `device` and `compute_dtype` of that training
    """
    lengths = [len(document["input_ids"]) for document in general]
    common = {"general": general, "seed": seed, "progress": progress, "shards": shards}
    sampling = functools.partial(services.Sampling, tokenizer, seed=seed, size=settings.micro_batch, shards=shards)
    states: dict[str, dict] = {}

    def made(part: Part, hook: str, model: nn.Module, **more: Any) -> Preparation | None:
        counter = Flops(model)
        stated = [each for each in part.preparation() if each.bare == (hook == "calibrate")]
        passes = [each for each in stated if each.training is None and not each.generated]
        flops = [of_pass(each, counter, lengths) for each in passes]
        began = time.perf_counter()
        prepared = getattr(part, hook)(model=model, **common, **more)
        seconds = time.perf_counter() - began
        for service in ("fit", "sample"):
            flops += more[service].flops if service in more else []
        total = None if None in flops else sum(flops)
        return None if prepared is None else Preparation(part=part, prepared=prepared, seconds=seconds, flops=total)

    for part in (part for part in in_order(parts) if overrides(part, "calibrate")):
        calibrated = made(part, "calibrate", make(False), sample=sampling())
        if calibrated is not None:
            states[part.key] = {"calibration": calibrated.prepared.calibration}
            yield calibrated
    for part in (part for part in in_order(parts) if overrides(part, "prepare")):
        model = make(any(each.training is not None for each in part.preparation()))
        torch.manual_seed(seed)
        model = adapted(model, parts, seed=seed, states=states)
        kept = resume(part.key)
        arguments = {"settings": settings, "base": base, "shards": shards, "name": f"prepare {part.key}"} | placed
        loop = (fitting or Fitting)(kept, **arguments)
        prepared = made(part, "prepare", model, base=base, resume=kept, fit=loop, sample=sampling())
        del model, loop
        if prepared is not None:
            yield prepared


class Fitting:
    """The engine's loop for a part that trains while it prepares; None keeps a setting of the method's own.

    Every call has checkpoints of its own: a second one does not continue from those of the first.

    flops  of each call; None where they are not known
    """

    def __init__(self, resume: Resume | None, *, settings: TrainSettings, **arguments: Any):
        self.flops: list[float | None] = []
        self._resume, self._settings, self._arguments = resume, settings, arguments

    def __call__(self, *, model, parts, examples, seed, **overrides: Any) -> FitResult:
        changed = {name: value for name, value in overrides.items() if value is not None}
        result = fit(
            model=model,
            parts=parts,
            examples=examples,
            seed=seed,
            settings=replace(self._settings, **changed),
            resume=self._resume and self._resume.within(f"fit-{len(self.flops)}"),
            **self._arguments,
        )
        self.flops.append(result.flops)
        allocator.give_back()
        return result
