"""Whole fits on the device against each other and against what was predicted of them: random weights, random tokens.

Each check returns {"status": "passed" or "failed", its numbers}; what "passed" asks for stands in its docstring.
"""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.bench import running, sizes
from experiments.bench.sizes import Skipped
from experiments.model.shape import Shape
from experiments.training import memory
from experiments.training.engine import FitResult
from experiments.training.resume import Resume
from experiments.training.settings import TrainSettings
from methods import registry
from methods.part import Part
from methods.tools.effective import base_parameters
from methods.tools.process_group import Shards
from tests.gpu import models
from tests.gpu.verdict import judged
from tests.gpu.waiting import Watcher

MEMORY_WITHIN = 0.15


def zero_strength(device: torch.device, *, tiny: bool, lora: bool = False) -> dict:
    """Weights after some steps with a penalty of strength 0 against plain fine-tuning: bit for bit, in deterministic
    kernels.

    `repeats` says whether plain fine-tuning itself comes out equal twice in torch's ordinary kernels.
    """
    beside = {"lora": {}} if lora else {}
    if lora:
        sizes.parts_of("lora")
    model = models.llama(device, tiny)
    adapted = registry.build(beside)
    with _deterministic():
        plain = _weights(_fit(model, registry.build(beside), device))
        wrong = []
        for name in ("ewc", "hierarchical"):
            part = registry.build({name: {"strength": 0.0}})[0]
            state = {"importance": _ones(model)}
            if name == "hierarchical":
                state["start"] = _start(model, adapted)
            found = _weights(_fit(model, (part, *adapted), device, states={name: state}))
            wrong += [f"{name}: {key}" for key, value in found.items() if not torch.equal(value, plain[key])]
    twice = [_weights(_fit(model, registry.build(beside), device)) for _ in range(2)]
    repeats = all(torch.equal(value, twice[1][key]) for key, value in twice[0].items())
    return judged(not wrong, {"wrong": wrong[:10], "repeats": repeats})


def resumed(device: torch.device, *, tiny: bool, method: str) -> dict:
    """A run that is stopped after three steps and resumed, against one that is not: bit for bit, in
    deterministic kernels.
    """
    model, parts = models.llama(device, tiny), sizes.parts_of(method)
    states = {"ewc": {"importance": _ones(model)}} if method == "ewc" else {}
    with _deterministic(), tempfile.TemporaryDirectory() as folder:
        whole = _weights(_fit(model, parts, device, states=states))

        def at():
            return Resume(Path(folder) / "run", identity={"check": method}, every=0)

        with contextlib.suppress(_Stop):
            _fit(model, (*parts, _StopAfter(steps=3)), device, states=states, resume=at())
        continued = _fit(model, parts, device, states=states, resume=at())
        weights = _weights(continued)
    wrong = [key for key, value in weights.items() if not torch.equal(value, whole[key])]
    return judged(not wrong and continued.resumed == 2, {"wrong": wrong[:10], "steps_resumed": continued.resumed})


def sharded(device: torch.device, *, tiny: bool, dtype: torch.dtype, shards: Shards) -> dict:
    """fully_shard in one process against the plain layout, after some steps.

    float32: weights within a relative 1e-6. bfloat16: within 1 % of how far the plain run moved.
    """
    _needs(shards)
    model = models.llama(device, tiny, dtype)
    base = {name: p.detach().clone() for name, p in base_parameters(model).items()}
    plain, other = (
        _weights(_fit(model, (), device, shards=s, compute_dtype=dtype, base=base)) for s in (Shards(), shards)
    )

    def whole(tensors):
        return torch.cat([tensors[name].double().flatten() for name in plain])

    start = torch.cat([base[name].double().flatten() for name in plain])
    moved, apart = (whole(plain) - start).norm().item(), (whole(other) - whole(plain)).norm().item()
    numbers = {"apart_of_weights": apart / whole(plain).norm().item(), "apart_of_movement": apart / moved}
    return judged(
        numbers["apart_of_weights"] <= 1e-6 if dtype == torch.float32 else numbers["apart_of_movement"] <= 1e-2, numbers
    )


