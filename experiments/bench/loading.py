"""Measure shared images, cached feature maps, waiting for batches, loading and decoding.

All data are generated: synthetic scenes, and JPEGs like COCO's.
"""

import time
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import psutil
import torch

from data.batches import Batch
from data.h5_rows import H5Rows
from data.preprocess import preprocess
from data.sources import Source
from experiments.bench.scale import decode_alone
from experiments.bench.setup import Rows, Setup
from experiments.bench.step import interleaved
from experiments.bench.vqa_sized_data import write_coco_like
from experiments.prepare import prepare
from experiments.process_group import Processes
from experiments.tasks.vqa import VQATask
from experiments.training.run_directory import RunDirectory
from experiments.training.train import prepare as prepare_training
from experiments.training.train import train
from vqa.io.files import read_json
from vqa.io.images import decode_image
from vqa.norms import Modulation
from vqa.resnet import ModulatedResNet, StageMap
from vqa.saved_model.files import save_weights
from vqa.settings.recipes import load_settings
from vqa.settings.schema import Settings

RECIPE = Path(__file__).with_name("scenes.yaml")
CPU = torch.device("cpu")


def sharing_rows(setup: Setup) -> Rows:
    """Questions a second, training and answering, with stages 3 and 4 conditioned, as more questions are on the same
    image: the first stages computed once an image (shared) or once a question.
    """
    (network, size), questions, device = setup.network, 16, setup.device
    torch.manual_seed(0)
    net = ModulatedResNet(network, stages=(3, 4)).to(device, memory_format=torch.channels_last)
    width = sum(layer.channels for layer in net.layers)
    deltas = [(0.1 * torch.randn(questions, width, device=device)).requires_grad_() for _ in "γβ"]

    def answer(images: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        with torch.inference_mode():
            return net(images, Modulation(*deltas), places)

    def train_step(images: torch.Tensor, places: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        y = net(images, Modulation(*deltas), places)
        return y.detach(), *torch.autograd.grad(y, deltas, torch.ones_like(y))

    for together in (1, 2, 4, 8):
        images = torch.randn(questions // together, 3, size, size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        places = torch.arange(questions, device=device) // together
        row = {"network": network, "pixels": size, "batch": questions, "questions_an_image": together}
        for job, function in (("training", train_step), ("answering", answer)):
            ways = {"shared": partial(function, images, places), "not": partial(function, images[places], None)}
            seconds = interleaved(ways, setup.repeats, device)
            row[f"{job}_questions_a_second"] = round(questions / seconds["shared"], 2)
            row[f"{job}_not_shared"] = round(questions / seconds["not"], 2)
            row[f"{job}_times_faster"] = round(seconds["not"] / seconds["shared"], 2)
        errors = map(_largest_difference, train_step(images, places), train_step(images[places], None))
        yield row | {"largest_relative_difference": f"{max(errors):.1e}"}


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def prepared_scenes(setup: Setup, *words: str, recipe: Path = RECIPE) -> Settings:
    """Settings of a recipe on synthetic scenes in the folder with a random network; makes the data where missing."""
    scenes = f"{setup.folder}/scenes"
    here = (f"device={setup.device}", f"data.folder={scenes}", f"data.h5={scenes}.h5", "backbone.weights=none")
    settings = load_settings(recipe, [*here, *words])
    prepare(settings)
    return settings


def _network_words(setup: Setup, images: int) -> tuple[str, ...]:
    network, size = setup.network
    return f"backbone.name={network}", f"data.image_size={size}", f"scenes.images={{train: {images}, val: 8}}"


def cache_rows(setup: Setup) -> Rows:
    """An epoch of `train` with stage 4 conditioned, from cached feature maps and from images."""
    images = setup.pick(16, 128)
    lines: dict[str, list[dict[str, float]]] = {"images": [], "maps": []}  # of metrics.jsonl
    for turn in range(setup.repeats + 1):  # the first one fills the cache and does not count
        for way, gib in (("images", 0), ("maps", 8)):
            words = (f"name={way}_{turn}", f"data.cache_gib={gib}", "cbn.stages=[4]")
            settings = prepared_scenes(setup, *_network_words(setup, images), *words)
            run = train(settings, runs=setup.folder / "runs")
            lines[way].append(read_json(run.path / "metrics.jsonl"))
    from_images, from_maps = (median(line["seconds"] for line in of_way[1:]) for of_way in lines.values())
    network, size = setup.network
    yield {
        "network": network,
        "pixels": size,
        "questions": 4 * images,
        "batch": 32,
        "epoch_seconds_images": round(from_images, 2),
        "epoch_seconds_maps": round(from_maps, 2),
        "times_faster": round(from_images / from_maps, 2),
        "train_loss_images": round(lines["images"][-1]["train_loss"], 6),
        "train_loss_maps": round(lines["maps"][-1]["train_loss"], 6),
        "largest_relative_difference": f"{_half_precision_error(network, size):.1e}",
    }


def _half_precision_error(network: str, size: int) -> float:
    """The error of the stage-4 map whose stage-3 map was stored in half precision."""
    torch.manual_seed(0)
    net = ModulatedResNet(network, stages=(4,))
    images = torch.randn(4, 3, size, size)
    with torch.inference_mode():
        stored = net.prefix(images, 3).map.half()
        return _largest_difference(net(StageMap(3, stored.float())), net(images))


def waiting_rows(setup: Setup) -> Rows:
    """The share of MODERN's training time (all stages) that is spent waiting for the next batch from the h5 file."""
    (network, size), batch = setup.network, 8
    for workers in (0, 2):
        words = (f"name=waiting_{workers}", f"workers={workers}", f"train.batch_size={batch}", "data.cache_gib=0")
        settings = prepared_scenes(setup, *_network_words(setup, setup.pick(8, 64)), *words)
        steps, _, share = time_training(settings, setup.folder / settings.name)
        row = {"network": network, "pixels": size, "batch": batch, "workers": workers, "steps": steps}
        yield row | {"share_waiting": round(share, 4)}


def time_training(
    settings: Settings, run: Path, warm_up: int = 1, steps: int | None = None, save: bool = False
) -> tuple[int, float, float]:
    """Train an epoch, or at most so many steps of it; with `save` the run directory then holds the model.

    Returns:
        The number of steps; of those after the warm-up, the seconds of a step and the share of waiting for batches.
    """
    trainer = prepare_training(VQATask(settings), RunDirectory(run), Processes())
    if settings.speed.compile:
        trainer.model.resnet.compile()
    waited = 0.0

    def timed(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal waited
        start = time.perf_counter()
        for batch in batches:
            waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    of_epoch = islice(trainer.batches(), trainer.steps_per_epoch)  # the validation's follow
    batches = timed(islice(of_epoch, steps))
    ends = [(time.perf_counter(), waited) for _ in trainer.steps(trainer.model, batches)]
    if save:
        save_weights(trainer.run.model, trainer.model, {"trained_on": settings.train.splits})
    (start, waited_before), (end, waited_after) = ends[warm_up - 1], ends[-1]
    return len(ends), (end - start) / (len(ends) - warm_up), (waited_after - waited_before) / (end - start)


def loading_rows(setup: Setup) -> Rows:
    """Images a second: random batches from an h5 file and from the same JPEGs, in one process; `preprocess` and
    decoding alone, with as many threads. And the memory that reading from few and many images takes.
    """
    (_, size), images, folder = setup.network, setup.pick(64, 3072), setup.folder
    splits = write_coco_like(folder, {"train": images}, {"train": images}, setup.pick(1, 2))
    files = sorted((folder / "train2014").iterdir())
    batch = np.random.default_rng(0).permutation(images)[:64]
    h5, threads = folder / "photographs.h5", 2

    def preprocess_all() -> None:
        h5.unlink(missing_ok=True)
        options = {"image_size": size, "min_word_count": 1, "source": Source(2), "skip_bad_images": False}
        preprocess(splits, h5, **options, threads=threads)

    jobs = {"preprocess": preprocess_all, "decode": partial(decode_alone, files, size, threads)}
    seconds = interleaved(jobs, setup.repeats, CPU)
    stored = H5Rows(h5, "images/pixels")
    reads = {
        "h5": lambda: np.stack([stored[row] for row in batch]),
        "jpeg": lambda: np.stack([decode_image(files[row], size) for row in batch]),
    }
    seconds |= interleaved(reads, setup.repeats, CPU)
    for what, count, ours, other in (
        ("random batch of 64: h5 file, JPEGs", 64, "h5", "jpeg"),
        ("preprocess, decoding and resizing alone", images, "preprocess", "decode"),
    ):
        yield {
            "pixels": size,
            "images": images,
            "what": what,
            "images_a_second": round(count / seconds[ours], 1),
            "images_a_second_beside": round(count / seconds[other], 1),
            "times_faster": round(seconds[other] / seconds[ours], 2),
        }
    for count in (1_000, 80_000):
        yield _memory_row(size, count, folder)


def _memory_row(size: int, images: int, folder: Path) -> dict[str, Any]:
    """Measure the memory that reading 2 000 random rows of a sparse file of so many images adds to this process."""
    path = folder / f"{images}.h5"
    with h5py.File(path, "w", locking=False) as file:
        file.create_dataset("images/pixels", (images, size, size, 3), np.uint8, fill_time="never")
        file["images/pixels"][images - 1] = 0  # so that the file has its whole length
        file["images/crc32"] = np.full(images, zlib.crc32(bytes(3 * size**2)), np.uint32)
    rows, process = H5Rows(path, "images/pixels"), psutil.Process()
    before = process.memory_info().rss
    for row in np.random.default_rng(0).integers(images, size=2000):
        rows[row]
    added = (process.memory_info().rss - before) / 2**20
    path.unlink()
    what = "memory that 2 000 random reads add, MiB"
    return {"pixels": size, "images": images, "what": what, "added_mib": round(added, 1)}
