"""Prepare and train as the stages do, without their files, and with what the GPU holds read beside the times."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.bench.stopwatch import Stopwatch
from experiments.training import hardware
from experiments.training.engine import FitResult, fit
from experiments.training.settings import TrainSettings
from methods.part import Part
from methods.tools.effective import base_parameters
from methods.tools.importance import Codes
from methods.tools.process_group import Shards

WARM = 2  # steps or documents that are not counted: kernels are chosen and memory is fetched in them


@dataclass(kw_only=True)
class Preparation:
    """What the parts prepared, and what it cost; `seconds_token` is without warm-up, None where too little was read."""

    states: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_token: float | None = None
    tokens: int = 0
    bytes_stored: dict[str, int] = field(
        default_factory=dict
    )  # by kind; a file of importance is smaller, being compressed
    bytes_peak: int | None = None


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Shards]:
    """A process group of this process alone, which fully_shard needs; no network is asked."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Shards(active=True)
    finally:
        dist.destroy_process_group()


def forget(device: torch.device) -> None:
    """Give back what the last piece held on a GPU, so that the next one begins with an empty device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Peak:
    """The largest number of bytes allocated on a GPU from here on, without what was there; None on a CPU."""

    def __init__(self, device: torch.device):
        forget(device)
        hardware.reset_peak(device)
        self._device = device
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def bytes(self) -> int | None:
        return hardware.peak_memory_bytes(self._device) - self.before if self._device.type == "cuda" else None


def base_of(model: nn.Module, parts: Sequence[Part]) -> dict[str, Tensor]:
    """θ₀ on the CPU, where a study has it too, for parts that keep some of it; nothing for the others."""
    if not any("importance" in part.capabilities for part in parts):
        return {}
    return {name: p.detach().to("cpu", copy=True) for name, p in base_parameters(model).items()}


def prepare(
    *,
    parts: Sequence[Part],
    make: Callable[[], nn.Module],
    general: Sequence[dict],
    settings: TrainSettings,
    device: torch.device,
    shards: Shards,
    compute_dtype: torch.dtype,
) -> Preparation:
    """Every part's preparation in turn, each on a new model. `settings` are those of a part that trains in it."""
    found, peak = Preparation(), Peak(device)
    for part in parts:
        if type(part).prepare is Part.prepare:
            continue
        model = make()
        base = base_of(model, parts)
        torch.manual_seed(0)
        for other in parts:
            model = other.adapt(model, seed=0)
        inner = _InnerFit(settings=settings, base=base, device=device, shards=shards, compute_dtype=compute_dtype)
        documents = _Documents(device)
        began = perf_counter()
        prepared = part.prepare(
            model=model, base=base, general=general, seed=0, fit=inner, progress=documents, shards=shards
        )
        found.seconds += perf_counter() - began
        del model
        if prepared is None:
            continue
        found.tokens += prepared.tokens
        found.seconds_token = inner.seconds_token() or documents.seconds_token(general)
        state = found.states[part.key] = {}
        for kind in ("importance", "start", "carry"):
            if tensors := getattr(prepared, kind):
                state[kind] = {
                    name: t.cpu() if isinstance(t, Codes) else t.detach().cpu() for name, t in tensors.items()
                }
                found.bytes_stored[kind] = found.bytes_stored.get(kind, 0) + sum(t.nbytes for t in state[kind].values())
        del prepared
    found.bytes_peak = peak.bytes() if found.states else None
    return found


def train(
    *,
    parts: Sequence[Part],
    model: nn.Module,
    base: dict,
    states: dict,
    examples: Sequence[dict],
    settings: TrainSettings,
    device: torch.device,
    shards: Shards,
    compute_dtype: torch.dtype,
    **more: Any,
) -> tuple[FitResult, Stopwatch]:
    """The engine's loop with a stopwatch in it."""
    watch = Stopwatch(device)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar for each of many short fits
        result = fit(
            model=model,
            parts=(*parts, *watch.parts),
            examples=examples,
            settings=settings,
            seed=0,
            base=base,
            states=states,
            device=device,
            shards=shards,
            compute_dtype=compute_dtype,
            **more,
        )
    return result, watch


class _InnerFit:
    """The loop as parts that train in their preparation are given it; notes seconds a token of the steps after
    warm-up.
    """

    def __init__(self, *, settings: TrainSettings, **given: Any):
        self._settings, self._given = settings, given
        self._times: list[float] = []
        self._tokens = 0

    def __call__(self, *, model, parts, examples, seed, **overrides) -> FitResult:
        changed = replace(self._settings, **{key: value for key, value in overrides.items() if value is not None})
        result, watch = train(model=model, parts=parts, examples=examples, settings=changed, states={}, **self._given)
        if result.steps > WARM:
            self._times = watch.steps(skip=WARM)
            self._tokens = result.tokens // result.steps
        return result

    def seconds_token(self) -> float | None:
        return sum(self._times) / len(self._times) / self._tokens if self._times else None


class _Documents:
    """A progress bar that notes when each document was done."""

    def __init__(self, device: torch.device):
        self._device, self._times = device, []

    def __call__(self, **_: Any) -> _Documents:
        return self

    def __enter__(self) -> _Documents:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, count: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._times += [perf_counter()] * count

    def seconds_token(self, general: Sequence[dict]) -> float | None:
        if len(self._times) <= WARM:
            return None
        tokens = sum(len(e["input_ids"]) for e in general[WARM : len(self._times)])
        return (self._times[-1] - self._times[WARM - 1]) / tokens
