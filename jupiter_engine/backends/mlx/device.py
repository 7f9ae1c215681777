"""What the device under MLX has and takes: memory used and allowed, arithmetic speed, the allocator's cache."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import mlx.core as mx

_CACHE_SHARE = 8
"""One part in so many of the GPU's working set may lie in MLX's cache of freed buffers."""


def on_metal() -> bool:
    """Do computations run on an Apple GPU (and not on the CPU)?"""
    return bool(mx.metal.is_available()) and mx.default_device() == mx.Device(mx.gpu)


def memory_budget() -> int | None:
    """Bytes that the GPU may use before macOS takes memory back from it; None on a CPU, whose limit is the machine's.

    Apple's `recommendedMaxWorkingSetSize`: about two thirds to three quarters of the machine's memory.
    """
    if not on_metal():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def prepare() -> None:
    """Bound MLX's cache of freed buffers on Metal; elsewhere nothing is to be done.

    Left alone the cache grows up to MLX's memory limit, which on a 16 GB Mac
    leaves nothing for the system. A step frees and asks for the same sizes
    again and again, so an eighth of the working set keeps nearly all hits.
    `mx.set_wired_limit` is never called: wiring most of the memory has brought
    kernel panics of macOS (IOGPUMemory.cpp "completeMemory() prepare count underflow").
    """
    budget = memory_budget()
    if budget is not None:
        mx.set_cache_limit(budget // _CACHE_SHARE)


def peak_bytes() -> int:
    """The most memory used so far: MLX's own count on Metal, the process's resident set on a CPU."""
    if on_metal():
        return int(mx.get_peak_memory())
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux hands the parent's peak on to a child through exec, and VmHWM starts anew.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak_flops() -> float | None:
    """None: Apple publishes no peak of its GPUs, and a CPU's depends on clocks nobody can read off.

    What a machine really does in a matrix product is `measured_gemm_flops`.
    """
    return None


def measured_gemm_flops(seconds: float = 0.2, *, dtype: mx.Dtype = mx.float32, size: int | None = None) -> float:
    """Floating-point operations per second of square matrix products, measured for about `seconds`.

    A yardstick for utilisation where no peak is known: it says what share of
    the best this library does here a training step reaches. `size` is the
    matrices' edge: 2048 on a GPU, 512 on a CPU, where 2048 may outlast `seconds`.
    """
    edge = size or (2048 if on_metal() else 512)
    a = mx.random.normal((edge, edge)).astype(dtype)
    b = mx.random.normal((edge, edge)).astype(dtype)
    mx.eval(a, b, a @ b)  # the first product loads kernels
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - began)
    return 2.0 * edge**3 / best
