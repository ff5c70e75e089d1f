"""The exact diagonal of the Fisher needs every example's own gradient. Against one plain forward and backward pass of
the same tokens in batches: a loop over examples that squares and adds whole gradients, the same with hooks that free
each gradient once it is squared, ours (a batch at a time, one matrix product an example and weight), and two estimators
that take a batch's gradient: `signed`, which is right in the mean over signs, and `batched`, which is no Fisher.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from experiments.bench.race import Goal, Race, race
from experiments.model.random_models import build
from methods.tools.fisher import diagonal_fisher

TITLE = "Diagonal Fisher of every weight"


def measure(*, small: bool, rounds: int) -> Iterator[Race]:
    sizes = {} if small else {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 4096}
    model = build("llama", seed=0, **sizes)
    weights, count = sum(p.numel() for p in model.parameters()), 4 if small else 16
    for longest in (32, 128):
        documents = _documents(count, longest, vocabulary=model.config.vocab_size)
        batches = [_padded(documents[at : at + 8]) for at in range(0, count, 8)]
        ours, exact = diagonal_fisher(model, batches), _naive(model, documents)
        error = max(((ours[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact)
        yield race(
            f"{count} documents of about {longest} tokens",
            {
                "plain forward and backward": lambda: _plain(model, batches),
                "loop, F += g²": lambda: _naive(model, documents),
                "loop, hooks": lambda: _hooked(model, documents),
                "ours": lambda: diagonal_fisher(model, batches),
                "ours, signed": lambda: diagonal_fisher(model, batches, "signed"),
                "batched": lambda: diagonal_fisher(model, batches, "batched"),
            },
            against="plain forward and backward",
            rounds=rounds or 7,
            goals=[Goal(runner="ours", limit=1.25), Goal(runner="ours, signed", limit=1.1)],
            facts={
                "weights": weights,
                "tokens": sum(map(len, documents)),
                "threads": torch.get_num_threads(),
                "ours from the loop's F, relative": error,
            },
        )


def _documents(count: int, longest: int, *, vocabulary: int) -> list[Tensor]:
    """Ids of lengths within an eighth of `longest`, longest first: a batch holds little padding."""
    draw = torch.Generator().manual_seed(longest)
    lengths = [longest - (i * longest) // (8 * count) for i in range(count)]
    return [torch.randint(2, vocabulary, (length,), generator=draw) for length in lengths]


def _padded(documents: list[Tensor]) -> dict[str, Tensor]:
    pad = {"batch_first": True, "padding_value": 0}
    return {
        "input_ids": pad_sequence(documents, **pad),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in documents], **pad),
    }


def _nll(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def _plain(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        model.zero_grad()
        _nll(model, batch["input_ids"], batch["attention_mask"]).backward()
    model.zero_grad()


def _naive(model: nn.Module, documents: list[Tensor]) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for ids in documents:
        model.zero_grad()
        _nll(model, ids[None], torch.ones_like(ids)[None]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2
    model.zero_grad()
    return {name: t.detach() / len(documents) for name, t in total.items()}


def _hooked(model: nn.Module, documents: list[Tensor]) -> None:
    total = {p: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in model.parameters()}

    def square(p: Tensor) -> None:
        gradient = p.grad.float()
        total[p].addcmul_(gradient, gradient)
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(square) for p in model.parameters()]
    for ids in documents:
        _nll(model, ids[None], torch.ones_like(ids)[None]).backward()
    for handle in handles:
        handle.remove()
