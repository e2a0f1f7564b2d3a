"""Folders of labelled images: classes, groups, and images held out of each class."""

from pathlib import Path

import numpy as np
from PIL import Image

GROUPS = {"big_cat": ("lion", "tiger"), "insect": ("ant", "bee"), "car": ("taxi", "jeep"), "tree": ("oak", "elm")}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def photographs(folder: Path) -> Path:
    """Four images of noise a class, where the folder is not there yet."""
    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    for name in GROUP_OF:
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    table = "".join(f"{name},{group}\n" for name, group in GROUP_OF.items())
    (folder / "classes.csv").write_text("class,group\n" + table)
    return folder


def coloured(folder: Path) -> Path:
    """Three classes of 20 noisy images, each of its colour."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(colour + rng.normal(0, 30, (24, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder
