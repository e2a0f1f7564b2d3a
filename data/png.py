"""PNG files without the blocks beside their pixels, for a large or damaged one of which Pillow refuses the image."""

import io
import struct
import zlib
from contextlib import suppress
from typing import Any, BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 2**24  # of one block beside the pixels that are looked at
# Where Pillow looks for the orientation: keyword of a text block → name in `Image.info`.
_ORIENTING = {b"exif": "exif", b"Raw profile type exif": "Raw profile type exif", b"XML:com.adobe.xmp": "xmp"}


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
