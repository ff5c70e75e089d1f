"""The protocol of a part: what a method may do to a run, and when.

A method is a composition of parts. A part is a frozen, keyword-only dataclass: its fields are its settings, and it
overrides only the hooks it needs. The engine calls the hooks in this order:

    calibrate, prepare      in the stage `prepare`: calibrate on the bare model, prepare on the adapted one
    adapt                   wrap the model or freeze tensors of it
    begin                   the training rows are there, nothing has moved
    optimizer, optimizer_ready
    epoch                   at the beginning of each epoch: its rows
    each step:
        examples            the rows of the global step, before they are cut into micro-batches and shared out
        batch               one micro-batch
        token_weights       a weight for each labelled token, from the prediction there
        batch_weights       the same, from the nll of all labelled tokens of the micro-batch
        loss                a term in nats
        second_gradient     offsets at which the step's gradient is taken once more
        before_clip         gradients of penalties in closed form, projections
        after_step          after clipping and optimizer.step()
    finish, save, report

Parts that share a hook run by phase (`PHASES`), then by key; `@register(phase=...)` says the phase. Without it the
phase follows from the hooks that the part overrides.

`state` is one mutable dict for each part. It begins with what `calibrate` and `prepare` made ("calibration",
"importance", "start", "carry"), and the part's hooks add to it; checkpoints contain it. The engine reads two keys:

    state["anchor"]   tensors, in a dict, that the run compares its weights with; their bytes are recorded
    state["frozen"]   {name of run.weights: bool mask that broadcasts to this process's rows, on their device}: entries
                      that do not move in this step, whatever the optimizer and its weight decay do; their gradient
                      counts in no norm. A mask of no dimension stays on the CPU and freezes the tensor whole: the
                      optimizer keeps no state of it. What is frozen is held twice during the step (`Memory.update`).
                      What is drawn is set in `begin` or `examples`, before a part takes a second gradient; what the
                      step's gradient chooses in `before_clip`, with "frozen" in `scratch`

Where several processes train one model, each holds some rows of every tensor. A part works on these rows
(`run.weights`, `run.shards.local`) and sums over processes what belongs to all rows (`run.shards.sum`). All processes
call all hooks equally often, also for micro-batches that only fill up an uneven batch and count with weight zero: a
hook that runs the model runs it in every call, whatever the batch contains.

What the engine offers, so that no part has to write it, stands at `Run`. What these services cost is charged to the
part whose hook uses them; a part reports what else it reads or stores with `run.charge`. A complete example:

    from dataclasses import dataclass

    from methods.part import Part, register, setting
    from methods.tools.effective import effective_weights

    @register(
        key="my_l2_sp",
        title="L2-SP",
        paper="https://arxiv.org/abs/1802.01483",
        line="Pull every weight back to the base.",
        phase="penalty",
    )
    @dataclass(frozen=True, kw_only=True)
    class L2SP(Part):
        strength: float = setting(1e-2, within="[0, inf)", help="α of α/2·‖θ−θ₀‖²")

        def before_clip(self, *, run, state, step):
            value = 0.0
            for weight in effective_weights(run):
                moved = weight.value()
                weight.pull(moved, scale=self.strength)
                value += self.strength / 2 * moved.square().sum()
            return value  # of this process's rows; the engine adds the processes' values
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from methods.errors import UserError
from methods.settings import check, declared, setting
from methods.tools.adam import Moments
from methods.tools.costs import Added, Counts, Memory, Pass
from methods.tools.names import unknown
from methods.tools.process_group import Shards

if TYPE_CHECKING:
    from torch import Generator, Tensor, device, nn, optim

    from methods.tools.importance import Codes
    from methods.tools.resume import Resume
    from methods.tools.token_statistics import TokenStatistics

__all__ = [
    "CAPABILITIES",
    "PHASES",
    "REGISTERED",
    "TENSORS",
    "Part",
    "Prepared",
    "Row",
    "Run",
    "adapted",
    "cut",
    "register",
    "setting",
]

Row = dict[str, Any]  # {"input_ids", "labels"}, both (tokens,); labels unshifted, -100 where nothing is learned

PHASES = ("adapt", "data", "weights", "loss", "penalty", "projection", "mask", "merge", "interpolate", "budget")

CAPABILITIES = {
    "optimizer": "brings the optimizer; two such parts are refused",
    "adapts": "changes which tensors are trained; preparation is done on the adapted model",
    "adapter": "wraps linear layers with an adapter; two such parts are refused",
    "importance": "prepares importance, which is stored",
    "general": "reads general text while it trains: `begin` is given it",
    "measures": "measures finished weights on the general probe rows, which the study must have",
    "needs_gradient": "reads the raw task gradient in after_step",
    "provides_weights": "brings finished weights: nothing is trained, its cost is unknown, it stands alone",
    "seeded_preparation": "its preparation draws, so it is made once a seed",
}

REGISTERED: dict[str, type[Part]] = {}


@dataclass(kw_only=True)
class Run:
    """One fine-tuning run, as its parts see it.

    weights  trained tensors by the model's parameter name: float32 (float64 for float64 models) leaf tensors whose
             `.grad` is the optimizer step's complete gradient. They are the truth; the module may compute on copies.
             Where several processes share the model these are this process's rows, cut along the first dimension.
    shapes   shapes of the whole tensors, by the same names
    base     θ₀ by base parameter name, whole, in the checkpoint's own dtype
    shards   this process among those that share the model
    moments  how an optimizer of Adam's kind keeps its m and v
    epoch    optimizer steps of an epoch
    clipped  by what clipping multiplied the last step's gradients: a 0-dim tensor, None before the first step

    Services of the engine, absent (None) where a run was not made by it:

    reference  the frozen base as a model: `hidden(batch)`, `logits(rows)` and, in chunks of logits,
               `kl(hidden rows, reference's hidden rows, temperature=, weights=, reverse=)` to the trained model
    teacher    teacher(weights): the trained model at other values of its trained tensors, a dict of a part's own by the
               names of `weights`. It and `reference` have `states(rows)` → the last hidden states that predict each
               row's labels, read outside a forward pass, and `kl` for the loss
    sample     sample(prompts=, tokens=, temperature=, key=, until=(), ended=False, base=False) → continuations, lists
               of token ids; `until`: texts that end one, `ended`: with the end of text
    score      score(rows, base=False) → for each row the log-probabilities of its labelled tokens, on the CPU
    encode     text → token ids, as general text is encoded
    decode     token ids → text, without special tokens
    passes     passes(rows) → micro-batches that the processes together compute of a step with these rows
    charge     charge(tokens=, flops=, seconds=, bytes=) adds to what the part that is at work costs; charge(rows=) the
               tokens and FLOPs of a training step on these rows
    """

    model: nn.Module
    weights: dict[str, Tensor]
    base: Mapping[str, Tensor]
    seed: int
    device: device | str
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    shards: Shards = dataclasses.field(default_factory=Shards)
    moments: Moments = dataclasses.field(default_factory=Moments)
    epoch: int = 1
    clipped: Tensor | None = None
    reference: Any = None
    teacher: Callable[[dict[str, Tensor]], Any] | None = None
    sample: Callable[..., list[list[int]]] | None = None
    score: Callable[..., list[Tensor]] | None = None
    encode: Callable[[str], Sequence[int]] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    passes: Callable[[Sequence[Row]], int] | None = None
    charge: Callable[..., None] = lambda **costs: None

    def __post_init__(self) -> None:
        self.shapes = self.shapes or {name: weight.shape for name, weight in self.weights.items()}

    def whole(self, name: str) -> Tensor:
        """The whole trained tensor `name`, detached; every process must call it."""
        return self.shards.whole(self.weights[name].detach(), self.shapes[name])

    def generator(self, *key: int | str) -> Generator:
        """Random numbers on the CPU that depend on the run's seed and `key` alone: (part's key, step, row).

        A draw then does not depend on accumulation, on the number of processes or on what was drawn before.
        """
        return generator(self.seed, *key)


def generator(*key: int | str) -> Generator:
    """Random numbers on the CPU that depend on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


