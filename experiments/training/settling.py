"""Settle a model: train an adapter on general rows until plain fine-tuning no longer lowers general nats.

a round    `every` steps of LoRA on all linear layers, from the factors of the round before; the rate falls to 0 at
           its end, or the noise of a high rate would be what the gate repairs
the gate   the merged candidate, rounded as it would be kept, takes `steps` steps of plain fine-tuning on rows of
           the mix that no round reads. The improvement, Σ (nats before − nats after) / Σ tokens over general probe
           texts, must be less than `nats` at the upper end of its 95 % interval (over texts, Student's t)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from analysis.statistics.intervals import Interval, per_token
from evaluation.encode import encode_rolling
from evaluation.labelled import encode_row
from evaluation.preserve import preserved
from evaluation.token_losses import Labelled, token_losses
from experiments.model import settled, tuned, weights
from experiments.model.base import load_tensors
from experiments.training.batches import Example
from experiments.training.engine import FitResult, fit
from experiments.training.resume import Resume
from experiments.training.settings import TrainSettings
from methods import registry
from methods.part import Part
from methods.tools.effective import factored_weights
from methods.tools.files import read_json

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Settling:
    """What is settled, on what, and where it is computed.

    folder     of the model that is settled
    adapter    file of the candidate's adapter
    rows       examples that rounds read one after the other, again from the first after the last
    fresh      examples of the gate, `steps` steps of them
    texts      general probe texts
    train      settings of a round; those of the gate but for its rate
    gate       the block `gate:`
    resume     checkpoints
    """

    folder: Path
    adapter: Path
    rows: Sequence[Example]
    fresh: Sequence[Example]
    texts: Sequence[Labelled]
    rank: int
    alpha: float
    train: TrainSettings
    gate: Any
    dtype: torch.dtype
    device: torch.device
    resume: Resume

    def run(self, told: Callable[[dict], None], *, begun: dict[str, Any] | None = None) -> dict[str, Any]:
        """Rounds and gates until one holds; resumes where it stopped.

        Returns {"nats": of the texts before, per token, "gates": [...], "steps", "tokens", "seconds"}.


        told    is called with each gate's record
        begun   what an earlier call returned, whose candidate is still there: it is taken through this gate and, where
                that does not hold, trained on
        """
        fresh = {"gates": [], "steps": 0, "tokens": 0, "seconds": 0.0}
        factors, at = self.resume.load({}) or (settled.starts(self.adapter) if begun else {}, begun or fresh)
        asked = {"learning_rate": self.gate.learning_rate, "of": self.gate.steps, "nats_allowed": self.gate.nats}
        if "nats" not in at:
            model = weights.load_model(self.folder, dtype=self.dtype, device=self.device)
            at["nats"] = per_token_of(nats(model, self.texts, description="general text before settling"))
        while True:
            gates, began = at["gates"], time.perf_counter()
            known = [gate for gate in gates if gate.items() >= (asked | {"steps": at["steps"]}).items()]
            gates[:] = [gate for gate in gates if gate not in known] + known[:1]  # the last one is the one asked for
            passed = bool(known)
            if at["steps"] and not passed:
                gates.append(asked | self._pass_gate(at["steps"]))
                told(gates[-1])
            elif passed and (gates[-1]["holds"] or at["steps"] >= self.gate.most):
                return at
            else:
                steps = min(self.gate.every, self.gate.most - at["steps"])
                factors, tokens = self._round(factors, first=at["steps"], steps=steps)
                at |= {"steps": at["steps"] + steps, "tokens": at["tokens"] + tokens}
            at["seconds"] += time.perf_counter() - began
            self.resume.save(factors, at)

    def _round(self, factors: Mapping[str, Tensor], *, first: int, steps: int) -> tuple[dict[str, Tensor], int]:
        """Train the adapter for `steps` more steps and write the candidate; its factors, and the tokens read."""
        size = steps * self.train.batch
        start = first * self.train.batch
        rows = [self.rows[number % len(self.rows)] for number in range(start, start + size)]
        model = weights.load_model(self.folder, dtype=self.dtype, device=self.device)
        result = self._fit(
            model,
            rows,
            parts=[adapter(model, rank=self.rank, alpha=self.alpha)],
            start=factors,
            name=f"settle, steps {first + 1} to {first + steps}",
        )
        layers = factored_weights(result.run)
        settled.save_adapter(
            self.adapter,
            updates={layer.name: dict(zip("ab", layer.update(), strict=True)) for layer in layers},
            scale=layers[0].scaling,
            transposed=layers[0].transposed,
            base_sha256=read_json(self.folder / "base.json", "sha256")["sha256"],
        )
        return {name: tensor.detach().cpu() for name, tensor in result.run.weights.items()}, result.tokens

    def _pass_gate(self, steps: int) -> dict[str, Any]:
        """The record of the gate after `steps` steps of settling."""
        base = dict(settled.candidate(self.folder, self.adapter))
        model = weights.load_model(self.folder, dtype=self.dtype, device=self.device)
        tuned.fill(model, base.items())
        before = nats(model, self.texts, description=f"general text after {steps} steps")
        gate = replace(self.train, learning_rate=self.gate.learning_rate)
        self._fit(model, self.fresh, settings=gate, base=base, name=f"gate after {steps} steps")
        gained = improvement(before, nats(model, self.texts, description="general text after the gate"))
        return {
            "steps": steps,
            "nats": per_token_of(before),
            "improvement": gained.value,
            "low": gained.low,
            "high": gained.high,
            "holds": gained.high is not None and gained.high < self.gate.nats,
        }

    def _fit(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        *,
        name: str,
        parts: Sequence[Part] = (),
        settings: TrainSettings | None = None,
        base: Mapping[str, Tensor] | None = None,
        start: Mapping[str, Tensor] = {},
    ) -> FitResult:
        return fit(
            model=model,
            parts=parts,
            examples=rows,
            settings=settings or self.train,
            seed=SEED,
            base=load_tensors(self.folder) if base is None else base,
            states={part.key: {"start": dict(start)} for part in parts if start},
            device=self.device,
            compute_dtype=self.dtype,
            resume=self.resume.within(name.replace(" ", "-").replace(",", "")),
            name=name,
        )


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    linear = (entry for entry in model.named_modules() if isinstance(entry[1], nn.Linear | Conv1D))
    return {name: module for name, module in linear if module is not head}


def adapter_bytes(model: nn.Module, *, rank: int) -> int:
    """Bytes of the adapter's factors (rank × in and out × rank of each layer) in bf16, as they are committed."""
    return 2 * rank * sum(sum(module.weight.shape) for module in _adapted(model).values())


