"""Log-likelihoods of several continuations of one context in one forward pass. Pure torch.

    sequence   context | a1 a2 | b1 b2 b3 | ...      each continuation less its last token, which predicts nothing
    positions  0 .. n-1 | n ..  | n ..     | ...     every continuation begins where the context ends
    attention  a token sees the context and the tokens before it in its own continuation, nothing else

The context is encoded once, not once a choice, and logits exist only where a token is scored: log p(t_1) comes from
the context's last position, for all continuations from the same row. Requests are (context ids, continuation ids);
what is too long loses tokens from the left, as in HFLM. Values equal HFLM's to 1e-3 nats in float32.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evaluation.progress import Bar
from methods.errors import UserError
from methods.tools.architecture import backbone, logits_of, plain

Request = tuple[Sequence[int], Sequence[int]]  # context ids, continuation ids; neither empty

TOKENS = 1024  # padded input tokens of one forward pass: 512 to 1024 is fastest on a CPU, a GPU wants more
PACKED = 256  # a sequence no longer than this takes all continuations; a longer one up to twice its need
LOGITS = 2**22  # logits alive at once, in the model's dtype: small enough that memory is not fetched anew each time
CACHED = 2**18  # logits whose softmax is computed at once on the CPU: 1 MB of float32 fits its cache, 4 times as fast

_refusals: "weakref.WeakKeyDictionary[torch.nn.Module, str]" = weakref.WeakKeyDictionary()


@dataclass
class Row:
    """One row of a batch: a context and the continuations it is shared by."""

    context: tuple[int, ...]
    members: list[tuple[int, Sequence[int]]] = field(default_factory=list)  # (request number, continuation)

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(c) - 1 for _, c in self.members)

    @property
    def branches(self) -> bool:
        """Whether it needs a mask of its own: two or more continuations with an input token."""
        return sum(len(c) > 1 for _, c in self.members) > 1


@torch.no_grad()
def log_likelihoods(
    model: torch.nn.Module,
    requests: Sequence[Request],
    *,
    max_length: int,
    tokens: int = TOKENS,
    description: str | None = None,
) -> list[tuple[float, bool]]:
    """For each request, log p(continuation | context) in nats and whether every token is the model's first choice.

    The model (llama, gptj, or another that `refusal` accepts; plain or in peft's wrapper) must be in eval mode; one
    that is refused is scored request by request through its own forward, with the same values. `tokens` bounds the
    padded tokens of a forward pass; `description` shows a progress bar on a terminal.
    """
    shared = not refusal(model)
    results = [(0.0, True)] * len(requests)
    batches = plan(requests, max_length=max_length, tokens=tokens, shared=shared)
    total = sum(s.length for batch in batches for s in batch)
    hidden = None if description else True  # None: hidden if stderr is no terminal
    with Bar(total=total, desc=description, unit="tok", unit_scale=True, disable=hidden) as bar:
        for batch in batches:
            for request, result in _score(model, batch, shared):
                results[request] = result
            bar.update(sum(s.length for s in batch))
    return results


def plan(requests: Sequence[Request], *, max_length: int, tokens: int = TOKENS, shared: bool = True) -> list[list[Row]]:
    """The forward passes that score `requests`, in order: rows of similar lengths, padded to the first and longest."""
    return list(_batches(_sequences(requests, max_length, shared), tokens))


def _sequences(requests: Sequence[Request], max_length: int, shared: bool) -> list[Row]:
    """Requests with equal contexts together, as far as their sequence stays short enough to be worth it."""
    groups: dict[Any, list[tuple[int, Sequence[int]]]] = defaultdict(list)
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation or len(continuation) > max_length:
            raise ValueError(
                f"request {number}: context of {len(context)} and continuation of {len(continuation)} tokens; both "
                f"need at least one, and the continuation at most the model's {max_length}"
            )
        kept = tuple(context)[-(max_length + 1 - len(continuation)) :]
        groups[kept if shared else (number, kept)].append((number, continuation))
    sequences = []
    for key, members in groups.items():
        context = key if shared else key[1]
        longest = max(len(c) for _, c in members)
        # masked pairs still cost attention, so a row of mostly continuations is not worth sharing
        limit = max(PACKED, 2 * (len(context) + longest))
        current = Row(context)
        for number, continuation in members:
            if current.members and current.length + len(continuation) - 1 > limit:
                sequences.append(current)
                current = Row(context)
            current.members.append((number, continuation))
        sequences.append(current)
    return sequences


def _batches(sequences: list[Row], tokens: int) -> Iterator[list[Row]]:
    """Sequences of like lengths, longest first (memory runs out at once or never); masked and unmasked apart."""
    batch: list[Row] = []
    for sequence in sorted(sequences, key=lambda s: (not s.branches, -s.length, s.context)):
        new = batch and sequence.branches != batch[0].branches
        if batch and (new or (len(batch) + 1) * batch[0].length > tokens):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _score(model: torch.nn.Module, batch: list[Row], shared: bool) -> Iterator[tuple[int, tuple[float, bool]]]:
    width = max(s.length for s in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segment = torch.full_like(ids, -1)  # 0 the context, 1.. the continuations, -1 padding
    rows: list[int] = []  # flat positions whose logits are wanted, each once
    row_of: list[int] = []  # for each scored token, its entry in `rows`
    target: list[int] = []
    owner: list[int] = []  # for each scored token, its request's place among the batch's requests
    numbers: list[int] = []
    for b, sequence in enumerate(batch):
        at = len(sequence.context)
        ids[b, :at] = torch.tensor(sequence.context)
        positions[b, :at] = torch.arange(at)
        segment[b, :at] = 0
        last = len(rows)
        rows.append(b * width + at - 1)
        for branch, (number, continuation) in enumerate(sequence.members, 1):
            inputs = len(continuation) - 1
            place = slice(at, at + inputs)
            ids[b, place] = torch.tensor(continuation[:-1], dtype=torch.long)
            positions[b, place] = torch.arange(inputs) + len(sequence.context)
            segment[b, place] = branch
            row_of += [last, *range(len(rows), len(rows) + inputs)]
            rows += range(b * width + at, b * width + at + inputs)
            target += continuation
            owner += [len(numbers)] * len(continuation)
            numbers.append(number)
            at += inputs
    device = next(model.parameters()).device
    call: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
    if batch[0].branches:  # otherwise the model's own causal attention is right, because padding is on the right
        call["attention_mask"] = _mask(segment.to(device), plain(model).dtype)
        call["position_ids"] = positions.to(device)
    if shared:
        states, to_logits = backbone(model)(**call).last_hidden_state, logits_of(model)
    else:
        states, to_logits = model(**call).logits, torch.nn.Identity()
    states = states.flatten(0, 1)[torch.tensor(rows, device=device)]
    vocabulary = plain(model).get_input_embeddings().weight.shape[0] if shared else states.shape[-1]
    values, greedy = _pick(states, to_logits, torch.tensor(row_of), torch.tensor(target), vocabulary=vocabulary)
    total = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, torch.tensor(owner), values)
    misses = torch.zeros(len(numbers), dtype=torch.long).index_add_(0, torch.tensor(owner), (~greedy).long())
    yield from zip(numbers, zip(total.tolist(), (misses == 0).tolist()))


def _mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (batch, 1, tokens, tokens) in the model's dtype, which every attention of transformers takes."""
    width = segment.shape[1]
    seen = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    seen &= torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _pick(
    states: Tensor, to_logits: Callable, row_of: Tensor, target: Tensor, *, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """log softmax of each target at its row, as float64 on the CPU, and whether it is the row's argmax.

    The softmax is taken in float32 (float64 for a float64 model), on the CPU over a few rows at a time; `vocabulary` is
    about the number of logits of a row.
    """
    values = torch.empty(len(target), dtype=torch.float64)
    greedy = torch.empty(len(target), dtype=torch.bool)
    order = row_of.argsort(stable=True)
    row_of = row_of[order]
    size = max(1, LOGITS // vocabulary)
    block = max(1, CACHED // vocabulary) if states.device.type == "cpu" else size
    for start in range(0, len(states), size):
        chunk = to_logits(states[start : start + size])
        for first in range(start, start + len(chunk), block):
            logits = chunk[first - start : first - start + block]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            begin, end = torch.searchsorted(row_of, torch.tensor([first, first + len(logits)])).tolist()
            here = order[begin:end]
            row, wanted = (row_of[begin:end] - first).to(logits.device), target[here].to(logits.device)
            best = logits[row, wanted] == logits.amax(-1)[row]
            # of equal logits the first is the argmax, which takes as long as the softmax: only if the target may be it
            best[best.clone()] = logits[row[best]].argmax(-1) == wanted[best]
            greedy[here] = best.cpu()
            values[here] = logits.log_softmax(-1)[row, wanted].double().cpu()
    return values, greedy


def refusal(model: torch.nn.Module) -> str:
    """Why the shared prefix cannot be used with this model; empty where it can. Tried once a model, on 12 tokens."""
    inner = plain(model)
    if inner not in _refusals:
        _refusals[inner] = _refusal(model)
    return _refusals[inner]


@torch.no_grad()
def _refusal(model: torch.nn.Module) -> str:
    inner = plain(model)
    config = getattr(inner.config, "text_config", None) or inner.config
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        return "flash attention takes no mask of our own"
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if sliding or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "not all of its layers attend to the whole context"
    sequence = Row((1, 2, 3, 4, 5), [(0, (6, 7, 8, 9)), (1, (4, 3, 2, 1))])
    alone = [Row(sequence.context, [member]) for member in sequence.members]
    try:
        together = dict(_score(model, [sequence], True))
        apart = dict(pair for s in alone for pair in _score(model, [s], False))
    except UserError as error:
        return str(error)
    except Exception as error:  # an unknown architecture may raise anything
        return f"{type(error).__name__}: {error}"
    half = inner.dtype in (torch.bfloat16, torch.float16)
    gap = max(abs(together[i][0] - apart[i][0]) for i in together)
    if not gap <= (0.8 if half else 1e-3):  # 0.2 nats a token in half precision; also true of a NaN
        return f"its log-likelihoods differ by {gap:.3g} nats from its own forward pass's"
    return ""
