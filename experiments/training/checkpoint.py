"""Checkpoints: everything that a run resumes from, written whole or not at all, read without pickle."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.process_group import Processes
from vqa.io.errors import InputError, first_line
from vqa.io.files import written_whole
from vqa.io.weight_files import load_tensors
from vqa.settings.schema import TrainSettings


@dataclass
class Progress:
    """The progress of a run."""

    epoch: int = 1  # being trained, from 1
    step: int = 0  # steps done in this epoch
    skipped: int = 0  # of them, because something was not finite
    loss_sum: float = 0.0  # of the others, in this process
    seconds: float = 0.0  # they took
    best_overall: float | None = None  # percent, on the validation split
    best_epoch: int = 0
    trained_before: list[str] = field(default_factory=list)  # splits that the model of --init-from was trained on
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl

    def is_finished(self, train: TrainSettings) -> bool:
        """Whether all epochs are trained, or the last `patience` epochs (if not 0) brought no better model."""
        trained = len(self.history)
        return trained >= train.epochs or 0 < train.patience <= trained - self.best_epoch

    def end_epoch(self, line: dict[str, Any]) -> bool:
        """Moves to the next epoch; returns whether the model is the best so far (without validation it always is)."""
        overall = line["val_overall"]
        best = overall is None or self.best_overall is None or overall > self.best_overall
        if best:
            self.best_overall, self.best_epoch = overall, self.epoch
        self.history.append(line)
        self.epoch, self.step, self.skipped, self.loss_sum, self.seconds = self.epoch + 1, 0, 0, 0.0, 0.0
        return best


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Reads a checkpoint. Raises InputError if it is not a checkpoint, or damaged: a flipped byte is detected."""
    with read_as_checkpoint(file):
        return load_tensors(file)


@contextmanager
def read_as_checkpoint(file: Path) -> Iterator[None]:
    """Turns any error of the block, which uses the content of `file`, into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch raises errors of several kinds on a damaged file, and on other content
        why = f"{'no ' if isinstance(error, KeyError) else ''}{first_line(error):.100}"
        raise InputError(f"{file}: cannot be read as a checkpoint ({why})") from None


def save_checkpoint(file: Path, saved: dict[str, Any]) -> None:
    """Writes what `load_checkpoint` reads, whole or not at all.

    Raises:
        InputError: the disk is full, or fails; the previous checkpoint is kept.
    """
    with written_whole(file) as aside, aside.open("wb") as opened:
        try:
            torch.save(saved, opened)
        except RuntimeError as error:  # torch's own, raised while it handles one of the disk's
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


@dataclass
class TrainingState:
    """Everything that a run resumes from, in one process."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    progress: Progress = field(default_factory=Progress)

    def save(self, file: Path, processes: Processes, data: str) -> None:
        """Writes a checkpoint of all processes as `save_checkpoint`; `data` is the identity of the data."""
        random = {"cpu": torch.get_rng_state()}  # what dropout draws from
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        everyone = processes.gather({"random": random, "loss_sum": self.progress.loss_sum})
        if not processes.is_main:
            return
        saved = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress),
            "processes": everyone,
            "data": data,
        }
        save_checkpoint(file, saved)

    def restore(self, saved: dict[str, Any], rank: int) -> None:
        """Restores what `save` wrote and `load_checkpoint` read, with `progress` as Progress. Raises KeyError,
        RuntimeError or ValueError where a part is missing or does not fit; see `read_as_checkpoint`.
        """
        mine = saved["processes"][rank]
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        for parameter, moments in self.optimiser.state.items():
            for name, value in moments.items():
                # a fused step needs them in the parameter's layout; `speed.channels_last` may have been another
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.schedule.load_state_dict(saved["schedule"])
        self.progress = progress = replace(saved["progress"], loss_sum=mine["loss_sum"])
        taken = sum(line["steps"] - line["steps_left_out"] for line in progress.history)
        if (counted := self.schedule.last_epoch) != taken + progress.step - progress.skipped:
            raise ValueError(f"its schedule counts {counted} steps, its epochs others")
        torch.set_rng_state(mine["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in mine["random"]:  # not where the run was on a CPU before
            torch.cuda.set_rng_state(mine["random"]["cuda"], self.device)
