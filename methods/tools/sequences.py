"""The sequences of a micro-batch, which is padded (a row each) or packed (one row, positions begin at 0 in each)."""

import torch
from torch import Tensor


def marked(batch: dict[str, Tensor], mark: str) -> dict[str, Tensor]:
    """The sequences with an entry of `mark` (a mask), without labels; where there are none, one token of any sequence.

    Every process can therefore read what is returned. Rows keep their padding, so that numbers computed from them are
    rounded as those of the whole micro-batch are.
    """
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", mark) if name in batch}
    mask, positions = batch[mark], batch.get("position_ids")
    if not mask.any():
        return {name: tensor[:1, :1] for name, tensor in given.items()}
    if positions is None:
        return {name: tensor[mask.any(1)] for name, tensor in given.items()}
    number = (positions == 0).cumsum(1)  # of each sequence of a packed row
    kept = torch.isin(number, number[mask])
    return {name: tensor[kept][None] for name, tensor in given.items()}
