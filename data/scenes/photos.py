"""Mosaics of labelled photographs: four in a 2 x 2 grid, of which some are tinted, grey, dark or upside down.

A question needs the change of a photograph and its group (or class), which a network pretrained on such photographs
names. Every photograph is mirrored at random, which no question is about.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.labelled_images import LabelledImages
from data.scenes.asking import Candidates, Kind, SceneQuestion, counts, existence, pair_kinds, with_article
from data.scenes.asking import ask as ask_in_rounds
from data.scenes.draw import COLOURS, jittered
from data.scenes.small import ALIKE, COUNT_WEIGHTS
from vqa.io.errors import InputError
from vqa.text.tokenizer import unusable

PLAIN = "plain"
TINTS = ("red", "green", "blue", "yellow")
CHANGES = (PLAIN, *TINTS, "grey", "dark", "upside down")
_TINT = 0.4  # share of the colour in a tinted photograph
_DARK = 0.35  # factor of the pixels of a dark one


class Tile(NamedTuple):
    """One photograph of a mosaic."""

    group: str
    class_: str
    change: str
    row: int  # of the photograph in its `LabelledImages`


@cache
def photographs(source: str) -> LabelledImages:
    """The labelled images of a folder or zip file, listed once a process.

    Raises:
        InputError: as `LabelledImages`, there are fewer than three groups, or a class has a name that no file can hold.
    """
    images = LabelledImages(Path(source))
    if len(_pool(images, True)) < 3:
        raise InputError(f"{source}: mosaics need at least three groups of classes that have held-out images")
    for name in images.classes:
        if wrong := unusable(name):
            raise InputError(f"{source}: class {name!r} is {wrong}")
    return images


@cache
def _pool(images: LabelledImages, held_out: bool) -> dict[str, list[np.ndarray]]:
    """The rows of the photographs that are held out, or of the others: of each class, by its group."""
    start, end = (images.training, len(images.names)) if held_out else (0, images.training)
    pool: dict[str, list[np.ndarray]] = {}
    for label in np.unique(images.labels[start:end]).tolist():
        rows = start + np.flatnonzero(images.labels[start:end] == label)
        pool.setdefault((images.groups or images.classes)[label], []).append(rows)
    return pool


def sample_mosaic(rng: np.random.Generator, images: LabelledImages, held_out: bool) -> list[Tile]:
    """Sample four photographs, of those that are held out or of the others; groups are equally likely, and classes in
    a group.
    """
    groups = sorted(_pool(images, True))  # the others have these, too
    alike = int(rng.choice(len(ALIKE), p=ALIKE))  # share a group or a change, as objects of the small scenes
    named = [groups[index] for index in rng.integers(len(groups), size=4)]
    changes = [CHANGES[index] for index in rng.integers(len(CHANGES), size=4)]
    values = named if rng.random() < 0.5 else changes
    values[:alike] = values[:1] * alike
    mosaic = []
    for index in rng.permutation(4).tolist():
        classes = _pool(images, held_out)[named[index]]
        row = int(rng.choice(classes[rng.integers(len(classes))]))
        mosaic.append(Tile(named[index], images.classes[images.labels[row]], changes[index], row))
    return mosaic


def draw_mosaic(mosaic: Sequence[Tile], images: LabelledImages, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a mosaic as uint8 [size, size, 3]. Raises InputError if a photograph cannot be read."""
    half = -(-size // 2)
    tiles = [changed(images.decode(images.names[tile.row], half), tile.change, rng) for tile in mosaic]
    rows = [np.concatenate(pair, axis=1) for pair in (tiles[:2], tiles[2:])]
    return np.concatenate(rows)[:size, :size]


def changed(pixels: np.ndarray, change: str, rng: np.random.Generator) -> np.ndarray:
    """Change one photograph, uint8 [S, S, 3], and mirror it with probability ½; `rng` samples that and the tint."""
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    match change:
        case "upside down":
            return pixels[::-1]
        case "dark":
            return (_DARK * pixels).astype(np.uint8)
        case "grey":
            return (pixels @ np.array([0.299, 0.587, 0.114]))[..., None].repeat(3, axis=2).astype(np.uint8)
        case tint if tint in COLOURS:
            return ((1 - _TINT) * pixels + _TINT * np.array(jittered(rng, tint))).astype(np.uint8)
    return pixels


def changed_at_random(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change each of the photographs, uint8 [B, S, S, 3], by one of CHANGES."""
    changes = rng.integers(len(CHANGES), size=len(pixels))
    return np.stack([changed(one, CHANGES[change], rng) for one, change in zip(pixels, changes, strict=True)])


def _said(name: str) -> str:
    return name.replace("_", " ")


def _predicate(change: str) -> str:
    return f"tinted {change}" if change in TINTS else change


def _tints(mosaic: Sequence[Tile]) -> Candidates:
    """Ask for the tint of the only photograph of its group or class."""
    number = Counter(name for tile in mosaic for name in {tile.group, tile.class_})
    return [
        (_said(name), tile.change, 1.0)
        for tile in mosaic
        if tile.change in TINTS
        for name in sorted({tile.group, tile.class_})
        if number[name] == 1
    ]


def _groups(mosaic: Sequence[Tile]) -> Candidates:
    """Ask for the group of the only photograph with a change."""
    number = Counter(tile.change for tile in mosaic)
    return [
        (_predicate(tile.change), _said(tile.group), 1.0)
        for tile in mosaic
        if tile.change != PLAIN and number[tile.change] == 1
    ]


def _counts(mosaic: Sequence[Tile], groups: Sequence[str]) -> Candidates:
    subjects = {group: f"show {with_article(_said(group))}" for group in groups}
    subjects |= {change: f"are {_predicate(change)}" for change in CHANGES if change != PLAIN}
    return counts((value for tile in mosaic for value in (tile.group, tile.change)), subjects, COUNT_WEIGHTS)


def _existence(mosaic: Sequence[Tile], groups: Sequence[str]) -> Candidates:
    kinds = pair_kinds([(tile.group, tile.change) for tile in mosaic], groups, CHANGES)
    asked = (
        [
            with_article(f"{change} tinted" if change in TINTS else change, _said(group))
            for group, change in kind
            if change != PLAIN
        ]
        for kind in kinds
    )
    return existence(*asked)


def ask(mosaic: Sequence[Tile], images: LabelledImages, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Ask `count` (at most MAX_QUESTIONS) different questions; sources of three groups or more have as many."""
    groups = sorted(_pool(images, True))
    kinds = (
        Kind("what color", "other", ("is the {} tinted?", "is the picture of the {} tinted?"), _tints),
        Kind("what is", "other", ("{}?", "in the picture that is {}?"), _groups),
        Kind("how many", "number", ("pictures {}?", "of the pictures {}?"), lambda tiles: _counts(tiles, groups)),
        Kind("is there", "yes/no", ("{}?", "{} in a picture?"), lambda tiles: _existence(tiles, groups)),
    )
    return ask_in_rounds(kinds, mosaic, rng, count)
