"""Pretrains the backbone of synthetic scenes: it learns to name the shape of one object, and nothing else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from data.scenes.write import WORLDS, draw_single_objects
from vqa.backbone import build_resnet
from vqa.devices import autocast
from vqa.io.errors import InputError
from vqa.io.files import written_whole
from vqa.io.progress import progress
from vqa.io.weight_files import as_safetensors
from vqa.preprocessing import Preprocessing


def pretrain_backbone(
    file: Path,
    name: str,
    *,
    world: str = "small",
    seed: int,
    image_size: int,
    images: int,
    epochs: int,
    batch_size: int = 64,
    precision: str = "float32",
    device: str = "cpu",
) -> float:
    """Trains torchvision's network on single objects and writes its weights.

    On a CPU with one thread, however many cores there are: another number would round otherwise, and what comes of it
    is another network, with which a baseline is two points better or worse.

    Args:
        file: a .safetensors file, by torchvision's names.
        name: the ResNet.
        world: whose objects, one of WORLDS.
        seed: of the objects, the initial weights and the order.
        image_size: side S in pixels.
        images: objects to train on; a tenth as many others are held out.
        epochs: passes over them.
        batch_size: images a step.
        precision: `float32`, or `bfloat16` (autocast).
        device: where it is trained.

    Returns:
        How often the shape of a held-out object is named, in percent. A file that was made with the same arguments (on
        any device) is kept, and what it says of itself returned.

    Raises:
        InputError: `file` is no .safetensors file of this function's making, which it would overwrite.
    """
    made = {"name": name, "world": world, "seed": seed, "image_size": image_size, "images": images, "epochs": epochs}
    made |= {"batch_size": batch_size, "precision": precision}
    found = _made_before(file)
    if found is not None:
        accuracy = found.pop("held_out_accuracy")
        if found == made:
            return accuracy
        key = next(key for key, value in made.items() if found.get(key) != value)
        raise InputError(
            f"{file}: pretrained with {key} {found.get(key)}, not {made[key]}; remove it or name another "
            "backbone.weights"
        )
    torch.manual_seed(seed)
    held_out = max(images // 10, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=file.parent) as aside:  # not in memory: 20 000 images of 224 px are 3 GB
        pixels = np.memmap(aside, np.uint8, shape=(images + held_out, image_size, image_size, 3))
        labels = draw_single_objects(WORLDS[world], seed, pixels)
        resnet = build_resnet(name, classes=len(WORLDS[world].shapes)).to(device)
        naming = _Naming(resnet, torch.from_numpy(pixels), torch.from_numpy(labels), precision, torch.device(device))
        with _one_thread():
            naming.train(images, epochs, batch_size)
        accuracy = naming.accuracy(range(images, images + held_out))
    with written_whole(file) as aside:
        said = {"pretrained": json.dumps(made | {"held_out_accuracy": accuracy})}
        aside.write_bytes(as_safetensors(resnet.state_dict(), said))
    return accuracy


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Naming(NamedTuple):
    """A network that names the shapes of single objects."""

    resnet: ResNet
    pixels: Tensor  # uint8 [N, S, S, 3]
    shapes: Tensor  # int64 [N]
    precision: str
    device: torch.device

    def train(self, images: int, epochs: int, batch_size: int) -> None:
        """Trains on the first `images`."""
        steps = epochs * (images // batch_size)
        optimiser = torch.optim.Adam(self.resnet.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, cycle_momentum=False)
        order = torch.cat([torch.randperm(images)[: steps // epochs * batch_size] for _ in range(epochs)])
        for rows in progress(order.split(batch_size), steps, "pretraining"):
            loss = F.cross_entropy(self._logits(rows), self.shapes[rows].to(self.device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()

    @torch.inference_mode()
    def accuracy(self, rows: range) -> float:
        """How often the shape is named, in percent."""
        self.resnet.eval()
        parts = torch.arange(rows.start, rows.stop).split(256)
        right = [(self._logits(part).argmax(1).cpu() == self.shapes[part]).sum() for part in parts]
        return 100 * int(sum(right)) / len(rows)

    def _logits(self, rows: Tensor) -> Tensor:
        """float32 [B, shapes]."""
        images = Preprocessing(self.pixels.shape[1]).normalise(self.pixels[rows].to(self.device))
        with autocast(self.device, self.precision):
            return self.resnet(images).float()


def _made_before(file: Path) -> dict[str, Any] | None:
    """What a file that `pretrain_backbone` wrote says of itself; None if there is no file."""
    if file.suffix != ".safetensors":
        raise InputError(f"backbone.weights: {file} must be a .safetensors file, which the demo makes")
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            said = {**json.loads((opened.metadata() or {})["pretrained"])}
            said["held_out_accuracy"] = float(said["held_out_accuracy"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        raise InputError(
            f"{file}: not made by the demo, which would overwrite it; name another backbone.weights"
        ) from None
    return said
