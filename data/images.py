"""Images: decoded and resized as the paper does, and normalised on the device they are used on."""

import math
import struct
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data import png
from data.errors import InputError
from data.files import read_json, write_json

if TYPE_CHECKING:  # decoding processes do without torch
    import torch
    from PIL import Image

# Pillow knows more, some of which run other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
MOST_SIZE = 2048  # side of the pictures that a network sees
MOST_PIXELS = 89_478_485  # where Pillow only begins to warn: 256 MiB as RGB
# Of the training set of torchvision's ImageNet weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_image(path: Path) -> "Image.Image":
    """The picture in a file as RGB and upright; `docs/input.md` says what becomes of each kind of file.

    Raises:
        InputError: the file is missing, is no image of one of FORMATS, is damaged, or holds more than MOST_PIXELS.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not path.is_file():  # a pipe might never end
            raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        source, beside = _source(path)
        with warnings.catch_warnings(action="ignore"), Image.open(source, formats=FORMATS) as opened:
            opened.info |= beside
            if opened.width * opened.height > MOST_PIXELS:  # said by its header, before anything is decoded
                raise InputError(
                    f"{path}: too large an image: {opened.width} x {opened.height}, more than {MOST_PIXELS} pixels"
                )
            image = _of_eight_bits(opened)
            return _upright(image if image.mode == "RGB" else image.convert("RGB"))
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: cannot be read as an image (none of {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large an image: {error}") from None
    except Exception as error:  # Pillow raises errors of every kind on broken files
        reason = str(error).split("'")[0].strip() or type(error).__name__
        raise InputError(f"{path}: cannot be read as an image ({reason:.100})") from None


def decode_image(path: Path, size: int) -> np.ndarray:
    """The image as RGB, resized to size x size without regard to its shape (bilinear, antialiased).

    Returns:
        uint8 [S, S, 3].

    Raises:
        InputError: as `read_image`.
    """
    from PIL import Image

    return np.asarray(read_image(path).resize((size, size), Image.Resampling.BILINEAR))


def _source(path: Path) -> tuple[Path | BinaryIO, dict[str, Any]]:
    """What Pillow is to open, and what it is not shown of the blocks beside the pixels."""
    with path.open("rb") as file:
        header = file.read(24)  # up to width and height
        if not header.startswith(png.SIGNATURE) or len(header) < 24:
            return path, {}
        if math.prod(struct.unpack(">II", header[16:])) > MOST_PIXELS:  # refused without reading the rest
            return path, {}
        file.seek(len(png.SIGNATURE))
        return png.without_ancillary(file, path.stat().st_size)


def _of_eight_bits(image: "Image.Image") -> "Image.Image":
    """Grey pictures of more bits with 8 of them; Pillow's `convert` would clip them to white."""
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        image.load()
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16:
        raise ValueError("32 bits a pixel, of which nobody knows where white is; save it with 8 or 16")
    made = Image.fromarray((pixels // 256).astype(np.uint8))
    made.info = image.info  # the orientation is in it
    return made


def _upright(image: "Image.Image") -> "Image.Image":
    """Turned as its EXIF orientation says, as viewers show it; a damaged EXIF block says nothing."""
    from PIL import ImageOps

    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


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
            known = len(mean) == len(std) == 3 and min(std) > 0 and 1 <= loaded.size <= MOST_SIZE
            known = known and bool(np.isfinite([*mean, *std]).all())
        except (TypeError, KeyError, ValueError, OverflowError):
            known = False
        if not known:
            raise InputError(
                f"{file}: not an image preprocessing: needs size (1 to {MOST_SIZE}), 3 means, 3 positive stds, resize"
            )
        if loaded.resize != "bilinear":
            raise InputError(f"{file}: resize must be bilinear, got {loaded.resize!r}")
        return loaded


def _float32() -> "torch.dtype":
    import torch

    return torch.float32
