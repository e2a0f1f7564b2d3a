"""Images: decoded and resized as the paper does, and normalised on the device they are used on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import InputError
from data.files import read_json, write_json

if TYPE_CHECKING:  # decoding processes do without torch
    import torch

# Of the training set of torchvision's ImageNet weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def decode_image(path: Path, size: int) -> np.ndarray:
    """The image as RGB, resized to size x size without regard to its shape (bilinear, antialiased).

    Returns:
        uint8 [S, S, 3].

    Raises:
        InputError: the file is missing or is no image that can be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened
            if opened.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip to white
                image = Image.fromarray((np.asarray(opened) // 256).clip(0, 255).astype(np.uint8))
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large an image: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises each of these on broken files
        reason = str(error).split("'")[0].strip() or type(error).__name__
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image, in training, evaluation, `ask` and `inspect` alike; stored with the model."""

    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: str = "bilinear"

    def decode(self, path: Path) -> np.ndarray:
        """The image of a file as uint8 [S, S, 3]. Raises InputError as `decode_image` does."""
        return decode_image(path, self.size)

    def normalise(self, images: "torch.Tensor") -> "torch.Tensor":
        """uint8 [B, S, S, 3] → float32 [B, 3, S, S] with the mean and deviation of each channel taken out.

        The result stays channels-last in memory, as the images come; convolutions are faster so.
        """
        mean = images.new_tensor([255 * value for value in self.mean], dtype=_float32())
        scale = images.new_tensor([1 / (255 * value) for value in self.std], dtype=_float32())
        return ((images - mean) * scale).permute(0, 3, 1, 2)

    def save(self, file: Path) -> None:
        """Writes the preprocessing as JSON."""
        write_json(file, asdict(self))

    @classmethod
    def load(cls, file: Path) -> "Preprocessing":
        """Reads what `save` wrote.

        Raises:
            InputError: the file is missing, malformed or of another form.
        """
        content: dict[str, Any] = read_json(file)
        try:
            mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
            loaded = cls(int(content["size"]), mean, std, content["resize"])
        except (TypeError, KeyError, ValueError):
            loaded = None
        if loaded is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0 or loaded.size < 1:
            raise InputError(f"{file}: not an image preprocessing: needs size, 3 means, 3 positive stds, resize")
        if loaded.resize != "bilinear":
            raise InputError(f"{file}: resize must be bilinear, got {loaded.resize!r}")
        return loaded


def _float32() -> "torch.dtype":
    import torch

    return torch.float32
