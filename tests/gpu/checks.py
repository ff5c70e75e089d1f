"""Does the device compute what the CPU, float64 or the plain way computes? Every check by name. Random weights, no
data.
"""

import functools
from collections.abc import Callable

import torch

from methods.tools.process_group import Shards
from tests.gpu import fits, kernels, models
from tests.gpu.verdict import Wrong

__all__ = ["Wrong", "checks"]

Check = Callable[..., dict]


def checks(*, tiny: bool, shards: Shards) -> dict[str, Check]:
    """Every check by name, a function of the device."""
    found: dict[str, Check] = {
        "attention-float32": lambda device: kernels.attention(device, tiny=tiny, dtype=torch.float32),
        "attention-bfloat16": lambda device: kernels.attention(device, tiny=tiny, dtype=torch.bfloat16),
        "cross-entropy": lambda device: kernels.cross_entropy(device, tiny=tiny),
        "random-bits": lambda device: kernels.random_bits(device, tiny=tiny),
        "mofo-threshold": lambda device: kernels.mofo_threshold(device, tiny=tiny),
        "importance-8-bit": lambda device: kernels.importance_in_8_bits(device, tiny=tiny),
        "zero-strength": lambda device: fits.zero_strength(device, tiny=tiny),
        "zero-strength-lora": lambda device: fits.zero_strength(device, tiny=tiny, lora=True),
        "sharded-float32": lambda device: fits.sharded(device, tiny=tiny, dtype=torch.float32, shards=shards),
        "sharded-bfloat16": lambda device: fits.sharded(device, tiny=tiny, dtype=torch.bfloat16, shards=shards),
        "no-waiting-plain": lambda device: fits.no_waiting(device, tiny=tiny, shards=Shards()),
        "no-waiting-sharded": lambda device: fits.no_waiting(device, tiny=tiny, shards=shards),
    }
    for method in ("full", "mofo", "ewc"):
        found[f"resume-{method}"] = functools.partial(fits.resumed, tiny=tiny, method=method)
    for kind in models.MEDIUM:
        for name in kernels.ATTENTIONS:
            found[f"packed-{kind}-{name}"] = functools.partial(kernels.packed, tiny=tiny, kind=kind, name=name)
    for method in ("full", "mofo", "ewc"):
        for layout, among in (("plain", Shards()), ("sharded", shards)):
            found[f"memory-{method}-{layout}"] = functools.partial(fits.memory_predicted, method=method, shards=among)
    return found
