"""Seconds and bytes of full-size models with random weights: each method's preparation and its steps.

Of a slice (`Size.blocks`) the bytes are of interest: the first blocks of a model at its real width and vocabulary take
what a whole model takes for each weight, and fit into the memory of a machine that the model does not fit into.

The goals are stated for one H200 (docs/gpu-check.md); a goal that is missed is a number and no failure.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from experiments.bench import running, sizes
from experiments.bench.sizes import Skipped
from experiments.bench.stopwatch import Stopwatch
from experiments.model.shape import Shape
from experiments.training import allocator, hardware, memory
from experiments.training.engine import FitResult, final_weights
from experiments.training.hardware import mfu
from experiments.training.settings import TrainSettings
from methods.part import Part, overrides
from methods.tools.adapter import saved_entries
from methods.tools.process_group import Shards

MFU_GOALS = {("llama3-8b", "full"): 0.45, ("gptj-6b", "full"): 0.40}
PENALTY_GOAL = 0.03  # of a step
STEPS = 6  # counted, after the warm-up
DOCUMENTS = 16  # of a Fisher pass, likewise
MEMORY_GOAL = 0.1  # of the predicted bytes, by which those measured may differ
SPARE = 1 << 30  # of the memory, for what is not predicted
PREPARED_LENGTH = 512
MOMENTS = {"muon": "float32"}  # of methods that refuse the dtype of the others


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a speed piece is of.

    blocks  of a slice, how many it has; None: the whole model
    """

    model: str
    tiny: bool
    rows: int
    length: int
    compile: bool = False
    blocks: int | None = None

    @property
    def shape(self) -> Shape:
        return sizes.shape_named(self.model, tiny=self.tiny, blocks=self.blocks)

    @property
    def steps(self) -> int:
        """Steps that are counted, after the warm-up."""
        return 1 if self.blocks else STEPS

    @property
    def documents(self) -> int:
        return 1 if self.blocks else DOCUMENTS

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def steps(size: Size, *, device: torch.device, **given: Any) -> dict:
    """Prepare one method in one layout and train it in steps of one micro-batch. Raises Skipped if it will not fit.

    given   the name of the `method`, the `layout` ("plain" or "sharded"), and `shards`
    """
    of = {"tiny": size.tiny, "blocks": size.blocks}
    make = partial(sizes.build_named, size.model, device=device, dtype=torch.bfloat16, **of)
    if not size.blocks:
        return _steps(size, make=make, base=None, device=device, **given)
    with running.mapped(make, dtype=torch.bfloat16, device=device) as (make, base):
        return _steps(size, make=make, base=base, device=device, **given)


def _steps(
    size: Size,
    *,
    make: Callable[[], nn.Module],
    base: Mapping[str, Tensor] | None,
    method: str,
    layout: str,
    device: torch.device,
    shards: Shards,
) -> dict:
    parts = sizes.parts_of(method)
    if size.length > (longest := size.shape.config.max_position_embeddings):
        raise Skipped(f"{size.model} takes {longest} tokens, not {size.length}")
    settings = TrainSettings(
        batch=size.rows,
        micro_batch=size.rows,
        length=size.length,
        learning_rate=1e-6,
        schedule="constant",
        moments=MOMENTS.get(method, "bfloat16"),
        compile=size.compile,
        probes=0,
    )
    # as many tokens a step as in training, in shorter documents
    length = min(PREPARED_LENGTH, size.length)
    documents = size.tokens // length
    preparing = dataclasses.replace(settings, length=length, batch=documents, micro_batch=documents)
    given = {"parts": parts, "device": device, "sharded": layout == "sharded"}
    preparing, predicted_prepare = _fitting(size, preparing, phase="prepare", what=f"preparing {method}", **given)
    settings, predicted = _fitting(size, settings, phase="train", what=f"training {method}", **given)

    vocabulary = size.shape.config.vocab_size
    base = running.base_of(make, parts) if base is None else base
    among = shards if layout == "sharded" else Shards()
    common = {"base": base, "device": device, "shards": among, "compute_dtype": torch.bfloat16}

    since = running.Peak(device, resident=True) if size.blocks else None
    trains = any(made.training is not None for part in parts for made in part.preparation())
    count = (running.WARM + size.steps) * preparing.batch if trains else running.WARM + size.documents
    general = sizes.random_examples(count, preparing.length, vocabulary=vocabulary, seed=1)
    prepared = running.prepare(
        parts=sizes.parts_of(method, documents=count),
        make=make,
        general=general,
        settings=preparing,
        since=since,
        **common,
    )

    peak = running.Peak(device, resident=bool(size.blocks), since=since)
    model = make()
    written = sum(p.nbytes for p in model.parameters())
    examples = sizes.random_examples((running.WARM + size.steps) * size.rows, size.length, vocabulary=vocabulary)
    result, watch = running.train(
        parts=parts,
        model=model,
        states=prepared.states,
        examples=examples,
        general=general,
        settings=settings,
        **common,
    )

    def seconds(first: str, second: str) -> float:
        return median(watch.between(first, second, skip=running.WARM))

    step = median(watch.steps(skip=running.WARM))
    reached = mfu(result.flops / result.steps, step, result.peak_flops)
    penalty = seconds("backward", "penalty") if any(overrides(part, "before_clip") for part in parts) else None
    goals = []
    if goal := MFU_GOALS.get((size.model, method)):
        goals.append(goal_of("mfu", reached, ">=", goal))
    if penalty is not None:
        goals.append(goal_of("share_penalty", penalty / step, "<=", PENALTY_GOAL))
    if size.blocks:
        allocator.give_back()  # as the `train` stage does
        final_weights(result, parts)  # which merges adapters
    most = peak.bytes()
    if size.blocks and most:
        goals.append(goal_of("memory / predicted", abs(most / predicted["total"] - 1), "<=", MEMORY_GOAL))
    return {
        "layout": layout,
        "rows": size.rows,
        "length": size.length,
        "compiled": size.compile,
        "checkpointing": settings.checkpointing,
        "moments": settings.moments,
        "blocks": size.blocks,
        "steps": size.steps,
        "seconds_step": step,
        "seconds_steps": watch.steps(skip=running.WARM),
        "tokens_per_second": size.tokens / step,
        "mfu": reached,
        "peak_flops": result.peak_flops,
        "peak_flops_basis": hardware.dense_peak(device, torch.bfloat16)[1],
        "seconds_forward": seconds("begin", "forward"),
        "seconds_backward": seconds("forward", "backward"),
        "seconds_penalty": penalty,
        "share_penalty": penalty and penalty / step,
        "seconds_optimizer": seconds("update begins", "update ends"),
        "seconds_begin": result.seconds_begin,
        "prepare": _prepared(prepared, predicted_prepare, preparing),
        "memory": {
            "predicted": predicted,
            "held": held(result, prepared),
            **_passing(watch, peak.before),
            "peak": most,
            "predicted_over_peak": most and predicted["total"] / most,
            "bytes_a_weight": {
                "predicted": predicted["total"] / size.shape.parameters,
                "peak": most and most / size.shape.parameters,
            },
        },
        "bytes": stored(result, prepared, written),
        "goals": [] if size.tiny else goals,
    }


