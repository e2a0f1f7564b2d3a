"""Pretrains the backbone of synthetic scenes: it learns to name the shape of one object, and nothing else."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from data.scenes.write import WORLDS, draw_single_objects
from vqa.backbone import build_resnet
from vqa.devices import autocast
from vqa.io.errors import InputError
from vqa.io.files import written_whole
from vqa.io.progress import progress
from vqa.io.weight_files import as_safetensors
from vqa.preprocessing import Preprocessing

BATCH = 64  # objects a step


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
    """Trains torchvision's network on single objects and writes its weights.

    On a CPU it uses one thread: another number rounds differently and gives another network, with which a baseline is
    two points better or worse.

    Args:
        file: a .safetensors file, by torchvision's names.
        name: the ResNet.
        world: whose objects, one of WORLDS.
        seed: of the objects, the initial weights and the order.
        image_size: side S in pixels.
        images: objects to train on; a tenth as many others are held out.
        epochs: passes over them.
        precision: `float32`, or `bfloat16` (autocast).
        device: where it is trained.

    Returns:
        How often the shape of a held-out object is named, in percent. A file that was made with the same arguments (on
        any device) is kept, and the percentage in its header returned.

    Raises:
        InputError: `file` is no .safetensors file, or one that was not written with these arguments.
    """
    made = {"name": name, "world": world, "seed": seed, "image_size": image_size, "images": images, "epochs": epochs}
    made |= {"batch_size": BATCH, "precision": precision}
    if (found := _header_of(file)) is not None:
        accuracy = found.pop("held_out_accuracy")
        if found == made:
            return accuracy
        key = next(key for key, value in made.items() if found.get(key) != value)
        raise InputError(
            f"{file}: pretrained with {key} {found.get(key)}, not {made[key]}; remove it or name another "
            "backbone.weights"
        )
    torch.manual_seed(seed)
    count, place = images + max(images // 10, 1), torch.device(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=file.parent) as aside:  # not in memory: 20 000 images of 224 px are 3 GB
        mapped = np.memmap(aside, np.uint8, shape=(count, image_size, image_size, 3))
        shapes = torch.from_numpy(draw_single_objects(WORLDS[world], seed, mapped)).to(place)
        pixels = torch.from_numpy(mapped)
        resnet = build_resnet(name, classes=len(WORLDS[world].SHAPES)).to(place)

        def logits_of(rows: Tensor) -> Tensor:
            normalised = Preprocessing(image_size).normalise(pixels[rows].to(place))
            with autocast(place, precision):
                return resnet(normalised).float()

        order = torch.cat([torch.randperm(images)[: images // BATCH * BATCH] for _ in range(epochs)])
        with _one_thread():
            _train(resnet, order.split(BATCH), lambda rows: F.cross_entropy(logits_of(rows), shapes[rows]))
        resnet.eval()
        with torch.inference_mode():
            held_out = torch.arange(images, count).split(256)
            right = sum(int((logits_of(rows).argmax(1) == shapes[rows]).sum()) for rows in held_out)
    accuracy = 100 * right / (count - images)
    with written_whole(file) as aside:
        header = {"pretrained": json.dumps(made | {"held_out_accuracy": accuracy})}
        aside.write_bytes(as_safetensors(resnet.state_dict(), header))
    return accuracy


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(resnet: nn.Module, batches: Sequence[Tensor], loss_of: Callable[[Tensor], Tensor]) -> None:
    optimiser = torch.optim.Adam(resnet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=len(batches), cycle_momentum=False)
    for rows in progress(batches, len(batches), "pretraining"):
        loss = loss_of(rows)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()


def _header_of(file: Path) -> dict[str, Any] | None:
    """What `pretrain_backbone` wrote into the header of a file; None if there is no file."""
    if file.suffix != ".safetensors":
        raise InputError(f"backbone.weights: {file} must be a .safetensors file, which the demo makes")
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            header = {**json.loads((opened.metadata() or {})["pretrained"])}
            header["held_out_accuracy"] = float(header["held_out_accuracy"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        raise InputError(
            f"{file}: not made by the demo, which would overwrite it; name another backbone.weights"
        ) from None
    return header
