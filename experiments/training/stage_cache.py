"""Where training takes its images from: the pixels, or a cache of the frozen stages' feature maps on disk.

Up to the first stage that is conditioned or trained, a ResNet under `population` statistics gives the same map for the
same image in every epoch. With no stage conditioned (the baseline) that is all of it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from data.batches import Images
from data.h5_file import Store, partial_path
from data.h5_rows import H5Rows, damage_named, mark_rows, opened_for_filling, reserve_rows, structured, write_rows
from experiments.process_group import Processes
from vqa.io.errors import InputError, NotWrittenError
from vqa.io.files import check_room, naming_write_errors, written_whole
from vqa.io.locks import held
from vqa.io.progress import progress
from vqa.preprocessing import Preprocessing
from vqa.resnet import ModulatedResNet, StageMap


@dataclass(frozen=True)
class ImageSource:
    """What stands for the images of a dataset, and how a batch of it becomes the network's input."""

    images: Images  # row → uint8 [S, S, 3], or a map float16 [H, W, C]
    preprocessing: Preprocessing
    channels_last: bool  # memory layout of the input
    stage: int | None = None  # after which the maps are; None: images

    def prepare(self, batch: Tensor) -> Tensor | StageMap:
        """The network's input for a batch of images or maps."""
        prepared = self.preprocessing.normalise(batch) if self.stage is None else batch.permute(0, 3, 1, 2).float()
        if not self.channels_last:
            prepared = prepared.contiguous()
        return prepared if self.stage is None else StageMap(self.stage, prepared)


def choose_images(
    resnet: ModulatedResNet,
    store: Store,
    pixels: ImageSource,
    device: torch.device,
    most_gib: float,
    processes: Processes,
) -> ImageSource:
    """The maps of the last fixed stage, from a file beside the h5 file that the main process makes if it is missing.

    It is `pixels`, the images of the store, where no stage is fixed, or the file would be larger than `most_gib` or
    cannot be written.

    Raises:
        InputError: as `cached_maps`.
    """
    stage = resnet.fixed_stage()
    if stage is None:
        return pixels

    @torch.inference_mode()
    def encode(rows: Sequence[int]) -> np.ndarray:
        images = torch.from_numpy(np.stack([pixels.images[row] for row in rows])).to(device)
        was_training = resnet.training
        maps = resnet.eval().prefix(pixels.preprocessing.normalise(images), stage).map
        resnet.train(was_training)
        return maps.permute(0, 2, 3, 1).cpu().numpy()

    count = len(store.usable)
    if 2 * count * encode([0])[0].size > most_gib * 2**30:
        return pixels
    identity = {"data": store.images_identity, "network": _digest(resnet, stage), "stage": stage}
    file = store.path.with_name(f"{store.path.stem}_stage{stage}_{identity['network'][:8]}.h5")
    maps = None
    if processes.is_main:
        try:
            maps = cached_maps(file, identity, count, encode)
        except NotWrittenError as error:
            processes.say(f"{error}; training goes on without stored maps")
    if not processes.broadcast(maps is not None):
        return pixels
    if maps is None:
        maps = cached_maps(file, identity, count, encode)
    return replace(pixels, images=maps, stage=stage)


def _digest(resnet: ModulatedResNet, stage: int) -> str:
    """Of the weights and statistics of the stages up to `stage`."""
    digest = hashlib.sha256()
    for name, value in resnet.fixed_state(stage):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
