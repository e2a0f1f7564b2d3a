"""Pretrains a backbone to name the class of an image: the shape of one synthetic object, or the folder of any image."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet

from data.labelled_images import LabelledImages
from data.scenes.write import WORLDS, draw_single_objects
from experiments.training.checkpoint import load_checkpoint, read_as_checkpoint, save_checkpoint
from vqa.backbone import build_resnet
from vqa.devices import autocast, choose_device
from vqa.io.errors import InputError, printable
from vqa.io.files import check_room, naming_write_errors, written_whole
from vqa.io.locks import held, lock_beside
from vqa.io.processes import StopRequest
from vqa.io.progress import progress
from vqa.io.weight_files import as_safetensors
from vqa.preprocessing import MAX_SIZE, Preprocessing

BATCH = 64  # images per step
CHECKPOINT_EVERY = 200  # steps


def pretrain_backbone(
    file: Path,
    name: str,
    *,
    world: str = "small",
    seed: int,
    image_size: int,
    images: int,
    epochs: int,
    precision: str = "float32",
    device: str = "cpu",
) -> float:
    """Trains torchvision's network on single objects and writes its weights; resumes where it was interrupted.

    On a CPU it uses one thread: another number rounds differently and makes another network, with which a baseline is
    two points better or worse.

    Args:
        file: a .safetensors file, by torchvision's names; a checkpoint is kept beside it until it is finished.
        name: the ResNet.
        world: whose objects, one of WORLDS.
        seed: of the objects, the initial weights and the order.
        image_size: side S in pixels.
        images: objects to train on; a tenth as many others are held out.
        epochs: passes over them.
        precision: `float32`, or `bfloat16` (autocast).
        device: where it is trained, as `choose_device` names it.

    Returns:
        How often the shape of a held-out object is named, in percent. A file that was made with the same arguments (on
        any device) is kept, and the percentage in its header returned.

    Raises:
        InputError: `file` is no .safetensors file, or one that was not written with these arguments.
    """
    made = {"name": name, "world": world, "seed": seed, "image_size": image_size, "images": images, "epochs": epochs}
    made |= {"batch_size": BATCH, "precision": precision}
    count, shapes = images + max(images // 10, 1), len(WORLDS[world].SHAPES)
    draw = partial(draw_single_objects, WORLDS[world], seed)

    def train() -> tuple[ResNet, dict[str, Any]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            resnet, (predicted, true) = _train(file, made, draw, images, count, shapes, device)
        finally:
            torch.set_num_threads(threads)
        return resnet, {"held_out_accuracy": _percent(predicted == true)}

    return _kept_or_trained(file, made, train, wait=True)["held_out_accuracy"]


def pretrain_on_images(
    file: Path,
    name: str,
    source: Path,
    *,
    seed: int,
    image_size: int,
    epochs: int,
    device: str,
    change: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Trains torchvision's network to name the classes of labelled images, which are shifted and mirrored at random.

    Args:
        file, name, image_size, epochs, device: as of `pretrain_backbone`.
        source: what `LabelledImages` reads.
        seed: of the initial weights, the order, the shifts.
        change: what else is done to images to train on, uint8 [B, S, S, 3]; its name is in the header.

    Returns:
        The file's header: the arguments, `classes`, `held_out_images`, `held_out_accuracy`: how many of these are given
        their class, in percent, and `held_out_group_accuracy`: at least a class of the same group, where there are
        groups. A file that was made with the same arguments is kept.

    Raises:
        InputError: `file` was not written with these arguments or is locked, `source` is malformed, or images
            in it cannot be read.
    """
    if not 32 <= image_size <= MAX_SIZE:
        raise InputError(f"the image size must be 32 to {MAX_SIZE}, not {image_size}")
    images = LabelledImages(source)
    made = {"name": name, "seed": seed, "image_size": image_size, "images": identity_of(images), "epochs": epochs}
    made |= {"batch_size": BATCH, "precision": "float32", "change": change and change.__name__}
    count, classes = len(images.names), len(images.classes)

    def varied(pixels: Tensor, rng: np.random.Generator) -> Tensor:
        shifted = _shifted_and_mirrored(pixels, rng)
        return shifted if change is None else torch.from_numpy(change(shifted.numpy(), rng))

    def train() -> tuple[ResNet, dict[str, Any]]:
        decode = images.decode_into
        resnet, (predicted, true) = _train(file, made, decode, images.training, count, classes, device, change=varied)
        results = {"classes": images.classes, "held_out_images": len(true)}
        results["held_out_accuracy"] = _percent(predicted == true)
        if images.groups is not None:
            groups = np.array(images.groups)
            results["held_out_group_accuracy"] = _percent(groups[predicted] == groups[true])
        return resnet, results

    return _kept_or_trained(file, made, train, wait=False)


def _kept_or_trained(
    file: Path, made: Mapping[str, Any], train: Callable[[], tuple[ResNet, dict[str, Any]]], *, wait: bool
) -> dict[str, Any]:
    """The header of the file of these arguments; if there is none, the network that `train` returns is written to it,
    with its results. `wait`: for another process that trains it, rather than raise InputError.
    """
    if (found := _results_in(file, made)) is not None:
        print(f"{file}: complete, nothing to do")
        return found
    with held(lock_beside(file), file, wait=wait):
        if (found := _results_in(file, made)) is not None:  # another process has made it since
            return found
        resnet, results = train()
        header = made | results
        with written_whole(file) as aside:
            aside.write_bytes(as_safetensors(resnet.state_dict(), {"pretrained": json.dumps(header)}))
        _checkpoint_of(file).unlink(missing_ok=True)
    return header


