"""Adam's moments m and v, kept in float32 or in bfloat16, and AdamW on top of them.

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  update = −lr·m̂/(√v̂+ε),  m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)

bfloat16 halves the memory of both. A step changes v by less than bfloat16 can represent (β₂ = 0.999 moves it by a
thousandth, neighbouring numbers are 1/128 apart), so rounding to nearest would keep v constant. It is rounded
stochastically instead, up with the probability that makes the mean right. The update is computed before rounding.

The random bits of an entry are a hash of (seed, step, name of the tensor, index of the entry in the whole tensor):
they do not depend on chunks, on the device or on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

MOMENTS = ("float32", "bfloat16")
CHUNK = 1 << 24  # entries of a tensor processed at once, which bounds every temporary
CPU_CHUNK = 1 << 18  # the same on the CPU, where work that stays in the cache is three times as fast
SCRATCH = 28  # bytes for each entry of a chunk: float32 update, m and v, and the random bits for rounding them
VECTOR = 64  # entries; a multiple of every CPU's vector length
BLOCK = 1 << 31  # indices for one hash key: those that an int32 can hold


@dataclass
class _Place:
    """The place of a weight in the model, and its step count on the host."""

    weight: Tensor  # a reference, so that its id is not used again
    name: str
    offset: int
    step: Tensor | None = None  # the step tensor that `count` is of; after another write to it, it is read again
    version: int = -1
    count: int = 0


class Moments:
    """How the optimizers of a run keep m and v.

    dtype   "float32" (for float64 weights: float64), or "bfloat16" with stochastic rounding
    seed    of the stochastic rounding

    Raises ValueError for another dtype.
    """

    def __init__(self, *, dtype: str = "float32", seed: int = 0):
        if dtype not in MOMENTS:
            raise ValueError(f"moments are {dtype!r}: they must be one of {', '.join(MOMENTS)}")
        self.dtype, self.seed = dtype, seed
        self._places: dict[int, _Place] = {}

    def place(self, weight: Tensor, *, name: str, offset: int = 0) -> None:
        """Declare `weight` as the piece of the flattened tensor `name` that begins at entry `offset`.

        bfloat16 moments need this for every weight, float32 moments do not.
        """
        self._places[id(weight)] = _Place(weight, name, offset)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_places": list(self._places.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # the weights of a copy have other ids
        vars(self).update(state | {"_places": {id(place.weight): place for place in state["_places"]}})

    def advance(self, *, weight: Tensor, gradient: Tensor, state: dict[str, Any]) -> None:
        """Create the state, or restore its dtypes and device after a load, and count the step.

        state   "step" (0-dim float32), "exp_avg" and "exp_avg_sq" (like `weight`, in the chosen dtype), all on its
                device

        Raises ValueError for a sparse gradient, and for bfloat16 moments of a weight without a `place`.
        """
        if gradient.is_sparse:
            raise ValueError("there are no moments of sparse gradients: build the embedding with sparse=False")
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else _wide(weight)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            state["exp_avg_sq"] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        # load_state_dict gives m and v the dtype of the weight and leaves the step on the CPU
        for name, value in state.items():
            state[name] = value.to(weight.device, torch.float32 if name == "step" else dtype)
        step = state["step"]
        place = self._places.get(id(weight)) if self.dtype == "bfloat16" else None
        if place is None and self.dtype == "bfloat16":
            raise ValueError(
                f"bfloat16 moments of an unknown weight of shape {tuple(weight.shape)}: "
                "call place(weight, name=…) first"
            )
        if place and (place.step is not step or place.version != step._version):
            place.step, place.count = step, int(step)  # waits for the device, at the start and after a load only
        step += 1
        if place:
            place.version, place.count = step._version, place.count + 1

    def move(
        self,
        *,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        update: Tensor,
        piece: slice,
    ) -> None:
        """After `advance`, update m and v of one piece and write −lr·m̂/(√v̂+ε) into `update`.

        group              the parameter group: lr, betas, eps
        gradient, update   the piece itself, flat
        piece              its place in the flattened weight; the result for an entry does not depend on the pieces
        """
        kept = state["exp_avg"].view(-1)[piece], state["exp_avg_sq"].view(-1)[piece]
        wide = _wide(weight) if self.dtype == "float32" else torch.float32
        m, v = (moment.to(wide) for moment in kept)  # no copies if they are wide already
        moved = update.zero_() if update.dtype == wide else torch.zeros_like(update, dtype=wide)
        settings = {name: group[name] for name in ("lr", "betas", "eps")}
        fused_adam(moved, gradient.to(wide), m, v, state["step"], **settings)
        if moved is not update:
            update.copy_(moved)
        if self.dtype == "bfloat16":
            place = self._places[id(weight)]
            bits = random_bits(
                seed=self.seed,
                step=place.count,
                name=place.name,
                start=place.offset + piece.start,
                entries=len(m),
                device=m.device,
            )
            round_stochastically(m, bits & 0xFFFF, out=kept[0])
            round_stochastically(v, bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF), out=kept[1])


class AdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101) over `Moments`.

        θ ← θ − lr·( m̂/(√v̂+ε) + weight_decay·θ )

    watch   called with (weight, piece, movement) for every piece of every weight just before the movement is added:
            `piece` is a slice of the flattened weight, `movement` is all that is added to it, with weight decay. It is
            scratch memory and must not be kept. Watching changes no weight.
    """

    watch: Callable[[Tensor, slice, Tensor], None] | None = None

    def __init__(
        self,
        params: Iterable,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: Moments | None = None,
    ):
        self._moments = moments or Moments()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_moments": self._moments}  # a copy is not watched

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state, decay = self.state[p], group["lr"] * group["weight_decay"]
        self._moments.advance(weight=p, gradient=p.grad, state=state)
        flat, gradient = p.detach().reshape(-1), p.grad.reshape(-1)
        update = None
        for piece in pieces(p):
            weight = flat[piece]
            update = torch.empty_like(weight) if update is None else update[: len(weight)]  # the first is the longest
            self._moments.move(weight=p, gradient=gradient[piece], state=state, group=group, update=update, piece=piece)
            if decay:
                update.add_(weight, alpha=-decay)
            if self.watch:
                self.watch(p, piece, update)
            weight.add_(update)
        if not p.is_contiguous():  # flattening has copied it
            p.copy_(flat.view(p.shape))