def adapter(model: nn.Module, *, rank: int, alpha: float) -> Part:
    """LoRA on every linear layer but the head."""
    targets = sorted({name.rpartition(".")[2] for name in _adapted(model)})
    (part,) = registry.build({"lora": {"rank": rank, "alpha": alpha, "targets": targets}})
    return part


def documents(rows: Sequence[Mapping[str, Any]], tokenizer: Any, length: int) -> list[Example]:
    """An example for each row, cut at `length` tokens; of a question and its answer all tokens are learned, too."""
    examples = []
    for row in rows:
        text = row["text"] if "text" in row else row["context"] + row["choices"][row["gold"]]
        ids, labels, _ = encode_row(tokenizer, {"text": text})
        ids, labels = torch.tensor(ids[:length]), torch.tensor(labels[:length])
        examples.append({"input_ids": ids, "labels": ids.where(labels, torch.tensor(-100))})
    return examples


def passages(texts: Sequence[str], tokenizer: Any) -> list[Labelled]:
    """Texts as they are scored: each after the prefix token, all of its tokens labelled."""
    pairs = [encode_rolling(tokenizer, text) for text in texts]
    return [([*prefix, *ids], [False] * len(prefix) + [True] * len(ids)) for prefix, ids in pairs]


def nats(
    model: nn.Module, texts: Sequence[Labelled], *, description: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nats of each text and its labelled tokens, (texts,) each; modes and random states stay as they were."""
    with preserved(model):
        losses = token_losses(model, texts, description=description)
    return np.array([one.nats for one in losses]), np.array([one.tokens for one in losses])


def per_token_of(scored: tuple[np.ndarray, np.ndarray]) -> float:
    return float(scored[0].sum() / scored[1].sum())


def improvement(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> Interval:
    """Nats a token by which the texts became likelier, with its 95 % interval over texts."""
    return per_token((before[0] - after[0])[None], before[1])
