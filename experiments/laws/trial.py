"""A part tried on a tiny random model: prepared, trained and finished by the functions that the stages use.

A `Trial` is one part class on one architecture. It is trained at most once for all laws that look at its ordinary run.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.model.measure import Measure
from experiments.model.random_models import build, byte_tokenizer
from experiments.model.shape import Shape
from experiments.training import hooks
from experiments.training.batches import Example, epoch_steps
from experiments.training.engine import FitResult, final_weights, finish, fit
from experiments.training.preparation import prepare
from experiments.training.resume import Resume
from experiments.training.services import evaluating
from experiments.training.settings import TrainSettings
from methods import registry
from methods.part import TENSORS, Part, adapted, in_order
from methods.settings import declared
from methods.tools.names import unknown
from methods.tools.process_group import Shards

ARCHITECTURES = ("llama", "gptj")
SEED = 5
# Five examples a step are cut into micro-batches of two, two and one; of two processes one has three examples and the
# other two, so that their micro-batches do not divide evenly.
SETTINGS = TrainSettings(learning_rate=2e-3, batch=5, micro_batch=2, length=48, probes=0, warmup=0.2, epochs=1.0)


def texts(count: int, *, seed: int, labelled: bool, length: int | None = None) -> list[Example]:
    """Random token ids, of `length` or of ragged lengths; `labelled` leaves labels on the last three, an answer's."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        ids = torch.randint(0, 256, (length or 8 + (index * 7) % 30,), generator=draw)
        labels = ids.clone()
        if labelled:
            labels[:-3] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


class Killed(Exception):
    """The run ends here, as by a kill."""


