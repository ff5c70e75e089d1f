"""An optimizer's state as named tensors, carried from one training phase into the next."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.errors import UserError
from methods.part import Run
from methods.tools.adam import Moments


def carried(run: Run, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors in the optimizer's state, whole, by "<trained tensor>::<entry>" (Adam: step, exp_avg, exp_avg_sq)."""
    return {
        f"{name}::{entry}": (run.shards.whole(value, run.shapes[name]) if value.shape == weight.shape else value)
        .detach()
        .cpu()
        .clone()
        for name, weight in run.weights.items()
        for entry, value in optimizer.state.get(weight, {}).items()
        if isinstance(value, Tensor)
    }


def restore_state(run: Run, optimizer: torch.optim.Optimizer, carry: dict[str, Tensor]) -> None:
    """Put carried tensors into an optimizer over the same trained tensors.

    Raises UserError unless it is a kind of Adam: another optimizer would read these entries as its own.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and not isinstance(
        getattr(optimizer, "_moments", None), Moments
    ):
        raise UserError(
            f"{type(optimizer).__name__} cannot begin with Adam's state of the general phase: "
            "set carry_optimizer: false, or combine with another optimizer"
        )
    for name, weight in run.weights.items():
        entries = {key.partition("::")[2]: value for key, value in carry.items() if key.partition("::")[0] == name}
        if entries:
            optimizer.state[weight] = {
                entry: (run.shards.local(value) if value.shape == run.shapes[name] else value).to(
                    weight.device, copy=True
                )
                for entry, value in entries.items()
            }
