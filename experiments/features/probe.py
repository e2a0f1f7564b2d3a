"""Linear probes of the features of a pretrained backbone, stage by stage.

A photograph's features are the map after a stage, averaged over positions and standardised. A logistic regression on
them is trained with photographs that the backbone was trained on, and tested with held-out ones. The targets are

- class and group (where there are groups) of photographs as they are, mirrored at random;
- tint: which of the four tints a tinted photograph has;
- grey, dark, upside down: changed so or not, both mirrored at random;
- mirrored: mirrored or as it is.

In the last four each photograph occurs both ways, so that chance is 50 %; else chance is the share of the most common
class, group or tint in what is tested.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data.labelled_images import LabelledImages
from data.scenes.photos import PLAIN, TINTS, changed
from experiments.machine import surroundings
from experiments.pretrain import header_of, identity_of
from experiments.tables import aligned
from vqa.io.errors import InputError
from vqa.io.files import write_json
from vqa.io.progress import progress
from vqa.preprocessing import Preprocessing
from vqa.resnet import ModulatedResNet

MOST = 4000  # photographs to train with, and to test with
CHANGED = ("grey", "dark", "upside down")
STRENGTH = 0.1  # inverse of the regression's L2 penalty
SEED = 0  # of the photographs, the tints and the mirroring
Labelled = tuple[list[np.ndarray], np.ndarray]  # the features after each stage, [N, C] each, and their labels, [N]


def probe(file: Path, source: Path, device: torch.device) -> list[dict[str, Any]]:
    """Probe a backbone that `pretrain_on_images` wrote; write `FILE.probe.json`.

    Args:
        file: the backbone.
        source: the images that it was pretrained on.
        device: where features are computed.

    Returns:
        For each stage and target `stage`, `target`, in percent `accuracy`, `chance` and `fitted` (the accuracy where it
        was fitted), and `tested`, the number of features that were tested.

    Raises:
        InputError: `file` is not such a backbone, or one of other images, or an image cannot be read.
    """
    header, images = header_of(file), LabelledImages(source)
    if (theirs := header.get("images")) != (ours := identity_of(images)):
        raise InputError(f"{file}: pretrained on images {theirs}, but {source} has {ours}")
    try:
        resnet = ModulatedResNet(header["name"], file, stages=()).to(device)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    size, rng = header["image_size"], np.random.default_rng(SEED)
    chosen = [
        np.sort(rng.permutation(np.arange(*ends))[:MOST])
        for ends in ((0, images.training), (images.training, len(images.names)))
    ]
    known, held_out = (_labelled(images, rows, size, resnet, rng) for rows in chosen)
    found = []
    for target, (seen, labels) in progress(known.items(), len(known), "probes"):
        tested, true = held_out[target]
        if len(np.unique(labels)) < 2:
            continue
        chance = np.unique(true, return_counts=True)[1].max() / len(true)
        for stage, (ours, theirs) in enumerate(zip(seen, tested, strict=True), 1):
            regression = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
            regression.fit(ours, labels)
            shares = {"accuracy": regression.score(theirs, true), "chance": chance}
            shares["fitted"] = regression.score(ours, labels)
            shares = {name: 100 * float(share) for name, share in shares.items()}
            found.append({"stage": stage, "target": target, **shares, "tested": len(true)})
    made = {
        "photographs": [len(rows) for rows in chosen],
        "C": STRENGTH,
        "seed": SEED,
        "scikit_learn": sklearn.__version__,
        "machine": surroundings(device),
    }
    write_json(file.with_name(f"{file.name}.probe.json"), {"backbone": header, "probe": made, "rows": found})
    return found


@torch.inference_mode()
def _features(resnet: ModulatedResNet, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The averaged map after each stage, [N, C] each, of images uint8 [S, S, 3]."""
    device, prepare, parts = next(resnet.parameters()).device, Preprocessing(len(pixels[0])).normalise, []
    for part in torch.from_numpy(np.stack(pixels)).split(256):
        maps = resnet.stage_maps(prepare(part.to(device)))
        parts.append([map_.mean((2, 3)).cpu().numpy() for map_ in maps])
    return [np.concatenate(of_stage) for of_stage in zip(*parts, strict=True)]


def _labelled(
    images: LabelledImages, rows: np.ndarray, size: int, resnet: ModulatedResNet, rng: np.random.Generator
) -> dict[str, Labelled]:
    """The features and labels of each target."""
    pixels = [images.decode(images.names[row], size) for row in progress(rows.tolist(), len(rows), "photographs")]

    def either(one: list[np.ndarray], other: list[np.ndarray]) -> Labelled:
        both = [np.concatenate(of_stage) for of_stage in zip(one, other, strict=True)]
        return both, np.repeat([False, True], len(rows))

    def after(changes: Sequence[str]) -> list[np.ndarray]:
        return _features(resnet, [changed(one, change, rng) for one, change in zip(pixels, changes, strict=True)])

    plain, classes = after([PLAIN] * len(rows)), images.labels[rows]
    labelled: dict[str, Labelled] = {"class": (plain, classes)}
    if images.groups is not None:
        labelled["group"] = plain, np.array(images.groups)[classes]
    tints = rng.choice(TINTS, len(rows))
    labelled["tint"] = after(tints), tints
    labelled |= {change: either(plain, after([change] * len(rows))) for change in CHANGED}
    mirrored = _features(resnet, [one[:, ::-1] for one in pixels])
    return labelled | {"mirrored": either(_features(resnet, pixels), mirrored)}


def probe_table(found: Sequence[dict[str, Any]]) -> str:
    """The results as text: one line per stage, one column per target, and a line of chance."""
    targets = list(dict.fromkeys(row["target"] for row in found))
    value = {(row["stage"], row["target"]): row["accuracy"] for row in found}
    value |= {("chance", row["target"]): row["chance"] for row in found}
    lines = [(stage, f"stage {stage}") for stage in dict.fromkeys(row["stage"] for row in found)]
    lines.append(("chance", "chance"))
    cells = [[said, *(f"{value[stage, target]:.1f}" for target in targets)] for stage, said in lines]
    return aligned([["read from held-out photographs, %", *targets], *cells])
