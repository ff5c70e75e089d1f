"""The state of every random generator a run may draw from, so that a run that goes on draws what it would have drawn."""

import random
import sys

import torch
from torch import Tensor


def random_state(device: torch.device | str) -> dict:
    """The state of every generator a run may draw from, as JSON: torch's, that of `device`, Python's, numpy's."""
    device = torch.device(device)
    version, words, gauss = random.getstate()
    state = {"torch": _hex(torch.get_rng_state()), "python": [version, list(words), gauss]}
    if device.type == "cuda":
        state["cuda"] = _hex(torch.cuda.get_rng_state(device))
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def set_random_state(state: dict, device: torch.device | str) -> None:
    """Set what `random_state` gave on the same kind of device."""
    device = torch.device(device)
    torch.set_rng_state(_from_hex(state["torch"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(_from_hex(state["cuda"]), device)
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