class Checkpoints(Resume):
    """Checkpoints of a run that is killed after each of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, identity={}, every=0.0)

    def within(self, name: str) -> "Checkpoints":
        return Checkpoints(self.folder / name)

    def save(self, tensors, position, *, problem=None) -> None:
        if problem:
            raise RuntimeError(problem)  # no checkpoint can be written, and the verdict says why
        super().save(tensors, position)
        raise Killed


@dataclass(kw_only=True)
class Trained:
    """What became of one run."""

    result: FitResult
    final: dict[str, Tensor]  # by base parameter name, at the first process
    reports: dict[str, Any]
    logits: Tensor | None = None  # before the first step


@dataclass(kw_only=True)
class Trial:
    """One part class on one architecture, with its own `trial` settings and the parts it needs beside it."""

    kind: type[Part]
    architecture: str
    folder: Path  # for checkpoints and for what the part's settings name
    chosen: Mapping[str, Any] = field(default_factory=dict)  # settings in place of those of the part's `trial`
    shards: Shards = Shards()
    training: TrainSettings | None = None  # None: as SETTINGS, for GPT-J without weight decay
    rows: int = 14  # of the domain
    length: int | None = None  # tokens of every text; None: ragged
    dtype: torch.dtype = torch.float32
    config: Mapping[str, Any] = field(default_factory=dict)  # sizes that are not the tiny model's

    def __post_init__(self) -> None:
        self.training = self.training or replace(SETTINGS, weight_decay=0.1 * (self.architecture == "llama"))
        self.base = {name: p.detach() for name, p in self.model().named_parameters()}
        self.lent = {name: tensor.clone() for name, tensor in self.base.items()}  # what parts are given as the base
        self.read: dict[str, int] = {}  # tokens that each part says it read in its last preparation

    def model(self) -> nn.Module:
        return build(self.architecture, seed=1, dtype=self.dtype, **self.config)

    @property
    def general(self) -> list[Example]:
        return texts(6, seed=11, labelled=False, length=self.length)

    @property
    def beside(self) -> tuple[Part, ...]:
        return registry.build(self.kind.beside)

    def settings(self, **settings: Any) -> dict[str, Any]:
        """The settings under which the part is tried, with a checkpoint folder and a JSONL in the places for them."""
        settings = {**self.kind.trial, **self.chosen, **settings}
        names = [setting.name for setting in declared(self.kind)]
        for name in settings.keys() - set(names):
            raise unknown("setting", name, names, where=f"what {self.kind.key} declares")
        places = {"{checkpoint}": self._checkpoint, "{rows}": self._rows}
        return {
            name: places[value]() if isinstance(value, str) and value in places else value
            for name, value in settings.items()
        }

    def part(self, **settings: Any) -> Part:
        return self.kind(**self.settings(**settings))

    def adapted(self, parts: tuple[Part, ...], states: Mapping[str, dict]) -> nn.Module:
        return adapted(self.model(), parts, seed=SEED, states=states)

    def prepare(self, parts: tuple[Part, ...], *, checkpoints: Checkpoints | None = None) -> dict[str, dict]:
        """What each part prepares from general text, as the training stage would load it."""
        states: dict[str, dict] = {}
        self.read = dict.fromkeys((part.key for part in parts), 0)
        never = Resume(self.folder / "unused", identity={}, every=float("inf"), shards=self.shards)
        for made in prepare(
            parts,
            make=lambda trains: self.model(),
            general=self.general,
            base=self.lent,
            seed=SEED,
            settings=self.training,
            resume=lambda part: checkpoints.within(part) if checkpoints else never,
            shards=self.shards,
            tokenizer=byte_tokenizer(),
        ):
            kept = {kind: getattr(made.prepared, kind) for kind in TENSORS if getattr(made.prepared, kind)}
            state = states.setdefault(made.part.key, {"notes": {}})
            state["notes"] |= json.loads(json.dumps(made.prepared.notes))
            state |= kept
            self.read[made.part.key] += made.prepared.tokens
        return states

    def fit(
        self,
        parts: tuple[Part, ...],
        states: dict[str, dict] | None = None,
        *,
        steps: int | None = None,
        checkpoints: Checkpoints | None = None,
        probe: Callable[[nn.Module], dict[str, float]] | None = None,
        **settings: Any,
    ) -> FitResult:
        """The training alone: an epoch, or `steps`."""
        if steps:
            settings["epochs"] = steps / epoch_steps(self.rows, self.training.batch)
        return fit(
            model=self.model(),
            parts=hooks.trainers(parts),
            examples=texts(self.rows, seed=12, labelled=True, length=self.length),
            general=self.general,
            settings=replace(self.training, **settings),
            seed=SEED,
            base=self.lent,
            states=states,
            shards=self.shards,
            resume=checkpoints,
            probe=probe,
            tokenizer=byte_tokenizer(),
        )

    def train(
        self,
        parts: tuple[Part, ...],
        states: dict[str, dict] | None = None,
        *,
        checkpoints: Checkpoints | None = None,
        save: Path | None = None,
        **settings: Any,
    ) -> Trained:
        """Train and finish; `save` is the folder for the files that parts write."""
        logits: list[Tensor] = []

        def probe(model: nn.Module) -> dict[str, float]:
            logits.append(self.logits(model))
            return {}

        result = self.fit(parts, states, checkpoints=checkpoints, probe=probe, **settings)
        final = final_weights(result, result.method.parts, measure=self.measure)
        for part in result.method.parts if save else ():
            save.mkdir(parents=True, exist_ok=True)
            part.save(run=result.run, state=result.states[part.key], folder=save)
        final, more, _ = finish(
            parts,
            final=final,
            measure=self.measure,
            shape=Shape(config=result.run.model.config),
            base=self.lent,
            seed=SEED,
            device="cpu",
            shards=self.shards,
        )
        reports = result.method.reports(result.run) | more
        return Trained(result=result, final=final, reports=reports, logits=logits[0] if logits else None)

    def logits(self, model: nn.Module) -> Tensor:
        """Of one fixed text, without dropout; the model's mode is as it was afterwards."""
        with torch.no_grad(), evaluating(model):
            return model(texts(1, seed=13, labelled=False)[0]["input_ids"][None]).logits

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return in_order((*self.beside, self.part()))

    @cached_property
    def states(self) -> dict[str, dict]:
        return self.prepare(self.parts)

    @cached_property
    def trained(self) -> Trained:
        """The ordinary run, uninterrupted, without checkpoints."""
        return self.train(self.parts, self.states, probes=1, save=self.folder / "saved")

    def measure(self, weights: Mapping[str, Tensor], **charge: Any) -> dict[str, float]:
        """What a part's `finish` is given to score weights with; nothing is made before the first call."""
        return self._measure(weights, **charge)

    @cached_property
    def _measure(self) -> Measure:
        folder, probes = self.folder / "base", self.folder / "probes"
        if self.shards.first and not probes.is_dir():
            self.model().save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            probes.mkdir()
            (probes / "general.jsonl").write_text(json.dumps({"text": "General text that is not trained on."}) + "\n")
        self.shards.barrier()
        return Measure(
            folder=folder,
            probes=probes,
            base=self.lent,
            dtype=torch.float32,
            device=torch.device("cpu"),
            shards=self.shards,
        )

    def _checkpoint(self) -> str:
        folder = self.folder / "checkpoint"
        if self.shards.first and not folder.is_dir():
            build(self.architecture, seed=2, dtype=self.dtype, **self.config).save_pretrained(folder)
        self.shards.barrier()
        return str(folder)

    def _rows(self) -> str:
        path = self.folder / "rows.jsonl"
        if self.shards.first and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": f"Row {row} of a user's own text. " * (1 + row % 3)}) for row in range(9)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.shards.barrier()
        return str(path)
