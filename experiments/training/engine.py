"""The training engine: one visible loop on torch and transformers, for every method, on one process or many.

The loss of an optimizer step is Σ nll over all labelled tokens of its batch divided by their number, whatever
the accumulation and the number of processes. Parts act through hooks only; the engine knows none of them by name.
Hooks shared by several parts run in the order of their phases.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.model.shape import Shape
from experiments.training import batches, hardware, hooks, services, update
from experiments.training.flops import Flops
from experiments.training.hooks import Hooks
from experiments.training.interruption import Interruption
from experiments.training.log import Log, TrainingFailed
from experiments.training.loss import weighted_nll
from experiments.training.master_weights import MasterWeights, compute_in
from experiments.training.progress import bar as progress
from experiments.training.resume import Resume
from experiments.training.settings import TrainSettings, learning_rate
from experiments.training.sharded_weights import ShardedWeights
from experiments.training.stopping import Probes, Rule
from methods.errors import UserError
from methods.part import Part, Run, adapted, in_order
from methods.tools import architecture
from methods.tools.process_group import Shards

__all__ = ["FitResult", "TrainingFailed", "final_weights", "fit"]


@dataclass(kw_only=True)
class FitResult:
    """What a fit returns: the run (adapted model, float32 weights), its parts with their states, and its costs."""

    run: Run
    method: Hooks
    optimizer: torch.optim.Optimizer
    tokens: int = 0  # non-padding input tokens of the training rows
    # executed in matrix products on these rows, recomputation left out; None: not known of this architecture
    flops: float | None = 0.0
    # by part: tokens, flops, seconds and bytes
    added: dict[str, dict[str, float | None]] = field(default_factory=dict)
    steps: int = 0  # that were done
    stopped: dict | None = None  # what a rule on probes did (`Probes.record`)
    resumed: int = 0  # steps that an interrupted run had already done
    seconds: float = 0.0  # inside the loop, without probes and checkpoints
    seconds_begin: float = 0.0
    peak_flops: float | None = None  # the device's, a second; of all processes' devices together
    curve: list[dict] = field(default_factory=list)

    @property
    def states(self) -> dict[str, dict]:
        return self.method.states


def fit(
    *,
    model: nn.Module,
    parts: Sequence[Part],
    examples: Sequence[batches.Example],
    settings: TrainSettings,
    seed: int,
    base: Mapping[str, Tensor],
    general: Sequence[batches.Example] = (),
    states: dict[str, dict] | None = None,
    device: torch.device | str = "cpu",
    shards: Shards = Shards(),
    compute_dtype: torch.dtype | None = None,
    resume: Resume | None = None,
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
    rule: Rule | None = None,
    tokenizer: Any = None,
    name: str = "train",
) -> FitResult:
    """Fine-tune `model` on `examples` with `parts`; the model is changed in place and returned in the run.

    `base` maps base parameter names to θ₀; `states` holds what each part prepared, by key; `general` is general text
    for parts with the capability "general"; parts that encode or sample text use `tokenizer`. The model computes in
    `compute_dtype`, by default its own. With `shards` active the model, on the CPU or on `device`, is shared among the
    processes; every process gives the same arguments. `resume` keeps the checkpoints from which an interrupted run
    continues, bit for bit. `probe` is called outside timed training and must leave random state and mode as they were;
    `rule` may end the run at a probe, and choose which probed step's weights it ends with.
    Raises TrainingFailed where the loss is not finite.
    """
    device = torch.device(device)
    parts, states = in_order(parts), states or {}
    computing = compute_dtype or next(model.parameters()).dtype
    compute_in(model, computing)  # adapters are drawn in the dtype of what they adapt
    torch.manual_seed(seed)
    bare = services.skeleton(model)
    model = adapted(model, parts, seed=seed, states=states)
    if shards.rank:
        torch.manual_seed(seed + 2**32 * shards.rank)  # processes have different examples, so different dropout
    model.train()
    flops = Flops(model)
    method = Hooks(parts, states, flops=flops, shards=shards)
    if settings.checkpointing:
        architecture.recompute_activations(model)
    if settings.pack and not architecture.keeps_apart(model):
        raise UserError(
            f"train.pack is {settings.pack}, but {type(architecture.plain(model)).__name__} with this attention lets "
            "packed examples see each other: set train.pack: 0"
        )
    if shards.active:
        hooks.refuse_second_gradient(parts, computing)
    if settings.compile:
        architecture.compile_blocks(model)
    trained = (
        ShardedWeights(model, shards=shards, compute_dtype=computing, device=device, base=base)
        if shards.active
        else MasterWeights(model, base=base)
    )
    untrained = any("provides_weights" in part.capabilities for part in parts)
    rows = [] if untrained else [example | {"index": index} for index, example in enumerate(examples)]
    epoch = batches.epoch_steps(len(rows), settings.batch)
    steps = batches.steps(len(rows), settings.batch, settings.epochs)
    run = Run(
        model=model,
        weights=trained.weights,
        shapes=trained.shapes,
        base=base,
        seed=seed,
        device=device,
        shards=shards,
        moments=update.moments(trained, settings, seed, shards),
        epoch=max(1, epoch),
        charge=method.charge,
        passes=functools.partial(batches.passes, shards=shards, settings=settings),
    )
    services.offer(run, bare=bare, trained=trained, flops=flops, prompts=settings.micro_batch, tokenizer=tokenizer)

    started = time.perf_counter()
    method.begin(run, examples, general)
    seconds_begin = time.perf_counter() - started
    update.start_from(run, method.states)
    optimizer = update.optimizer_of(parts, run, settings)
    for part in method.having("optimizer_ready"):
        method.call(part, "optimizer_ready", run=run, optimizer=optimizer)
    result = FitResult(run=run, method=method, optimizer=optimizer, seconds_begin=seconds_begin)
    peak, _ = hardware.dense_peak(device, computing)
    result.peak_flops = peak and peak * shards.world

    with progress(total=steps, desc=name, unit="step", disable=not shards.first) as bar:
        log = Log(
            name=name,
            steps=steps,
            learning_rate=settings.learning_rate,
            device=device,
            peak=result.peak_flops,
            bar=bar,
            added=method.added,
        )
        probes = Probes(probe, times=settings.probes, rule=rule, steps=steps, run=run, trained=trained, log=log)
        if resume is not None:
            with log.pause():
                state = {"run": run, "method": method, "optimizer": optimizer, "log": log, "best": probes.weights}
                interruption = Interruption(resume, **state)
                result.resumed = interruption.restore()
                method.added = log.added
            bar.update(result.resumed)
        trained.update_model()
        order: list[list[int]] = []  # of the epoch, once it is known
        with resume.stops_after_a_step() if resume is not None else nullcontext():
            for step in range(result.resumed, steps):
                if probes.end_run(step):
                    break
                number, place = divmod(step, run.epoch)
                if place == 0 or not order:
                    drawn = method.epoch(run, rows, number, begins=place == 0)
                    order = batches.epoch_order([len(row["input_ids"]) for row in drawn], settings.batch, seed, number)
                rate = learning_rate(settings, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                own = [rows[i] for i in order[place]]
                wanted = method.examples(run, own, [drawn[i] for i in order[place]], step)
                kept = {row["index"] for row in wanted if "index" in row}
                own = [row for row in own if row["index"] in kept]
                lengths = [len(row["input_ids"]) for row in own]
                log.step(
                    {"step": step + 1, "learning_rate": rate},
                    tokens=sum(lengths),
                    read=_step(run, method, trained, optimizer, settings, wanted, step),
                    flops=flops.step(lengths=lengths, labelled=hooks.labelled(own)),
                )
                if resume is not None and resume.due(last=step + 1 == steps):
                    with log.pause():
                        interruption.save(step + 1)
                    resume.end_if_asked()
        log.flush()
        probes.finish()
    trained.release()
    result.steps, result.curve, result.seconds = probes.stopped_at or steps, log.curve, log.seconds
    if rule and result.steps:
        result.stopped = probes.record() | {"tokens_planned": batches.tokens(rows, settings, seed)}
    result.tokens, result.flops, result.added = log.tokens, log.flops, method.total()
    model.eval()
    return result


def _step(run, method, trained, optimizer, settings, rows, step) -> dict[str, Tensor | float]:
    """One optimizer step; returns loss (nats a labelled token), penalty and gradient norm, on the device."""
    labelled = max(1, hooks.labelled(rows))
    pieces = [
        (method.batch(run, batch, counted=bool(counts)), counts)
        for batch, counts in batches.shared(rows, run.shards, settings)
    ]
    gradient = functools.partial(_gradient, run, method, trained, pieces, labelled)
    total = update.twice(run, trained, method, rows, step, gradient) if method.asking_twice else gradient()
    needed = any("needs_gradient" in part.capabilities for part in method.parts)
    gradient = {n: w.grad.clone() for n, w in run.weights.items()} if needed else None
    with torch.no_grad():
        penalty = method.penalty(run, step)
        with update.unmoved(run, method.frozen()):
            norm = update.clip(run, settings.clip)
            optimizer.step()
        trained.update_model()
        for part in method.having("after_step"):
            method.call(part, "after_step", run=run, step=step, gradient=gradient)
        if method.having("after_step"):  # which may have changed the weights
            trained.update_model()
    return {"loss": run.shards.sum(total), "penalty": run.shards.sum(penalty), "grad_norm": norm}


def _gradient(run: Run, method: Hooks, trained, pieces: Sequence[tuple[batches.Example, int]], labelled: int) -> Tensor:
    """Put the step's gradient into `.grad` of the trained tensors; returns this process's share of the loss."""
    trained.zero()
    total, count = torch.zeros((), device=run.device), 0
    for batch, counts in pieces:
        method.counted = bool(counts)
        count += counts * hooks.labelled_in(batch)
        # labels stay on the CPU: what they select is known there
        batch = {name: value if name == "labels" else batches.sent(value, run.device) for name, value in batch.items()}
        nll, loss = trained.compute(_loss, batch, run, method)
        total += counts * nll / labelled
        (loss * (counts * run.shards.world / labelled)).backward()  # reduction over processes takes the mean
    method.counted = True
    trained.complete()
    if method.having("batch") and (left := sum(run.shards.all_gather(count))) not in (0, labelled):
        torch._foreach_mul_([weight.grad for weight in run.weights.values()], labelled / left)
        total *= labelled / left
    return total


def _loss(model: nn.Module, batch: batches.Example, run: Run, method: Hooks) -> tuple[Tensor, Tensor]:
    """Σ nll of a micro-batch, detached, and what is minimised: the same with the parts' weights and terms."""
    # padding stands on the right, where a causal model cannot see it: no mask, and the faster attention kernel
    hidden = architecture.hidden_states(model, batch["input_ids"], None, batch.get("position_ids"))
    weigh, weigh_batch = (
        functools.partial(weights, run, batch) if method.having(hook) else None
        for hook, weights in (("token_weights", method.weigh), ("batch_weights", method.weigh_batch))
    )
    loss, nll = weighted_nll(hidden, batch["labels"], architecture.logits_of(model), weigh, weigh_batch)
    return nll, method.loss(run, batch, hidden, loss)


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
    final = result.method.finish(run, parts, final, measure)
    result.added = result.method.total()
    return final


def finish(
    parts: Sequence[Part], *, final: Mapping[str, Tensor], measure: Callable | None, shape: Shape, **known: Any
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, dict]]:
    """What those of `parts` that act in `finish` alone make of trained weights: the weights, their reports and costs.

    They are given a run without a training: the model of `shape` has no numbers, and there are no trained weights.

    known   `base`, `seed`, `device` and `shards` of the run
    """
    run = Run(model=shape.build(), weights={}, **known)
    method = Hooks(hooks.finishers(parts), {}, flops=Flops(run.model), shards=run.shards)
    run.charge = method.charge
    final = method.finish(run, method.parts, dict(final), measure)
    return final, method.reports(run), method.total()
