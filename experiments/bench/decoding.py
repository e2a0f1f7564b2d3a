"""Decode and resize images without storing them, to compare `preprocess` with. The processes import nothing else."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from vqa.io.images import decode_image
from vqa.io.processes import WorkerContext


def decode_alone(files: Sequence[Path], size: int, processes: int) -> int:
    """Decode and resize images in `processes` processes and discard them; return the number of images."""
    with ProcessPoolExecutor(processes, mp_context=WorkerContext()) as pool:
        return sum(pool.map(partial(_decode_and_drop, size=size), files, chunksize=32))


def _decode_and_drop(file: Path, size: int) -> int:
    decode_image(file, size)
    return 1
