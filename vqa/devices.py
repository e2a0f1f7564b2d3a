"""Devices and precision."""

from contextlib import AbstractContextManager

import torch

from vqa.io.errors import InputError


def choose_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device of a `device` setting; `auto` and `cuda` take this process's GPU (`auto` only if there is one).

    Args:
        name: auto, cpu, cuda, cuda:N or mps.
        local_rank: this process's number on its host.
        world_size: number of processes of the run.

    Raises:
        InputError: the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and world_size > 1:
        raise InputError(f"device: {name} cannot serve {world_size} processes; device=cuda gives each its own")
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        known = False
    if not known:
        raise InputError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name} is not available ({torch.cuda.device_count()} GPUs found); use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device: mps is not available; use cpu")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 autocast on a device, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