TENSORS = ("calibration", "importance", "start", "carry")  # what is stored of a `Prepared`, a file each


@dataclass(kw_only=True)
class Prepared:
    """What `calibrate` or `prepare` made: whole tensors, of several processes the first one's, stored for the runs."""

    calibration: dict[str, Tensor] | None = None  # by `calibrate`, for `adapt`
    importance: dict[str, Tensor | Codes] | None = None  # by base parameter name, tensors or 8-bit codes
    start: dict[str, Tensor] | None = None  # by the names of `Run.weights`: what training starts from
    carry: dict[str, Tensor] | None = None
    tokens: int = 0  # non-padding input tokens read
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # deterministic facts, no time and no place


@dataclass(frozen=True, kw_only=True)
class Part:
    """Base of all parts: every hook does nothing. Raises UserError for a setting of a wrong type or value."""

    key: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    line: ClassVar[str] = ""
    capabilities: ClassVar[frozenset[str]] = frozenset()
    phase: ClassVar[str] = ""  # one of PHASES; empty: as its hooks say
    shares: ClassVar[tuple[str, ...]] = ()  # modules whose code counts as this part's own: "methods.tools.effective"
    scratch: ClassVar[tuple[str, ...]] = ()  # keys of `state` that no checkpoint needs: they are always made anew
    removed: ClassVar[Mapping[str, str]] = {}  # settings of earlier versions → what to write instead
    # What the laws (experiments/laws) must know of it. docs/parts.md explains them.
    neutral: ClassVar[Mapping[str, Any] | str] = ""  # settings that make it plain fine-tuning, or "none: the reason"
    frozen: ClassVar[str] = ""  # why entries that are not trained may differ from the base afterwards
    decomposed: ClassVar[float] = 0.0  # largest relative error of the base's logits where its weights are kept as a sum
    beside: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # parts without which it cannot run, with their settings
    excludes: ClassVar[Mapping[str, str]] = {}  # parts, or capabilities of parts, it cannot run beside → the reason
    trial: ClassVar[Mapping[str, Any]] = {}  # settings for a tiny model, on which the laws run it

    def __post_init__(self) -> None:
        check(self, self.key or type(self).__name__)

    def settings(self) -> dict[str, Any]:
        """Every setting's value: the block's, else the default."""
        return {f.name: getattr(self, f.name) for f in declared(self)}

    def look(self, *, shapes: Mapping[str, Sequence[int]]) -> None:
        """Before anything runs: refuse files and other inputs that the part reads and could not work with.

        shapes   of the base's tensors by name; empty before the base was made
        """

    def calibrate(
        self,
        *,
        model: nn.Module,
        general: Sequence[Row],
        seed: int,
        progress: Callable[..., Any] | None,
        shards: Shards = Shards(),
        sample: Callable[..., list[list[int]]] | None = None,
    ) -> Prepared | None:
        """What the method needs of the bare model, before any part adapts it; `Prepared.calibration` is for `adapt`.

        Each process has the whole model, which must be left as it is. The other arguments are those of `prepare`.
        Methods with other adapters share what is made here, unless a part of them has `prepare`.
        """
        return None

    def adapt(self, model: nn.Module, *, seed: int, state: Mapping[str, Any] = {}) -> nn.Module:
        """Wrap the model or freeze tensors of it; trained tensors are those that require a gradient afterwards.

        `state["calibration"]` is what `calibrate` made. It is absent on the meta device, where only shapes are needed.
        """
        return model

    def preparation(self) -> Sequence[Pass]:
        """The passes over general text that `calibrate` and `prepare` make, for `plan` and the memory check.

        By default each makes one over all uncut documents: `calibrate` forward alone, `prepare` with gradients.
        """
        passes = {"calibrate": Pass(bare=True, gradients="none"), "prepare": Pass()}
        return tuple(made for hook, made in passes.items() if overrides(self, hook))

    def added(self) -> Added:
        """What the part adds to training, in tokens."""
        return Added()

    def memory(self, *, counts: Counts, phase: str) -> Memory:
        """The bytes that the part holds and takes beside the engine's own, in the phase "prepare" or "train"."""
        return Memory()

    def prepare(
        self,
        *,
        model: nn.Module,
        base: Mapping[str, Tensor],
        general: Sequence[Row],
        seed: int,
        fit: Callable[..., Any],
        progress: Callable[..., Any] | None,
        shards: Shards = Shards(),
        resume: Resume | None = None,
        sample: Callable[..., list[list[int]]] | None = None,
    ) -> Prepared | None:
        """What the method needs before it sees the domain, from general text.

        general   whole documents, which the part cuts at a length of its own (`cut`)
        seed      the cell's with the capability "seeded_preparation"; otherwise 0, and all seeds share what is prepared
        fit       fit(model=, parts=, examples=, seed=, **training settings; None keeps the method's own): the
                  engine's loop, which shares the model among the processes and continues where it was interrupted
        progress  progress(total=, desc=, unit=) → a tqdm bar
        shards    the processes; each has the whole model
        resume    checkpoints of a long pass of the part's own; None: there are none
        sample    sample(model=, prompts=, tokens=, temperature=, key=, ended=, size=, done=) → continuations, as
                  `Run.sample` gives them; of `size` prompts together, with done(number) after each batch
        """
        return None

    def begin(self, *, run: Run, state: dict, examples: Sequence[Row], general: Sequence[Row] = ()) -> None:
        """Before the first step: weights are the base's and adapters are fresh; `state["start"]` is copied afterwards.

        examples  the training rows of the domain; row i of the list is the row with the index i in later hooks
        general   whole documents of general text with the capability "general", else nothing
        """

    def optimizer(
        self, *, run: Run, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> optim.Optimizer | None:
        """The optimizer of `run.weights`; None: AdamW."""

    def optimizer_ready(self, *, run: Run, state: dict, optimizer: optim.Optimizer) -> None:
        """After the optimizer is made and the start is copied."""

    def epoch(self, *, run: Run, state: dict, examples: Sequence[Row], epoch: int) -> Sequence[Row]:
        """The training rows of epoch `epoch` (from 0), as many as `examples` has; for example answers sampled anew."""
        return examples

    def examples(self, *, run: Run, state: dict, rows: list[Row], step: int) -> list[Row]:
        """Change the rows of the global step, on the CPU, before they are cut into micro-batches and shared out.

        A row of the domain carries its "index". A row without one is the part's own: its tokens and FLOPs are charged
        to the part and not counted in `tokens_trained`. A domain row may come back with other tokens and labels:
        `tokens_trained` counts those it had, and the difference is charged to the part. Further 1-D tensors of a row's
        length are carried into the micro-batch under their name, zero where a row has none. Every process calls this
        with the same rows and must get the same rows: draw from `run.generator(self.key, step, row)`.

        The step's loss is divided by the labelled tokens of the rows that are returned. A label set to -100 here is
        not counted; a token that is to be counted and not learned gets the weight 0 in `token_weights`.
        """
        return rows

    def batch(self, *, run: Run, state: dict, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change a micro-batch on the CPU: input_ids, labels, attention_mask or (packed) position_ids (batch, tokens).

        Rows and labels may be added, changed and taken away: the step's loss is divided by the labelled tokens that are
        then in all its micro-batches, and tokens that are added are charged to the part. Padding stands on the right;
        no other mask is read.
        """
        return batch

    def token_weights(
        self, *, run: Run, state: dict, batch: dict[str, Tensor], statistics: TokenStatistics
    ) -> Tensor | None:
        """Weights (tokens,) of the nll of labelled tokens, without a gradient; None leaves them at 1, to the bit.

        Called for a chunk of a micro-batch's labelled tokens, where their logits are. The weights of several parts are
        multiplied. The loss stays divided by the number of labelled tokens.
        """
        return None

    def batch_weights(
        self, *, run: Run, state: dict, batch: dict[str, Tensor], nll: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor | None:
        """The same for all labelled tokens of a micro-batch together, from their nll (tokens,) alone.

        Called once for each micro-batch, after `token_weights`, with whose weights these are multiplied. rows and
        columns (tokens,) are the labels' places in the micro-batch, row by row.
        """
        return None

    def loss(self, *, run: Run, state: dict, batch: dict[str, Tensor], hidden: Tensor) -> Tensor | None:
        """A term in nats summed over the micro-batch's labelled tokens, to be divided by the step's number of them.

        hidden (batch, tokens, width) and all of the batch but its labels are on the run's device. The model and
        `run.reference` may be run on other tokens. Where processes share the model a term of `run.weights` themselves
        is refused: it belongs in `before_clip`.
        """
        return None

    def second_gradient(self, *, run: Run, state: dict, step: int) -> Mapping[str, Tensor] | None:
        """Offsets by names of `run.weights`: the step's gradient is taken once more at weights plus offsets.

        The first gradient is in `.grad`, which may be changed in place to make the offsets: the second one replaces it,
        on the same micro-batches with the same dropout. Both are computed in float32, whatever dtype the run computes
        in. The step itself is made from the unmoved weights (SAM). At most one part of a method asks for it, and one
        at its neutral settings does not.
        """
        return None

    def before_clip(self, *, run: Run, state: dict, step: int) -> Tensor | float | None:
        """Add a penalty's closed-form gradient to the trained tensors' `.grad`, or project it, once a step.

        Returns the penalty's value (0-dim) on this process's rows; the engine adds the processes' values.
        """
        return None

    def after_step(self, *, run: Run, state: dict, step: int, gradient: dict[str, Tensor] | None) -> None:
        """After the update. `gradient`: the task's, before penalties and clipping, if "needs_gradient" is declared."""

    def keep(self, *, run: Run, state: dict) -> dict[str, Tensor]:
        """Tensors outside `state` that change during training; an interrupted run gets them back in place.

        The names must be the same before the first step and after each step. Checkpoints contain `state` in any case:
        tensors, numpy arrays, numbers, strings, booleans and None, random number generators and objects with a
        `state_dict`, in dicts, lists, tuples, sets, deques and dataclasses. Where an object of another kind changes, no
        checkpoint is written and a message names it. Attributes of the part and of its module are not kept.
        """
        return {}

    def finish(
        self,
        *,
        run: Run,
        state: dict,
        final: dict[str, Tensor],
        measure: Callable[[Mapping[str, Tensor]], dict[str, float]] | None = None,
    ) -> dict[str, Tensor]:
        """Change the full-precision weights to be written, by base parameter name; what is absent stays the base's.

        final    whole tensors on the CPU at the first process, which writes them; empty at the others
        measure  measure(weights) → {"nll", "kl"}: nats per token of the general probe rows and KL(base ‖ weights)
                 there, of weights like `final`, rounded as they will be kept. Every process calls it equally often;
                 None outside a cell

        No name, shape or narrower dtype than the base has: that is refused by the part's name. A part that has no other
        hook of a training acts in `finish` alone: cells that differ in such parts train once. Its `run` then has a
        model without numbers and no trained weights.
        """
        return final

    def save(self, *, run: Run, state: dict, folder: Path) -> None:
        """Write deterministic files beside the weights. Every process calls it; the first one writes."""

    def report(self, *, run: Run, state: dict) -> dict[str, Any]:
        """Facts of the run for its record, as JSON can hold them."""
        return {}


# The phase of a part that does not say one: that of the first of these hooks that it overrides.
PHASE_OF_HOOK = {
    "adapt": "adapt",
    "epoch": "data",
    "examples": "data",
    "batch": "data",
    "token_weights": "weights",
    "batch_weights": "weights",
    "loss": "loss",
    "before_clip": "penalty",
    "optimizer": "mask",
    "after_step": "mask",
    "finish": "interpolate",
}


def overrides(part: Part | type[Part], hook: str) -> bool:
    """Whether a part has this hook of its own."""
    return getattr(part if isinstance(part, type) else type(part), hook) is not getattr(Part, hook)


def prepares(part: Part) -> bool:
    """Whether the part has something to do in the stage `prepare`."""
    return overrides(part, "calibrate") or overrides(part, "prepare")


def phase_of(part: Part | type[Part]) -> str:
    """The phase in which a part's hooks run."""
    return part.phase or next((phase for hook, phase in PHASE_OF_HOOK.items() if overrides(part, hook)), PHASES[0])


def in_order(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts in the order in which hooks they share are called: by phase, then by key."""
    return tuple(sorted(parts, key=lambda part: (PHASES.index(phase_of(part)), part.key)))


def adapted(model: nn.Module, parts: Iterable[Part], *, seed: int, states: Mapping[str, Mapping] = {}) -> nn.Module:
    """The model as all parts adapt it, in their order; `states` by key as `Part.adapt` reads them."""
    for part in in_order(parts):
        model = part.adapt(model, seed=seed, state=states.get(part.key, {}))
    return model


def register(
    *, title: str, paper: str, line: str, phase: str = "", capabilities: frozenset[str] = frozenset(), key: str = ""
):
    """Class decorator: enter a part under `key`, by default its module's name.

    phase   when its hooks run beside those of other parts, one of `PHASES`; by default that of its first hook
    """

    def enter(part: type[Part]) -> type[Part]:
        name = key or part.__module__.rpartition(".")[2]
        if not (issubclass(part, Part) and "__dataclass_params__" in vars(part) and part.__dataclass_params__.frozen):
            raise TypeError(f"part {name!r}: write @dataclass(frozen=True, kw_only=True) below @register on a Part")
        if shadowed := [f.name for f in declared(part) if hasattr(Part, f.name)]:
            raise TypeError(f"part {name!r}: the setting {shadowed[0]!r} would hide the hook of that name: rename it")
        own = [name for name in vars(part) if not name.startswith("_") and name not in {f.name for f in declared(part)}]
        if strange := [name for name in own if not hasattr(Part, name)]:
            raise TypeError(
                f"part {name!r}: write a setting as `setting(...)` and a helper's name with a leading `_`, or "
                f"correct the name: {unknown('hook or attribute', strange[0], [n for n in dir(Part) if n[0] != '_'])}"
            )
        for hook, capability in (("optimizer", "optimizer"), ("adapt", "adapts")):
            if overrides(part, hook) and capability not in capabilities:
                raise TypeError(
                    f"part {name!r}: it has the hook `{hook}`, so write {capability!r} among its capabilities: "
                    f"{CAPABILITIES[capability]}"
                )
        if odd := set(capabilities) - CAPABILITIES.keys():
            raise TypeError(
                f"part {name!r}: unknown capability {', '.join(sorted(odd))}; known: {', '.join(CAPABILITIES)}"
            )
        if phase and phase not in PHASES:
            raise TypeError(f"part {name!r}: the phase is {phase!r}: it must be one of {', '.join(PHASES)}")
        there = REGISTERED.get(name)
        if name in ("train", "like") or (
            there and (there.__module__, there.__qualname__) != (part.__module__, part.__qualname__)
        ):
            taken = f"{there.__module__}.{there.__qualname__}" if there else "a method block's own key"
            raise UserError(f"part {name!r} of {part.__module__}: the name is taken by {taken}; give another `key`")
        part.key, part.title, part.paper, part.line, part.phase = name, title, paper, line, phase
        part.capabilities = frozenset(capabilities)
        REGISTERED[name] = part
        return part

    return enter


def cut(
    examples: Sequence[dict[str, Tensor]], *, samples: int, length: int, part: Part | None = None
) -> list[dict[str, Tensor]]:
    """The first `samples` documents, each cut at `length` tokens. With `part` a message says where there are fewer."""
    if part and len(examples) < samples:
        print(
            f"{part.key}.samples is {samples}, but the general text has {len(examples)} documents to learn from: all "
            "of them are used; `general.importance` sets how many there are",
            flush=True,
        )
    return [{name: tensor[:length] for name, tensor in example.items()} for example in examples[:samples]]
