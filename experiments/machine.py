"""The machine and the versions that measured numbers depend on, and the memory of this process."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "h5py", "numpy", "pillow")


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions, commit and machine, on which measured numbers depend."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": next(iter(_values_in(Path("/proc/cpuinfo"), "model name")), platform.processor()),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_mib(device: torch.device) -> float:
    """The peak of this process's memory so far, in MiB: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # on Linux getrusage starts with the peak of the process that started this one
    if peaks := _values_in(Path("/proc/self/status"), "VmHWM"):
        return int(peaks[0].split()[0]) / 2**10
    import resource  # not on Windows, where other imports say so in one line

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB


def _values_in(file: Path, key: str) -> list[str]:
    """The values of a key in a file of Linux's /proc."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _git_commit() -> str | None:
    """The commit of this code, marked if files were changed since; of a copy without its history, GIT_COMMIT."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        asked = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return asked.stdout.strip() or None
