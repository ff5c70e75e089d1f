"""Prepare and train as the stages do, without their files, and with what the GPU holds read beside the times."""

import contextlib
import gc
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.bench.stopwatch import Stopwatch
from experiments.study.paths import HERE
from experiments.training import allocator, hardware, preparation
from experiments.training.engine import FitResult, fit
from experiments.training.preparation import Fitting
from experiments.training.settings import TrainSettings
from methods.part import TENSORS, Part
from methods.tools.effective import base_parameters
from methods.tools.importance import Codes
from methods.tools.process_group import Shards

RESET = Path("/proc/self/clear_refs")
WARM = 2  # steps or documents that are not counted: kernels are chosen and memory is fetched in them


@dataclass(kw_only=True)
class Preparation:
    """What the parts prepared, and what it cost; `seconds_token` is without warm-up, None where too little was read."""

    states: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_token: float | None = None
    tokens: int = 0
    bytes_stored: dict[str, int] = field(default_factory=dict)  # by kind, before a file of importance is compressed
    bytes_peak: int | None = None


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Shards]:
    """A process group of this process alone, which fully_shard needs; it uses no network."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Shards(active=True)
    finally:
        dist.destroy_process_group()


def forget(device: torch.device) -> None:
    """Give back what the last piece held, so that the next one begins with an empty device."""
    gc.collect()
    allocator.give_back()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Peak:
    """The largest number of bytes in use from here on, without what was there before.

    On a GPU they are those of torch's allocator. On a CPU, with `resident`, they are the process's resident set as
    Linux counts it, with the libraries' buffers; else None.

    since   an earlier peak: what was there before that is left out, and what has stayed since then counts
    """

    def __init__(self, device: torch.device, *, resident: bool = False, since: "Peak | None" = None):
        forget(device)
        hardware.reset_peak(device)
        self._device = device
        self._resident = resident and device.type == "cpu" and RESET.exists()
        if self._resident:
            RESET.write_text("5")  # sets the peak to what is resident now
        self.before = since.before if since else self._now("VmRSS")

    def bytes(self) -> int | None:
        return self._now("VmHWM") - self.before if self._resident or self._device.type == "cuda" else None

    def _now(self, of_process: str) -> int:
        if self._device.type == "cuda":
            peak = of_process == "VmHWM"
            return hardware.peak_memory_bytes(self._device) if peak else torch.cuda.memory_allocated(self._device)
        if not self._resident:
            return 0
        lines = dict(line.split(":", 1) for line in RESET.with_name("status").read_text().splitlines())
        return 1024 * int(lines[of_process].split()[0])


def base_of(make: Callable[[], nn.Module], parts: Sequence[Part]) -> dict[str, Tensor]:
    """θ₀ of a new model on the CPU, where a study has it too, if a part keeps some of it; else nothing."""
    if not any("importance" in part.capabilities for part in parts):
        return {}
    return {name: p.detach().to("cpu", copy=True) for name, p in base_parameters(make()).items()}


@contextlib.contextmanager
def mapped(
    make: Callable[[], PreTrainedModel], *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Callable[[], nn.Module], Mapping[str, Tensor]]]:
    """What makes the model, and θ₀, both mapped from a folder that is there for a time, as a study's model is."""
    from experiments.model import weights
    from experiments.model.base import load_tensors

    work = HERE / "work"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="slice-") as fresh:
        folder = Path(fresh)
        with weights.quiet():
            make().save_pretrained(folder, save_original_format=False)
        forget(device)  # what was saved is mapped from here on, and has no part in what is free
        yield partial(weights.load_model, folder, dtype=dtype, device=device), load_tensors(folder)


def prepare(
    *,
    parts: Sequence[Part],
    make: Callable[[], nn.Module],
    base: Mapping[str, Tensor],
    general: Sequence[dict],
    settings: TrainSettings,
    device: torch.device,
    shards: Shards = Shards(),
    compute_dtype: torch.dtype,
    tokenizer: Any = None,
    since: Peak | None = None,
) -> Preparation:
    """Every part's preparation in turn, each on a new model. `settings` are those of a part that trains in it.

    tokenizer  for parts that sample text
    since      as `Peak` takes it, which then counts what is resident
    """
    peak = Peak(device, resident=since is not None, since=since)
    whole, documents, fits = Preparation(), _Documents(device), []

    def timed(*arguments: Any, **named: Any) -> _TimedFitting:
        fits.append(_TimedFitting(*arguments, **named))
        return fits[-1]

    for made in preparation.prepare(
        parts,
        make=lambda _: make(),
        general=general,
        base=base,
        seed=0,
        settings=settings,
        resume=lambda _: None,
        progress=documents,
        shards=shards,
        fitting=timed,
        device=device,
        compute_dtype=compute_dtype,
        tokenizer=tokenizer,
    ):
        whole.seconds += made.seconds
        whole.tokens += made.prepared.tokens
        whole.seconds_token = (fits[-1].seconds_token if fits else None) or documents.seconds_token(general)
        state = whole.states.setdefault(made.part.key, {})
        for kind in TENSORS:
            if tensors := getattr(made.prepared, kind):
                state[kind] = {n: t.cpu() if isinstance(t, Codes) else t.detach().cpu() for n, t in tensors.items()}
                stored = sum(tensor.nbytes for tensor in state[kind].values())
                whole.bytes_stored[kind] = whole.bytes_stored.get(kind, 0) + stored
    whole.bytes_peak = peak.bytes() if whole.states else None
    return whole


def train(*, parts: Sequence[Part], device: torch.device, **given: Any) -> tuple[FitResult, Stopwatch]:
    """The engine's loop (its arguments) with a stopwatch in it."""
    watch = Stopwatch(device)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar for each of many short fits
        return fit(parts=(*parts, *watch.parts), seed=0, device=device, **given), watch


class _TimedFitting(Fitting):
    """The loop as parts that train in their preparation are given it, with a stopwatch in it.

    seconds_token  of the last call's steps after warm-up; None where there are none
    """

    seconds_token: float | None = None

    def __call__(self, *, parts: Sequence[Part], **given: Any) -> FitResult:
        watch = Stopwatch(self._arguments["device"])
        with contextlib.redirect_stderr(io.StringIO()):
            result = super().__call__(parts=(*parts, *watch.parts), **given)
        if result.steps > WARM:
            self.seconds_token = mean(watch.steps(skip=WARM)) / (result.tokens // result.steps)
        return result


class _Documents:
    """A progress bar that notes when each document was done."""

    def __init__(self, device: torch.device):
        self._device = device
        self._times: list[float] = []

    def __call__(self, **_: Any) -> "_Documents":
        self._times = []
        return self

    def __enter__(self) -> "_Documents":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, count: int = 1) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._times += [perf_counter()] * count

    def seconds_token(self, general: Sequence[dict]) -> float | None:
        if min(len(self._times), len(general)) <= WARM:
            return None
        tokens = sum(len(e["input_ids"]) for e in general[WARM : len(self._times)])
        return (self._times[-1] - self._times[WARM - 1]) / tokens
