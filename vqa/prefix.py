"""Where training takes its images from: the pixels, or a cache of the frozen stages' feature maps on disk.

Up to the first stage that is conditioned or trained, a ResNet under `population` statistics gives the same map for the
same image in every epoch. With no stage conditioned (the baseline) that is all of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.errors import NotWrittenError
from data.loading import Images
from data.maps import cached_maps
from data.store import Store
from vqa.distributed import Processes
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
