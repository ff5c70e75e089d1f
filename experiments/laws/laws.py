"""The laws of a part, one function a law: it returns where the law holds, and raises `Broken` or `DoesNotApply`.

The law that two processes give the numbers of one stands in experiments/laws/processes.py.
"""

import contextlib
import functools
import io
import itertools
import math
import random
import re
import shutil
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from experiments.laws.trial import SETTINGS, Checkpoints, Killed, Trial, texts
from experiments.model.shape import Shape
from experiments.training import hardware, memory
from experiments.training.batches import epoch_steps, steps
from experiments.training.snapshot import tensors_in
from methods import listing, registry
from methods.errors import UserError
from methods.part import TENSORS, Part, in_order, overrides
from methods.settings import declared
from methods.tools import garbage
from methods.tools.architecture import base_name
from methods.tools.files import folder_sha256

LIVES = 100  # of a run that is killed after every checkpoint
# Long rows of a model whose tensors are large beside what a run holds whatever its size.
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 1000}
LENGTH = 64
SMALL = 1 << 18  # bytes of rows, positions and counters, which do not grow with a model
TOLERANCE = 0.03  # of predicted memory, as tests/experiments/test_memory.py measures it for the parts built in


class Broken(Exception):
    """The law does not hold; the message says what was found and what to do."""


class DoesNotApply(Exception):
    """The part declares that the law cannot hold for it, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one law holds for a part, and if not, what was found and what to do."""

    part: str
    law: str
    status: Literal["passed", "failed", "does not apply"]
    text: str = ""

    def __str__(self) -> str:
        return f"{self.part}  {self.law:{WIDTH}}  {self.status}" + (self.text and f": {self.text}")


def neutral(trial: Trial) -> None:
    """At its neutral setting it equals plain fine-tuning from the same start, bit for bit."""
    settings = trial.kind.neutral
    if isinstance(settings, str):
        if settings.startswith("none: ") and settings.removeprefix("none: ").strip():
            raise DoesNotApply(f"it has no neutral setting: {settings.removeprefix('none: ')}")
        raise Broken(
            f"`neutral` is {settings!r}: declare the settings at which the part is plain fine-tuning, such as "
            'neutral = {"strength": 0.0}, or neutral = "none: " and the reason why there is none'
        )
    part = trial.part(**settings)
    parts = in_order((*trial.beside, part))
    prepares = registry.phase_settings(part, "prepare") != registry.phase_settings(trial.part(), "prepare")
    states = trial.prepare(parts) if prepares else trial.states
    start = {name: tensor for state in states.values() for name, tensor in state.get("start", {}).items()}
    plain = trial.train(in_order((*trial.beside, _Start())), {_Start.key: {"start": start}} if start else None)
    own = trial.train(parts, states)
    _same(
        own.final,
        plain.final,
        what=f"at {_shown(settings)} its weights and those of plain fine-tuning",
        within=trial.kind.decomposed,
        then="make the part do nothing at its neutral setting: return before anything is added, drawn or rounded",
    )


def base(trial: Trial) -> None:
    """The adapted model computes the base's logits, also before the first step, and nothing writes into the base."""
    model = trial.model()
    before = trial.logits(model)
    then = "`adapt` may wrap and freeze; what it adds must start at zero"
    _same(
        {"logits": trial.logits(trial.adapted(trial.parts, trial.states))},
        {"logits": before},
        what="the adapted model's logits and the base's",
        within=trial.kind.decomposed,
        then=then,
    )
    started = any(state.get("start") for state in trial.states.values())
    if trial.trained.logits is not None and not started:
        _same(
            {"logits": trial.trained.logits},
            {"logits": before},
            what="the logits before the first step and the base's",
            within=trial.kind.decomposed,
            then="`begin` must leave the weights alone; weights to start from are prepared, as `start`",
        )
    then = "read `base` and `run.base`, never write"
    _same(trial.lent, trial.base, what="`base` after the run and before it", then=then)


