"""Draw the synthetic scenes: flat shapes on a noisy background."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from typing import NamedTuple

import numpy as np

# Far enough from 0 and 255 for the jitter.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (40, 165, 50),
    "blue": (40, 75, 225),
    "yellow": (235, 215, 45),
    "purple": (165, 50, 185),
    "cyan": (60, 215, 220),
    "orange": (235, 125, 25),
    "pink": (235, 150, 195),
}
_COLOUR_JITTER = 20  # at most, for each of R, G, B


def _folded(x: np.ndarray, y: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Fold a figure of `times`-fold symmetry onto half of its part that points up; return (along, across)."""
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    step = 2 * pi / times
    angle = abs(angle - step * np.round(angle / step))
    return radius * np.cos(angle), radius * np.sin(angle)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    along, across = _folded(x, y, 5)  # a point, and the edge from it (1, 0) to the notch beside it
    notch = (0.45 * cos(pi / 5), 0.45 * sin(pi / 5))
    return ((along - 1) * notch[1] + across * (1 - notch[0])) / np.hypot(1 - notch[0], notch[1]).item()


# Signed distance to the outline, negative inside, at (x, y) from the centre; y points down, the object's radius is 1.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(y - 0.75, 0.868 * abs(x) - 0.496 * (y + 1)),
    "cross": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 1, np.minimum(abs(x), abs(y)) - 0.32),
    "star": _star,
    "pentagon": lambda x, y: _folded(x, -y, 5)[0] - 0.8,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.22,
    "diamond": lambda x, y: 0.857 * abs(x) + 0.514 * abs(y) - 0.514,
}
SHAPES: tuple[str, ...] = tuple(_OUTLINES)


class Look(NamedTuple):
    """The conditions of an image; the noise's range is between its least and its greatest value."""

    background: tuple[float, float] = (85.0, 145.0)  # range of an image's grey level
    noise: float = 60.0
    noise_on_objects: float = 20.0
    light: float = 1.0  # factor of all pixels


LOOKS: dict[str, Look] = {
    "plain": Look(),
    "dark": Look(light=0.4),
    "noisy": Look(noise=150.0, noise_on_objects=80.0),
    "bright": Look(background=(175.0, 235.0)),
}


@dataclass(frozen=True)
class SceneObject:
    """One object; lengths are fractions of the image's side, places from its top left corner."""

    shape: str
    colour: str
    centre: tuple[float, float]  # x, y
    radius: float
    rgb: tuple[int, int, int]  # the colour with its jitter
    size: str = ""  # name of its radius, in worlds that ask for it
    tilt: float = 0.0  # clockwise, in radians

    @property
    def pair(self) -> tuple[str, str]:
        """Shape and colour."""
        return self.shape, self.colour


Scene = Sequence[SceneObject]  # they do not overlap


def jittered(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    """Sample R, G, B around a named colour."""
    red, green, blue = (COLOURS[colour] + rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)).tolist()
    return red, green, blue


def coverage(item: SceneObject, size: int) -> np.ndarray:
    """Return how much of each pixel an object covers, [size, size] (height, width), 0 to 1."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size  # [S], centres of the pixels
    right = (axis[None, :] - item.centre[0]) / item.radius
    down = (axis[:, None] - item.centre[1]) / item.radius
    x = cos(item.tilt) * right + sin(item.tilt) * down  # [S, S], in the object's own axes
    y = cos(item.tilt) * down - sin(item.tilt) * right
    distance = _OUTLINES[item.shape](x, y) * item.radius * size  # [S, S], in pixels
    return np.clip(0.5 - distance, 0, 1)  # smooths the edge over one pixel


def draw_scene(scene: Scene, size: int, rng: np.random.Generator, look: Look = LOOKS["plain"]) -> np.ndarray:
    """Draw a scene as uint8 [size, size, 3] (height, width, RGB); `rng` samples the background and the noise."""
    noise = rng.random((3, size, size), dtype=np.float32) - 0.5
    image = rng.uniform(*look.background) + look.noise * noise  # [3, S, S]
    for item in scene:
        covered = coverage(item, size)
        image += covered * (np.float32(item.rgb)[:, None, None] + look.noise_on_objects * noise - image)
    return np.clip(look.light * image, 0, 255).transpose(1, 2, 0).astype(np.uint8, order="C")