def _train(
    file: Path,
    made: Mapping[str, Any],
    fill: Callable[[np.ndarray], np.ndarray],
    images: int,
    count: int,
    classes: int,
    device: str,
    change: Callable[[Tensor, np.random.Generator], Tensor] = lambda pixels, _: pixels,
) -> tuple[ResNet, tuple[np.ndarray, np.ndarray]]:
    """Trains on the first `images` of `count` images; resumes from a checkpoint of the same arguments `made`.

    `fill` writes all images into an array, uint8 [count, S, S, 3], and returns their classes, int64 [count]. `change`
    transforms each training batch, uint8 [B, S, S, 3].

    Returns:
        The network in evaluation mode, and for the other images the classes it predicts and the true ones.
    """
    place, size, seed = choose_device(device), made["image_size"], made["seed"]
    checkpoint, saved = _checkpoint_of(file), None
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint)
        with read_as_checkpoint(checkpoint):
            _check_same(checkpoint, saved["made"], made)
    torch.manual_seed(seed)
    try:
        resnet = build_resnet(made["name"], classes=classes).to(place)
    except ValueError as error:
        raise InputError(f"backbone: {error}") from None
    with _array_beside(file, (count, size, size, 3)) as array:
        labels = torch.from_numpy(fill(array)).to(place)
        pixels = torch.from_numpy(array)

        def logits_of(images: Tensor) -> Tensor:
            with autocast(place, made["precision"]):
                return resnet(Preprocessing(size).normalise(images.to(place))).float()

        batch = min(BATCH, images)
        order = torch.cat([torch.randperm(images)[: images // batch * batch] for _ in range(made["epochs"])])
        batches = order.split(batch)
        optimiser = torch.optim.Adam(resnet.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=len(batches), cycle_momentum=False)
        state, done = {"model": resnet, "optimiser": optimiser, "schedule": schedule}, 0
        if saved is not None:
            with read_as_checkpoint(checkpoint):
                for part, content in state.items():
                    content.load_state_dict(saved[part])
                if (done := schedule.last_epoch) != saved["step"]:
                    raise ValueError(f"its schedule counts {done} steps, not {saved['step']!r:.20}")
        with StopRequest() as stop:
            steps = progress(batches[done:], len(batches), "pretraining", done=done)
            for step, rows in enumerate(steps, start=done + 1):
                changed = change(pixels[rows], np.random.default_rng([seed, step]))
                loss = F.cross_entropy(logits_of(changed), labels[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                if stop.made or step % CHECKPOINT_EVERY == 0:
                    parts = {part: content.state_dict() for part, content in state.items()}
                    save_checkpoint(checkpoint, parts | {"made": dict(made), "step": step})
                if stop.made:
                    stop.obey()
        resnet.eval()
        with torch.inference_mode():
            predicted = torch.cat([logits_of(some).argmax(1) for some in pixels[images:].split(256)])
    return resnet, (predicted.cpu().numpy(), labels[images:].cpu().numpy())


@contextmanager
def _array_beside(file: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """An array of uint8 in a temporary file beside `file`, not in memory: 20 000 images of 224 px are 3 GB."""
    file.parent.mkdir(parents=True, exist_ok=True)
    check_room(file, math.prod(shape), "use smaller images")
    with TemporaryFile(dir=file.parent) as aside:
        with naming_write_errors(file):
            if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk kills a process that writes to a mapped file
                os.posix_fallocate(aside.fileno(), 0, math.prod(shape))
            mapped = np.memmap(aside, np.uint8, shape=shape)
        yield mapped


def _shifted_and_mirrored(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts each image by up to an eighth of its side, repeating its border, and mirrors every second one."""
    count, size = pixels.shape[:2]
    shifts = torch.from_numpy(rng.integers(-(size // 8), size // 8, (2, count, 1), endpoint=True))
    rows, columns = (torch.arange(size) + shifts).clamp(0, size - 1)
    mirrored = torch.from_numpy(rng.random((count, 1)) < 0.5)
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pixels[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _percent(right: np.ndarray) -> float:
    return 100 * int(right.sum()) / len(right)


def _checkpoint_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.checkpoint")


def _results_in(file: Path, made: Mapping[str, Any]) -> dict[str, Any] | None:
    """The header of a file that was made with these arguments; None if there is no file."""
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: must be a .safetensors file")
    if printable(str(file)) != str(file):
        raise InputError(f"{file}: the name must be readable text, as safetensors opens no other")
    if not file.exists():
        return None
    header = header_of(file)
    _check_same(file, header, made)
    return header


def header_of(file: Path) -> dict[str, Any]:
    """The arguments and results in the header of a pretrained file. Raises InputError if it is not one."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = {**json.loads((opened.metadata() or {})["pretrained"])}
            return header | {"held_out_accuracy": float(header["held_out_accuracy"])}
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; `pretrain` without --probe makes it") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        raise InputError(f"{file}: not a file that `pretrain` wrote; name another one") from None


def identity_of(images: LabelledImages) -> str:
    """The identity of the images, as in a header."""
    return f"{len(images.names)} (checksum {images.digest[:12]})"


def _check_same(file: Path, found: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    for key, value in made.items():
        if found.get(key) != value:
            raise InputError(
                f"{file}: pretrained with {key} {found.get(key)}, not {value}; remove it or name another file"
            )
