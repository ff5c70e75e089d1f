"""The random generators that a run may draw from, so that a resumed run draws what it would have drawn."""

import random

import numpy as np
import torch


def random_state(device: torch.device | str) -> dict:
    """The state of the global generators of torch, numpy and Python, and of `device`."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if torch.device(device).type == "cuda" else {})


def set_random_state(state: dict, device: torch.device | str) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
