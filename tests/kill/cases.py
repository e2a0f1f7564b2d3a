"""The commands that `tests.kill.harness` kills, on tiny data, and how their output is read and compared."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from data.h5_rows import H5Rows
from data.preprocess import preprocess
from data.scenes.write import write_world
from experiments import ROOT
from experiments.prepare import preprocessing_of
from experiments.training.checkpoint import load_checkpoint
from experiments.training.train import train
from tests.fabricated_games import RECIPE as ORACLE
from tests.fabricated_games import write_games
from vqa.io.weight_files import read_safetensors
from vqa.settings.recipes import load_settings

RECIPE = """\
base: {demo}
name: tiny
device: cpu
data: {{folder: {folder}/world, h5: {h5}, processes: 2}}
backbone: {{weights: none}}
cbn: {{hidden_size: 8}}
question: {{embedding_size: 8, hidden_size: 16}}
attention: {{units: 8}}
answer: {{fusion_size: 16, hidden_size: 8, dropout: 0.3}}
train: {{epochs: 3, batch_size: 8, checkpoint_every: 3}}
scenes: {{images: {{train: {images}, val: 12}}, pretrain_images: 64, pretrain_epochs: 1}}
"""
SUITE = """\
title: Two runs
recipe: {folder}/tiny.yaml
seeds: [1]
baseline: none
runs:
  none: {{settings: "cbn.stages=[]"}}
  all: {{}}
"""
_VARYING = {"seconds", "peak_memory_mib"}  # of a line of metrics.jsonl or a report


@dataclass(frozen=True)
class Case:
    """A command, run in its own folder."""

    name: str
    prepare: Callable[[Path], None]  # makes the command's input in the parent folder
    words: Callable[[Path], list[str]]  # the command, given the parent folder
    lock: str  # pattern of the lock file that it holds while it works
    given: str | None = None  # a file or folder of the parent folder that is copied before it begins

    def begin(self, work: Path) -> None:
        """Empty the folder and copy into it what is given."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if self.given is not None:
            source = work.parent / self.given
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, work / self.given)


def _world(folder: Path, images: int, h5: str = "world.h5") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE.format(demo=ROOT / "config" / "demo.yaml", folder=folder, h5=h5, images=images)
    (folder / "tiny.yaml").write_text(recipe)
    (folder / "two.yaml").write_text(SUITE.format(folder=folder))
    scenes = load_settings(folder / "tiny.yaml").scenes
    write_world(folder / "world", seed=scenes.seed, images=scenes.images, processes=1)


def _world_and_h5(folder: Path, images: int) -> None:
    _world(folder, images)
    settings = load_settings(folder / "tiny.yaml", [f"data.h5={folder}/world.h5", "data.processes=1"])
    preprocess(**preprocessing_of(settings))


def _world_and_run(folder: Path) -> None:
    _world_and_h5(folder, 24)
    train(load_settings(folder / "tiny.yaml", [f"data.h5={folder}/world.h5", "train.epochs=1"]), runs=folder / "runs")


def _games_and_h5(folder: Path) -> None:
    games = write_games(folder / "games")
    (folder / "oracle.yaml").write_text(ORACLE.format(root=ROOT, games=games, folder=folder))
    preprocess(**preprocessing_of(load_settings(folder / "oracle.yaml")))


CASES = {
    case.name: case
    for case in (
        Case(
            "preprocess",
            lambda folder: _world(folder, 400),
            lambda folder: ["preprocess", "--config", f"{folder}/tiny.yaml"],
            ".world.h5.lock",
        ),
        Case(
            "maps",
            lambda folder: _world_and_h5(folder, 150),
            lambda folder: ["train", "--resume", "--config", f"{folder}/tiny.yaml", "cbn.stages=[]", "train.epochs=1"],
            ".world_stage4_*.lock",
            given="world.h5",
        ),
        Case(
            "train",
            lambda folder: _world_and_h5(folder, 24),
            lambda folder: ["train", "--resume", "--config", f"{folder}/tiny.yaml", f"data.h5={folder}/world.h5"],
            "runs/.tiny.lock",
        ),
        Case(
            "oracle",
            _games_and_h5,
            lambda folder: [
                *("train", "--resume", "--config", f"{folder}/oracle.yaml", "answer.dropout=0.3"),
                *("train.epochs=3", "train.batch_size=8", "train.checkpoint_every=3"),
            ],
            "runs/.oracle.lock",
        ),
        Case("eval", _world_and_run, lambda _: ["eval", "--run", "runs/tiny"], "runs/tiny/.val.lock", given="runs"),
        Case(
            "experiment",
            lambda folder: _world(folder, 24),
            lambda folder: ["experiment", f"{folder}/two.yaml"],
            "runs/experiments/.two*.lock",
        ),
    )
}


