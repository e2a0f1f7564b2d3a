"""Decode image files to RGB and resize them as the paper does; needs no torch."""

import io
import math
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vqa.io.errors import InputError, without_warnings

ImageSource = str | Path | bytes | Image.Image | np.ndarray
# Pillow reads more formats, some with other programs (EPS with Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
MOST_PIXELS = 89_478_485  # where Pillow only begins to warn: 256 MiB as RGB
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value of the second
_MOST_BYTES = 2**24  # read of one block beside the pixels
# Where Pillow looks for the orientation: keyword of a text block → name in `Image.info`.
_ORIENTING = {b"exif": "exif", b"Raw profile type exif": "Raw profile type exif", b"XML:com.adobe.xmp": "xmp"}
# Of the training set of torchvision's ImageNet weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_image(source: ImageSource) -> Image.Image:
    """Read an image as RGB and upright; `docs/input.md` lists how each kind of file is read.

    Args:
        source: a path, the bytes of an image file, a PIL image, or an array (uint8, height x width x 3 or height x
            width).

    Raises:
        InputError: the file is missing, damaged, not an image of one of FORMATS, or holds more than MOST_PIXELS; an
            array has another shape or type.
    """
    name = source if isinstance(source, str | Path) else "image"
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(_of_eight_bits(source).copy())  # a copy has no tags of a TIFF
        if isinstance(source, np.ndarray):
            return _of_array(source)
        if not isinstance(source, str | bytes | os.PathLike):
            given = type(source).__name__
            raise InputError(f"image: must be a path, bytes, a PIL image or a NumPy array, not {given}")
        with without_warnings, _opened(source) as file:
            shown, beside = _without_ancillary_blocks(file)
            with Image.open(shown, formats=FORMATS) as opened:
                opened.info |= beside
                if opened.width * opened.height > MOST_PIXELS:  # from the header, before anything is decoded
                    size = f"{opened.width} x {opened.height}"
                    raise InputError(f"{name}: too large an image: {size}, more than {MOST_PIXELS} pixels")
                return _upright_rgb(opened)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name}: cannot be read as an image (none of {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too large an image: {error}") from None
    except Exception as error:  # Pillow raises errors of every kind on broken files
        reason = str(error).split("'")[0].strip() or type(error).__name__
        raise InputError(f"{name}: cannot be read as an image ({reason:.100})") from None


def decode_image(source: ImageSource, size: int) -> np.ndarray:
    """Read an image as RGB, resized to size x size without regard to its shape (bilinear, antialiased).

    Returns:
        uint8 [S, S, 3].

    Raises:
        InputError: as `read_image`.
    """
    return resize(read_image(source), size)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Resize an image to uint8 [S, S, 3] as `decode_image`."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _opened(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if not path.is_file():  # a pipe might never end
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    return path.open("rb")


def _without_ancillary_blocks(file: BinaryIO) -> tuple[BinaryIO, dict[str, Any]]:
    """A PNG with its critical blocks only, and its EXIF and XMP data as in `Image.info`; any other file as it is."""
    header = file.read(24)  # up to width and height
    size = file.seek(0, os.SEEK_END)
    is_png = header.startswith(SIGNATURE) and len(header) == 24
    if not is_png or math.prod(struct.unpack(">II", header[16:])) > MOST_PIXELS:  # refused without reading it
        file.seek(0)
        return file, {}
    file.seek(len(SIGNATURE))
    critical, info, name = io.BytesIO(), {}, b""
    critical.write(SIGNATURE)
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
    """The content of a text block as in `Image.info`, if its keyword is one of _ORIENTING."""
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


def _of_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        found = f"{array.dtype} {' x '.join(map(str, array.shape))}"
        raise InputError(f"image: an array must be uint8, height x width x 3 or height x width, not {found}")
    return Image.fromarray(array).convert("RGB")


def _upright_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned by the EXIF orientation as viewers do; a damaged EXIF block is ignored."""
    image = _of_eight_bits(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    image.info = {}  # Pillow may have left the orientation there: the image would be turned again when it is read again
    return image


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Reduce grey images of more bits to 8; Pillow's `convert` would clip them to white. Others are returned unchanged.

    Raises:
        ValueError: it has no pixels, or no defined white level.
    """
    if not all(image.size):
        raise ValueError("it has no pixels")  # resized, it would be black
    if not image.mode.startswith(("I", "F")):
        image.load()
        return image
    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})  # of a TIFF
    # in 32 bits white may be 255 or 65 535; Pillow stretches the 16 bits of a PGM to 65 535
    of_bytes = image.mode == "I" and image.format != "PPM" and pixels.max() < 2**8
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16 or of_bytes:
        raise ValueError("32 bits per pixel, with no defined white level; save it with 8 or 16")
    bits = min(tags.get(_BITS, (16,))[0], 16)
    upper = (pixels >> (bits - 8)).astype(np.uint8)
    made = Image.fromarray(~upper if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else upper)
    made.info = image.info  # the orientation is in it
    return made
