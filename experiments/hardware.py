"""The machine a number was measured on: device, compute dtype, peak memory."""

import os
import platform
import resource
import sys
from pathlib import Path

import psutil
import torch

from experiments.errors import UserError


def device(setting: str) -> torch.device:
    """`auto` is the CUDA device where there is one, else the CPU."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device here: set `device: auto` or `cpu` in params.yaml")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def has_bf16(where: torch.device) -> bool:
    """Whether matrix products in bf16 run in hardware there; emulated ones are slower than float32."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(checkpoint: torch.dtype, where: torch.device) -> torch.dtype:
    """The dtype forward and backward run in: the checkpoint's, but bf16 for fp16 (whose gradients underflow)
    and float32 where there are no bf16 instructions."""
    if checkpoint in (torch.float32, torch.float64):
        return checkpoint
    return torch.bfloat16 if has_bf16(where) else torch.float32


def reset_peak(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def peak_memory_bytes(where: torch.device) -> int:
    """Largest CUDA allocation since `reset_peak`; on CPU the process's largest resident set so far."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(where: torch.device) -> dict:
    """What a reader needs to judge a time: processor, cores, memory, GPU."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