def pieces(weight: Tensor) -> Iterator[slice]:
    """Slices of the flattened weight that are processed one after the other."""
    chunk = CPU_CHUNK if weight.device.type == "cpu" else CHUNK
    for start in range(0, weight.numel(), chunk):
        yield slice(start, min(start + chunk, weight.numel()))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def fused_adam(
    update: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """torch's fused kernel on a zeroed "parameter" without weight decay, which becomes the update; all tensors 1-D."""
    settings = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "weight_decay": 0.0, "eps": eps}

    def kernel(update, gradient, m, v):
        torch._fused_adamw_([update], [gradient], [m], [v], [], [step], **settings, amsgrad=False, maximize=False)

    tensors = (update, gradient, m, v)
    # the CPU kernel rounds the last entries, outside its vectors, in another way: pad, so that none is outside
    odd = len(update) % VECTOR if update.device.type == "cpu" else 0
    whole = len(update) - odd
    if not odd:
        kernel(*tensors)
    elif whole:
        kernel(*(t[:whole] for t in tensors))
    if odd:
        padded = [pad(t[whole:], (0, VECTOR - odd)) for t in tensors]
        kernel(*padded)
        for t, result in zip(tensors, padded):
            if t is not gradient:
                t[whole:] = result[:odd]


@cache
def kernel_is_lerp(dtype: torch.dtype, beta: float) -> bool:
    """Whether the CPU's fused kernel computes m to the same bits as torch.lerp."""
    p, m, draw = torch.zeros(4099, dtype=dtype), torch.zeros(4099, dtype=dtype), torch.Generator().manual_seed(0)
    optimizer = AdamW([p], betas=(beta, 0.5))
    for _ in range(3):
        p.grad = torch.randn(4099, dtype=dtype, generator=draw)
        optimizer.step()
        m.lerp_(p.grad, 1 - beta)
    return torch.equal(m, optimizer.state[p]["exp_avg"])


def random_bits(
    *, seed: int, step: int, name: str, start: int, entries: int, device: torch.device | str = "cpu"
) -> Tensor:
    """32 random bits for each of the entries start, start+1, … of the tensor `name`: (entries,), int32.

    The index of the entry, xor a hash of everything else, goes through a 32-bit finaliser (Wellons' lowbias32). It uses
    integers and products modulo 2³² only, so it is the same on every device.
    """
    bits = torch.empty(entries, dtype=torch.int32, device=device)
    shifted = torch.empty_like(bits)
    done = 0
    while done < entries:
        block, low = divmod(start + done, BLOCK)
        some = min(entries - done, BLOCK - low)
        key = blake2b(f"{seed}/{step}/{block}/{name}".encode(), digest_size=4).digest()
        x, spare = bits[done : done + some], shifted[done : done + some]
        torch.arange(low, low + some, out=x)
        x.bitwise_xor_(int.from_bytes(key, "little", signed=True))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, None)):
            # the mask makes the arithmetic shift an unsigned one
            torch.bitwise_right_shift(x, shift, out=spare).bitwise_and_((1 << (32 - shift)) - 1)
            x.bitwise_xor_(spare)
            if factor is not None:
                x.mul_(factor)
        done += some
    return bits


def round_stochastically(value: Tensor, bits: Tensor, *, out: Tensor) -> None:
    """Round float32 `value` (overwritten) to bfloat16 `out`: up in magnitude with the probability that keeps the mean.

    bits    uniform int32 in [0, 2¹⁶): 16 bits, as many as bfloat16 drops

    Values that bfloat16 can represent stay as they are, and so do zeros, infinities and NaN.
    """
    unknown = value.isnan()
    out.view(torch.int16).copy_(value.view(torch.int32).add_(bits).bitwise_right_shift_(16))
    out.masked_fill_(unknown, torch.nan)  # a carry may have turned the bits of a NaN into another value
