"""Read and write weights and checkpoints with checksums, so that a damaged file is refused."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from vqa.io.errors import without_warnings

if TYPE_CHECKING:
    from torch import Tensor

_CHECKSUM = "sha256"  # in the header of a .safetensors file; the format itself has no checksum


def as_safetensors(weights: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> bytes:
    """The content of a .safetensors file, with a checksum in its metadata.

    Equal weights and metadata make equal bytes: results name a backbone by the checksum of its file.
    """
    from safetensors.torch import save

    kept = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    content = save(kept, metadata={**metadata, _CHECKSUM: _checksum(kept, metadata)})
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # the library writes them in random order
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(end - 8) + content[end:]


def read_safetensors(file: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Read weights and metadata; a file without a checksum (of another program) is not verified.

    Raises:
        ValueError: the checksum does not match.
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    checksum = metadata.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(weights, metadata):
        raise ValueError("damaged: checksum mismatch")
    return weights, metadata


def load_tensors(file: Path) -> Any:
    """Read what `torch.save` wrote; nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: a checksum does not match.
        Exception: torch raises errors of several kinds where the file cannot be read.
    """
    import torch

    if zipfile.is_zipfile(file):  # the format of torch.save since 2020; torch itself does not verify its checksums
        with zipfile.ZipFile(file) as parts:
            if damaged := parts.testzip():
                raise ValueError(f"damaged: checksum mismatch in {damaged}")
    with without_warnings:  # about files of other programs
        return torch.load(file, map_location="cpu", weights_only=True)


def _checksum(weights: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
