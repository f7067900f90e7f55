"""What a measurement was made on."""

import os
import platform
from pathlib import Path

import torch


def machine(device: str) -> str:
    """The GPU, or the number and the name of the processors."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} x {_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
