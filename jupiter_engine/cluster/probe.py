"""Live facts of a node; this machine's are read with psutil."""

from __future__ import annotations

import platform
import shutil
import socket
from pathlib import Path

import psutil

from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.protocol.specs import Twin


def choose_twin() -> Twin:
    """MLX on Apple silicon, torch everywhere else (MLX's Linux CPU wheel is many times slower there)."""
    return "mlx" if platform.system() == "Darwin" and platform.machine() == "arm64" else "torch"


def chip_name() -> str:
    """The processor's name as the system gives it, its architecture where it gives none."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def probe_local(workspace: Path) -> NodeFacts:
    """This machine now. The first call's cpu_percent is 0: it needs an earlier reading to compare with."""
    memory = psutil.virtual_memory()
    twin = choose_twin()
    accelerator = "Metal" if twin == "mlx" else ("CUDA" if shutil.which("nvidia-smi") else "cpu")
    return NodeFacts(
        name="this machine",
        host=socket.gethostname(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        chip=chip_name(),
        cores=psutil.cpu_count() or 1,
        cpu_percent=psutil.cpu_percent(None),
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.total - memory.available,
        disk_free_bytes=shutil.disk_usage(workspace).free,
        load_1m=psutil.getloadavg()[0],
        python=platform.python_version(),
        twin=twin,
        accelerator=accelerator,
    )