def no_waiting(device: torch.device, *, tiny: bool, shards: Shards) -> dict:
    """Where the host waits for the device inside a step of MoFO with EWC: nowhere. Steps 3 to 5 of 6 are watched."""
    if device.type != "cuda":
        raise Skipped("a CPU computes as it is asked: nothing waits")
    model = models.llama(device, tiny, torch.bfloat16)
    parts = registry.build({"ewc": {}, "mofo": {}})
    watcher = Watcher(first=2, last=4)
    states = {"ewc": {"importance": _ones(model)}}
    _fit(model, (*parts, watcher), device, states=states, shards=shards, steps=6, compute_dtype=torch.bfloat16)
    places = {place: count / 3 for place, count in sorted(watcher.places.items())}
    return judged(not places, {"waits_a_step": sum(places.values()), "places": places})


def memory_predicted(device: torch.device, *, method: str, shards: Shards) -> dict:
    """memory.predict against torch's largest allocation of a fit, a model of 0.5 B weights in bfloat16: within 15 %."""
    if device.type != "cuda":
        raise Skipped("nothing counts what a process allocates on the CPU")
    if shards.active:
        _needs(shards)
    parts = sizes.parts_of(method)
    settings = _settings(steps=4, rows=8, length=512)
    peak = running.Peak(device)
    model = sizes.build("llama", device=device, dtype=torch.bfloat16, **models.LARGE)
    shape = Shape(config=model.config)
    base = running.base_of(lambda: model, parts)
    states = {"ewc": {"importance": _ones(model, device="cpu")}} if method == "ewc" else {}
    examples = sizes.random_examples(4 * 8, 512, vocabulary=models.LARGE["vocab_size"])
    running.train(
        parts=parts,
        model=model,
        base=base,
        states=states,
        examples=examples,
        settings=settings,
        device=device,
        shards=shards,
        compute_dtype=torch.bfloat16,
    )
    most = peak.bytes()
    predicted = memory.predict(
        phase="train",
        shape=shape,
        parts=parts,
        settings=settings,
        checkpoint_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        device_type=device.type,
        processes=1 if shards.active else None,
    )
    ratio = predicted["total"] / most
    return judged(abs(ratio - 1) <= MEMORY_WITHIN, {"predicted": predicted, "peak": most, "predicted_over_peak": ratio})


class _Stop(Exception):
    """What a killed run stands for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StopAfter(Part):
    key = "~ stop"

    steps: int

    def after_step(self, *, run, state, step, gradient):
        if step + 1 == self.steps:
            raise _Stop


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _settings(*, steps: int, rows: int, length: int) -> TrainSettings:
    return TrainSettings(batch=rows, micro_batch=rows, length=length, learning_rate=1e-3, moments="bfloat16", probes=0)


def _fit(
    model: PreTrainedModel,
    parts,
    device: torch.device,
    *,
    states: dict | None = None,
    shards: Shards = Shards(),
    steps: int = 6,
    compute_dtype: torch.dtype | None = None,
    base: dict | None = None,
    **more,
) -> FitResult:
    """A fit of a copy of the model on random tokens, two micro-batches a step."""
    settings = dataclasses.replace(_settings(steps=steps, rows=8, length=32), micro_batch=4)
    examples = sizes.random_examples(8 * steps, 32, vocabulary=model.config.vocab_size)
    base = base if base is not None else {name: p.detach().clone() for name, p in base_parameters(model).items()}
    states = {key: dict(state) for key, state in (states or {}).items()}
    result, _ = running.train(
        model=copy.deepcopy(model),
        parts=parts,
        examples=examples,
        settings=settings,
        base=base,
        states=states,
        device=device,
        shards=shards,
        compute_dtype=compute_dtype,
        **more,
    )
    return result


def _weights(result: FitResult) -> dict[str, Tensor]:
    return {name: result.run.whole(name).clone() for name in result.run.weights}


def _ones(model: PreTrainedModel, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Importance 1 of every weight that parts can regularise."""
    return {
        name: torch.ones_like(p, dtype=torch.float32, requires_grad=False, device=device or p.device)
        for name, p in base_parameters(model).items()
    }


def _start(model: PreTrainedModel, adapted) -> dict[str, Tensor]:
    """The weights as they are, adapters' fresh ones included, by the names that a run has for them."""
    model = copy.deepcopy(model)
    for part in adapted:
        model = part.adapt(model, seed=0)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _needs(shards: Shards) -> None:
    if not shards.active:
        raise Skipped("no process group could be started here")
