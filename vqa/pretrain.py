"""Pretrains the small backbone of the embedded world: it learns to name the shape of one object, and nothing else."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from data.errors import InputError
from data.files import written_whole
from data.images import Preprocessing
from data.progress import progress
from data.scenes import SHAPES, single_objects
from vqa.resnet import build_resnet


def pretrain_backbone(
    file: Path, name: str, *, seed: int, image_size: int, images: int, epochs: int, batch_size: int = 64
) -> float:
    """Trains torchvision's network on single objects and writes its weights.

    Args:
        file: a .safetensors file, by torchvision's names.
        name: the ResNet.
        seed: of the objects, the initial weights and the order.
        image_size: side S in pixels.
        images: objects to train on; a tenth as many others are held out.
        epochs: passes over them.
        batch_size: images a step.

    Returns:
        How often the shape of a held-out object is named, in percent. A file that was made with the same arguments is
        kept, and what it says of itself returned.

    Raises:
        InputError: `file` is no .safetensors file of this function's making, which it would overwrite.
    """
    made = {"name": name, "seed": seed, "image_size": image_size, "images": images, "epochs": epochs}
    made |= {"batch_size": batch_size}
    found = _made_before(file)
    if found is not None:
        accuracy = found.pop("held_out_accuracy")
        if found == made:
            return accuracy
    torch.manual_seed(seed)
    held_out = max(images // 10, 1)
    pixels, shapes = (torch.from_numpy(part) for part in single_objects(seed, images + held_out, image_size))
    normalise = Preprocessing(image_size).normalise
    resnet = build_resnet(name, classes=len(SHAPES))
    steps = epochs * (images // batch_size)
    optimiser = torch.optim.Adam(resnet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, cycle_momentum=False)
    order = torch.cat([torch.randperm(images)[: steps // epochs * batch_size] for _ in range(epochs)])
    for rows in progress(order.split(batch_size), steps, "pretraining"):
        loss = F.cross_entropy(resnet(normalise(pixels[rows])), shapes[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    resnet.eval()
    with torch.inference_mode():
        right = [
            (resnet(normalise(some)).argmax(1) == true).sum()
            for some, true in zip(pixels[images:].split(256), shapes[images:].split(256), strict=True)
        ]
    accuracy = 100 * int(sum(right)) / held_out
    with written_whole(file) as aside:
        save_file(resnet.state_dict(), aside, {"pretrained": json.dumps(made | {"held_out_accuracy": accuracy})})
    return accuracy


def _made_before(file: Path) -> dict[str, Any] | None:
    """What a file that `pretrain_backbone` wrote says of itself; None if there is no file."""
    if file.suffix != ".safetensors":
        raise InputError(f"backbone.weights: {file} must be a .safetensors file, which the demo makes")
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {})["pretrained"])
    except (SafetensorError, OSError, KeyError, ValueError):
        raise InputError(
            f"{file}: not made by the demo, which would overwrite it; name another backbone.weights"
        ) from None
