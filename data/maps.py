"""A cache of feature maps: one array an image in an h5 file, half precision, written as safely as a store.

    /       attributes: identity (JSON: of what data, by what network), complete
    maps    float16 [N, H, W, C], channels last as convolutions read them
    crc32   uint32 [N]
    filled  bool [N]

A row is marked in `filled` only after it was flushed to the disk, and the file (`NAME.partial` until then) takes its
name when every row is filled: a killed run loses what was not flushed, and nothing half-written is taken for whole. A
row that is read is verified by its checksum.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.errors import InputError
from data.files import naming_write_errors, written_whole
from data.locks import held
from data.progress import progress
from data.rows import H5Rows, damage_named, mark_rows, opened_for_filling, reserve_rows, structured, write_rows
from data.space import check_room
from data.store import partial_path

_REMEDY = "remove it; it is made again"
_BATCH = 64  # images encoded at once
_SECONDS_A_FLUSH = 2.0  # from one to the next


def cached_maps(
    path: Path, identity: dict[str, Any], count: int, encode: Callable[[Sequence[int]], np.ndarray]
) -> H5Rows:
    """The maps of `count` images, float16 [H, W, C] each; what is missing in the file is encoded first.

    Args:
        path: the file.
        identity: what the maps depend on; a file of another identity is refused.
        count: N.
        encode: the maps of some rows, [B, H, W, C].

    Raises:
        InputError: the file is of other data or another network, or damaged, or a map does not fit into half precision.
        NotWrittenError: it is not there and cannot be written, or does not fit on its disk.
    """
    if not path.exists():
        # several runs may need it at once: one makes it, the others wait
        with held(path.with_name(f".{path.name}.lock"), path, wait=True):
            if not path.exists():
                _make(path, identity, count, encode)
    with damage_named(path, _REMEDY), h5py.File(path, "r", locking=False) as file:
        _check(path, file, identity)
    return H5Rows(path, "maps", _REMEDY)


def _make(path: Path, identity: dict[str, Any], count: int, encode: Callable[[Sequence[int]], np.ndarray]) -> None:
    partial = partial_path(path)
    if not partial.exists():
        _begin(partial, identity, count, encode([0])[0].shape)
    with opened_for_filling(partial) as file:
        with damage_named(partial, _REMEDY):
            _check(partial, file, identity)
            pending = np.flatnonzero(~file["filled"][:])
            size = file["maps"].nbytes + file["crc32"].nbytes
        check_room(partial, size, "set data.cache_gib=0 to do without")
        _fill(file, pending, encode, path.name)
    with naming_write_errors(path):
        with structured(partial, "r+") as file:
            file.attrs.modify("complete", True)
        partial.replace(path)


def _check(path: Path, file: h5py.File, identity: dict[str, Any]) -> None:
    found = json.loads(file.attrs.get("identity", "{}"))
    for key in identity.keys() | found.keys():
        if found.get(key) == identity.get(key):
            continue
        raise InputError(f"{path}: made with another {key}; remove it")


def _begin(partial: Path, identity: dict[str, Any], count: int, shape: tuple[int, ...]) -> None:
    with written_whole(partial) as aside, structured(aside, "w") as file:
        file.attrs.update(identity=json.dumps(identity), complete=False)
        reserve_rows(file, "maps", (count, *shape), np.float16)


def _fill(file: h5py.File, pending: np.ndarray, encode: Callable[[Sequence[int]], np.ndarray], name: str) -> None:
    batches = np.split(pending, range(_BATCH, len(pending), _BATCH)) if len(pending) else []
    unmarked: list[int] = []
    flushed = time.monotonic()
    try:
        for rows in progress(batches, len(batches), name):
            with np.errstate(over="ignore"):  # said below
                maps = encode(rows.tolist()).astype(np.float16)
            if not np.isfinite(maps).all():
                raise InputError(f"{name}: a map is not finite in half precision; set data.cache_gib=0 to do without")
            write_rows(file, "maps", rows.tolist(), maps)
            unmarked += rows.tolist()
            if time.monotonic() - flushed >= _SECONDS_A_FLUSH:
                mark_rows(file, "maps", unmarked)
                unmarked, flushed = [], time.monotonic()
    finally:  # also when a signal ends it
        mark_rows(file, "maps", unmarked)
