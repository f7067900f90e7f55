"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def machine(device: str) -> str:
    """The GPU, or the number and the name of the processors that this process may use."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{_cores()} x {_processor()}"


def commit() -> str | None:
    """The commit of this checkout, with a + behind it if files were changed; None where git does not know."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_memory_in_use() -> int | None:
    """Bytes in use on the first visible GPU, by whomever; None where `nvidia-smi` is missing or does not tell, as of a
    part of a GPU. It is asked, since torch would open a context of its own there, which takes memory itself and keeps
    others out of a GPU in exclusive mode. It counts by PCI bus, so must CUDA_DEVICE_ORDER where GPUs differ."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", device]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 2**20
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _cores() -> int:
    """Fewer than there are under `taskset` or with PYTHON_CPU_COUNT."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed, os.cpu_count())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
