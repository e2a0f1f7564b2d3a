"""The networks whose features are compared, and their features: the maps after each stage, averaged over positions.

The networks are

- the raw ResNet: pretrained, without modulation. It comes from the first run with a frozen ResNet (nothing of it
  trained, population statistics that were not re-estimated, batch norms only), and all such runs must have the same
  one. If all runs are fine-tuned, it is skipped.
- each run with its modulation, if any, under the name of its directory. A run with a frozen ResNet and no conditioned
  norm *is* the raw ResNet and is not repeated (if it has the same preprocessing).

Legend: N pairs of an image and a question, C channels of a stage.
"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.batches import QuestionDataset, batches_by_image
from data.loader import moved
from experiments.evaluate import find_settings, split_data
from experiments.training.loop import read_batches
from vqa.devices import autocast, choose_device
from vqa.io.errors import InputError
from vqa.saved_model import SavedModel, load_model
from vqa.saved_model.files import find_model
from vqa.settings.schema import Settings

RAW = "raw ResNet"
MIN_PAIRS = 20
STAGES = (1, 2, 3, 4)


class Run(NamedTuple):
    """A trained model with questions."""

    name: str
    saved: SavedModel
    settings: Settings
    data: QuestionDataset


class Network(NamedTuple):
    """A row of the figures: a run's model with its modulation, or its ResNet without."""

    name: str
    run: Run
    modulate: bool


def open_runs(folders: Sequence[Path], split: str, overrides: Sequence[str]) -> list[Run]:
    """Load models with all questions of a split.

    Args:
        folders: run directories, or `model/` directories.
        split: a split of their data.
        overrides: `key=value` words over their settings: where the data are, and the device.

    Raises:
        InputError: a run, the split or its data are missing, or a model has no image input.
    """
    runs = []
    for name, folder in zip(shown_names(folders), folders, strict=True):
        _, settings = find_settings(folder, overrides)
        if not settings.views:
            raise InputError(f"{folder}: a model without image input has no features to show")
        saved = load_model(folder, choose_device(settings.device))
        runs.append(Run(name, saved, settings, split_data(saved, settings, split)))
    return runs


def shown_names(folders: Sequence[Path]) -> list[str]:
    """The names of the run directories, with as many parents as make them unique.

    Raises:
        InputError: a directory holds no model, or is given twice.
    """
    models = [find_model(folder).resolve() for folder in folders]
    paths = [model.parent if model.name == "model" else model for model in models]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder}: given twice")
    names = (["/".join(path.parts[-depth:]) for path in paths] for depth in count(1))
    return next(unique for unique in names if len({*unique, RAW}) > len(paths))


def select_pairs(runs: Sequence[Run], split: str, pairs: int, seed: int) -> list[Run]:
    """Reduce the runs to the same random pairs, in order of the question ids.

    Raises:
        InputError: the split has no annotations or too few pairs, or the runs have different questions.
    """
    first = runs[0].data.table
    if not first.given.size:
        raise InputError(f"split {split!r} has no annotations, so no types of answers and questions to compare")
    if min(pairs, len(first)) < MIN_PAIRS:
        raise InputError(
            f"split {split!r} has {len(first)} pairs and {pairs} are asked for; at least {MIN_PAIRS} are needed"
        )
    chosen = np.random.default_rng(seed).choice(np.sort(first.ids), min(pairs, len(first)), replace=False)
    ids = np.sort(chosen).tolist()
    texts = dict(zip(first.ids.tolist(), first.texts, strict=True))
    selected = []
    for run in runs:
        table = run.data.table
        rows = {id_: row for row, id_ in enumerate(table.ids.tolist()) if texts.get(id_) == table.texts[row]}
        if not rows.keys() >= set(ids):
            raise InputError(f"{run.name}: its split {split!r} holds other questions than that of {runs[0].name}")
        of_run = table.select(np.array([rows[id_] for id_ in ids]))
        selected.append(run._replace(data=QuestionDataset(of_run, run.data.images)))
    return selected


def networks_of(runs: Sequence[Run]) -> list[Network]:
    """The networks to compare, the raw ResNet first.

    Raises:
        InputError: runs have different raw ResNets.
    """
    frozen = [run for run in runs if _has_raw_resnet(run)]
    for run in frozen[1:]:
        ours, theirs = (one.saved.model.resnet.state_dict() for one in (frozen[0], run))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key].cpu(), theirs[key].cpu()) for key in ours):
            raise InputError(f"{run.name}: its frozen ResNet differs from that of {frozen[0].name}; compare one ResNet")
    networks = [Network(RAW, frozen[0], modulate=False)] if frozen else []
    for run in runs:
        conditioned = bool(run.saved.model.resnet.layers)
        if conditioned or not _has_raw_resnet(run) or run.saved.preprocessing != frozen[0].saved.preprocessing:
            networks.append(Network(run.name, run, conditioned))
    return networks


def _has_raw_resnet(run: Run) -> bool:
    backbone, cbn = run.settings.backbone, run.settings.cbn
    batch_norms = cbn.normaliser == "batch" or not run.saved.model.resnet.layers
    kept = backbone.train == "none" and backbone.statistics == "population" and batch_norms
    return kept and "recalibrated_on" not in run.saved.training


@torch.inference_mode()
def stage_features(network: Network) -> list[np.ndarray]:
    """Compute the averaged map after each stage, float32 [N, C] in the order of the pairs.

    Raises:
        InputError: an image cannot be read, or a map is not finite.
    """
    _, saved, settings, data = network.run
    device = choose_device(settings.device)
    rows: list[int] = []
    maps: list[list[np.ndarray]] = []
    in_order = batches_by_image(data.table, settings.train.batch_size)
    for batch in moved(read_batches(data, in_order, settings, device, f"{network.name}: features"), device):
        first = batch.places.reshape(len(batch.rows), -1)[:, 0]  # of a question about several images
        images = saved.preprocessing.normalise(batch.images)[first]
        with autocast(device, settings.precision):
            _, modulation = saved.model.encode(images, batch.tokens, batch.lengths, modulate=network.modulate)
            stages = saved.model.resnet.stage_maps(images, modulation)
        maps.append([of_stage.float().mean((2, 3)).cpu().numpy() for of_stage in stages])
        rows += batch.rows.tolist()  # a tensor would keep the worker's shared memory
    order = np.argsort(rows)
    features = [np.concatenate(of_stage)[order] for of_stage in zip(*maps, strict=True)]
    if not all(np.isfinite(of_stage).all() for of_stage in features):
        raise InputError(f"{saved.folder}: its feature maps are not finite")
    return features
