"""The training engine: one visible loop on torch and transformers, for every method, on one process or many.

The loss of an optimizer step is Σ nll over all labelled tokens of its batch divided by their number, whatever
the accumulation and the number of processes. Parts act through hooks only; the engine knows none of them by name.
Hooks shared by several parts run in alphabetical order of their keys.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from experiments.training import batches, hardware, hooks
from experiments.training.flops import Flops
from experiments.training.interruption import Interruption
from experiments.training.log import Log, TrainingFailed
from experiments.training.loss import summed_nll
from experiments.training.master_weights import MasterWeights, compute_in
from experiments.training.progress import bar as progress
from experiments.training.resume import Resume
from experiments.training.settings import TrainSettings, learning_rate
from experiments.training.sharded_weights import ShardedWeights
from methods.errors import UserError
from methods.part import Part, Run
from methods.tools import architecture
from methods.tools.adam import AdamW, Moments
from methods.tools.process_group import Shards

__all__ = ["FitResult", "TrainingFailed", "final_weights", "fit"]


@dataclass(kw_only=True)
class FitResult:
    """What a fit leaves: the run (adapted model and float32 weights), its states, and what it cost."""

    run: Run
    states: dict[str, dict]
    optimizer: torch.optim.Optimizer
    tokens: int = 0  # non-padding input tokens
    flops: float | None = (
        0.0  # executed in matrix products, recomputation left out; None: not known of this architecture
    )
    steps: int = 0
    resumed: int = 0  # steps that an interrupted run had already done
    seconds: float = 0.0  # inside the loop, without probes and checkpoints
    seconds_begin: float = 0.0
    peak_flops: float | None = None  # the device's, a second; of all processes' devices together
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
    shards: Shards = Shards(),
    compute_dtype: torch.dtype | None = None,
    resume: Resume | None = None,
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
    name: str = "train",
) -> FitResult:
    """Fine-tune `model` on `examples` with `parts`; the model is changed in place and returned in the run.

    `base` maps base parameter names to θ₀; `states` holds what each part prepared, by key. The model computes in
    `compute_dtype`, by default its own. With `shards` active the model, on the CPU or on `device`, is shared among the
    processes; every process gives the same arguments. `resume` is where an interrupted run is gone on from, bit for
    bit. `probe` is called outside timed training and must leave random state and mode as they were.
    Raises TrainingFailed where the loss is not finite.
    """
    device = torch.device(device)
    parts = sorted(parts, key=lambda part: part.key)
    states = {part.key: dict((states or {}).get(part.key, {})) for part in parts}
    computing = compute_dtype or next(model.parameters()).dtype
    compute_in(model, computing)  # adapters are drawn in the dtype of what they adapt
    torch.manual_seed(seed)
    for part in parts:
        model = part.adapt(model, seed=seed)
    if shards.rank:
        torch.manual_seed(seed + 2**32 * shards.rank)  # its dropout is that of other examples
    model.train()
    flops = Flops(model)
    if settings.checkpointing:
        architecture.recompute_activations(model)
    if settings.pack and not architecture.keeps_apart(model):
        raise UserError(
            f"train.pack is {settings.pack}, but {type(architecture.plain(model)).__name__} with this attention lets packed "
            "examples see each other: set train.pack: 0"
        )
    if settings.compile:
        architecture.compile_blocks(model)
    trained = (
        ShardedWeights(model, shards=shards, compute_dtype=computing, device=device, base=base)
        if shards.active
        else MasterWeights(model, base=base)
    )
    if not any("provides_weights" in part.capabilities for part in parts):
        lengths = [len(e["input_ids"]) for e in examples]
        plan = batches.schedule(lengths, settings.batch, seed, settings.epochs)
        epoch = batches.epoch_steps(len(lengths), settings.batch)
    else:
        plan, epoch = [], 1
    run = Run(
        model=model,
        weights=trained.weights,
        shapes=trained.shapes,
        base=base,
        seed=seed,
        device=device,
        shards=shards,
        moments=_moments(trained, settings, seed, shards),
        epoch=epoch,
    )

    started = time.perf_counter()
    for part in parts:
        part.begin(run=run, state=states[part.key], examples=examples)
    seconds_begin = time.perf_counter() - started
    _start_from(run, states)
    optimizer = _optimizer(parts, run, settings)
    for part in parts:
        part.optimizer_ready(run=run, state=states[part.key], optimizer=optimizer)
    peak, _ = hardware.dense_peak(device, computing)
    result = FitResult(
        run=run,
        states=states,
        optimizer=optimizer,
        seconds_begin=seconds_begin,
        peak_flops=peak and peak * shards.world,
    )
    probe_steps = (
        {round(i * len(plan) / settings.probes) for i in range(settings.probes)} if settings.probes and probe else set()
    )

    with progress(total=len(plan), desc=name, unit="step", disable=not shards.first) as bar:
        log = Log(
            name=name,
            steps=len(plan),
            learning_rate=settings.learning_rate,
            device=device,
            peak=result.peak_flops,
            bar=bar,
        )
        if resume is not None:
            with log.pause():
                interruption = Interruption(resume, run=run, parts=parts, states=states, optimizer=optimizer, log=log)
                result.resumed = interruption.go_on()
            bar.update(result.resumed)
        trained.push()
        for step in range(result.resumed, len(plan)):
            if step in probe_steps:
                with log.pause():
                    if step == 0:
                        log.curve.append({"step": 0, "tokens": 0, "seconds": 0.0})
                    log.curve[-1] |= _probed(probe, trained)
            rate = learning_rate(settings, step, len(plan))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = [examples[i] for i in plan[step]]
            read, lengths, labelled = _step(run, parts, states, trained, optimizer, settings, batch, step)
            log.step(
                {"step": step + 1, "learning_rate": rate},
                tokens=sum(lengths),
                read=read,
                flops=flops.step(lengths=lengths, labelled=labelled),
            )
            if resume is not None and step + 1 < len(plan) and resume.due():
                with log.pause():
                    interruption.keep(step + 1)
        log.flush()
        if probe_steps and log.curve:
            log.curve[-1] |= _probed(probe, trained)
    trained.release()
    result.steps, result.curve, result.seconds = len(plan), log.curve, log.seconds
    result.tokens, result.flops = log.tokens, log.flops
    model.eval()
    return result


def _step(
    run, parts, states, trained, optimizer, settings, examples, step
) -> tuple[dict[str, Tensor | float], list[int], int]:
    """One optimizer step; returns loss (nats a labelled token), penalty and gradient norm, on the device, with the tokens of each
    example and how many of all are labelled."""
    lengths, labelled = [len(e["input_ids"]) for e in examples], _labelled(examples)
    asked, changing, worked = max(1, labelled), hooks.overridden(parts, "batch"), []
    trained.zero()
    total = torch.zeros((), device=run.device)
    for batch, counts in _micro_batches(examples, run, settings):
        for part in parts:
            batch = hooks.batch(part, run=run, state=states[part.key], before=batch)
        if changing and counts:
            worked.append(hooks.worked(batch))
        # labels stay on the CPU: what they select is known there
        batch = {
            name: tensor if name == "labels" else batches.sent(tensor, run.device) for name, tensor in batch.items()
        }
        nll, loss = trained.compute(_loss, batch, run, parts, states)
        total += counts * nll / asked
        (loss * (counts * run.shards.world / asked)).backward()  # reduction over processes takes the mean
    trained.complete()
    if changing:  # rows or labels
        worked = [one for each in run.shards.gathered(worked) for one in each]
        lengths, labelled = [length for found, _ in worked for length in found], sum(count for _, count in worked)
        if labelled not in (0, asked):
            torch._foreach_mul_([weight.grad for weight in run.weights.values()], asked / labelled)
            total *= asked / labelled
    wanted = any("needs_gradient" in part.capabilities for part in parts)
    gradient = {n: w.grad.clone() for n, w in run.weights.items()} if wanted else None
    penalty = torch.zeros((), device=run.device)
    with torch.no_grad():
        for part in parts:
            value = hooks.term(
                part, "before_clip", part.before_clip(run=run, state=states[part.key], step=step), like=penalty
            )
            if value is not None:
                penalty = penalty + value
        norm = _clip(run, settings.clip)
        optimizer.step()
        trained.push()
        for part in parts:
            part.after_step(run=run, state=states[part.key], step=step, gradient=gradient)
        if hooks.overridden(parts, "after_step"):  # which may have changed the weights
            trained.push()
    return {"loss": run.shards.sum(total), "penalty": run.shards.sum(penalty), "grad_norm": norm}, lengths, labelled


def _micro_batches(
    examples: list[batches.Example], run: Run, settings: TrainSettings
) -> Iterator[tuple[batches.Example, int]]:
    """This process's share of a step, piece by piece, each with 1; and pieces with 0, whose loss does not count.

    Processes that share weights compute together, also what a part computes in its `loss`: one with fewer pieces than
    another computes the step's first example in their place.
    """
    shares = [examples[rank :: run.shards.world] for rank in range(run.shards.world)]
    if settings.pack:
        cuts = [batches.pack([len(e["input_ids"]) for e in share], settings.pack) for share in shares]
    else:
        cuts = [list(batches.micro_batches(range(len(share)), settings.micro_batch)) for share in shares]
    mine = shares[run.shards.rank]
    collate = batches.collate_packed if settings.pack else batches.collate
    for indices in cuts[run.shards.rank]:
        yield collate([mine[i] for i in indices]), 1
    for _ in range(max(map(len, cuts)) - len(cuts[run.shards.rank])):
        yield collate(examples[:1]), 0


def _loss(model: nn.Module, batch: batches.Example, run: Run, parts, states) -> tuple[Tensor, Tensor]:
    """Σ nll of a micro-batch, detached, and the same with what parts add to it."""
    # padding stands on the right, where a causal model cannot see it: no mask, and the faster attention kernel
    hidden = architecture.hidden_states(model, batch["input_ids"], None, batch.get("position_ids"))
    loss = summed_nll(hidden, batch["labels"], architecture.logits_of(model))
    nll = loss.detach()
    for part in parts:
        extra = hooks.term(
            part, "loss", part.loss(run=run, state=states[part.key], batch=batch, hidden=hidden), like=loss
        )
        if extra is not None:
            loss = loss + extra
    return nll, loss


def _labelled(examples: Sequence[batches.Example]) -> int:
    return sum(int((e["labels"][1:] != -100).sum()) for e in examples)


def _clip(run: Run, limit: float) -> Tensor:
    """Scale the gradients down to the norm `limit` (0: none), as torch does; returns their norm over all processes."""
    gradients = [weight.grad for weight in run.weights.values()]
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = run.shards.sum(norms.square().sum()).sqrt()
    run.clipped = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
    torch._foreach_mul_(gradients, run.clipped)
    return norm


def _moments(trained, settings: TrainSettings, seed: int, shards: Shards) -> Moments:
    moments = Moments(dtype=settings.moments, seed=seed)
    for name, weight in trained.weights.items():
        shape = trained.shapes[name]
        rows = shards.rows(shape[0]).start if shape else 0
        moments.place(weight, name=name, offset=rows * math.prod(shape[1:]))
    return moments


def _start_from(run: Run, states: dict[str, dict]) -> None:
    """Copy the weights that a part prepared as the start of fine-tuning."""
    with torch.no_grad():
        for name, value in hooks.starts(states, run).items():
            run.weights[name].copy_(run.shards.local(value))


def _optimizer(parts: Sequence[Part], run: Run, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of the part that brings one, else fused AdamW."""
    betas, chosen = (settings.beta1, settings.beta2), {"eps": settings.eps, "weight_decay": settings.weight_decay}
    if (
        optimizer := hooks.optimizer(parts, run=run, learning_rate=settings.learning_rate, betas=betas, **chosen)
    ) is not None:
        return optimizer
    if settings.moments == "float32":
        return torch.optim.AdamW(run.weights.values(), lr=settings.learning_rate, betas=betas, fused=True, **chosen)
    return AdamW(run.weights.values(), lr=settings.learning_rate, betas=betas, moments=run.moments, **chosen)


def _probed(probe, trained) -> dict[str, float]:
    return {f"probe_{name}": value for name, value in trained.compute(probe).items()}


def final_weights(result: FitResult, parts: Sequence[Part], *, measure: Callable | None = None) -> dict[str, Tensor]:
    """Full-precision final weights by base parameter name: trained tensors, then every part's `finish`.

    Every process must call it; the first one gets them, whole and on the CPU, the others nothing.
    """
    run, final = result.run, {}
    for name in run.weights:
        if name in run.base:
            whole = run.whole(name)
            if run.shards.first:
                final[name] = whole.cpu()
    return finish(run, parts, states=result.states, final=final, measure=measure)


def finish(
    run: Run, parts: Sequence[Part], *, states: Mapping[str, dict], final: dict[str, Tensor], measure: Callable | None
) -> dict[str, Tensor]:
    """`final` as every part's `finish` leaves it, in order."""
    for part in sorted(parts, key=lambda part: part.key):
        given = part.finish(run=run, state=states[part.key], final=final, measure=measure)
        final = hooks.finished(part, given, base=run.base)
    return final
