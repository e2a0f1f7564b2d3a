"""A cache of feature maps: one array a picture in an h5 file, half precision, written as safely as a store.

    /       attributes: identity (JSON: of what data, by what network), complete
    maps    float16 [N, H, W, C], channels last as convolutions read them
    filled  bool [N]

A row is marked in `filled` only after it was flushed to the disk, and the file (`NAME.partial` until then) takes its
name when every row is filled: a killed run loses what was not flushed, and nothing half-written is taken for whole.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.errors import InputError
from data.files import held
from data.progress import progress
from data.store import H5Rows, opened_for_writing, partial_path, to_disk

_BATCH = 64  # pictures encoded at once
_BATCHES_A_FLUSH = 16


def cached_maps(
    path: Path, identity: dict[str, Any], count: int, encode: Callable[[Sequence[int]], np.ndarray]
) -> H5Rows:
    """The maps of `count` pictures, float16 [H, W, C] each; what is missing in the file is encoded first.

    Args:
        path: the file.
        identity: what the maps depend on; a file of another identity is refused.
        count: N.
        encode: the maps of some rows, [B, H, W, C].

    Raises:
        InputError: the file is of other data or another network, or damaged, or a map does not fit into half precision.
    """
    with held(path.with_name(f".{path.name}.lock")):  # several runs may need it at once: one makes it, the others wait
        if not path.exists():
            _make(path, identity, count, encode)
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check(path, file, identity)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an h5 file ({error!s:.100}); remove it") from None
    return H5Rows(path, "maps")


def _make(path: Path, identity: dict[str, Any], count: int, encode: Callable[[Sequence[int]], np.ndarray]) -> None:
    partial = partial_path(path)
    if not partial.exists():
        _begin(partial, identity, count, encode([0])[0].shape)
    with opened_for_writing(partial) as file:
        _check(partial, file, identity)
        _fill(file, encode, path.name)
        file.attrs["complete"] = True
        to_disk(file)
    partial.replace(path)


def _check(path: Path, file: h5py.File, identity: dict[str, Any]) -> None:
    found = json.loads(file.attrs.get("identity", "{}"))
    for key in identity.keys() | found.keys():
        if found.get(key) == identity.get(key):
            continue
        raise InputError(f"{path}: made with another {key}; remove it")


def _begin(partial: Path, identity: dict[str, Any], count: int, shape: tuple[int, ...]) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    aside = partial.with_name(f".{partial.name}.unfinished")
    try:
        with h5py.File(aside, "w") as file:
            file.attrs.update(identity=json.dumps(identity), complete=False)
            file.create_dataset("filled", data=np.zeros(count, bool))
            file.create_dataset("maps", (count, *shape), np.float16, fill_time="never")
            to_disk(file)
        aside.replace(partial)
    finally:
        aside.unlink(missing_ok=True)


def _fill(file: h5py.File, encode: Callable[[Sequence[int]], np.ndarray], name: str) -> None:
    pending = np.flatnonzero(~file["filled"][:])
    batches = np.split(pending, range(_BATCH, len(pending), _BATCH)) if len(pending) else []
    unmarked: list[int] = []
    for number, rows in enumerate(progress(batches, len(batches), name), 1):
        with np.errstate(over="ignore"):  # said below
            maps = encode(rows.tolist()).astype(np.float16)
        if not np.isfinite(maps).all():
            raise InputError(f"{name}: a map is not finite in half precision; set data.cache_gib=0 to do without")
        for row, map_ in zip(rows, maps, strict=True):
            file["maps"][row] = map_
        unmarked += rows.tolist()
        if number % _BATCHES_A_FLUSH == 0 or number == len(batches):
            to_disk(file)
            file["filled"][unmarked] = True
            to_disk(file)
            unmarked = []
