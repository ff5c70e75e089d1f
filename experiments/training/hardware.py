"""The machine that a number is measured on: device, compute dtype, peak rate, memory."""

import functools
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch

from methods.errors import UserError

# Words of a device's name, and the dense matrix TFLOP/s of its data sheet, without sparsity: bf16 and fp16 with float32
# accumulation, and float32 without TF32. The first line whose words are all in the name applies.
_DATA_SHEET = (
    ({"B200"}, 2250.0, 75.0),
    ({"H200", "NVL"}, 835.0, 60.0),
    ({"H200"}, 989.0, 67.0),
    ({"GH200"}, 989.0, 67.0),
    ({"H100", "NVL"}, 835.0, 60.0),
    ({"H100", "PCIe"}, 756.0, 51.0),
    ({"H100"}, 989.0, 67.0),
    ({"A100"}, 312.0, 19.5),
    ({"A30"}, 165.0, 10.3),
    ({"A40"}, 149.7, 37.4),
    ({"A10"}, 125.0, 31.2),
    ({"L40S"}, 362.0, 91.6),
    ({"L40"}, 181.0, 90.5),
    ({"L4"}, 121.0, 30.3),
    ({"RTX", "4090"}, 165.2, 82.6),
    ({"RTX", "3090"}, 71.2, 35.6),
    ({"RTX", "A6000"}, 154.8, 38.7),
    ({"V100", "PCIE"}, 112.0, 14.0),
    ({"V100"}, 125.0, 15.7),
    ({"T4"}, 65.0, 8.1),
)
_CUT_DOWN = {"MIG", "Laptop", "Ti", "D", "Max-Q"}  # names of slices and smaller variants of a device


def device(setting: str) -> torch.device:
    """The device for a setting: `auto` is the CUDA device where there is one, else the CPU."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device: set `device: auto` or `cpu` in params.yaml")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def has_bf16(where: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bf16; emulated ones are slower than float32."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(checkpoint: torch.dtype, where: torch.device) -> torch.dtype:
    """The dtype of forward and backward passes for a checkpoint's dtype.

    It is the same, but bf16 for fp16, whose gradients underflow, and float32 where there are no bf16 instructions.
    """
    if checkpoint in (torch.float32, torch.float64):
        return checkpoint
    return torch.bfloat16 if has_bf16(where) else torch.float32


def reset_peak(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def peak_memory_bytes(where: torch.device) -> int:
    """The largest CUDA allocation since `reset_peak`; on the CPU the largest resident set of the process so far."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(where: torch.device) -> int | None:
    """Bytes that a run can still take: free CUDA memory, or available main memory; None where that is unknown."""
    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[0]
    memory = _memory()
    return memory and memory.available


@functools.cache
def dense_peak(where: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """FLOP/s of dense matrix products in `dtype`, and its basis: "data sheet" or "matrix product measured here".

    It is measured, once in a process, where no data sheet is known for the device and dtype, as for every CPU.
    """
    stated = data_sheet_peak(torch.cuda.get_device_name(where), dtype) if where.type == "cuda" else None
    if stated is not None:
        return stated, "data sheet"
    return _measured_peak(where, dtype), "matrix product measured here"


def data_sheet_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense products in the data sheet of a CUDA device, by its name; None where no data sheet is known."""
    words = set(re.split(r"[ _]+|-(?!Q)", name))
    half = dtype in (torch.bfloat16, torch.float16)
    if words & _CUT_DOWN or not (half or dtype == torch.float32):
        return None
    for known, in_half, in_float32 in _DATA_SHEET:
        if known <= words:
            return 1e12 * (in_half if half else in_float32)
    return None


def _measured_peak(where: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some short matrix products."""
    size = 8192 if where.type == "cuda" else 1024
    # its own generator, because a run's random numbers must not depend on whether this was measured before
    a = torch.randn(size, size, device=where, dtype=dtype, generator=torch.Generator(where).manual_seed(0))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def describe(where: torch.device) -> dict:
    """Processor, cores, memory and GPU, without which a reader cannot judge a time."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": (memory := _memory()) and memory.total,
        "gpu": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
    }


def _memory():
    """psutil's figures of the machine's memory; None where it is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (name := re.search(r"^model name\s*:\s*(.+?)\s*$", info.read_text(), re.MULTILINE)):
        return name[1]
    return platform.processor() or platform.machine()


def mfu(flops: float | None, seconds: float, peak: float | None) -> float | None:
    """The share of `peak` (FLOP/s) that `flops` in `seconds` reach; None where it cannot be computed."""
    return flops / seconds / peak if flops is not None and peak and seconds else None
