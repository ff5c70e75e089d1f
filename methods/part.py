"""The protocol of a part: what a method may do to a run, and when.

A method is a composition of parts. A part is a frozen, keyword-only dataclass: its fields are its settings, and it
overrides only the hooks it needs. The engine calls them in this order, parts in alphabetical order of their keys:

    adapt → [prepare, in a stage of its own] → begin → optimizer → optimizer_ready
          → each step: batch, loss for every micro-batch; before_clip; clip; optimizer.step(); after_step
          → finish → save → report

`state` is one mutable dict a part: what `prepare` left under "importance", "start" and "carry", and whatever the
part's own hooks put there. `state["anchor"]` (a dict of tensors) is what the run holds to compare weights with; its
bytes are recorded. Where several processes train one model, each holds some rows of every tensor: a part works on these
(`run.weights`, `run.shards.local`), and what is of all rows it sums (`run.shards.sum`). A complete example:

    from dataclasses import dataclass

    from methods.tools.effective import effective_weights
    from methods.part import Part, register, setting

    @register(key="l2_sp", title="L2-SP", paper="https://arxiv.org/abs/1802.01483", line="Pull every weight back to the base.")
    @dataclass(frozen=True, kw_only=True)
    class L2SP(Part):
        strength: float = setting(1e-2, within="[0, inf)", help="α of α/2·‖θ−θ₀‖²")

        def before_clip(self, *, run, state, step):
            value = 0.0
            for weight in effective_weights(run):
                moved = weight.value()
                weight.pull(moved, scale=self.strength)
                value += self.strength / 2 * moved.square().sum()
            return value  # of this process's rows; the engine adds them up
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from methods.errors import UserError
from methods.settings import check, declared, setting
from methods.tools.adam import Moments
from methods.tools.process_group import Shards

if TYPE_CHECKING:
    from torch import Tensor, device, nn, optim

    from methods.tools.importance import Codes
    from methods.tools.resume import Resume

__all__ = ["CAPABILITIES", "REGISTERED", "Part", "Prepared", "Run", "cut", "register", "setting"]

CAPABILITIES = {
    "optimizer": "brings the optimizer; two such parts are refused",
    "adapts": "changes which tensors are trained; preparation is done on the adapted model",
    "importance": "prepares importance, which is stored",
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
    base     θ₀ by base parameter name, whole, in the checkpoint's own dtype.
    shards   this process among those that share the model
    moments  how an optimizer of Adam's kind keeps its m and v
    epoch    optimizer steps an epoch takes
    clipped  what clipping multiplied the last step's gradients by; a 0-dim tensor, None before the first
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

    def __post_init__(self) -> None:
        self.shapes = self.shapes or {name: weight.shape for name, weight in self.weights.items()}

    def whole(self, name: str) -> Tensor:
        """The whole trained tensor `name`, detached; every process must ask."""
        return self.shards.whole(self.weights[name].detach(), self.shapes[name])


@dataclass(kw_only=True)
class Prepared:
    """What a part prepared: importance by base parameter name, tensors or 8-bit codes (methods/tools/importance.py); `start` by
    the names of `Run.weights`; carried tensors. Whole tensors; of several processes the first one's are kept."""

    importance: dict[str, Tensor | Codes] | None = None
    start: dict[str, Tensor] | None = None
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
    shares: ClassVar[tuple[str, ...]] = ()  # modules whose code counts as this part's own: "methods.tools.effective"
    scratch: ClassVar[
        tuple[str, ...]
    ] = ()  # keys of its state that hold nothing from one step to the next: no checkpoint has them
    removed: ClassVar[Mapping[str, str]] = {}  # settings of earlier versions → what to write instead
    # What the laws (experiments/laws) must know of it. docs/parts.md explains them.
    neutral: ClassVar[Mapping[str, Any] | str] = ""  # settings that make it plain fine-tuning, or "none: the reason"
    frozen: ClassVar[str] = ""  # why entries that are not trained may differ from the base afterwards
    decomposed: ClassVar[float] = 0.0  # largest relative error of the base's logits where its weights are kept as a sum
    beside: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # parts without which it cannot run, with their settings
    trial: ClassVar[Mapping[str, Any]] = {}  # settings for a tiny model, on which the laws run it

    def __post_init__(self) -> None:
        check(self, self.key or type(self).__name__)

    def settings(self) -> dict[str, Any]:
        """Every setting's value: the block's, else the default."""
        return {f.name: getattr(self, f.name) for f in declared(self)}

    def look(self, *, shapes: Mapping[str, Sequence[int]]) -> None:
        """Before anything runs: refuse what the part itself reads, such as files, where it could not work.

        shapes   of the base's tensors by name, where the base was made; else empty
        """

    def adapt(self, model: nn.Module, *, seed: int) -> nn.Module:
        """Wrap the model or freeze tensors of it; trained tensors are those that require a gradient afterwards."""
        return model

    def general_phase(self) -> dict[str, Any]:
        """Training settings of this part's own that its `prepare` gives to `fit`; None keeps the method's."""
        return {}

    def prepare(
        self,
        *,
        model: nn.Module,
        base: Mapping[str, Tensor],
        general: Sequence[dict[str, Tensor]],
        seed: int,
        fit: Callable[..., Any],
        progress: Callable[..., Any] | None,
        shards: Shards = Shards(),
        resume: Resume | None = None,
    ) -> Prepared | None:
        """What the method needs before it sees the domain, from general text.

        general   {"input_ids", "labels"}, 1-D, labels unshifted and -100 where nothing is asked; whole documents, which a part
                  cuts at a length of its own (`cut`)
        fit       fit(model=, parts=, examples=, seed=, **training settings; None keeps the method's own): the engine's loop,
                  which shares the model among the processes and goes on where it was interrupted
        seed      the cell's with the capability "seeded_preparation", else 0: other seeds reuse what is made
        progress  progress(total=, desc=, unit=) → a tqdm bar
        shards    the processes at work; each has the whole model
        resume    where a pass of the part's own keeps what it has so far; None: nowhere
        """
        return None

    def begin(self, *, run: Run, state: dict, examples: Sequence[dict[str, Tensor]]) -> None:
        """Before the first step; weights are still the base's (the adapter's fresh), `state["start"]` is copied after."""

    def optimizer(
        self, *, run: Run, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> optim.Optimizer | None:
        """The optimizer over `run.weights`; None leaves it to AdamW."""

    def optimizer_ready(self, *, run: Run, state: dict, optimizer: optim.Optimizer) -> None:
        """After the optimizer is made and the start is copied."""

    def batch(self, *, run: Run, state: dict, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change a micro-batch, on the CPU: input_ids, labels, and attention_mask or (packed) position_ids, each (batch, tokens).

        Rows and labels may be added, changed and taken away: a step's loss is divided by the labelled tokens that are then in all
        its micro-batches, and the record's tokens and FLOPs are of what is then computed. Padding stands on the right; no other mask is read.
        """
        return batch

    def loss(self, *, run: Run, state: dict, batch: dict[str, Tensor], hidden: Tensor) -> Tensor | None:
        """A term in nats summed over the micro-batch's labelled tokens, to be divided by the step's number of them.

        hidden (batch, tokens, width) and all of the batch but its labels are on the run's device. The model may be run on
        other tokens. Where processes share the model, one that has fewer micro-batches than another is asked of an example of
        the step once more, which does not count; and a term of `run.weights` themselves is refused: it belongs in `before_clip`.
        """

    def before_clip(self, *, run: Run, state: dict, step: int) -> Tensor | None:
        """Add a penalty's closed-form gradient to the trained tensors' `.grad`, once a step.

        Returns its value (0-dim) on this process's rows; the engine adds the processes' values up.
        """

    def after_step(self, *, run: Run, state: dict, step: int, gradient: dict[str, Tensor] | None) -> None:
        """After the update. `gradient`: the task's, before penalties and clipping, if "needs_gradient" is declared."""

    def keep(self, *, run: Run, state: dict) -> dict[str, Tensor]:
        """Tensors outside `state` that change while the part trains: a run that was interrupted gets them back in place.

        The same names are given before the first step and after each. What changes in `state` needs no word here: tensors, numpy's
        arrays, numbers, texts, true, false and None, generators of random numbers and objects with a `state_dict`, in dicts,
        lists, tuples, sets, deques and dataclasses. Where an object of another kind changes no checkpoint is written, and that
        is said; nor is anything kept that stands in the part itself, which is frozen, or in its module.
        """
        return {}

    def finish(
        self,
        *,
        run: Run,
        state: dict,
        final: dict[str, Tensor],
        measure: Callable[[Mapping[str, Tensor]], dict[str, float]] | None,
    ) -> dict[str, Tensor]:
        """Change the full-precision weights to be written, by base parameter name; what is absent stays the base's.

        final    whole tensors on the CPU at the first process, which writes them; empty at the others
        measure  measure(weights) → {"nll", "kl"}: nats per token of the general probe rows and KL(base ‖ weights) there, of
                 weights like `final`, rounded as they will be kept. Every process calls it equally often; None outside a cell

        No name, shape or narrower dtype than the base has: that is refused by the part's name. A part that has no other
        hook of a training acts in `finish` alone: cells that differ in such parts train once. Its `run` then has a model
        without numbers and no trained weights.
        """
        return final

    def save(self, *, run: Run, state: dict, folder: Path) -> None:
        """Write deterministic files of the part's own beside the weights; all processes are asked, the first one writes."""

    def report(self, *, run: Run, state: dict) -> dict[str, Any]:
        """JSON-able facts of the run for its record."""
        return {}


def register(*, title: str, paper: str, line: str, capabilities: frozenset[str] = frozenset(), key: str = ""):
    """Class decorator: enter a part under `key`, by default its module's name."""

    def enter(part: type[Part]) -> type[Part]:
        name = key or part.__module__.rpartition(".")[2]
        if not (issubclass(part, Part) and "__dataclass_params__" in vars(part) and part.__dataclass_params__.frozen):
            raise TypeError(
                f"part {name!r}: write @dataclass(frozen=True, kw_only=True) below @register, on a subclass of Part"
            )
        if shadowed := [f.name for f in declared(part) if hasattr(Part, f.name)]:
            raise TypeError(
                f"part {name!r}: the setting {shadowed[0]!r} would hide the hook of that name; call it something else"
            )
        for hook, capability in (("optimizer", "optimizer"), ("adapt", "adapts")):
            if getattr(part, hook) is not getattr(Part, hook) and capability not in capabilities:
                raise TypeError(
                    f"part {name!r}: it has the hook `{hook}`, so write {capability!r} among its capabilities: {CAPABILITIES[capability]}"
                )
        if unknown := set(capabilities) - CAPABILITIES.keys():
            raise TypeError(
                f"part {name!r}: unknown capability {', '.join(sorted(unknown))}; known: {', '.join(CAPABILITIES)}"
            )
        there = REGISTERED.get(name)
        if name in ("train", "like") or (
            there and (there.__module__, there.__qualname__) != (part.__module__, part.__qualname__)
        ):
            taken = f"{there.__module__}.{there.__qualname__}" if there else "a method block's own key"
            raise UserError(
                f"part {name!r} of {part.__module__}: the name is taken by {taken}; give another `key` to @register"
            )
        part.key, part.title, part.paper, part.line, part.capabilities = (
            name,
            title,
            paper,
            line,
            frozenset(capabilities),
        )
        REGISTERED[name] = part
        return part

    return enter


def cut(
    examples: Sequence[dict[str, Tensor]], *, samples: int, length: int, part: Part | None = None
) -> list[dict[str, Tensor]]:
    """The first `samples` examples, each cut at `length` tokens: one document each, never packed. `part` is named where there are fewer."""
    if part and len(examples) < samples:
        print(
            f"{part.key}.samples is {samples}, but the general text has {len(examples)} documents to learn from: all of them are taken; "
            "`general.importance` sets how many there are",
            flush=True,
        )
    return [{name: tensor[:length] for name, tensor in example.items()} for example in examples[:samples]]
