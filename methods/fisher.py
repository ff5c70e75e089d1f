"""The diagonal of the Fisher information, exact per example.

    F_i = (1/N) Σ_n (∂/∂θ_i Σ_t −log p_θ(y_nt | x_n,<t))²

The square is outside the sum over tokens and inside the sum over examples, so there is no cheaper way than one
backward pass an example; each runs alone and unpadded, which makes F independent of batch size, padding and order.
A hook squares each tensor's gradient as soon as it is complete and frees it: no gradient buffer, one float32 F.
Several processes take the batches in turn, each with the whole weights, and add up their sums of squares once, at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from experiments.errors import UserError
from experiments.sharding import Shards

if TYPE_CHECKING:
    from experiments.resume import Resume

ESTIMATORS = ("empirical", "sampled", "batched")


def diagonal_fisher(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], estimator: str = "empirical", *, seed: int = 0,
                    parameters: Mapping[str, nn.Parameter] | Iterable[str] | None = None,
                    progress: Callable[[int], object] | None = None, shards: Shards | None = None,
                    resume: Resume | None = None) -> dict[str, Tensor]:  # fmt: skip
    """F of `model`'s parameters on `batches`: float32 tensors by parameter name, shaped like the parameters.

    batches     dicts of (examples, tokens) tensors: input_ids; attention_mask where padded, on either side; labels as
                transformers takes them (unshifted, −100 ignored), without them every token is a label
    estimator   "empirical": the labels given. "sampled": labels drawn from the model at every labelled position, by a
                generator seeded with `seed` and the example's input ids: the true Fisher's estimate.
                "batched": the square of each batch's mean gradient, as published baselines compute it: about 1/batch of
                the empirical scale, and the batches' sizes and composition matter. Not a Fisher; kept for comparison.
    parameters  what to compute F of: names, or parameters under the names they are to have; all by default.
                A tied tensor has one name; its uses are summed before squaring.
    progress    called after each batch with the number of examples that all processes did meanwhile; first with those
                done before an interruption
    shards      the processes to split the batches over; each has the whole weights and gives the same arguments, and F
                is the same on all. One by default.
    resume      where the sums are kept from time to time; a pass begun again goes on from there to the same F, bit for bit

    The model computes in evaluation mode; its modes, gradients and requires_grad flags are left as they were.
    An example without a label counts with a zero gradient. Raises UserError for an unknown estimator, for no examples
    and for weights that are cut into shards.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator is {estimator!r}: it must be one of {', '.join(ESTIMATORS)}")
    everything = dict(model.named_parameters())
    if parameters is None:
        parameters = everything
    elif not isinstance(parameters, Mapping):
        parameters = {name: everything[name] for name in parameters}
    for name, p in parameters.items():
        if isinstance(p, DTensor):
            raise UserError(
                f"{name} is cut into shards: its gradient is a mean over processes, and the square of a mean is not the mean "
                "of squares; compute the Fisher on whole weights, before fully_shard"
            )
    shards = shards or Shards()
    batches = list(batches)
    rows = [sum(len(batch["input_ids"]) for batch in batches[at : at + shards.world]) for at in range(0, len(batches), shards.world)]
    examples = sum(rows)
    if not examples:
        raise UserError("the Fisher has no examples: give at least one document of general text")
    mine = batches[shards.rank :: shards.world]
    device = next(iter(everything.values())).device
    wide = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in parameters.items()}
    total = {name: torch.zeros_like(p, dtype=wide[name], requires_grad=False) for name, p in parameters.items()}
    weight = 1  # examples the gradient at hand stands for; read by the hooks

    def square_into(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad.to(wide[name])
            total[name].addcmul_(gradient, gradient, value=weight)
            parameter.grad = None

        return hook

    before = resume.load(total, device) if resume else None
    done = before[1]["rounds"] if before else 0
    if done and progress is not None:
        progress(sum(rows[:done]))
    with _only_these(model, parameters, square_into), torch.enable_grad():
        for turn in range(done, len(rows)):
            for batch in mine[turn : turn + 1]:  # none in the last round of a process with one batch less
                if estimator == "batched":
                    weight = len(batch["input_ids"])
                    loss = _batch_nll(model, batch, device)
                    if loss is not None:
                        (loss / weight).backward()
                else:
                    for ids, labels in _documents(batch):
                        loss = _document_nll(model, ids.to(device), labels.to(device), seed if estimator == "sampled" else None)
                        if loss is not None:
                            loss.backward()
            if resume and resume.due():
                resume.save(total, {"rounds": turn + 1})
            if progress is not None:
                progress(rows[turn])
    return {name: shards.sum(total.pop(name)).div_(examples).float() for name in list(total)}  # never a second copy of F


def _documents(batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(input ids, labels) of each example without its padding."""
    mask, labels = _filled(batch)
    for ids, keep, wanted in zip(batch["input_ids"], mask, labels, strict=True):
        yield ids[keep], wanted[keep]


def _filled(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    labels = batch.get("labels")
    return mask, (ids if labels is None else labels).masked_fill(~mask, -100)


def _document_nll(model: nn.Module, ids: Tensor, labels: Tensor, seed: int | None) -> Tensor | None:
    """Σ −log p(label) of one document (1-D ids and labels), in nats; None without a label. Logits only where labelled."""
    asked = (labels[1:] != -100).nonzero().flatten()
    if not len(asked):
        return None
    logits = model(input_ids=ids[None], logits_to_keep=asked, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels[1:][asked] if seed is None else _drawn(logits.detach(), ids, seed)
    return F.cross_entropy(logits, targets, reduction="sum")


def _drawn(logits: Tensor, ids: Tensor, seed: int) -> Tensor:
    """A label for each row of logits, drawn on the CPU so that every device draws the same."""
    text = f"{seed}:{','.join(map(str, ids.tolist()))}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)
    chances = logits.double().softmax(-1).cpu()
    return torch.multinomial(chances, 1, generator=generator).flatten().to(logits.device)


def _batch_nll(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    """Σ −log p(label) over a padded batch in one forward pass."""
    mask, labels = (t.to(device) for t in _filled(batch))
    if not (labels[:, 1:] != -100).any():
        return None
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)  # left padding must not shift positions
    logits = model(input_ids=batch["input_ids"].to(device), attention_mask=mask.long(), position_ids=positions,
                   use_cache=False).logits[:, :-1]  # fmt: skip
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # the first real token of a left-padded row would be predicted from padding: it has no context
    labels = labels[:, 1:].masked_fill(~mask[:, :-1], -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@contextlib.contextmanager
def _only_these(model: nn.Module, parameters: Mapping[str, nn.Parameter],
                hook_for: Callable[[str], Callable[[Tensor], None]]) -> Iterator[None]:  # fmt: skip
    """Gradients of `parameters` alone, none left over from before, in evaluation mode; everything restored after."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        for p, _, _ in before:
            p.grad = None  # a left-over gradient would be squared with the first example's
            p.requires_grad_(False)
        for name, p in parameters.items():
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(hook_for(name)))
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient
        for module, mode in modes:
            module.training = mode
