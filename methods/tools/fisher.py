"""The diagonal of the Fisher information matrix, exact for each example.

    F_i = (1/N) Σ_n (∂/∂θ_i Σ_t −log p_θ(y_nt | x_n,<t))²

The square is outside the sum over tokens and inside the sum over examples, so it takes one matrix product for each
example and weight. Everything else is done for several examples of similar length at once
(methods/tools/per_example.py). Padding is on the right, where no token attends to it, so F depends on batch size,
padding and order only by rounding. A model with layers that per_example does not know takes one backward pass for
each example, in which a hook squares each tensor's gradient as soon as it is complete and frees it. In both cases
there is one float32 F and no gradient buffer. Several processes take the batches in turn, each with the whole
weights, and add up their sums of squares once at the end.
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
TOKENS = 512  # in one forward pass, with padding; a longer document is alone in its pass


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
    """F of a model's parameters on batches: float32 tensors by parameter name, in the shapes of the parameters.

    batches     dicts of (examples, tokens) tensors: input_ids; attention_mask where padded, on either side; labels as
                transformers takes them (unshifted, −100 ignored); without labels every token is one
    estimator   "empirical": the labels given.
                "sampled": labels drawn from the model at every labelled position, by a generator seeded with `seed` and
                the example's input ids: an estimate of the true Fisher.
                "signed": (Σ_n s_n ∂/∂θ_i Σ_t …)² over groups of examples of similar length, s_n = ±1 drawn from `seed`
                and the example's input ids: its mean over signs is the empirical F. It is noisier, and as cheap as
                training. Only the noise depends on the batches; equal examples have equal signs.
                "batched": the square of each batch's mean gradient, as published baselines compute it. Its scale is
                about 1/batch of the empirical one, and it depends on the sizes and composition of the batches. It is
                not a Fisher and is here for comparison.
    parameters  what to compute F of: names, or parameters under the names they are to have; all by default.
                A tied tensor has one name; the gradients of its uses are summed before squaring.
    progress    called after each batch with the number of examples that all processes completed, and first with the
                number completed before an interruption
    shards      the processes that share the batches; all have the whole weights, give the same arguments and get the
                same F. One process by default.
    resume      where the sums are saved from time to time; an interrupted pass continues from there, to the same bits

    The model runs in evaluation mode; its modes, gradients and requires_grad flags are restored afterwards.
    An example without a label counts with a zero gradient. Raises UserError for an unknown estimator, without examples
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
                f"{name} is cut into shards: its gradient is a mean over processes, and the square of a mean is not "
                "the mean of squares; compute the Fisher on whole weights, before fully_shard"
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
    weight = 1  # number of examples that a gradient is the mean of; the hooks read it

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
                documents = list(_documents(batch))
                groups = by_length([len(ids) for ids, _ in documents])
                if estimator == "batched":
                    groups, weight = [range(len(documents))], len(documents)
                for group in groups:
                    _backward(model, [documents[i] for i in group], estimator, seed, squares, device)
            if resume and resume.due():
                resume.save(total, {"rounds": turn + 1})
            if progress is not None:
                progress(rows[turn])
    # tensor by tensor, so that there is never a second copy of F
    return {name: shards.sum(total.pop(name)).div_(examples).float() for name in list(total)}


def by_length(lengths: Sequence[int], tokens: int = TOKENS) -> list[list[int]]:
    """Indices in groups of similar length, longest first: at most `tokens` in a padded group, or one longer example."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def batched(examples: Sequence[Mapping[str, Tensor]], size: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of `size` documents in order; without a size, groups of similar length for one pass each."""
    if size is None:
        groups = by_length([len(e["input_ids"]) for e in examples])
    else:
        groups = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    for group in groups:
        ids, labels = ([examples[i][name] for i in group] for name in ("input_ids", "labels"))
        yield {
            "input_ids": pad_sequence(ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def _backward(
    model: nn.Module,
    documents: list[tuple[Tensor, Tensor]],
    estimator: str,
    seed: int,
    squares: Squares | None,
    device: torch.device,
) -> None:
    """Backward passes over examples (input ids, labels), together into `squares` or one by one into the hooks."""
    if estimator in ("signed", "batched"):
        ids, labels = _padded(documents, device)
        if (labels[:, 1:] != -100).any():
            nll = _nll(model, ids, labels)
            if estimator == "signed":
                nll = nll * torch.tensor([_sign(ids, seed) for ids, _ in documents], device=device)
            else:
                nll = nll / len(documents)
            nll.sum().backward()
        return
    draw = seed if estimator == "sampled" else None
    documents = [(ids, labels) for ids, labels in documents if (labels[1:] != -100).any()]
    lengths = [len(ids) for ids, _ in documents]
    if documents and squares is not None:
        ids, labels = _padded(documents, device)
        if squares.add(ids, lambda: _nll(model, ids, labels, lengths, draw).sum()):
            return
    for document, length in zip(documents, lengths, strict=True):
        _nll(model, *_padded([document], device), [length], draw).sum().backward()


def _padded(documents: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*documents, strict=True)
    ids = pad_sequence(ids, batch_first=True)
    return ids.to(device), pad_sequence(labels, batch_first=True, padding_value=-100).to(device)


def _documents(batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(input ids, labels) of each example without its padding."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    for row, kept, wanted in zip(ids, mask, batch.get("labels", ids), strict=True):
        yield row[kept], wanted[kept]


def _nll(model: nn.Module, ids: Tensor, labels: Tensor, lengths: Sequence[int] = (), seed: int | None = None) -> Tensor:
    """Σ −log p(label) of each right-padded example, in nats; with a seed the labels are drawn from the model.

    No token of an example attends to its padding, so there is no attention mask. Logits are computed only at positions
    where an example has a label.
    """
    labelled = (labels[:, 1:] != -100).any(0).nonzero().flatten()
    targets = labels[:, 1:][:, labelled]
    logits = architecture.logits_of(model)(architecture.hidden_states(model, ids, None)[:, labelled])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seed is not None:
        for row, length, wanted in zip(range(len(ids)), lengths, targets != -100, strict=True):
            targets[row, wanted] = _drawn(logits[row, wanted].detach(), ids[row, :length], seed)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return nll.view(targets.shape).sum(1)


def _drawn(logits: Tensor, ids: Tensor, seed: int) -> Tensor:
    """A label for each row of logits, drawn on the CPU so that all devices draw the same."""
    generator = torch.Generator().manual_seed(_number(ids, seed))
    chances = logits.double().softmax(-1).cpu()
    return torch.multinomial(chances, 1, generator=generator).flatten().to(logits.device)


def _sign(ids: Tensor, seed: int) -> int:
    return 1 - 2 * (_number(ids, seed) % 2)


def _number(ids: Tensor, seed: int) -> int:
    """63 random bits that depend on a document and the seed alone."""
    text = f"{seed}:{','.join(map(str, ids.tolist()))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def _only_these(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], hook_for: Callable[[str], Callable[[Tensor], None]]
) -> Iterator[None]:
    """Evaluation mode with gradients of `parameters` alone and none from before; everything is restored afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        for p, _, _ in before:
            p.grad = None  # an old gradient would be squared together with the first example's
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
