"""The embedded world's pictures: two to four objects in the cells of a 2 x 2 grid, on a noisy background.

Everything is drawn from seeds: the same arguments give the same pictures.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Far enough from 0 and 255 to be jittered.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (40, 165, 50),
    "blue": (40, 75, 225),
    "yellow": (235, 215, 45),
    "purple": (165, 50, 185),
    "cyan": (60, 215, 220),
}
# Signed distance to the outline, negative inside, at (x, y) from the centre; y points down, the object's radius is 1.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(y - 0.75, 0.868 * abs(x) - 0.496 * (y + 1)),
    "cross": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 1, np.minimum(abs(x), abs(y)) - 0.32),
}
SHAPES: tuple[str, ...] = tuple(_OUTLINES)

_RADIUS = (0.13, 0.19)  # of the image's side
_COLOUR_JITTER = 20  # at most, for each of R, G, B


class Look(NamedTuple):
    """How pictures are taken; noise from the least to the most, for each of R, G, B."""

    background: tuple[float, float] = (85.0, 145.0)  # an image's grey level
    noise: float = 60.0
    noise_on_objects: float = 20.0
    light: float = 1.0  # everything is multiplied by it in the end


LOOKS: dict[str, Look] = {
    "plain": Look(),
    "dark": Look(light=0.4),
    "noisy": Look(noise=150.0, noise_on_objects=80.0),
    "bright": Look(background=(175.0, 235.0)),
}


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; lengths are fractions of the image's side, from its top left corner."""

    shape: str
    colour: str
    centre: tuple[float, float]  # x, y
    radius: float
    rgb: tuple[int, int, int]  # its colour as drawn, jittered


@dataclass(frozen=True)
class Scene:
    """Two to four objects, each inside its own cell of the 2 x 2 grid."""

    objects: tuple[SceneObject, ...]


def place_object(
    rng: np.random.Generator, shape: str, colour: str, corner: tuple[float, float], side: float
) -> SceneObject:
    """An object anywhere inside the square of that side whose top left corner is `corner`."""
    radius = rng.uniform(*_RADIUS)
    x, y = (start + rng.uniform(radius, side - radius) for start in corner)
    red, green, blue = (COLOURS[colour] + rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)).tolist()
    return SceneObject(shape, colour, (x, y), radius, (red, green, blue))


def draw_scene(scene: Scene, size: int, rng: np.random.Generator, look: Look = LOOKS["plain"]) -> np.ndarray:
    """The scene as uint8 [size, size, 3] (height, width, RGB); `rng` draws the background and the noise."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size  # [S], the pixels' centres
    noise = rng.random((3, size, size), dtype=np.float32) - 0.5
    image = rng.uniform(*look.background) + look.noise * noise  # [3, S, S]
    for item in scene.objects:
        x = (axis[None, :] - item.centre[0]) / item.radius
        y = (axis[:, None] - item.centre[1]) / item.radius
        distance = _OUTLINES[item.shape](x, y) * item.radius * size  # [S, S], in pixels
        coverage = np.clip(0.5 - distance, 0, 1)  # smooths the edge over one pixel
        image += coverage * (np.float32(item.rgb)[:, None, None] + look.noise_on_objects * noise - image)
    return np.clip(look.light * image, 0, 255).transpose(1, 2, 0).astype(np.uint8, order="C")


def single_objects(seed: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one object anywhere, for learning to name its shape: uint8 [N, S, S, 3] and int64 [N].

    Labels are places in SHAPES, equally many of each as far as `count` divides; sizes, colours and background are those
    of the scenes.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"single objects")])
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        item = place_object(rng, SHAPES[label], rng.choice(tuple(COLOURS)).item(), corner=(0.0, 0.0), side=1.0)
        image[:] = draw_scene(Scene((item,)), size, rng)
    return images, labels
