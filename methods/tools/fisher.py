"""The diagonal of the Fisher information, exact per example.

    F_i = (1/N) Σ_n (∂/∂θ_i Σ_t −log p_θ(y_nt | x_n,<t))²

The square is outside the sum over tokens and inside the sum over examples, so there is no cheaper way than one matrix
product an example and weight; all else is done for several examples of like lengths at once (methods/tools/per_example.py).
Padding on the right is seen by no token and has no gradient, so F depends on batch size, padding and order by rounding
alone. A model with layers that are not known there has one backward pass an example, in which a hook squares each tensor's
gradient as soon as it is complete and frees it. Either way there is no gradient buffer, and one float32 F.
Several processes take the batches in turn, each with the whole weights, and add up their sums of squares once, at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from methods.errors import UserError
from methods.tools import architecture
from methods.tools.per_example import Squares
from methods.tools.process_group import Shards

if TYPE_CHECKING:
    from methods.tools.resume import Resume

ESTIMATORS = ("empirical", "sampled", "signed", "batched")
TOKENS = 512  # of one forward pass, padding included, unless one document is longer


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    estimator: str = "empirical",
    *,
    seed: int = 0,
    parameters: Mapping[str, nn.Parameter] | Iterable[str] | None = None,
    progress: Callable[[int], object] | None = None,
    shards: Shards | None = None,
    resume: Resume | None = None,
) -> dict[str, Tensor]:
    """F of `model`'s parameters on `batches`: float32 tensors by parameter name, shaped like the parameters.

    batches     dicts of (examples, tokens) tensors: input_ids; attention_mask where padded, on either side; labels as
                transformers takes them (unshifted, −100 ignored), without them every token is a label
    estimator   "empirical": the labels given. "sampled": labels drawn from the model at every labelled position, by a
                generator seeded with `seed` and the example's input ids: the true Fisher's estimate.
                "signed": (Σ_n s_n ∂/∂θ_i Σ_t …)² of examples of like lengths together, s_n = ±1 drawn from `seed` and the
                example's input ids alone: the empirical F in the mean over signs, noisier, at the price of plain training.
                The noise, and no more, depends on the batches; examples that are the same have the same sign.
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
        if hasattr(p, "placements"):  # a DTensor, whose module takes a second to import
            raise UserError(
                f"{name} is cut into shards: its gradient is a mean over processes, and the square of a mean is not the mean "
                "of squares; compute the Fisher on whole weights, before fully_shard"
            )
    shards = shards or Shards()
    batches = list(batches)
    rows = [
        sum(len(batch["input_ids"]) for batch in batches[at : at + shards.world])
        for at in range(0, len(batches), shards.world)
    ]
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

    squares = Squares.of(model, parameters, total) if estimator in ("empirical", "sampled") else None
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
                    documents = list(_documents(batch))
                    for group in by_length([len(ids) for ids, _ in documents]):
                        _accumulate(model, [documents[i] for i in group], estimator, seed, squares, device)
            if resume and resume.due():
                resume.save(total, {"rounds": turn + 1})
            if progress is not None:
                progress(rows[turn])
    return {
        name: shards.sum(total.pop(name)).div_(examples).float() for name in list(total)
    }  # never a second copy of F


def by_length(lengths: Sequence[int], tokens: int = TOKENS) -> list[list[int]]:
    """Indices in groups of like lengths, longest first: at most `tokens` a group when padded; what is longer is alone."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _accumulate(
    model: nn.Module,
    documents: list[tuple[Tensor, Tensor]],
    estimator: str,
    seed: int,
    squares: Squares | None,
    device: torch.device,
) -> None:
    """Backward passes of (input ids, labels) of examples: by `squares` of all together, or into the parameters' hooks."""
    if estimator == "signed":
        ids, labels = _padded(documents, device)
        if (labels[:, 1:] != -100).any():
            signs = torch.tensor([_sign(ids, seed) for ids, _ in documents], device=device)
            (_nll(model, ids, labels) * signs).sum().backward()
        return
    seed = seed if estimator == "sampled" else None
    documents = [(ids, labels) for ids, labels in documents if (labels[1:] != -100).any()]
    lengths = [len(ids) for ids, _ in documents]
    if documents and squares is not None:
        ids, labels = _padded(documents, device)
        if squares.add(ids, lambda: _nll(model, ids, labels, lengths, seed).sum()):
            return
    for document, length in zip(documents, lengths, strict=True):
        _nll(model, *_padded([document], device), [length], seed).sum().backward()


def _padded(documents: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*documents, strict=True)
    return pad_sequence(ids, batch_first=True).to(device), pad_sequence(
        labels, batch_first=True, padding_value=-100
    ).to(device)


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


def _nll(model: nn.Module, ids: Tensor, labels: Tensor, lengths: Sequence[int] = (), seed: int | None = None) -> Tensor:
    """Σ −log p(label) of each right-padded example, in nats, of labels drawn by `seed` if there is one.

    The last real token of an example sees no padding, so there is no attention mask. Logits only where an example has a label.
    """
    asked = (labels[:, 1:] != -100).any(0).nonzero().flatten()
    targets = labels[:, 1:][:, asked]
    logits = architecture.logits_of(model)(architecture.hidden_states(model, ids, None)[:, asked])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seed is not None:
        for row, length, wanted in zip(range(len(ids)), lengths, targets != -100, strict=True):
            targets[row, wanted] = _drawn(logits[row, wanted].detach(), ids[row, :length], seed)
    return (
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        .view(targets.shape)
        .sum(1)
    )


def _drawn(logits: Tensor, ids: Tensor, seed: int) -> Tensor:
    """A label for each row of logits, drawn on the CPU so that every device draws the same."""
    generator = torch.Generator().manual_seed(_number(ids, seed))
    chances = logits.double().softmax(-1).cpu()
    return torch.multinomial(chances, 1, generator=generator).flatten().to(logits.device)


def _sign(ids: Tensor, seed: int) -> int:
    return 1 - 2 * (_number(ids, seed) % 2)


def _number(ids: Tensor, seed: int) -> int:
    """63 random bits of a document."""
    text = f"{seed}:{','.join(map(str, ids.tolist()))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _batch_nll(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    """Σ −log p(label) over a padded batch in one forward pass."""
    mask, labels = (t.to(device) for t in _filled(batch))
    if not (labels[:, 1:] != -100).any():
        return None
    # padding on the left must not shift positions, which not every model takes: they are its own where there is none
    shifted = {} if mask[:, 0].all() else {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    logits = model(
        input_ids=batch["input_ids"].to(device), attention_mask=mask.long(), use_cache=False, **shifted
    ).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # the first real token of a left-padded row would be predicted from padding: it has no context
    labels = labels[:, 1:].masked_fill(~mask[:, :-1], -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@contextlib.contextmanager
def _only_these(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], hook_for: Callable[[str], Callable[[Tensor], None]]
) -> Iterator[None]:
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