def frozen(trial: Trial) -> None:
    """Entries that are not trained are the base's afterwards, bit for bit."""
    if trial.kind.frozen:
        raise DoesNotApply(trial.kind.frozen)
    run, final = trial.trained.result.run, trial.trained.final
    parameters = dict(run.model.named_parameters())
    kept = {
        base_name(name): parameter.detach()
        for name, parameter in parameters.items()
        if base_name(name) in trial.base and name not in run.weights
    }
    if not trial.kind.decomposed:
        _same(
            kept,
            {name: trial.base[name] for name in kept},
            what="tensors of the model that are not trained and the base's",
            then="change trained entries alone, which are in `run.weights`",
        )
    masks = {n: mask.expand_as(run.weights[n]) for n, mask in trial.trained.result.method.frozen().items()}
    _same(
        {name: run.weights[name].detach()[mask] for name, mask in masks.items()},
        {name: trial.base[base_name(name)][mask] for name, mask in masks.items()},
        what='entries that `state["frozen"]` names and the base\'s',
        then="name them before the first step, and do not move them in a hook; or declare in `frozen` why they move",
    )
    wrapped = {name.partition(".base_layer.")[0] + "." for name in parameters if ".base_layer." in name}
    adapted = {prefix for prefix in wrapped if any(name.startswith(prefix) for name in run.weights)}
    untouched = [
        base_name(name)
        for name in parameters
        if base_name(name) in kept and not any(name.startswith(prefix) for prefix in adapted)
    ]
    _same(
        {name: final[name] for name in untouched if name in final},
        {name: trial.base[name] for name in untouched if name in final},
        what="finished tensors that are neither trained nor adapted and the base's",
        then="leave them out of what `finish` gives: what is absent stays the base's",
    )


def repeatable(trial: Trial) -> None:
    """A second run gives the same bits, files and reports, whatever random numbers were drawn before it."""
    once = trial.trained
    random.random(), np.random.random(), torch.rand(1)
    states = trial.prepare(trial.parts)
    again = trial.train(trial.parts, states, save=trial.folder / "saved-again")
    then = "draw from a generator that is seeded with `run.seed`, and keep nothing in the module between two runs"
    _same_prepared(states, trial.states, what="prepares twice", then=then)
    _same(again.final, once.final, what="the weights of two equal runs", then=then)
    if again.reports != once.reports:
        raise Broken(f"two equal runs report {again.reports} and {once.reports}: report no time and no place")
    first, second = trial.folder / "saved", trial.folder / "saved-again"
    if first.is_dir() and folder_sha256(first) != folder_sha256(second):
        raise Broken("the files that `save` writes differ between two equal runs: sort what is written")


def resumable(trial: Trial) -> None:
    """A run that is killed after every checkpoint ends with the bits of the uninterrupted one."""
    folder = trial.folder / "resumed"
    shutil.rmtree(folder, ignore_errors=True)
    states, _ = _in_many_lives(functools.partial(trial.prepare, trial.parts), folder / "prepare")
    resumed, lives = _in_many_lives(functools.partial(trial.train, trial.parts, states), folder / "train")
    if lives < resumed.result.steps:  # no checkpoint is written after the last step
        raise Broken(f"of {resumed.result.steps} steps {lives - 1} were followed by a checkpoint")
    then = "keep what changes from step to step in `state`, or name its tensors in `keep`"
    _same_prepared(states, trial.states, what="prepares with interruptions and without", then=then)
    _same(resumed.final, trial.trained.final, what="the weights of an interrupted run and of a whole one", then=then)
    if resumed.reports != trial.trained.reports:
        raise Broken(f"an interrupted run reports {resumed.reports}, a whole one {trial.trained.reports}: {then}")


def predicted_memory(trial: Trial) -> None:
    """The memory that is predicted covers what is taken, in the preparation and in the training of a bfloat16 model."""
    large = replace(
        trial,
        architecture="llama",
        dtype=torch.bfloat16,
        config=SIZES,
        training=replace(SETTINGS, batch=8, micro_batch=4, length=LENGTH, learning_rate=1e-5),
        length=LENGTH,
        folder=trial.folder / "large",
    )
    parts, shape = large.parts, Shape(config=large.model().config)
    states: dict[str, dict] = {}
    hardware.dense_peak(torch.device("cpu"), large.dtype)  # its first call measures with matrices of its own

    def compare(phase: memory.Phase, run: Callable[[], object]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_in(states)}
        taken = sum(storage.nbytes() for storage in storages.values()) + _allocated(run)
        predicted = memory.predict(
            phase=phase,
            shape=shape,
            parts=parts,
            settings=large.training,
            checkpoint_dtype=large.dtype,
            compute_dtype=large.dtype,
            device_type="cpu",
            longest=LENGTH,
        )["total"]
        if predicted is not None and predicted < (1 - TOLERANCE) * taken - SMALL:
            raise Broken(
                f"{'preparation' if phase == 'prepare' else 'training'} takes {taken / 2**20:.1f} MiB at its peak, and "
                f"{predicted / 2**20:.1f} MiB are predicted. What to do: return from `memory` what the part holds and "
                "takes"
            )

    if any(overrides(part, hook) for part in parts for hook in ("calibrate", "prepare")):
        compare("prepare", lambda: states.update(large.prepare(parts)))
    compare("train", lambda: large.fit(parts, states))


def costs(trial: Trial) -> None:
    """The tokens that the part states, which `plan` shows, are those it reads; in training to within a row a step."""
    (part,) = (part for part in trial.parts if part.key == trial.kind.key)
    trial.prepare(trial.parts)
    lengths, stated = [len(document["input_ids"]) for document in trial.general], 0.0
    for each in part.preparation():
        cut = each.cut(lengths)
        epochs = (each.training or {}).get("epochs") or 1.0
        batch = trial.training.batch
        passes = steps(len(cut), batch, epochs) / epoch_steps(len(cut), batch) if each.training is not None else 1.0
        stated += passes * sum(cut)
    writes = any(each.generated for each in part.preparation())  # a text may end before it is as long as stated
    if not (0 < trial.read[part.key] <= stated if writes else math.isclose(stated, trial.read[part.key], rel_tol=0.01)):
        raise Broken(
            f"it states passes over {stated:.0f} tokens, and reads {trial.read[part.key]} while it prepares. What to "
            "do: return from `preparation` how many documents it reads, cut at which length, and from `prepare` "
            "the tokens"
        )
    result, rows = trial.trained.result, texts(trial.rows, seed=12, labelled=True, length=trial.length)
    if result.tokens == 0 or overrides(part, "finish"):  # what `finish` reads is in no step
        return
    added = part.added()
    read = added.begin + added.read + added.pooled * trial.training.cut(trial.shards.world)
    stated = (added.trained + read) * sum(len(row["input_ids"]) for row in rows)
    taken = result.added.get(part.key, {}).get("tokens", 0)
    longest = max(added.length or 0, *(len(row["input_ids"]) for row in rows))
    if abs(stated - taken) > result.steps * longest * bool(stated):
        raise Broken(
            f"it states {stated:.0f} tokens beside those of the domain in {result.steps} steps, and {taken} are "
            "charged to it. What to do: return from `added` the tokens it adds for each token of the domain"
        )


def described(trial: Trial) -> None:
    """Title, paper and line are there, and every setting is bounded and has a help text."""
    kind, missing = trial.kind, []
    if not kind.title:
        missing.append("a title")
    if not kind.paper.startswith("https://") and "provides_weights" not in kind.capabilities:
        missing.append(f"the paper's https address (it is {kind.paper!r})")
    if not kind.line.endswith("."):
        missing.append(f"one line of description that ends with a full stop (it is {kind.line!r})")
    kinds = typing.get_type_hints(kind)
    for field in declared(kind):
        if not field.metadata["help"]:
            missing.append(f"a help text of the setting {field.name}")
        kind_of = kinds[field.name]
        choices = typing.get_args(kind_of) if isinstance(kind_of, types.UnionType) else (kind_of,)
        if {int, float} & set(choices) and not field.metadata["within"]:
            missing.append(f'the interval of the setting {field.name}, such as within="[0, inf)"')
    if kind.key in registry.built_in() and not (listing.DOCS / f"{kind.key}.md").is_file():
        missing.append(f"docs/methods/{kind.key}.md: `python -m methods docs` writes it")
    if missing:
        raise Broken(f"it lacks {'; '.join(missing)}")


LAWS: Mapping[str, Callable[[Trial], None]] = {
    "described": described,
    "neutral": neutral,
    "base": base,
    "frozen": frozen,
    "repeatable": repeatable,
    "resumable": resumable,
    "memory": predicted_memory,
    "costs": costs,
}
ONCE = ("described", "memory", "costs")  # the same on every architecture
PROCESSES = "processes"
WIDTH = max(map(len, (*LAWS, PROCESSES)))


