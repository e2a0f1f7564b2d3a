"""Measure shared images, cached feature maps, waiting for batches, loading and decoding.

All data are made here: scenes of the large world, and JPEGs like COCO's.
"""

import json
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import torch

from data.batches import Batch
from data.h5_rows import H5Rows
from data.preprocess import preprocess
from experiments import ROOT
from experiments.bench.decoding import decode_alone
from experiments.bench.step import interleaved
from experiments.bench.vqa_sized_data import write_coco_like
from experiments.prepare import prepare_world, preprocessing_of
from experiments.process_group import Processes
from experiments.training.run_data import VQATask
from experiments.training.run_directory import RunDirectory
from experiments.training.trainer import prepare, train
from vqa.io.images import decode_image
from vqa.norms import Modulation
from vqa.resnet import ModulatedResNet, StageMap
from vqa.settings.recipes import load_settings
from vqa.settings.schema import Settings

RECIPE = ROOT / "config" / "scenes_224.yaml"
QUESTIONS_AN_IMAGE = (1, 2, 4, 8)


def sharing_rows(network: str, size: int, questions: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Questions a second, training and answering, with stages 3 and 4 conditioned, as more questions are on the same
    image, with the stages before computed once an image or once a question.
    """
    torch.manual_seed(0)
    net = ModulatedResNet(network, stages=(3, 4)).to(device, memory_format=torch.channels_last)
    width = sum(layer.channels for layer in net.layers)
    deltas = [(0.1 * torch.randn(questions, width, device=device)).requires_grad_() for _ in "γβ"]
    rows = []
    for together in QUESTIONS_AN_IMAGE:
        images = torch.randn(questions // together, 3, size, size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        places = torch.arange(questions, device=device) // together

        def step(images: torch.Tensor, places: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            y = net(images, Modulation(*deltas), places)
            return y.detach(), *torch.autograd.grad(y, deltas, torch.ones_like(y))

        ways = {"shared": partial(step, images, places), "not shared": partial(step, images[places], None)}
        error = max(
            ((one - other).abs().max() / other.abs().max()).item()
            for one, other in zip(*(way() for way in ways.values()), strict=True)
        )
        row = {"network": network, "pixels": size, "batch": questions, "questions_an_image": together}
        row |= _shared_speed("training", questions, interleaved(ways, repeats, device))
        forward = partial(net, images, Modulation(*deltas), places), partial(net, images[places], Modulation(*deltas))
        with torch.inference_mode():
            seconds = interleaved(dict(zip(ways, forward, strict=True)), repeats, device)
        row |= _shared_speed("answering", questions, seconds)
        rows.append(row | {"largest_relative_difference": f"{error:.1e}"})
    return rows


def _shared_speed(job: str, questions: int, seconds: dict[str, float]) -> dict[str, float]:
    return {
        f"{job}_questions_a_second": round(questions / seconds["shared"], 2),
        f"{job}_not_shared": round(questions / seconds["not shared"], 2),
        f"{job}_times_faster": round(seconds["not shared"] / seconds["shared"], 2),
    }


def cache_rows(
    network: str, size: int, images: int, folder: Path, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """An epoch with stage 4 conditioned from stored maps and from images, by `train` itself."""
    words = _words(network, size, images, folder, device)
    _prepare(load_settings(RECIPE, words))
    seconds: dict[str, list[float]] = {"pictures": [], "maps": []}
    losses = {}
    for turn in range(repeats + 1):  # the first one makes the maps and is not counted
        for way, cache in (("pictures", 0), ("maps", 8)):
            named = [f"name={way}_{turn}", f"data.cache_gib={cache}", "cbn.stages=[4]"]
            run = train(load_settings(RECIPE, [*words, *named]), runs=folder / "runs")
            line = json.loads((run.path / "metrics.jsonl").read_text(encoding="utf-8"))
            seconds[way].append(line["seconds"])
            losses[way] = line["train_loss"]
    taken = {way: float(np.median(values[1:])) for way, values in seconds.items()}
    return [
        {
            "network": network,
            "pixels": size,
            "questions": 4 * images,
            "batch": 32,
            "epoch_seconds_pictures": round(taken["pictures"], 2),
            "epoch_seconds_maps": round(taken["maps"], 2),
            "times_faster": round(taken["pictures"] / taken["maps"], 2),
            "train_loss_pictures": round(losses["pictures"], 6),
            "train_loss_maps": round(losses["maps"], 6),
            "largest_relative_difference": f"{_half_precision_error(network, size):.1e}",
        }
    ]


def _half_precision_error(network: str, size: int) -> float:
    """Of the stage-4 map, where the map after stage 3 went through half precision."""
    torch.manual_seed(0)
    net = ModulatedResNet(network, stages=(4,))
    images = torch.randn(4, 3, size, size)
    map_ = net.prefix(images, 3).map
    with torch.inference_mode():
        y = net(images)
        return ((net(StageMap(3, map_.half().float())) - y).abs().max() / y.abs().max()).item()


def waiting_rows(
    network: str, size: int, images: int, batch: int, folder: Path, device: torch.device
) -> list[dict[str, Any]]:
    """The share of the training time of MODERN (all stages) spent waiting for the next batch from the h5 file."""
    rows = []
    for workers in (0, 2):
        words = [*_words(network, size, images, folder, device), f"workers={workers}", f"train.batch_size={batch}"]
        settings = load_settings(RECIPE, [*words, f"name=waiting_{workers}", "data.cache_gib=0"])
        _prepare(settings)
        trainer = prepare(VQATask(settings), RunDirectory(folder / "runs" / settings.name), Processes())
        waited = Waiting(trainer.batches(epoch=1))
        begun = time.perf_counter()
        for _ in trainer.steps(trainer.model, waited):
            pass
        whole = time.perf_counter() - begun - waited.first
        share = waited.seconds / whole
        told = {"network": network, "pixels": size, "batch": batch, "workers": workers}
        rows.append(told | {"steps": waited.batches, "share_waiting": round(share, 4)})
    return rows


class Waiting:
    """Iterate over batches and measure the waiting time for the first one and for all others together."""

    def __init__(self, batches: Any) -> None:
        self.source, self.first, self.seconds, self.batches = batches, 0.0, 0.0, 0

    def __iter__(self) -> Iterator[Batch]:
        begun = time.perf_counter()
        for batch in self.source:
            passed = time.perf_counter() - begun
            if self.batches:
                self.seconds += passed
            else:
                self.first = passed
            self.batches += 1
            yield batch
            begun = time.perf_counter()


def loading_rows(size: int, images: int, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Images a second: random batches of 64 from an h5 file beside decoding the same JPEGs, in one process; and
    `preprocess` beside decoding alone, with as many processes.
    """
    splits = write_coco_like(folder, {"train": images}, {"train": images})
    files = sorted((folder / "train2014").iterdir())
    order = np.random.default_rng(0).permutation(images)[:64]
    h5 = folder / "photographs.h5"
    made = {"image_size": size, "min_word_count": 1, "answers": 2, "skip_bad_images": False}
    processes = 2

    def prepare() -> None:
        h5.unlink(missing_ok=True)
        preprocess(splits, h5, **made, processes=processes)

    whole = interleaved(
        {"preprocess": prepare, "decode": lambda: decode_alone(files, size, processes)},
        repeats,
    )
    stored = H5Rows(h5, "images/pixels")
    batch = interleaved(
        {
            "h5": lambda: np.stack([stored[row] for row in order]),
            "jpeg": lambda: np.stack([decode_image(files[row], size) for row in order]),
        },
        repeats,
    )
    told = {"pixels": size, "images": images}
    return [
        told | _compared("random batch of 64: h5 file, JPEGs", 64, batch["h5"], batch["jpeg"]),
        told | _compared("preprocess, decoding and resizing alone", images, whole["preprocess"], whole["decode"]),
        *(_memory_row(size, count, folder) for count in (1_000, 80_000)),
    ]


def _compared(what: str, images: int, seconds: float, other: float) -> dict[str, Any]:
    return {
        "what": what,
        "images_a_second": round(images / seconds, 1),
        "images_a_second_beside": round(images / other, 1),
        "times_faster": round(other / seconds, 2),
    }


def _memory_row(size: int, images: int, folder: Path) -> dict[str, Any]:
    """Memory that reading 2 000 random rows adds to this process, from a sparse file of so many images."""
    path = folder / f"{images}.h5"
    with h5py.File(path, "w", locking=False) as file:
        file.create_dataset("images/pixels", (images, size, size, 3), np.uint8, fill_time="never")
        file["images/pixels"][images - 1] = 0  # so that the file has its whole length
        file["images/crc32"] = np.full(images, zlib.crc32(bytes(3 * size**2)), np.uint32)
    rows = H5Rows(path, "images/pixels")
    process = psutil.Process()
    before = process.memory_info().rss
    for row in np.random.default_rng(0).integers(images, size=2000):
        rows[row]
    added = (process.memory_info().rss - before) / 2**20
    path.unlink()
    what = "memory that 2 000 random reads add, MiB"
    return {"pixels": size, "images": images, "what": what, "added_mib": round(added, 1)}


def _words(network: str, size: int, images: int, folder: Path, device: torch.device) -> list[str]:
    """Settings of a small large world with a random network."""
    return [
        f"device={device}",
        f"data.folder={folder}/world",
        f"data.h5={folder}/world.h5",
        f"data.image_size={size}",
        f"backbone.name={network}",
        "backbone.weights=none",
        f"scenes.images={{train: {images}, val: 8}}",
        "scenes.questions_per_image=4",
        "train.validate_on=null",
        "train.epochs=1",
        "train.batch_size=32",
        "precision=float32",
        "workers=0",
    ]


def _prepare(settings: Settings) -> None:
    prepare_world(settings)
    preprocess(**preprocessing_of(settings))
