"""The image preprocessing of a model: decode at its size, normalise on its device. It is saved with the model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json
from vqa.io.images import IMAGENET_MEAN, IMAGENET_STD, ImageSource, decode_image

MAX_SIZE = 2048  # the longest side of an image in pixels


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of every image, the same in training, evaluation, `ask` and `inspect`."""

    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: str = "bilinear"

    def decode(self, image: ImageSource) -> np.ndarray:
        """Decode and resize an image to uint8 [S, S, 3]. Raises InputError as `read_image` does."""
        return decode_image(image, self.size)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] → float32 [B, 3, S, S], (images / 255 - mean) / std in each channel.

        The result is channels-last in memory like the images, which makes convolutions faster.
        """
        constants = [255 * value for value in self.mean], [1 / (255 * value) for value in self.std]
        on_host = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in constants)
        mean, scale = (values.to(images.device, non_blocking=True) for values in on_host)  # `new_tensor` waits
        return ((images - mean) * scale).permute(0, 3, 1, 2)

    def save(self, file: Path) -> None:
        """Write the preprocessing as JSON."""
        write_json(file, asdict(self))

    @classmethod
    def load(cls, file: Path) -> "Preprocessing":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or malformed, or a value is out of range.
        """
        return cls.of(read_json(file), file)

    @classmethod
    def of(cls, content: Any, file: Path) -> "Preprocessing":
        """The preprocessing with these values, which `file` held. Raises InputError as `load`."""
        try:
            mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
            loaded = cls(int(content["size"]), mean, std, content["resize"])
            valid = len(mean) == len(std) == 3 and min(std) > 0 and bool(np.isfinite([*mean, *std]).all())
            valid = valid and 1 <= loaded.size <= MAX_SIZE and loaded.resize == "bilinear"
        except (TypeError, KeyError, ValueError, OverflowError):
            valid = False
        if not valid:
            needs = f"size (1 to {MAX_SIZE}), 3 means, 3 positive stds, resize: bilinear"
            raise InputError(f"{file}: not an image preprocessing: needs {needs}")
        return loaded