def saved_work(work: Path) -> dict[str, tuple[int, ...]]:
    """The progress of saved work by file, which may only grow; reads every file.

    Raises:
        Exception: a file under its final name is not complete.
    """
    saved = {}
    for file in _files(work):
        name = str(file.relative_to(work)).removesuffix(".partial")
        if name.endswith(".h5"):
            saved[name] = (_filled_rows(file),)
        elif name.endswith("last.pt"):
            progress = load_checkpoint(file)["progress"]
            saved[name] = (progress["epoch"], progress["step"])
        elif name.endswith("metrics_val.json"):  # from then on nothing of this run may be made again
            trained = file.parent / "model" / "model.safetensors"
            saved[name] = (-trained.stat().st_mtime_ns,) if trained.exists() else (0,)
        _read(file)
    return saved


def content_of(work: Path) -> dict[str, Any]:
    """The content of a finished command's output by file, to be compared."""
    return {str(file.relative_to(work)): _read(file) for file in _files(work)}


def _files(work: Path) -> Iterator[Path]:
    """The files of the output, without temporary files, logs and what differs from run to run."""
    for file in sorted(work.rglob("*")):
        if file.is_file() and not file.name.startswith(".") and file.name not in ("log.txt", "environment.json"):
            yield file


def _read(file: Path) -> Any:
    """The content of a file, as a value to compare."""
    match file.suffix:
        case ".json":
            found = json.loads(file.read_text())
        case ".jsonl":
            found = [_without_times(json.loads(line)) for line in file.read_text().splitlines()]
        case ".safetensors":
            weights, said = read_safetensors(file)
            found = said, _digest(weights)
        case ".pt":
            saved = load_checkpoint(file)
            progress = saved.pop("progress")
            lines = [_without_times(line) for line in progress.pop("history")]
            found = _without_times(progress), lines, _digest(saved)
        case ".csv":
            with file.open(newline="") as opened:
                found = [_without_times(row) for row in csv.DictReader(opened)]
        case ".md":  # the values of the CSV beside it, times included
            found = len(file.read_text().splitlines())
        case ".h5":
            found = _content_of_h5(file)
        case ".npz":
            with np.load(file) as arrays:
                found = _digest({name: torch.from_numpy(array) for name, array in arrays.items()})
        case _:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in _VARYING}


def _digest(value: Any) -> str:
    """A digest of nested tensors and plain values, bit for bit."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in part:
                digest.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for one in part:
                add(one)
        elif isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
        else:
            digest.update(f"{part!r};".encode())

    add(value)
    return digest.hexdigest()


def _content_of_h5(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found[name] = {key: str(value) for key, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            value = np.asarray(item[()])
            plain = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
            found[name] = found[name], str(item.dtype), item.shape, hashlib.sha256(plain).hexdigest()

    with h5py.File(file, "r", locking=False) as opened:
        found["/"] = {key: str(value) for key, value in opened.attrs.items()}
        opened.visititems(visit)
    return found


def _filled_rows(file: Path) -> int:
    """The number of rows marked as filled; verifies their checksums."""
    with h5py.File(file, "r", locking=False) as opened:
        array = "maps" if "maps" in opened else "images/pixels"
        filled = np.flatnonzero(opened[array].parent["filled"][:])
    stored = H5Rows(file, array)
    for row in filled.tolist():
        stored[row]
    return len(filled)