def held(result: FitResult, prepared: running.Preparation) -> dict[str, int]:
    """Bytes by the kinds of memory.predict that stay from step to step, and gradients, as they are on the device."""
    run, model = result.run, result.run.model
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    shared = {t.untyped_storage().data_ptr() for t in local}
    moments = (value for state in result.optimizer.state.values() for value in state.values())
    return {
        "weights": _bytes(local),
        "masters": _bytes(w for w in run.weights.values() if w.untyped_storage().data_ptr() not in shared),
        "gradients": _bytes(w.grad for w in run.weights.values() if w.grad is not None),
        "moments": _bytes(value for value in moments if isinstance(value, Tensor)),
        "anchor": _anchor_bytes(result),
        "importance": prepared.bytes_stored.get("importance", 0),
    }


def stored(result: FitResult, prepared: running.Preparation, weights: int) -> dict[str, int]:
    """Bytes of what a study would keep: tuned weights or the adapter in their place; importance, start, anchor."""
    adapter = saved_entries(result.run.model)
    kept = {"adapter": 4 * adapter} if adapter else {"weights": weights}
    anchor = _anchor_bytes(result)
    return kept | prepared.bytes_stored | ({"anchor": anchor} if anchor else {})


def _fitting(
    size: Size,
    settings: TrainSettings,
    *,
    phase: str,
    parts: Sequence[Part],
    device: torch.device,
    sharded: bool,
    what: str,
) -> tuple[TrainSettings, dict]:
    """The settings, with checkpointing where only that fits, and what they are predicted to take."""
    room = room_on(device, of_process=bool(size.blocks))
    if room is not None and size.blocks:
        # the base beside the model is mapped, and of its pages only those of the tensor at hand are needed
        room -= torch.bfloat16.itemsize * max(p.numel() for p in size.shape.build().parameters())
    for checkpointing in (False, True):
        chosen = dataclasses.replace(settings, checkpointing=checkpointing)
        predicted = memory.predict(
            phase=phase,
            shape=size.shape,
            parts=parts,
            settings=chosen,
            checkpoint_dtype=torch.bfloat16,
            compute_dtype=torch.bfloat16,
            device_type=device.type,
            processes=1 if sharded else None,
        )
        if room is None or predicted["total"] <= room:
            return chosen, predicted
    raise Skipped(
        f"{what} is predicted to take {predicted['total'] / 2**30:.1f} GiB with checkpointing, {room / 2**30:.1f} GiB "
        "are free"
    )


def room_on(device: torch.device, *, of_process: bool = False) -> int | None:
    """Bytes that may be taken on a GPU or, with `of_process`, in main memory; None: it is not looked at."""
    if device.type != "cuda":
        available = hardware.available_memory(device) if of_process else None
        return available and available - SPARE
    running.forget(device)
    return torch.cuda.mem_get_info(device)[0] - SPARE


def _prepared(measured: running.Preparation, predicted: dict, settings: TrainSettings) -> dict | None:
    if not measured.states:
        return None
    return {
        "seconds_per_million_tokens": measured.seconds_token and measured.seconds_token * 1e6,
        "seconds_measured": measured.seconds,
        "tokens_measured": measured.tokens,
        "checkpointing": settings.checkpointing,
        "bytes_peak": measured.bytes_peak,
        "predicted": predicted,
        "predicted_over_peak": measured.bytes_peak and predicted["total"] / measured.bytes_peak,
    }


def _passing(watch: Stopwatch, before: int) -> dict:
    """Bytes between steps, and what a forward pass leaves beyond them; None on a CPU."""
    if not watch.bytes_held:
        return {"between_steps": None, "forward": None}
    return {"between_steps": watch.bytes_held - before, "forward": watch.bytes_forward - watch.bytes_held}


def goal_of(what: str, value: float | None, sign: str, goal: float) -> dict:
    met = None if value is None else value >= goal if sign == ">=" else value <= goal
    return {"what": what, "value": value, "goal": f"{sign} {goal:g}", "stated_for": "NVIDIA H200", "met": met}


def _anchor_bytes(result: FitResult) -> int:
    return sum(_bytes((state.get("anchor") or {}).values()) for state in result.states.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
