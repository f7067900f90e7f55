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


def commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the checkout that this package lies in, with a + behind it if files were changed.

    None of an installed package, whatever repository its folder may lie in, and where git does not know.
    """
    file = file.resolve()
    checkout = file.parents[2]
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        # Not of a repository that the package was installed into, as by `pip install --target`.
        _printed(*git, "ls-files", "--error-unmatch", str(file))
        return _printed(*git, "describe", "--always", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_memory_in_use() -> int | None:
    """Bytes in use on the first visible GPU, by whomever; None where `nvidia-smi` is missing or does not tell, as of a
    part of a GPU. It is asked, since torch would open a context of its own there, which takes memory itself and keeps
    others out of a GPU in exclusive mode. It counts by PCI bus, so must CUDA_DEVICE_ORDER where GPUs differ."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", device]
    try:
        return int(_printed(*query)) * 2**20
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cores() -> int:
    """Fewer than there are under `taskset` or with PYTHON_CPU_COUNT."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed, os.cpu_count())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
