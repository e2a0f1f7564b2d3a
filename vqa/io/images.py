"""Decode image files to RGB and resize them as the paper does; needs no torch."""

import io
import math
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vqa.io.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Pillow knows more, some of which run other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
MOST_PIXELS = 89_478_485  # where Pillow only begins to warn: 256 MiB as RGB
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 2**24  # of one block beside the pixels that are looked at
# Where Pillow looks for the orientation: keyword of a text block → name in `Image.info`.
_ORIENTING = {b"exif": "exif", b"Raw profile type exif": "Raw profile type exif", b"XML:com.adobe.xmp": "xmp"}
# Of the training set of torchvision's ImageNet weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_image(path: Path) -> "Image.Image":
    """The image in a file as RGB and upright; `docs/input.md` says what becomes of each kind of file.

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
        if not header.startswith(SIGNATURE) or len(header) < 24:
            return path, {}
        if math.prod(struct.unpack(">II", header[16:])) > MOST_PIXELS:  # refused without reading the rest
            return path, {}
        file.seek(len(SIGNATURE))
        return without_ancillary(file, path.stat().st_size)


def _of_eight_bits(image: "Image.Image") -> "Image.Image":
    """Grey images of more bits with 8 of them; Pillow's `convert` would clip them to white."""
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


def without_ancillary(file: BinaryIO, size: int) -> tuple[io.BytesIO, dict[str, Any]]:
    """Reads a PNG of `size` bytes from behind its signature.

    Returns:
        The PNG with its critical blocks only, and what `Image.info` holds of the EXIF and XMP data.
    """
    critical, info = io.BytesIO(), {}
    critical.write(SIGNATURE)
    name = b""
    while name != b"IEND" and len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if not (name.isalpha() and name[:1].islower()):
            critical.write(header + file.read(min(length + 4, size)))  # with the checksum
            continue
        block = file.read(min(length, _MOST_BYTES)) if name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") else b""
        file.seek(length - len(block) + 4, io.SEEK_CUR)
        with suppress(zlib.error):
            info |= {"exif": b"Exif\0\0" + block} if name == b"eXIf" else _orienting(name, block)
    critical.seek(0)
    return critical, info


def _orienting(name: bytes, block: bytes) -> dict[str, Any]:
    """What a text block says, if its keyword is one of _ORIENTING."""
    keyword, _, text = block.partition(b"\0")
    if keyword not in _ORIENTING:
        return {}
    packed = name == b"zTXt"
    if packed:
        text = text[1:]  # behind the number of the compression method
    if name == b"iTXt":
        packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]  # behind language and translated keyword
    if packed:
        text = zlib.decompressobj().decompress(text, _MOST_BYTES)
    return {_ORIENTING[keyword]: text.decode("latin-1") if keyword.startswith(b"Raw") else text}
