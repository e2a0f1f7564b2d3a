"""The directory of one training run: what is in it, and when it may be written to."""

import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors, read_json, write_json, write_text
from vqa.settings.recipes import load_saved
from vqa.settings.schema import Role, Settings, TrainSettings, different_keys

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "safetensors", "h5py", "numpy", "pillow")
# What may change when a run is resumed: the checkpoint knows which data it needs.
_RESUMABLE = (Role.COMPUTING, Role.SPEED, Role.DATA, Role.SKIPPING)


class RunDirectory:
    """`runs/NAME`: config.yaml, environment.json, metrics.jsonl, checkpoints/, model/, tensorboard/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path.with_name(f".{path.name}.lock")  # beside it, since a run that is refused makes no directory
        self.checkpoint = path / "checkpoints" / "last.pt"
        self.model = path / "model"
        self.tensorboard = path / "tensorboard"

    def holds_training(self) -> bool:
        """Whether training left anything here; a run that ended before its first checkpoint does not block its name."""
        return self.checkpoint.exists() or (self.path / "metrics.jsonl").exists()

    def check(self, settings: Settings, resume: bool) -> None:
        """Refuses to overwrite a run, or to go on with one of other settings.

        Training may end later than the run was to end, where the schedule does not depend on it.

        Raises:
            InputError: training here would do so.
        """
        config = self.path / "config.yaml"
        if not self.holds_training():
            return
        if not resume:
            raise InputError(f"{self.path}: holds a run already; go on with it by --resume, or choose another `name`")
        theirs = load_saved(config)
        for key in different_keys(settings, theirs, _RESUMABLE):
            if not _lasts_longer(key, settings.train, theirs.train):
                raise InputError(
                    f"{config}: this run has another {key} than asked for; choose another `name` for the new settings"
                )
            if key == "train.epochs" and theirs.train.schedule == "one_cycle":
                raise InputError(
                    f"{config}: train.epochs cannot grow from {theirs.train.epochs} to {settings.train.epochs}: "
                    "one_cycle lowers the learning rate to 0 over the epochs it began with, constant does not; choose "
                    "another `name`"
                )

    def start(self, settings: Settings, device: torch.device, world_size: int, trained_parameters: int) -> None:
        """Writes what explains the run."""
        settings.save(self.path / "config.yaml")
        file = self.path / "environment.json"
        begun = read_json(file) if file.exists() and self.holds_training() else None
        if begun is not None and not (isinstance(begun, dict) and isinstance(begun.get("resumed", []), list)):
            raise InputError(f"{file}: not what a run wrote; remove it")
        environment = {
            **surroundings(device),
            "processes": world_size,
            "seed": settings.seed,
            "backbone": _digest_of(Path(settings.backbone.weights)),
            "trained_parameters": trained_parameters,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        }
        if begun is not None:  # resumed: who began it stays, who goes on is added
            resumed = begun.pop("resumed", [])
            environment = begun | {"resumed": [*resumed, environment]}
        write_json(file, environment)

    def write_metrics(self, history: Sequence[dict[str, Any]]) -> None:
        """Writes metrics.jsonl, a line an epoch."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))

    def write_tensorboard(self, line: dict[str, Any]) -> None:
        """Adds an epoch's line to `tensorboard/`."""
        from torch.utils.tensorboard import SummaryWriter

        # opened an epoch at a time, so that a killed run leaves whole files; an epoch that is trained again counts once
        with (
            naming_write_errors(self.tensorboard),
            SummaryWriter(self.tensorboard, purge_step=line["epoch"]) as writer,
        ):
            for key in ("train_loss", "val_overall", "learning_rate"):
                if line[key] is not None:
                    writer.add_scalar(key, line[key], line["epoch"])
            for kind, value in line.get("val_per_answer_type", {}).items():
                writer.add_scalar(f"val/{kind}", value, line["epoch"])


def _lasts_longer(key: str, asked: TrainSettings, begun: TrainSettings) -> bool:
    """Whether a key differs only in that training ends later."""
    if key == "train.patience":
        return (asked.patience or math.inf) > (begun.patience or math.inf)
    return key == "train.epochs" and asked.epochs > begun.epochs


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions, commit and machine: what measured numbers depend on."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that this process has held so far, in MiB: on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage begins with the peak of the process that started this one
        lines = status.read_text(encoding="utf-8").splitlines()
        if peaks := [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]:
            return peaks[0] / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB


def _digest_of(file: Path) -> str | None:
    """The beginning of a file's SHA-256 (a backbone pretrained anew is another one); None if there is no such file."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:12]


def _cpu() -> str:
    """The processor's kind, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    """The commit of this code, marked if files were changed since; GIT_COMMIT says it of a copy without its history."""
    if told := os.environ.get("GIT_COMMIT"):
        return told
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        asked = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return asked.stdout.strip() or None
