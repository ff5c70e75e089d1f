"""Peak memory of preparing and of training a cell, by kind, before anything is loaded.

What is held, in bytes a weight (c: bytes of the compute dtype, w: 4, or 8 for float64; k: of the checkpoint; m: 2 or w,
`train.moments`; N: processes that share the model):

    kind          one process                          shared, each of N
    weights       c                                    trained w/N, frozen c/N
    masters       trained w, where c < w               -
    gradients     trained w                            trained w/N
    moments       trained 2m                           trained 2m/N
    anchor        trained base tensors k; adapters w if the part's preparation trains; /N
    importance    regularised matrices 1 (`bits: 8`) or 4; /N
    scratch       what optimizer and penalty take beside them: of the largest tensor, or of a piece

What comes and goes: activations (all that is alive at the end of the forward pass of one micro-batch of the longest
examples), logits (of one chunk, with their log-softmax and its gradient), transient (the most that backward takes beyond
the activations; where the model is shared, also the gathered copies and what gradients are reduced in). Activations and
their backward pass are no formula: the real modules run on fake tensors, which have shapes and no numbers.

`total` is what is held and the larger of two moments: a pass, with activations and with logits or transient, and with all
gradients only if a step accumulates several passes, or masters are on the CPU; and the update, with all gradients and without activations. It is
so less than the kinds added up. Processes on the CPU that share a model and compute in another dtype than its checkpoint's
each begin with a whole copy, which can be more. CUDA's own context and the gaps of its allocator are not in it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from experiments.model.shape import Shape
from experiments.training import loss
from experiments.training.activations import Unknown, activations
from experiments.training.entries import Entries, entries
from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.part import Part
from methods.tools import adam as moments
from methods.tools import selection
from methods.tools.fisher import TOKENS
from methods.tools.importance import CPU_PIECE, CUDA_PIECE

Phase = Literal["prepare", "train"]
KINDS = (
    "weights",
    "masters",
    "gradients",
    "moments",
    "anchor",
    "importance",
    "scratch",
    "activations",
    "logits",
    "transient",
    "total",
)
HELD = ("weights", "masters", "moments", "anchor", "importance")  # from the first step to the last
MOST_PROCESSES = 8  # that are proposed


def predict(
    *,
    phase: Phase,
    shape: Shape,
    parts: Sequence[Part],
    settings: TrainSettings,
    checkpoint_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device_type: str,
    processes: int | None = None,
    longest: int | None = None,
) -> dict[str, int | None]:
    """Peak bytes of one process in `phase`, {kind: bytes} by `KINDS`; all 0 for a preparation of parts that prepare nothing.

    settings   of training in that phase; `length` is taken for the longest example, so put in what is known to be shorter
    longest    tokens of the longest document of general text, which a part cuts at its own length; None: not known
    processes  how many share the model; None: one process that does not share

    All None where the activations of the architecture are not known, for it does not run on tensors without numbers.
    A part with "seeded_preparation" trains while it prepares; another makes a Fisher pass, each process with the whole model.
    """
    layout = _Layout(
        shape=shape,
        parts=tuple(parts),
        checkpoint=checkpoint_dtype,
        compute=compute_dtype,
        device=device_type,
        processes=processes,
    )
    phase_of = lambda part: layout.general_phase if "seeded_preparation" in part.capabilities else layout.fisher
    try:
        if phase == "train":
            return layout.training(settings)
        prepared = [
            phase_of(part)(part, _cut(part, settings, longest))
            for part in parts
            if type(part).prepare is not Part.prepare
        ]
    except Unknown:
        return dict.fromkeys(KINDS)
    return max(prepared, key=lambda kinds: kinds["total"], default=_total({}))


def refuse(
    *, what: str, available: int | None, settings: TrainSettings, processes: int | None = None, **inputs: Any
) -> dict[str, int]:
    """The prediction where it fits into `available` bytes; what is not known fits. `predict` takes the other arguments.

    Raises UserError naming `what`, by how much it does not fit, and what each change of settings would save.
    """
    if available is not None and inputs["device_type"] == "cpu":
        available //= processes or 1  # there they share it
    found = predict(settings=settings, processes=processes, **inputs)
    if available is None or found["total"] is None or found["total"] <= available:
        return found

    def total(*, processes: int | None = processes, **changed: Any) -> int:
        return predict(settings=dataclasses.replace(settings, **changed), processes=processes, **inputs)["total"]

    helps = _helps(
        total, found["total"], available, settings, processes if inputs["device_type"] != "cpu" else MOST_PROCESSES
    )
    advice = (
        f"What would help: {'; '.join(helps)}"
        if helps
        else "No setting helps: take a smaller model, adapters, or a larger device"
    )
    most = ", ".join(
        f"{kind} {_gib(found[kind])}" for kind in sorted(KINDS[:-1], key=found.get, reverse=True)[:4] if found[kind]
    )
    raise UserError(
        f"{what} would take {_gib(found['total'])} of memory at its peak, {_gib(found['total'] - available)} more than the "
        f"{_gib(available)} free here (most of it: {most}). {advice}"
    )


def _helps(
    total: Callable[..., int], now: int, available: int, settings: TrainSettings, processes: int | None
) -> list[str]:
    """Changes that save memory, each with the bytes; of micro-batches and processes the first that fits."""
    helps, changes = [], {}
    for key, value, said in (
        ("checkpointing", True, "checkpointing: true"),
        ("moments", "bfloat16", "moments: bfloat16"),
    ):
        saved = now - total(**{key: value})
        if saved > 0:
            changes[key] = value
            helps.append(f"`train.{said}` saves {_gib(saved)}{' and fits' if now - saved <= available else ''}")
    if len(changes) > 1:
        saved = now - total(**changes)
        helps.append(f"both save {_gib(saved)}{' and fit' if now - saved <= available else ''}")
    smaller = [] if settings.pack else [settings.micro_batch >> i for i in range(1, settings.micro_batch.bit_length())]
    fitting = next((size for size in smaller if total(micro_batch=size) <= available), None)
    if fitting:
        helps.append(f"`train.micro_batch: {fitting}` fits")
    more = [2**i for i in range(1, MOST_PROCESSES.bit_length()) if 2**i > (processes or 1)]
    fitting = next((n for n in more if total(processes=n) <= available), None)
    if fitting:
        helps.append(f"`processes: {fitting}` in the model's block fits, with as many devices like this one")
    return helps


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The bytes of one model as its parts adapt it."""

    shape: Shape
    parts: tuple[Part, ...]
    checkpoint: torch.dtype
    compute: torch.dtype
    device: str
    processes: int | None

    def training(self, settings: TrainSettings) -> dict[str, int]:
        if any("provides_weights" in part.capabilities for part in self.parts):
            return _total({"weights": self._count.base * self.compute.itemsize})
        return self._fit(
            settings,
            parts=self.parts,
            held={"anchor": sum(map(self._anchor, self.parts)), "importance": sum(map(self._importance, self.parts))},
        )

    def general_phase(self, _: Part, settings: TrainSettings) -> dict[str, int]:
        """Training with float32 ω of every regularised weight; under an adapter also the sum of dL/dW it comes from."""
        count = self._count
        omega = self._wide * (count.regularised + count.adapted)
        return self._fit(settings, parts=(), held={"importance": _share(omega, self.processes)})

    def fisher(self, part: Part, settings: TrainSettings) -> dict[str, int]:
        """A pass of as many documents as `TOKENS` hold (`batched`: of a batch), a float32 F, one gradient at a time."""
        count, wide, length = self._count, self._wide, settings.length
        documents = (
            part.batch_size
            if getattr(part, "estimator", "") == "batched"
            else max(1, min(part.samples, TOKENS // length))
        )
        whole = getattr(part, "scope", "adapted") == "whole-model"
        alive, work = activations(
            self.shape,
            parts=adapting(self.parts),
            dtype=self.compute,
            rows=documents,
            length=length,
            fisher="whole-model" if whole else "adapted",
        )
        kinds = {
            "weights": count.all * self.compute.itemsize,
            "importance": wide * (count.base if whole else count.regularised),
            "scratch": (self.compute.itemsize + wide * self._half)
            * (count.largest_base if whole else count.largest_regularised),
            "activations": alive,
            "transient": work,
            "logits": 3 * wide * count.vocabulary * documents * length,
        }
        return _total(kinds, passing=alive + max(kinds["logits"], work, kinds["scratch"]))

    def _fit(self, settings: TrainSettings, *, parts: Sequence[Part], held: dict[str, int]) -> dict[str, int]:
        count, wide, narrow, n = self._count, self._wide, self.compute.itemsize, self.processes
        moment = 2 if settings.moments == "bfloat16" else wide
        rows, length = (
            (1, max(settings.pack, settings.length)) if settings.pack else (settings.micro_batch, settings.length)
        )
        alive, work = activations(
            self.shape,
            parts=adapting(self.parts),
            dtype=self.compute,
            rows=rows,
            length=length,
            checkpointing=settings.checkpointing,
            packed=bool(settings.pack),
            device=self.device,
        )
        labelled, copies = rows * length, 0
        kinds = held | {"gradients": _share(wide * count.trained, n), "moments": _share(2 * moment * count.trained, n)}
        if n is None:
            kinds["weights"] = narrow * count.all
            kinds["masters"] = wide * count.trained * self._half
        else:
            kinds["weights"] = _share(wide * count.trained + narrow * (count.all - count.trained), n)
            copies = narrow * (count.root + 2 * count.block) + (narrow + wide) * max(
                count.root_trained, count.block_trained
            )
        kinds["logits"] = 3 * wide * count.vocabulary * min(labelled, loss.CHUNK)
        if (
            labelled > loss.CHUNK
        ):  # the rows that logits are computed of, their gradient, and the head's of the chunks so far
            kinds["logits"] += 2 * narrow * count.width * labelled + narrow * count.head_trained
        kept, passing = self._scratch(settings, parts)
        kinds |= {"scratch": kept + passing, "activations": alive, "transient": work + copies}
        # gradients are there in a pass where several are added up, and where masters on the CPU keep their buffers
        waiting = bool(settings.pack) or settings.batch > settings.micro_batch * (n or 1)
        waiting = waiting or (self.device == "cpu" and n is None and self._half)
        # the head's gradient is complete while all blocks still hold their activations
        head = 0 if waiting else _share(wide * count.head_trained, n)
        # what is to be shared is loaded whole and cut in main memory: mapped from its files, or copied into another dtype
        copied = n is not None and self.device == "cpu" and self.compute != self.checkpoint
        return _total(
            kinds,
            kept=kept,
            loading=narrow * count.all * copied,
            passing=alive + copies + max(kinds["logits"], work + head) + (kinds["gradients"] if waiting else 0),
            update=kinds["gradients"] + max(passing, narrow * count.largest_trained * self._half),
        )

    def _scratch(self, settings: TrainSettings, parts: Sequence[Part]) -> tuple[int, int]:
        """Bytes that are kept from step to step, and bytes that are taken during the update alone."""
        count, wide, n, cpu = self._count, self._wide, self.processes, self.device == "cpu"
        largest = _share(count.largest_trained, n)
        chunk = min(largest, moments.CPU_CHUNK if cpu else moments.CHUNK)
        kept, passing = (
            0,
            28 * chunk if settings.moments == "bfloat16" else 0,
        )  # float32 update, m, v, and their random bits
        for part in parts:
            if (
                "optimizer" in part.capabilities
            ):  # update and mask of a piece; |m| that a partition reorders, or histograms
                kept += 2 * wide * chunk
                if cpu and not (n and n > 1):
                    kept += wide * largest
                else:
                    passing = max(passing, 28 * chunk + selection.HISTOGRAM)
            if "importance" in part.capabilities:
                piece = min(_share(count.largest_regularised, n), CPU_PIECE if cpu else CUDA_PIECE)
                passing += 2 * wide * _share(count.largest_adapted, n) + 4 * wide * piece
            if "needs_gradient" in part.capabilities:
                passing += _share(wide * count.trained, n)
        return kept, passing

    def _anchor(self, part: Part) -> int:
        if "importance" not in part.capabilities:
            return 0
        trains = "seeded_preparation" in part.capabilities  # then it starts from adapters of its own
        held = self.checkpoint.itemsize * self._count.trained_base + self._wide * self._count.adapters * trains
        return _share(held, self.processes)

    def _importance(self, part: Part) -> int:
        if "importance" not in part.capabilities:
            return 0
        return _share(self._count.regularised * getattr(part, "bits", 32) // 8, self.processes)

    @property
    def _wide(self) -> int:
        return max(4, self.compute.itemsize)

    @property
    def _half(self) -> bool:
        """Whether the module computes in fewer bits than its masters have."""
        return self.compute.itemsize < self._wide

    @property
    def _count(self) -> Entries:
        return entries(self.shape, adapting(self.parts))


def _cut(part: Part, settings: TrainSettings, longest: int | None) -> TrainSettings:
    return dataclasses.replace(
        settings, length=min(n for n in (getattr(part, "length", longest or settings.length), longest) if n)
    )


def adapting(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Those that change which tensors are trained: FLOPs and activations depend on no others."""
    return tuple(part for part in parts if "adapts" in part.capabilities)


def _share(count: int, processes: int | None) -> int:
    return -(-count // (processes or 1))


def _total(
    kinds: dict[str, int], *, kept: int = 0, passing: int = 0, update: int = 0, loading: int = 0
) -> dict[str, int]:
    """All kinds and their `total`: what is held, `kept` scratch included, and the larger of two moments; or `loading` before them."""
    found = {kind: int(kinds.get(kind, 0)) for kind in KINDS[:-1]}
    return found | {"total": max(loading, sum(found[kind] for kind in HELD) + kept + max(passing, update))}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
