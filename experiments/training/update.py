"""What an optimizer step does to gradients and weights, and what it begins with."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from experiments.training import hooks
from experiments.training.random_state import random_state, set_random_state
from experiments.training.settings import TrainSettings
from methods.part import Part, Row, Run
from methods.tools.adam import CPU_CHUNK, AdamW, Moments
from methods.tools.process_group import Shards


@contextmanager
def moved(run: Run, trained, offsets: dict[str, Tensor]) -> Iterator[None]:
    """The weights plus `offsets` for a time; then the very same weights again.

    The weights as they were take the place of the offsets in memory, which are let go, and so are gradients: they often
    are the same tensors.
    """
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in list(offsets):
            weight = run.weights[name]
            kept[name] = weight.detach().clone()
            weight.add_(offsets.pop(name))
            weight.grad = None
        trained.update_model()
    yield
    with torch.no_grad():
        for name, weight in kept.items():
            run.weights[name].copy_(weight)
        trained.update_model()


def twice(
    run: Run, trained, method: hooks.Hooks, rows: Sequence[Row], step: int, gradient: Callable[[], Tensor]
) -> Tensor:
    """The gradient at the weights to which a part moves them by their own gradient (`Part.second_gradient`).

    gradient   puts the gradient into `.grad` and returns the loss, which is that at the weights themselves

    Both gradients are computed in float32, and with the same dropout, which may depend on the dtype.
    """
    part, random = method.asking_twice, random_state(run.device)
    with trained.exact():
        loss = gradient()
        blank(run, method.frozen(before=True))
        with torch.no_grad():
            offsets = dict(method.call(part, "second_gradient", run=run, step=step) or {})
        if offsets:
            set_random_state(random, run.device)
            method.charge_rows(rows, part=part.key)
            with method.working(part), moved(run, trained, offsets):
                gradient()
    return loss


def blank(run: Run, masks: Mapping[str, Tensor]) -> None:
    """Take the gradient of entries away."""
    for name, mask in masks.items():
        gradient = run.weights[name].grad
        gradient.masked_fill_(mask.to(gradient.device), 0)


@contextmanager
def unmoved(run: Run, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Entries that have no gradient for a time, and afterwards the very same values as before.

    A tensor that is frozen whole, by a mask of no dimension on the host, meanwhile has no gradient at all: optimizers
    pass over it and keep no state of it. The weights that masks name are kept once more for the time.
    """
    kept: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}  # gradients of tensors that are frozen whole
    for name, mask in masks.items():
        weight = run.weights[name]
        if mask.dim() == 0 and mask.device.type == "cpu":
            if not mask:
                continue
            whole[name], weight.grad = weight.grad.zero_(), None
        elif pieces := _pieces(weight.grad, mask):
            for gradient, frozen in pieces:
                gradient.bitwise_and_(frozen.to(gradient.dtype).sub_(1))
        else:
            weight.grad.masked_fill_(mask, 0)
        kept[name] = weight.detach().clone()
    yield
    for name, gradient in whole.items():
        run.weights[name].grad = gradient
    for name in list(kept):
        weight, before, mask = run.weights[name].detach(), kept.pop(name), masks[name]
        if name in whole:
            weight.copy_(before)
        elif pieces := _pieces(weight, mask, before):
            for after, frozen, old in pieces:
                after.bitwise_xor_(old.bitwise_xor_(after).bitwise_and_(frozen.to(after.dtype).neg_()))
        else:
            torch.where(mask, before, weight, out=weight)


def _pieces(tensor: Tensor, mask: Tensor, *like: Tensor) -> list[tuple[Tensor, ...]]:
    """The bits of a tensor, its mask (int8: 0 or 1) and the bits of further tensors, flat and in pieces; or nothing.

    On the CPU torch selects by a mask entry for entry, which takes ten times as long as arithmetic on integers does
    while they are in the processor's cache.
    """
    if mask.shape != tensor.shape or not all(t.is_cpu and t.is_contiguous() for t in (tensor, mask, *like)):
        return []
    kind = torch.int64 if tensor.dtype == torch.float64 else torch.int32
    bits = [tensor.detach().view(kind), mask.view(torch.int8), *(t.view(kind) for t in like)]
    return list(zip(*(t.view(-1).split(CPU_CHUNK) for t in bits), strict=True))


def clip(run: Run, limit: float) -> Tensor:
    """Scale the gradients down to the norm `limit` (0: none), as torch does; returns their norm over all processes."""
    gradients = [weight.grad for weight in run.weights.values() if weight.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros((), device=run.device)
    norm = run.shards.sum(norms.square().sum()).sqrt()
    run.clipped = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
    if gradients:
        torch._foreach_mul_(gradients, run.clipped)
    return norm


def moments(trained, settings: TrainSettings, seed: int, shards: Shards) -> Moments:
    moments = Moments(dtype=settings.moments, seed=seed)
    for name, weight in trained.weights.items():
        shape = trained.shapes[name]
        rows = shards.rows(shape[0]).start if shape else 0
        moments.place(weight, name=name, offset=rows * math.prod(shape[1:]))
    return moments


def start_from(run: Run, states: dict[str, dict]) -> None:
    """Copy the weights that a part prepared as the start of fine-tuning."""
    with torch.no_grad():
        for name, value in hooks.starts(states, run).items():
            run.weights[name].copy_(run.shards.local(value))


def optimizer_of(parts: Sequence[Part], run: Run, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of the part that brings one, else fused AdamW."""
    betas, chosen = (settings.beta1, settings.beta2), {"eps": settings.eps, "weight_decay": settings.weight_decay}
    brought = hooks.optimizer(parts, run=run, learning_rate=settings.learning_rate, betas=betas, **chosen)
    if brought is not None:
        return brought
    if settings.moments == "float32":
        return torch.optim.AdamW(run.weights.values(), lr=settings.learning_rate, betas=betas, fused=True, **chosen)
    return AdamW(run.weights.values(), lr=settings.learning_rate, betas=betas, moments=run.moments, **chosen)
