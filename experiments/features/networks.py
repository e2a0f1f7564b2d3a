"""The networks whose features are compared, and what each of their stages makes of the same pairs.

The features are the maps after each stage, averaged over their positions, of pairs of an image and a question. The
networks are:

- the raw ResNet: as it was pretrained, hearing no question. It is that of the first run whose ResNet is frozen (nothing
  of it trained, population statistics that were not re-estimated, no norms but batch norms), without the modulation.
  All such runs must be of one ResNet; where there is none (fine-tuned networks alone) the raw one is left out.
- each run with its modulation, if any, by its directory's name. A run of a frozen ResNet that conditions nothing *is*
  the raw ResNet and is not shown again (if it sees images of the same size).

Legend: N pairs, C channels of a stage.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.batches import QuestionDataset, batches_by_image
from experiments.evaluate import check_overrides, split_data
from experiments.training.loop import read_batches
from vqa.devices import autocast, choose_device
from vqa.io.errors import InputError
from vqa.saved_model import Bundle, find_model, load_bundle
from vqa.settings.recipes import load_saved
from vqa.settings.schema import Settings

RAW = "raw ResNet"
MIN_PAIRS = 20
STAGES = (1, 2, 3, 4)


class Run(NamedTuple):
    """A trained model with the questions that it is shown."""

    name: str
    bundle: Bundle
    settings: Settings
    device: torch.device
    data: QuestionDataset


class Network(NamedTuple):
    """A row of the figures: a run's model with its modulation, or its ResNet without."""

    name: str
    run: Run
    modulate: bool


def open_runs(folders: Sequence[Path], split: str, overrides: Sequence[str]) -> list[Run]:
    """The models with all questions of a split.

    Args:
        folders: run directories, or `model/` directories.
        split: a split of their data.
        overrides: `key=value` words over their settings: where the data are, and the device.

    Raises:
        InputError: a run, the split or its data are not there, or a model sees no images.
    """
    check_overrides(overrides)
    runs = []
    for name, folder in zip(shown_names(folders), map(find_model, folders), strict=True):
        settings = load_saved(folder / "config.yaml", overrides)
        if "image" not in settings.inputs:
            raise InputError(f"{folder}: a model that does not see the image has no features to show")
        device = choose_device(settings.device)
        bundle = load_bundle(folder, device)
        runs.append(Run(name, bundle, settings, device, split_data(bundle, settings, split)))
    return runs


def shown_names(folders: Sequence[Path]) -> list[str]:
    """The directories' names, with as many parents' as tell them apart.

    Raises:
        InputError: a directory holds no model, or is given twice.
    """
    paths = [find_model(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1)
        raise InputError(f"{twice}: given twice")
    parts = [path.parent.parts if path.name == "model" else path.parts for path in paths]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(of_one[-depth:]) for of_one in parts]
        if len({*names, RAW}) == len(names) + 1:
            break
    return names


def show_same_pairs(runs: Sequence[Run], split: str, pairs: int, seed: int) -> list[Run]:
    """The runs with the same random pairs each, in order of the questions' ids.

    Raises:
        InputError: the split has no annotations or too few pairs, or runs are of different questions.
    """
    first = runs[0].data.table
    if not first.given.size:
        raise InputError(f"split {split!r} has no annotations, so no types of answers and questions to tell apart")
    if min(pairs, len(first)) < MIN_PAIRS:
        raise InputError(
            f"split {split!r} has {len(first)} pairs and {pairs} are asked for; {MIN_PAIRS} are the fewest to compare"
        )
    ids = np.sort(first.ids)
    ids = np.sort(np.random.default_rng(seed).choice(ids, min(pairs, len(ids)), replace=False))
    texts = dict(zip(first.ids.tolist(), first.texts, strict=True))
    shown = []
    for run in runs:
        table = run.data.table
        rows = {id_: row for row, id_ in enumerate(table.ids.tolist())}
        if any(id_ not in rows or table.texts[rows[id_]] != texts[id_] for id_ in ids.tolist()):
            raise InputError(f"{run.name}: its split {split!r} holds other questions than that of {runs[0].name}")
        chosen = table.select(np.array([rows[id_] for id_ in ids.tolist()]))
        shown.append(run._replace(data=QuestionDataset(chosen, run.data.images)))
    return shown


def networks_of(runs: Sequence[Run]) -> list[Network]:
    """The networks to compare, the raw ResNet first.

    Raises:
        InputError: runs are of different raw ResNets.
    """
    frozen = [run for run in runs if _has_raw_resnet(run)]
    for run in frozen[1:]:
        ours, theirs = (one.bundle.model.resnet.state_dict() for one in (frozen[0], run))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key].cpu(), theirs[key].cpu()) for key in ours):
            raise InputError(f"{run.name}: its frozen ResNet is another than that of {frozen[0].name}: not to compare")
    networks = [Network(RAW, frozen[0], modulate=False)] if frozen else []
    for run in runs:
        conditioned = bool(run.bundle.model.resnet.layers)
        if conditioned or not _has_raw_resnet(run) or run.bundle.preprocessing != frozen[0].bundle.preprocessing:
            networks.append(Network(run.name, run, conditioned))
    return networks


def _has_raw_resnet(run: Run) -> bool:
    backbone, cbn = run.settings.backbone, run.settings.cbn
    batch_norms = cbn.normaliser == "batch" or not run.bundle.model.resnet.layers
    kept = backbone.train == "none" and backbone.statistics == "population" and batch_norms
    return kept and "recalibrated_on" not in run.bundle.training


@torch.inference_mode()
def stage_features(network: Network) -> list[np.ndarray]:
    """The averaged map after each stage, float32 [N, C] in the order of the pairs.

    Raises:
        InputError: an image cannot be read, or a map is not finite.
    """
    _, bundle, settings, device, data = network.run
    parts: list[list[np.ndarray]] = [[] for _ in STAGES]
    rows = []
    in_order = batches_by_image(data.table, settings.train.batch_size)
    for batch in read_batches(data, in_order, settings, device, f"{network.name}: features"):
        moved = batch.to(device)
        images, modulation = bundle.preprocessing.normalise(moved.images)[moved.places], None
        with autocast(device, settings.precision):
            if network.modulate:
                modulation = bundle.model(images, moved.tokens, moved.lengths).modulation
            for part, map_ in zip(parts, bundle.model.resnet.stage_maps(images, modulation), strict=True):
                part.append(map_.float().mean((2, 3)).cpu().numpy())
        rows.append(batch.rows.numpy().copy())  # else it holds a worker's memory
    order = np.argsort(np.concatenate(rows))
    features = [np.concatenate(part)[order] for part in parts]
    if not all(np.isfinite(of_stage).all() for of_stage in features):
        raise InputError(f"{bundle.folder}: its feature maps are not finite")
    return features
