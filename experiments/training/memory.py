"""Predict the peak memory of preparing and of training a cell, by kind, before anything is loaded.

Bytes that are held for each weight (c: bytes of the compute dtype, w: 4, or 8 for float64 models; m: 2 or w, by
`train.moments`; N: processes that share the model):

    kind          one process                          shared, each of N
    weights       c                                    trained w/N, frozen c/N
    masters       trained w, where c < w               -
    gradients     trained w                            trained w/N
    moments       trained 2m                           trained 2m/N

`train.keep: best` holds the trained weights once more, at w bytes each, in main memory: they count as masters where the
model is on the CPU, too.

Parts answer for what they hold (`Part.memory`): anchor, importance, state, scratch, and the moments of an optimizer
that they bring.

What comes and goes: activations (all that is alive at the end of the forward pass of one micro-batch of the longest
examples), logits (of one chunk, with their log-softmax and its gradient), transient (the most that the backward pass
takes beyond the activations; where processes share the model, also the gathered copies and what gradients are reduced
in). Activations and their backward pass follow from no formula: the real modules run on fake tensors, which have shapes
and no numbers.

`total` is what is held and the largest of three moments: a pass, with activations and with logits or transient, and
with all gradients only if a step accumulates several passes, or if masters are on the CPU; the update, with all
gradients and without activations; and, on the CPU, the end, when adapters are merged into copies in float32. It is
therefore less than the sum of the kinds. Processes on the CPU that share a model and compute in another dtype than its
checkpoint's each begin with a whole copy, which can be more. CUDA's own context and the gaps of its allocator are not
included; on the CPU see `resident`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from experiments.model.shape import Shape
from experiments.training import hooks, loss
from experiments.training.activations import Unknown, activations
from experiments.training.entries import entries
from experiments.training.settings import TrainSettings
from methods.errors import UserError
from methods.part import Part
from methods.tools.adam import CHUNK, CPU_CHUNK, SCRATCH
from methods.tools.costs import Counts, Memory, Pass

Phase = Literal["prepare", "train"]
KINDS = (
    "weights",
    "masters",
    "gradients",
    "moments",
    "anchor",
    "importance",
    "state",
    "scratch",
    "activations",
    "logits",
    "transient",
    "total",
)
HELD = ("weights", "masters", "moments", "anchor", "importance", "state")  # from the first step to the last
LIBRARIES = int(0.6 * 2**30)  # bytes that Python and its libraries take
DRAWN = 48  # bytes for each entry of a row's logits while a token is drawn: of noise in float64, and of its copies
MOST_PROCESSES = 8  # that a refusal proposes


def predict(
    *, phase: Phase, parts: Sequence[Part], settings: TrainSettings, longest: int | None = None, **model: Any
) -> dict[str, int | None]:
    """Peak bytes of one process in `phase`, {kind: bytes} by `KINDS`; all 0 where no part prepares anything.

    settings   of training in that phase; `length` is taken for the longest example: replace it where that is shorter
    longest    tokens of the longest document of general text, which a part may cut; None: not known
    model      the other fields of `_Prediction`

    All None for an architecture that does not run on tensors without numbers, whose activations are therefore unknown.
    """
    predicting = _Prediction(parts=tuple(parts), **model)
    try:
        if phase == "train":
            return predicting.training(settings)
        passes = [predicting.preparing(part, made, settings, longest) for part in parts for made in part.preparation()]
    except Unknown:
        return dict.fromkeys(KINDS)
    return max(passes, key=lambda kinds: kinds["total"], default=_with_total({}))


def resident(kinds: Mapping[str, int | None]) -> int | None:
    """Bytes of a process on the CPU as the system counts them, from a prediction by kind; None where that is unknown.

    total + Python and its libraries + activations + logits: what is freed is kept, and tensors of rows of other lengths
    do not fit into it, which comes to about as much again.
    """
    if kinds["total"] is None:
        return None
    return kinds["total"] + LIBRARIES + kinds["activations"] + kinds["logits"]


def stored(*, parts: Sequence[Part], **model: Any) -> int:
    """Bytes on the disk, before they are compressed, of what preparing the parts makes; 0 where that is unknown.

    model      the fields of `_Prediction`

    It is what training then holds: importance, other state and, where a part trains while it prepares, its start.
    """
    try:
        counts = _Prediction(parts=tuple(parts), **model).counts
    except Unknown:
        return 0
    made = {part: part.preparation() for part in parts}
    held = [(part.memory(counts=counts, phase="train"), passes) for part, passes in made.items() if passes]
    return sum(
        memory.importance + memory.state + memory.anchor * any(one.training is not None for one in passes)
        for memory, passes in held
    )


def refuse(
    *, what: str, available: int | None, settings: TrainSettings, processes: int | None = None, **inputs: Any
) -> dict[str, int | None]:
    """The prediction, where it is unknown or fits into `available` bytes. `predict` takes the other arguments.

    Raises UserError naming `what`, by how much it does not fit, and what each change of settings would save.
    """
    if available is not None and inputs["device_type"] == "cpu":
        available //= processes or 1  # processes on the CPU share its memory
    kinds = predict(settings=settings, processes=processes, **inputs)
    if available is None or kinds["total"] is None or kinds["total"] <= available:
        return kinds

    def total(*, processes: int | None = processes, **changed: Any) -> int:
        return predict(settings=dataclasses.replace(settings, **changed), processes=processes, **inputs)["total"]

    most_processes = 1 if inputs["device_type"] == "cpu" else MOST_PROCESSES
    helps = _what_helps(total, kinds["total"], available, settings, processes or 1, most_processes)
    advice = (
        f"What would help: {'; '.join(helps)}"
        if helps
        else "No setting helps: take a smaller model, adapters, or a larger device"
    )
    largest = sorted((kind for kind in KINDS[:-1] if kinds[kind]), key=kinds.get, reverse=True)[:4]
    raise UserError(
        f"{what} would take {_gib(kinds['total'])} of memory at its peak, {_gib(kinds['total'] - available)} more than "
        f"the {_gib(available)} free here (most of it: "
        f"{', '.join(f'{kind} {_gib(kinds[kind])}' for kind in largest)}). {advice}"
    )


def _what_helps(
    total: Callable[..., int], now: int, available: int, settings: TrainSettings, processes: int, most_processes: int
) -> list[str]:
    """Changes that save memory, with the bytes each saves; of micro-batches and of processes the first that fits."""
    helps, changes = [], {}
    for key, value, text in (
        ("checkpointing", True, "checkpointing: true"),
        ("moments", "bfloat16", "moments: bfloat16"),
    ):
        saved = now - total(**{key: value})
        if saved > 0:
            changes[key] = value
            helps.append(f"`train.{text}` saves {_gib(saved)}{' and fits' if now - saved <= available else ''}")
    if len(changes) > 1:
        saved = now - total(**changes)
        helps.append(f"both save {_gib(saved)}{' and fit' if now - saved <= available else ''}")
    smaller = [] if settings.pack else [settings.micro_batch >> i for i in range(1, settings.micro_batch.bit_length())]
    fitting = next((size for size in smaller if total(micro_batch=size) <= available), None)
    if fitting:
        helps.append(f"`train.micro_batch: {fitting}` fits")
    more = [2**i for i in range(1, most_processes.bit_length()) if 2**i > processes]
    fitting = next((n for n in more if total(processes=n) <= available), None)
    if fitting:
        helps.append(f"`processes: {fitting}` in the model's block fits, with as many devices like this one")
    return helps


@dataclass(frozen=True, kw_only=True)
class _Prediction:
    """The bytes of one model as its parts adapt it.

    processes  how many share the model; None: one process, which does not share it
    """

    shape: Shape
    parts: tuple[Part, ...]
    checkpoint_dtype: torch.dtype
    compute_dtype: torch.dtype
    device_type: str
    processes: int | None = None

    @functools.cached_property
    def counts(self) -> Counts:
        return Counts(
            **vars(entries(self.shape, adapting(self.parts))),
            checkpoint=self.checkpoint_dtype.itemsize,
            compute=self.compute_dtype.itemsize,
            device=self.device_type,
            processes=self.processes,
        )

    def training(self, settings: TrainSettings) -> dict[str, int]:
        if any("provides_weights" in part.capabilities for part in self.parts):
            masters = self.counts.wide * self.counts.trained * self.counts.half  # made although nothing moves them
            return _with_total({"weights": self.counts.base * self.counts.compute, "masters": masters})
        longest = max([settings.length, *(part.added().length or 0 for part in self.parts)])
        own = [part.memory(counts=self.counts, phase="train") for part in self.parts]
        return self._fit(dataclasses.replace(settings, length=longest), own, parts=self.parts)

    def preparing(self, part: Part, made: Pass, settings: TrainSettings, longest: int | None) -> dict[str, int]:
        """A pass that a part makes over documents: a training of its own, or forward and backward passes."""
        length = min(n for n in (made.length or longest or settings.length, longest) if n) + made.generated
        own = part.memory(counts=self.counts, phase="prepare")
        if made.training is None:
            return self._pass(made, own, length)
        given = {name: value for name, value in made.training.items() if value is not None}
        return self._fit(dataclasses.replace(settings, **(given | {"length": length, "keep": "last"})), [own])

    def _pass(self, made: Pass, own: Memory, length: int) -> dict[str, int]:
        """Each process has the whole model, and one gradient at a time; or, for text, keys and values of all tokens."""
        counts, rows = self.counts, made.rows_at(length)
        alive, work = activations(
            self.shape,
            parts=() if made.bare else adapting(self.parts),
            dtype=self.compute_dtype,
            rows=rows,
            length=length,
            gradients=made.gradients,
            cached=bool(made.generated),
        )
        logits = DRAWN * rows if made.generated else 3 * counts.wide * rows * length * (made.gradients != "none")
        kinds = _held([own]) | {
            "weights": counts.compute * (counts.base if made.bare else counts.all),
            "scratch": own.kept + own.gradient,
            "activations": alive,
            "transient": work,
            "logits": logits * counts.vocabulary,
        }
        return _with_total(kinds, kept=own.kept, passing=alive + max(kinds["logits"], work, own.gradient))

    def _fit(self, settings: TrainSettings, own: Sequence[Memory], *, parts: Sequence[Part] = ()) -> dict[str, int]:
        """The engine's loop with `parts`, which hold and take their `own` in it."""
        counts, share, wide, narrow = self.counts, self.counts.share, self.counts.wide, self.counts.compute
        twice = hooks.asking_twice(parts) is not None  # both gradients are computed in float32
        computing = torch.promote_types(self.compute_dtype, torch.float32) if twice else self.compute_dtype
        rows, length = settings.micro_batch, settings.length
        if settings.pack:
            rows, length = 1, max(settings.pack, length)
        alive, work = activations(
            self.shape,
            parts=adapting(self.parts),
            dtype=computing,
            rows=rows,
            length=length,
            checkpointing=settings.checkpointing,
            packed=bool(settings.pack),
            device=self.device_type,
        )
        two_moments = share(2 * (2 if settings.moments == "bfloat16" else wide) * counts.trained)
        labelled, copies = rows * length, 0
        kinds = _held(own) | {
            "gradients": share(wide * counts.trained),
            "moments": next((memory.moments for memory in own if memory.moments is not None), two_moments),
            "logits": 3 * wide * counts.vocabulary * min(labelled, loss.CHUNK),
        }
        if self.processes is None:
            kinds["weights"] = narrow * counts.all
            kinds["masters"] = wide * counts.trained * counts.half
        else:
            kinds["masters"] = 0
            kinds["weights"] = share(wide * counts.trained + narrow * (counts.all - counts.trained))
            copies += narrow * (counts.root + 2 * counts.block)
            copies += (narrow + wide) * max(counts.root_trained, counts.block_trained)
        if twice:  # the weights before they are moved, and what is not trained in float32
            copies += share(wide * counts.trained) + counts.half * wide * (counts.all - counts.trained)
        if settings.keep == "best" and self.device_type == "cpu":
            kinds["masters"] += share(wide * counts.trained)
        if labelled > loss.CHUNK:
            # the hidden states that logits are computed from, their gradient, and the head's of the chunks so far
            kinds["logits"] += computing.itemsize * (2 * counts.width * labelled + counts.head_trained)
        update = 0
        if settings.moments == "bfloat16":
            update = SCRATCH * counts.piece(share(counts.largest_trained), cpu=CPU_CHUNK, cuda=CHUNK)
        gradient_copied = any("needs_gradient" in part.capabilities for part in parts)
        update += sum(memory.update for memory in own) + gradient_copied * share(wide * counts.trained)
        update = max([update, *(memory.optimizer for memory in own)])
        kept, forward = sum(memory.kept for memory in own), sum(memory.forward for memory in own)
        kinds |= {"scratch": kept + forward + update, "activations": alive, "transient": work + copies}
        # gradients exist during a pass where several are added up, and where masters on the CPU keep their buffers
        rows_added = any(part.added().trained for part in parts)
        waiting = rows_added or bool(settings.pack) or settings.batch > settings.micro_batch * (self.processes or 1)
        waiting = waiting or (self.device_type == "cpu" and self.processes is None and counts.half)
        # the head's gradient is complete while all blocks still hold their activations
        head = 0 if waiting else share(wide * counts.head_trained)
        # a model to be shared is loaded whole and cut in main memory: mapped from its files, or copied to another dtype
        copied = (
            self.processes is not None and self.device_type == "cpu" and self.compute_dtype != self.checkpoint_dtype
        )
        return _with_total(
            kinds,
            kept=kept,
            loading=narrow * counts.all * copied,
            passing=alive
            + copies
            + forward
            + max(kinds["logits"], work + head)
            + (kinds["gradients"] if waiting else 0),
            update=kinds["gradients"] + max(update, narrow * counts.largest_trained * counts.half),
            # the matrices under adapters, merged in main memory when the training has ended
            finishing=wide * counts.adapted * (self.device_type == "cpu" and bool(parts)),
        )


def adapting(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts that change which tensors are trained: FLOPs and activations depend on no others."""
    return tuple(part for part in parts if "adapts" in part.capabilities)


def _held(own: Sequence[Memory]) -> dict[str, int]:
    return {kind: sum(getattr(memory, kind) for memory in own) for kind in ("anchor", "importance", "state")}


def _with_total(
    kinds: dict[str, int], *, kept: int = 0, passing: int = 0, update: int = 0, finishing: int = 0, loading: int = 0
) -> dict[str, int]:
    """All kinds and `total`: what is held, with `kept` scratch, and the largest moment; or `loading` before them."""
    every = {kind: int(kinds.get(kind, 0)) for kind in KINDS[:-1]}
    return every | {"total": max(loading, sum(every[kind] for kind in HELD) + kept + max(passing, update, finishing))}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