def judge(law: str, trial: Trial) -> Verdict:
    """The verdict on one law of one trial."""
    return verdict(law, trial, lambda: LAWS[law](trial))


def verdict(law: str, trial: Trial, hold: Callable[[], None]) -> Verdict:
    """What `hold` found: whatever a faulty part raises is the verdict's text, and what it prints is not shown."""
    part = trial.kind.key or trial.kind.__name__
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            hold()
    except DoesNotApply as reason:
        return Verdict(part=part, law=law, status="does not apply", text=str(reason))
    except Broken as broken:
        where = "" if law in ONCE else f" ({trial.architecture})"
        return Verdict(part=part, law=law, status="failed", text=f"{broken}{where}")
    except Exception as error:  # a faulty part may raise anything
        return Verdict(part=part, law=law, status="failed", text=in_one_line(error, trial))
    return Verdict(part=part, law=law, status="passed")


def in_one_line(error: BaseException, trial: Trial) -> str:
    """An error in one line, with the line of the part's own file that it went through last."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if trial.kind.__module__.replace(".", "/") in frame.filename
    ]
    where = f", line {frames[-1].lineno} of {frames[-1].name} in {trial.kind.__module__}" if frames else ""
    text = re.sub(r"\s+", " ", str(error)).strip()
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{name}{text or 'no message'}{where} ({trial.architecture})"


class _Start(Part):
    """Plain fine-tuning from given weights."""

    key = "start"


def _same(own: Mapping[str, Tensor], other: Mapping[str, Tensor], *, what: str, then: str, within: float = 0.0) -> None:
    """Raise `Broken` unless the tensors are equal to the bit, or within the relative error `within`."""
    if odd := sorted(own.keys() ^ other.keys()):
        raise Broken(f"{what} are not of the same names: {odd[0]} is in one alone. What to do: {then}")
    worst, differing = ("", 0.0), 0
    for name, tensor in own.items():
        if torch.equal(tensor, other[name]):
            continue
        error = relative(tensor, other[name])
        if not error <= within:
            differing += 1
            if not error <= worst[1]:
                worst = name, error
    if differing:
        allowed = f"{within:.0e} is declared" if within else "they must be equal to the bit"
        raise Broken(
            f"{what} differ in {differing} of {len(own)} tensors, most in {worst[0]}, by {worst[1]:.2g} of its norm; "
            f"{allowed}. What to do: {then}"
        )


def relative(tensor: Tensor, other: Tensor) -> float:
    """‖tensor − other‖ / ‖other‖; infinite where the shapes differ or a value is not a number."""
    if tensor.shape != other.shape:
        return math.inf
    error = (tensor.double() - other.double()).norm().item() / max(other.double().norm().item(), 1e-30)
    return error if math.isfinite(error) else math.inf


def _same_prepared(own: Mapping[str, dict], other: Mapping[str, dict], *, what: str, then: str) -> None:
    """The same of everything that the parts prepare; 8-bit codes are compared by the tensors they are made of."""
    for key, prepared in other.items():
        for kind in TENSORS:
            one, two = (
                {
                    f"{name}[{index}]": tensor
                    for name, value in kinds.get(kind, {}).items()
                    for index, tensor in enumerate(tensors_in(value))
                }
                for kinds in (own.get(key, {}), prepared)
            )
            _same(one, two, what=f"the {kind} that {key} {what}", then=then)


def _in_many_lives(run: Callable[..., Any], folder: Path) -> tuple[Any, int]:
    """What `run` returns when it is killed after every checkpoint and continued, and how often it was begun."""
    for lives in range(1, LIVES + 1):
        with contextlib.suppress(Killed):
            return run(checkpoints=Checkpoints(folder)), lives
    raise Broken(f"it is not done after {LIVES} interruptions: a checkpoint is written, but not used")


def _allocated(run: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator held while `run` ran, beyond what it held before."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # what was left by others would be freed meanwhile
    with garbage.frozen(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def _shown(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {listing.yaml(value)}" for name, value in settings.items()) or "its trial settings"
