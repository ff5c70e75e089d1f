"""The training engine: one visible loop on torch and transformers, for every method.

The loss of an optimizer step is Σ nll over all labelled tokens of its batch divided by their number, whatever
the accumulation. Parts act through hooks only; the engine knows none of them by name. Hooks shared by several
parts run in alphabetical order of their keys.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from experiments import architecture, batches
from experiments.engine_settings import TrainSettings, learning_rate
from experiments.errors import UserError
from experiments.loss import summed_nll
from experiments.master import Masters
from experiments.progress import bar as progress
from methods.part import Part, Run

class TrainingFailed(UserError):
    """The loss stopped being a number."""


@dataclass(kw_only=True)
class FitResult:
    """What a fit leaves: the run (adapted model and float32 weights), its states, and what it cost."""

    run: Run
    states: dict[str, dict]
    optimizer: torch.optim.Optimizer
    tokens: int = 0  # non-padding input tokens
    steps: int = 0
    seconds: float = 0.0  # inside the loop, without probes
    seconds_begin: float = 0.0
    curve: list[dict] = field(default_factory=list)


def fit(
    *,
    model: nn.Module,
    parts: Sequence[Part],
    examples: Sequence[batches.Example],
    settings: TrainSettings,
    seed: int,
    base: Mapping[str, Tensor],
    states: dict[str, dict] | None = None,
    device: torch.device | str = "cpu",
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
    name: str = "train",
) -> FitResult:
    """Fine-tune `model` on `examples` with `parts`; the model is changed in place and returned in the run.

    `base` maps base parameter names to θ₀; `states` holds what each part prepared, by key. `probe` is called
    outside timed training and must leave random state and mode as they were.
    Raises TrainingFailed where the loss is not finite.
    """
    parts = sorted(parts, key=lambda part: part.key)
    states = {part.key: dict((states or {}).get(part.key, {})) for part in parts}
    torch.manual_seed(seed)
    for part in parts:
        model = part.adapt(model, seed=seed)
    model.train()
    if settings.checkpointing:
        architecture.plain(model).activation_checkpointing_enable({"use_reentrant": False})
    masters = Masters(model)
    run = Run(model=model, weights=masters.weights, base=base, seed=seed, device=device)

    started = time.perf_counter()
    for part in parts:
        part.begin(run=run, state=states[part.key], examples=examples)
    seconds_begin = time.perf_counter() - started
    _start_from(run, states)
    masters.push()
    optimizer = _optimizer(parts, run, settings)
    for part in parts:
        part.optimizer_ready(run=run, state=states[part.key], optimizer=optimizer)

    trained = not any("provides_weights" in part.capabilities for part in parts)
    plan = batches.schedule([len(e["input_ids"]) for e in examples], settings.batch, seed, settings.epochs) if trained else []
    result = FitResult(run=run, states=states, optimizer=optimizer, seconds_begin=seconds_begin)
    probe_steps = {round(i * len(plan) / settings.probes) for i in range(settings.probes)} if settings.probes else set()
    with progress(total=len(plan), desc=name, unit="step") as bar:
        for step, indices in enumerate(plan):
            if probe and step in probe_steps:
                if step == 0:
                    result.curve.append({"step": 0, "tokens": 0, "seconds": 0.0})
                result.curve[-1] |= _probed(probe, model)
            began = time.perf_counter()
            rate = learning_rate(settings, step, len(plan))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, penalty, norm, tokens = _step(
                run, parts, states, masters, optimizer, settings, [examples[i] for i in indices], step
            )
            seconds = time.perf_counter() - began
            result.tokens += tokens
            result.steps += 1
            result.seconds += seconds
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"{name}: the loss is {loss} at step {step + 1} of {len(plan)}; "
                    f"lower train.learning_rate ({settings.learning_rate}) or a part's strength"
                )
            line = {
                "step": step + 1, "tokens": result.tokens, "seconds": result.seconds, "loss": loss,
                "grad_norm": norm, "penalty": penalty, "learning_rate": rate, "tokens_per_second": tokens / seconds,
            }
            result.curve.append(line)
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{tokens / seconds:.0f}")
            bar.update()
    if probe and result.curve:
        result.curve[-1] |= _probed(probe, model)
    model.eval()
    return result


def _step(run, parts, states, masters, optimizer, settings, examples, step) -> tuple[float, float, float, int]:
    """One optimizer step; returns loss (nats a labelled token), penalty, gradient norm, input tokens."""
    asked = sum(int((e["labels"][1:] != -100).sum()) for e in examples)
    tokens = sum(len(e["input_ids"]) for e in examples)
    head = architecture.head(run.model)
    masters.zero()
    total = 0.0
    for indices in batches.micro_batches(range(len(examples)), settings.micro_batch):
        batch = batches.collate([examples[i] for i in indices], run.device)
        for part in parts:
            batch = part.batch(run=run, state=states[part.key], batch=batch)
        # padding stands on the right, where a causal model cannot see it: no mask, and the faster attention kernel
        hidden = architecture.hidden_states(run.model, batch["input_ids"], None)
        loss = summed_nll(hidden, batch["labels"], head) / asked
        total += loss.item()
        for part in parts:
            extra = part.loss(run=run, state=states[part.key], batch=batch, hidden=hidden)
            if extra is not None:
                loss = loss + extra / asked
        loss.backward()
        masters.gather()
    masters.complete()
    wanted = any("needs_gradient" in part.capabilities for part in parts)
    gradient = {n: w.grad.clone() for n, w in run.weights.items()} if wanted else None
    penalty = 0.0
    with torch.no_grad():
        for part in parts:
            value = part.before_clip(run=run, state=states[part.key], step=step)
            if value is not None:
                penalty += float(value)
        norm = torch.nn.utils.clip_grad_norm_(run.weights.values(), settings.clip or math.inf)
        optimizer.step()
        masters.push()
        for part in parts:
            part.after_step(run=run, state=states[part.key], step=step, gradient=gradient)
    return total, penalty, float(norm), tokens


def _start_from(run: Run, states: dict[str, dict]) -> None:
    """Copy the weights that a part prepared as the start of fine-tuning."""
    with torch.no_grad():
        for state in states.values():
            for name, value in (state.get("start") or {}).items():
                run.weights[name].copy_(value)


def _optimizer(parts: Sequence[Part], run: Run, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of the part that brings one, else fused AdamW."""
    chosen = {
        "learning_rate": settings.learning_rate, "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps, "weight_decay": settings.weight_decay,
    }
    for part in parts:
        optimizer = part.optimizer(weights=run.weights, **chosen)
        if optimizer is not None:
            return optimizer
    lr = chosen.pop("learning_rate")
    return torch.optim.AdamW(run.weights.values(), lr=lr, fused=True, **chosen)


def _probed(probe, model) -> dict[str, float]:
    return {f"probe_{name}": value for name, value in probe(model).items()}


def final_weights(result: FitResult, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Full-precision final weights by base parameter name: trained tensors, then every part's `finish`."""
    final = {n: w.detach() for n, w in result.run.weights.items() if n in result.run.base}
    for part in sorted(parts, key=lambda part: part.key):
        final = part.finish(run=result.run, state=result.states[part.key], final=final)
    return final
