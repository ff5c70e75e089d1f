"""Compare what training computes of a model with the model's own forward pass, on twelve tokens when it is loaded.

There are more architectures than anyone has read. Holdfast relies on three properties, and tests them on the model
itself, with the weights, attention and dtype that it will compute with:

    causality   changing the last token changes no earlier logit; otherwise right padding, packed rows and labels leak
    loss        the chunked loss of hidden states and labels equals the loss of `model(input_ids, labels)`
    gradient    the gradient with respect to the embedded tokens, which passes every layer, equals autograd's through
                the model's own loss

The test runs once for each config, dtype and device in a process. It takes five forward and three backward passes of
twelve tokens and no weight's gradient, which is less than reading the weights. A mixture of experts is tested without
the loss of its router, which training leaves out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from experiments.training.loss import summed_nll
from methods.errors import UserError, shortened
from methods.tools import architecture

TOKENS = 12
LARGE = 1_000_000_000  # parameters; of larger models on the CPU, where a pass takes seconds, FIRST blocks are tested
FIRST = 2
_HALF, _FULL = 0.03, 1e-3  # relative differences due to rounding, in half precision and above

_tried: set[tuple[str, ...]] = set()


def check(model: nn.Module) -> None:
    """Raise UserError with the architecture and the difference if one of the three properties does not hold.

    Random state, gradients, flags and modes are unchanged.
    """
    inner = architecture.plain(model)
    weight = next(inner.parameters())
    key = (type(inner).__qualname__, inner.config.to_json_string(), str(weight.dtype), weight.device.type)
    if key in _tried:
        return
    limit = _HALF if weight.dtype in (torch.bfloat16, torch.float16) else _FULL
    for blocks in (FIRST, None) if _large(inner) else (None,):  # all blocks may pass where the first ones do not
        try:
            with _prepared(model, blocks):
                differences = _differences(model)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an untested architecture may raise anything
            if blocks is None:
                raise UserError(
                    f"{_name(inner)} cannot be trained as a causal language model: a forward and backward pass of "
                    f"{TOKENS} tokens raises {shortened(error)}"
                ) from error
            continue
        wrong = [
            f"{what} (relative difference {difference:.2g}, allowed {limit:g})"
            for what, difference in differences.items()
            if difference > limit
        ]
        if not wrong:
            break
    if wrong:
        raise UserError(
            f"{_name(inner)} is not supported: tested on {TOKENS} tokens, {'; '.join(wrong)}. "
            "Choose a model of another architecture, or report this one with its config.json"
        )
    _tried.add(key)


def _name(model: nn.Module) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def _differences(model: nn.Module) -> dict[str, float]:
    """Relative differences by what a large one means; NaN if the model's own logits are not finite."""
    inner = architecture.plain(model)
    device, vocabulary = next(inner.parameters()).device, inner.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = (other[0, -1] + vocabulary // 2) % vocabulary
    ids, other = ids.to(device), other.to(device)
    labels = ids.clone()
    labels[0, :2] = -100

    def own() -> Tensor:
        return inner(input_ids=ids, labels=labels, use_cache=False).loss.float()

    def ours() -> Tensor:
        hidden = architecture.hidden_states(inner, ids, None)
        return summed_nll(hidden, labels, architecture.logits_of(inner)).float() / (TOKENS - 2)

    with torch.no_grad():
        before, after = (inner(input_ids=tokens, use_cache=False).logits[:, :-1] for tokens in (ids, other))
    (loss, gradient), (our_loss, our_gradient) = (_with_gradient(inner, compute) for compute in (own, ours))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        inner.train()  # some models fail in training mode, and dropout changes their numbers
        _with_gradient(inner, ours)
    return {
        "changing the last token changes earlier logits: its attention is not causal": _relative(after, before),
        f"its own loss is {loss.item():.5g}, and the training loss {our_loss.item():.5g}": _relative(our_loss, loss),
        "the gradients of its own loss and of the training loss differ": _relative(our_gradient, gradient),
    }


def _with_gradient(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the embedded tokens."""
    embedded: list[Tensor] = []

    def leaf(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models scale their embeddings in place

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            loss = compute()
            (gradient,) = torch.autograd.grad(loss, embedded[:1])
    finally:
        handle.remove()
    return loss.detach(), gradient


def _relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@contextmanager
def _prepared(model: nn.Module, blocks: int | None) -> Iterator[None]:
    """Evaluation mode without weight gradients and router loss, in the first `blocks` blocks; undone afterwards."""
    inner = architecture.plain(model)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    router = getattr(inner.config, "output_router_logits", None)
    try:
        model.eval().requires_grad_(False)
        if router:
            inner.config.output_router_logits = False
        with architecture.first_blocks(inner, blocks):
            yield
    finally:
        if router:
            inner.config.output_router_logits = router
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _large(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu" and sum(p.numel() for p in model.parameters()) >= LARGE
