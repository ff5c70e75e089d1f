"""Several processes as one run: which rows each holds, and collective operations over all of them.

Every tensor is cut along its first dimension as torch.chunk would cut it, which is how fully_shard lays out parameters.
A process holds one contiguous piece of each tensor, possibly an empty one. `Shards()` is a run of one process, where
every operation returns what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shards:
    """This process among `world`; `active` where torch's process group runs, also with a world of one."""

    rank: int = 0
    world: int = 1
    active: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """The rows of a tensor of `count` rows that this process holds."""
        size = -(-count // self.world)
        return slice(min(count, self.rank * size), min(count, (self.rank + 1) * size))

    def local(self, tensor: Tensor) -> Tensor:
        """This process's rows of a whole tensor; every process holds a 0-dim tensor."""
        return tensor if self.world == 1 or tensor.dim() == 0 else tensor[self.rows(len(tensor))]

    def whole(self, local: Tensor, shape: torch.Size) -> Tensor:
        """The whole tensor of `shape` from every process's rows of it; every process must call it."""
        if self.world == 1 or not shape:
            return local
        size = -(-shape[0] // self.world)
        padded = local.new_zeros((size, *shape[1:]))
        padded[: len(local)] = local
        pieces = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(pieces, padded)
        return torch.cat(pieces)[: shape[0]]

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every process has called it."""
        if self.world > 1:
            dist.barrier()

    def all_gather(self, value: Any) -> list:
        """Every process's `value`, in the order of the ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's `value`, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def in_turn(
    names: Iterable[str],
    make: Callable[[str], Mapping[str, Tensor]],
    *,
    desc: str,
    unit: str,
    progress: Callable[..., Any] | None = None,
    shards: Shards = Shards(),
) -> dict[str, Tensor]:
    """Copies, on the CPU, of the tensors that `make` returns for each name.

    Processes take the names in turn, and each is given what all have made; every process must call it.
    """
    own, names = {}, list(names)
    with progress(total=len(names), desc=desc, unit=unit) if progress else nullcontext() as bar:
        for index, name in enumerate(names):
            if index % shards.world == shards.rank:
                own |= {key: t.cpu().clone(memory_format=torch.contiguous_format) for key, t in make(name).items()}
            if bar is not None:
                bar.update()
    return {key: tensor for each in shards.all_gather(own) for key, tensor in each.items()}
