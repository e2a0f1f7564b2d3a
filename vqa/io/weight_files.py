"""Weights and checkpoints that are verified when they are read: not one flipped byte becomes a weight."""

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST = "sha256"  # in the header of a .safetensors file; the format itself has no checksum


def as_safetensors(weights: Mapping[str, "Tensor"], said: Mapping[str, str]) -> bytes:
    """The content of a .safetensors file: weights, and in its header texts about them and the digest of both. The same
    bytes for the same weights and texts: a run's `environment.json` names its backbone by the digest of the file.
    """
    from safetensors.torch import save

    kept = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    content = save(kept, metadata={**said, _DIGEST: _digest_of(kept, said)})
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # the library writes them in random order
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(end - 8) + content[end:]


def read_safetensors(file: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The weights and the texts about them; of a file without a digest (of another program) as they are.

    Raises:
        ValueError: the digest is another: the file is damaged.
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        said = dict(opened.metadata() or {})
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    digest = said.pop(_DIGEST, None)
    if digest is not None and digest != _digest_of(weights, said):
        raise ValueError("damaged: its digest is another")
    return weights, said


def load_tensors(file: Path) -> Any:
    """What `torch.save` wrote; nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: the checksum of a part is wrong: the file is damaged.
        Exception: torch raises errors of several kinds where it cannot be read.
    """
    import torch

    if zipfile.is_zipfile(file):  # as torch has written them since 2020: with checksums, which it does not look at
        with zipfile.ZipFile(file) as parts:
            if damaged := parts.testzip():
                raise ValueError(f"damaged: the checksum of {damaged} is wrong")
    with warnings.catch_warnings(action="ignore"):  # of files that torch did not write: what is wrong is raised
        return torch.load(file, map_location="cpu", weights_only=True)


def _digest_of(weights: Mapping[str, "Tensor"], said: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(dict(said), sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
