"""Checkpoints: everything that decides how a run goes on, written whole or not at all, read without pickle."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import InputError, first_line
from data.files import written_whole
from vqa.verified import load_tensors


@dataclass
class Progress:
    """Where a run is."""

    epoch: int = 1  # being trained, from 1
    step: int = 0  # steps done in this epoch
    left_out: int = 0  # of them, because something was not finite
    loss_sum: float = 0.0  # of the others, in this process
    seconds: float = 0.0  # they took
    best_overall: float | None = None  # percent, on the validation split
    best_epoch: int = 0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Sets what `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:  # not where the run was on a CPU before
        torch.cuda.set_rng_state(states["cuda"], device)


def save_checkpoint(
    file: Path,
    *,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
    processes: list[dict[str, Any]],
    data: str,
) -> None:
    """Writes a checkpoint; `processes` holds each process's random state and loss sum, in order of rank, and `data` the
    identity of the h5 file.

    Raises:
        InputError: the disk is full, or fails; the checkpoint before this one is kept.
    """
    saved = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
        "progress": asdict(progress),
        "processes": processes,
        "data": data,
    }
    with written_whole(file) as aside, aside.open("wb") as opened:
        try:
            torch.save(saved, opened)
        except RuntimeError as error:  # torch's own, on the way out from one of the disk's
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Raises:
        InputError: it is not one, or it is damaged: not one flipped byte is trained on.
    """
    try:
        return load_tensors(file)
    except Exception as error:  # torch raises errors of several kinds on a damaged file
        raise InputError(f"{file}: cannot be read as a checkpoint ({first_line(error):.100})") from None
