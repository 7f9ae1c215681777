"""What the device of a rank can do and what the process has used of it."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path

import torch

from jupiter_engine.errors import UsageError

# (part of the name that the driver gives, dense bfloat16 peak, float32 peak outside tensor cores), in FLOP/s.
# The first match counts, so longer names stand before shorter ones. bfloat16 is with float32 accumulation and
# without sparsity. From NVIDIA's data sheets and architecture papers: GA102 (3090), Ada (4090, L40S), Blackwell
# RTX (5090), A100, H100 (PCIe, NVL, SXM), H200.
_PEAKS = (
    ("RTX 5090", 209.5e12, 104.8e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090 Ti", 80.0e12, 40.0e12),
    ("RTX 3090", 71.0e12, 35.6e12),
    ("A100", 312.0e12, 19.5e12),
    ("H100 PCIe", 756.0e12, 51.2e12),
    ("H100 NVL", 835.5e12, 60.0e12),
    ("H100", 989.4e12, 66.9e12),
    ("H200", 989.4e12, 66.9e12),
    ("L40S", 362.0e12, 91.6e12),
)


def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s of the GPU that the driver calls `name`, for products in `dtype`; None: not known.

    Laptop GPUs share the desktop names but not their speed: they count as unknown.
    """
    if "laptop" in name.lower():
        return None
    for part, bfloat16, float32 in _PEAKS:
        if part in name:
            return bfloat16 if dtype == torch.bfloat16 else float32
    return None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense peak for products in `dtype`; None on a CPU and on GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device), dtype)


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: allocated on the GPU by this process, or on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a process inherits that one from the process that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def compiler_found() -> bool:
    """Is there the C++ compiler that torch.compile needs on a CPU? (On a GPU it needs a C compiler, for Triton.)"""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def compile_wanted(wish: str, device: torch.device, expected_seconds: float, pays_after: float = 180.0) -> bool:
    """Whether to use torch.compile: `on`, `off`, or `auto` - a compiler is there and the run is long enough.

    Raises UsageError for `on` where the compiler is missing.
    """
    if wish == "off":
        return False
    if not compiler_found():
        if wish == "on":
            raise UsageError(
                "torch.compile needs a C++ compiler, and none is found", fix="install g++, or set compile: auto"
            )
        return False
    return wish == "on" or device.type == "cuda" or expected_seconds > pays_after
