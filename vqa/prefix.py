"""What the fixed first stages make of every picture, computed once and read from then on.

Up to the first stage that is conditioned or trained, a ResNet under `population` statistics gives the same map for the
same picture in every epoch. With no stage conditioned (the baseline) that is all of it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from data.maps import cached_maps
from data.rows import H5Rows
from data.store import H5Images, Store
from vqa.preprocessing import Preprocessing
from vqa.resnet import ModulatedResNet, StageMap


def prefix_maps(
    resnet: ModulatedResNet, store: Store, preprocessing: Preprocessing, device: torch.device, most_gib: float
) -> tuple[int, H5Rows] | None:
    """The last fixed stage and its maps of all pictures, from a file beside the h5 file that is made if it is missing.

    Args:
        resnet: the network, on its device; what is trained of it is marked so.
        store: the pictures.
        preprocessing: what is done to a picture first.
        device: where it is computed.
        most_gib: the largest file that may be made, in GiB.

    Returns:
        None where no stage is fixed or the file would be larger.

    Raises:
        InputError: as `cached_maps`; NotWrittenError, too.
    """
    stage = resnet.fixed_stage()
    if stage is None:
        return None
    images = H5Images(store.path)

    @torch.inference_mode()
    def encode(rows: Sequence[int]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([images[row] for row in rows])).to(device)
        was_training = resnet.training
        maps = resnet.eval().prefix(preprocessing.normalise(pixels), stage).map
        resnet.train(was_training)
        return maps.permute(0, 2, 3, 1).cpu().numpy()

    count = len(store.usable)
    if 2 * count * encode([0])[0].size > most_gib * 2**30:
        return None
    identity = {"data": store.images_identity, "network": _digest(resnet, stage), "stage": stage}
    name = f"{store.path.stem}_stage{stage}_{identity['network'][:8]}.h5"
    return stage, cached_maps(store.path.with_name(name), identity, count, encode)


def as_stage_map(stage: int, maps: torch.Tensor) -> StageMap:
    """A batch of stored maps float16 [B, H, W, C] as the network takes it."""
    return StageMap(stage, maps.permute(0, 3, 1, 2).float())


def _digest(resnet: ModulatedResNet, stage: int) -> str:
    """Of the weights and statistics of the stages up to `stage`."""
    digest = hashlib.sha256()
    for name, value in resnet.fixed_state(stage):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
