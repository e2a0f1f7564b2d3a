"""Cache of the fixed stages' feature maps on disk, which training reads in place of the images.

Up to the first stage that is conditioned or trained, a ResNet under `population` statistics computes the same map of an
image in every epoch. With no stage conditioned (the baseline) that is the whole network. The file:

    /       attribute: identity (JSON: of what images, by what network, after which stage)
    maps    float16 [N, H, W, C], channels last as convolutions read them
    crc32   uint32 [N], verified when a row is read
    filled  bool [N]: rows that are on the disk

It is `NAME.partial` until every row is filled, so a killed run loses what was not flushed, and a partial file is never
taken for a complete one.
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

from data.batches import Images, NoImages
from data.h5_file import H5Images, partial_path
from data.h5_rows import H5Rows, damage_named, mark_rows, opened_for_filling, reserve_rows, structured, write_rows
from experiments.process_group import Processes
from experiments.tasks import Task
from vqa.io.errors import InputError, NotWrittenError
from vqa.io.files import check_room, naming_write_errors, written_whole
from vqa.io.locks import held, lock_beside
from vqa.io.progress import progress
from vqa.preprocessing import Preprocessing
from vqa.resnet import ModulatedResNet, StageMap


@dataclass(frozen=True)
class NetworkInput:
    """Images, or the feature maps in their place, and how a batch of them becomes the network's input."""

    images: Images  # row → uint8 [S, S, 3], or a map float16 [H, W, C]
    preprocessing: Preprocessing
    channels_last: bool  # memory layout of the input
    stage: int | None = None  # of the maps; None: images

    def prepare(self, batch: Tensor) -> Tensor | StageMap:
        """The network's input for a batch of images or maps."""
        prepared = self.preprocessing.normalise(batch) if self.stage is None else batch.permute(0, 3, 1, 2).float()
        if not self.channels_last:
            prepared = prepared.contiguous()
        return prepared if self.stage is None else StageMap(self.stage, prepared)


def choose_images(task: Task, resnet: ModulatedResNet, processes: Processes) -> NetworkInput:
    """The maps of the last fixed stage, from a file beside the h5 file that the main process makes if it is missing; or
    the images, if they are augmented or not used, if no stage is fixed, or if the file would be larger than
    `data.cache_gib` or cannot be written. Raises InputError as `cached_maps`.
    """
    store, settings = task.store, task.settings
    known = np.where(store.usable, store.checksums, 0)  # stand-ins may be repaired meanwhile
    images = H5Images(store.path, known) if settings.views else NoImages()
    pixels = NetworkInput(images, task.preprocessing, settings.speed.channels_last)
    if not settings.views:
        return pixels
    if (kind := settings.train.augment) != "none":
        processes.say(
            f"train.augment: {kind} changes each question's image in every epoch, so stored feature maps "
            "(data.cache_gib) and, in training, shared images (speed.share_images) are not used"
        )
        return pixels
    stage = resnet.fixed_stage()
    if stage is None:
        return pixels
    device = next(resnet.parameters()).device

    @torch.inference_mode()
    def encode(rows: Sequence[int]) -> np.ndarray:
        images = torch.from_numpy(np.stack([pixels.images[row] for row in rows])).to(device)
        maps = resnet.eval().prefix(pixels.preprocessing.normalise(images), stage).map
        return maps.permute(0, 2, 3, 1).cpu().numpy()

    count = len(store.usable)
    if 2 * count * encode([0])[0].size > settings.data.cache_gib * 2**30:
        return pixels
    identity = {"data": store.images_identity, "network": _digest(resnet, stage), "stage": stage}
    file = store.path.with_name(f"{store.path.name.removesuffix('.h5')}_stage{stage}_{identity['network'][:8]}.h5")

    def stored() -> H5Rows | None:
        try:
            return cached_maps(file, identity, count, encode)
        except NotWrittenError as error:
            print(f"{error}; training continues without stored feature maps", flush=True)
            return None

    maps = processes.on_main(stored)
    return pixels if maps is None else replace(pixels, images=maps, stage=stage)


def _digest(resnet: ModulatedResNet, stage: int) -> str:
    """SHA-256 of the weights and statistics of the stages up to `stage`."""
    digest = hashlib.sha256()
    for name, value in resnet.fixed_state(stage):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


_REMEDY = "remove it; it is made again"
_BATCH = 64  # images encoded at once
_SECONDS_A_FLUSH = 2.0


def cached_maps(
    path: Path, identity: dict[str, Any], count: int, encode: Callable[[Sequence[int]], np.ndarray]
) -> H5Rows:
    """The maps of `count` images, float16 [H, W, C] each; what is missing in the file is encoded first.

    `identity` is what the maps depend on: a file of another identity is refused. `encode` makes the maps of some rows,
    [B, H, W, C].

    Raises:
        InputError: the file is of other data or another network, or damaged, or a map does not fit into half precision.
        NotWrittenError: it does not exist and cannot be written, or does not fit on its disk.
    """
    if not path.exists():
        # several runs may need it at once: one makes it, the others wait
        with held(lock_beside(path), path, wait=True):
            if not path.exists():
                _make(path, identity, count, encode)
    with damage_named(path, _REMEDY), h5py.File(path, "r", locking=False) as file:
        _check_identity(path, file, identity)
        return H5Rows(path, "maps", _REMEDY, file["crc32"][:])


def _make(path: Path, identity: dict[str, Any], count: int, encode: Callable[[Sequence[int]], np.ndarray]) -> None:
    partial, without = partial_path(path), "set data.cache_gib=0 to do without"
    if not partial.exists():
        shape = (count, *encode([0])[0].shape)
        with written_whole(partial) as aside, structured(aside, "w") as file:
            file.attrs["identity"] = json.dumps(identity)
            reserve_rows(file, "maps", shape, np.float16)
    with opened_for_filling(partial) as file:
        with damage_named(partial, _REMEDY):
            _check_identity(partial, file, identity)
            pending = np.flatnonzero(~file["filled"][:]).tolist()
            size = file["maps"].nbytes + file["crc32"].nbytes
        check_room(partial, size, without)
        written: list[int] = []  # and not yet marked
        flushed = time.monotonic()
        try:
            for start in progress(range(0, len(pending), _BATCH), -(-len(pending) // _BATCH), path.name):
                rows = pending[start : start + _BATCH]
                with np.errstate(over="ignore"):  # refused in the next lines
                    maps = encode(rows).astype(np.float16)
                if not np.isfinite(maps).all():
                    raise InputError(f"{path.name}: a map is not finite in half precision; {without}")
                write_rows(file, "maps", rows, maps)
                written += rows
                if time.monotonic() - flushed >= _SECONDS_A_FLUSH:
                    mark_rows(file, "maps", written)
                    written, flushed = [], time.monotonic()
        finally:  # also when a signal ends it
            mark_rows(file, "maps", written)
    with naming_write_errors(path):
        partial.replace(path)


def _check_identity(path: Path, file: h5py.File, identity: dict[str, Any]) -> None:
    found = json.loads(file.attrs["identity"])
    for key in identity.keys() | found.keys():
        if found.get(key) != identity.get(key):
            raise InputError(f"{path}: made with another {key}; remove it")
