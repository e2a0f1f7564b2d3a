"""The directory of one training run: what is in it, and when it may be written to."""

import hashlib
import json
import math
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.machine import surroundings
from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors, read_json, read_text, write_json, write_text
from vqa.io.locks import lock_beside
from vqa.saved_model.files import WEIGHTS
from vqa.settings.recipes import load_saved
from vqa.settings.schema import Role, Settings, different_keys, flat

# may change when a run is resumed; the checkpoint records which data it needs
_RESUMABLE = (Role.COMPUTING, Role.SPEED, Role.DATA, Role.SKIPPING)


class RunDirectory:
    """`runs/NAME`: config.yaml, environment.json, metrics.jsonl, checkpoints/, model/, tensorboard/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = lock_beside(path)  # outside of it: a run that is refused makes no directory
        self.checkpoint = path / "checkpoints" / "last.pt"
        self.model = path / "model"
        self.tensorboard = path / "tensorboard"

    def check(self, settings: Settings, resume: bool, init_from: Path | None = None) -> None:
        """Refuses to overwrite a run, or to resume one with other settings; only more epochs or patience are allowed.

        Raises:
            InputError: the directory holds a run, and `resume` is false, its settings are others or its checkpoint is
                gone; or a run without a checkpoint is resumed that began with another model's weights, and `init_from`
                is None; or it holds a model that was copied or recalibrated.
        """
        metrics = self.path / "metrics.jsonl"
        if not self.checkpoint.exists() and not metrics.exists():  # a run that ended so early does not block its name
            began = (self.path / "config.yaml").exists()
            if (self.path / WEIGHTS).exists() or ((self.model / WEIGHTS).exists() and not began):
                raise InputError(f"{self.path}: holds a model that was not trained here; choose another `name`")
            file = self.path / "environment.json"
            begun = read_json(file) if resume and init_from is None and file.exists() else {}
            if isinstance(begun, dict) and begun.get("init_from"):
                raise InputError(f"{self.path}: has no checkpoint yet; start it again with its --init-from")
            return
        if not resume:
            raise InputError(f"{self.path}: already holds a run; resume it with --resume, or choose another `name`")
        # after one epoch there may be none yet
        if not self.checkpoint.exists() and len(read_text(metrics).splitlines()) > 1:
            raise InputError(
                f"{self.checkpoint}: missing, so that the run cannot be resumed; choose another `name`, or move it away"
            )
        config = self.path / "config.yaml"
        begun, asked = load_saved(config), settings.train
        for key in different_keys(settings, begun, _RESUMABLE):
            patience = asked.patience or math.inf
            longer = key == "train.epochs" and asked.epochs > begun.train.epochs
            if longer and begun.train.schedule != "constant":
                raise InputError(
                    f"{config}: train.epochs cannot grow from {begun.train.epochs} to {asked.epochs}: "
                    f"{begun.train.schedule} lowers the learning rate over the epochs it began with, constant does "
                    "not; choose another `name`"
                )
            if not longer and not (key == "train.patience" and patience > (begun.train.patience or math.inf)):
                was, now = (reprlib.repr(flat(one).get(key)) for one in (begun, settings))
                raise InputError(f"{config}: this run was started with {key} {was}, not {now}; choose another `name`")

    def start(
        self,
        settings: Settings,
        device: torch.device,
        world_size: int,
        trained_parameters: int,
        init_from: Sequence[Path] = (),
        data: str | None = None,
    ) -> None:
        """Writes config.yaml and environment.json; `init_from` are the files of weights that it starts from, `data` is
        the identity of what it learns from. Raises InputError if environment.json is another program's.
        """
        settings.save(self.path / "config.yaml")
        file = self.path / "environment.json"
        environment = {
            **surroundings(device),
            "processes": world_size,
            "seed": settings.seed,
            "backbone": _digest_of([Path(settings.backbone.weights)]),
            "init_from": _digest_of(init_from),
            "data": data,
            "trained_parameters": trained_parameters,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        }
        if file.exists() and self.checkpoint.exists():  # a resumed run keeps the environment that it was started in
            begun = read_json(file)
            if not isinstance(begun, dict) or not isinstance(begun.setdefault("resumed", []), list):
                raise InputError(f"{file}: not written by a run; remove it")
            environment = begun | {"resumed": [*begun["resumed"], environment]}
        write_json(file, environment)

    def write_metrics(self, history: Sequence[dict[str, Any]]) -> None:
        """Writes metrics.jsonl, one line per epoch."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))

    def write_tensorboard(self, line: dict[str, Any]) -> None:
        """Adds an epoch's line to `tensorboard/`."""
        from torch.utils.tensorboard import SummaryWriter

        # opened for each epoch, so that a killed run leaves complete files; an epoch that is trained again counts once
        with (
            naming_write_errors(self.tensorboard),
            SummaryWriter(self.tensorboard, purge_step=line["epoch"]) as writer,
        ):
            for key in ("train_loss", "val_overall", "learning_rate"):
                if line[key] is not None:
                    writer.add_scalar(key, line[key], line["epoch"])
            for kind, value in line.get("val_per_answer_type", {}).items():
                writer.add_scalar(f"val/{kind}", value, line["epoch"])


def _digest_of(files: Sequence[Path]) -> str | None:
    """The first 12 digits of the SHA-256 of the files, one after the other; None if there is no such file."""
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            return None
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()[:12] if files else None
