"""The kinds of synthetic scenes by name."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data import large_questions, large_world, small_world
from data.progress import progress
from data.scene_questions import SceneQuestion
from data.scenes import Scene, SceneObject, draw_scene


class World(NamedTuple):
    """How scenes are sampled and asked about; all randomness comes from the generator."""

    shapes: tuple[str, ...]
    sample_scene: Callable[[np.random.Generator], Scene]
    single_object: Callable[[np.random.Generator, str], SceneObject]  # of a shape, anywhere in the image
    ask: Callable[[Scene, np.random.Generator, int], list[SceneQuestion]]  # that many different questions


WORLDS: dict[str, World] = {
    "small": World(small_world.SHAPES, small_world.sample_scene, small_world.single_object, small_world.ask),
    "large": World(large_world.SHAPES, large_world.sample_scene, large_world.single_object, large_questions.ask),
}


def draw_single_objects(world: World, seed: int, images: np.ndarray) -> np.ndarray:
    """Draw one object of the world into each of `images`, uint8 [N, S, S, 3], to learn to name its shape from.

    Returns:
        indices of the shapes in `world.shapes`, int64 [N], equally many of each as far as N divides.
    """
    count, size = images.shape[:2]
    rng = np.random.default_rng([seed, zlib.crc32(b"single objects")])
    labels = rng.permutation(np.arange(count) % len(world.shapes))
    for image, label in zip(images, progress(labels, count, "single objects"), strict=True):
        image[:] = draw_scene([world.single_object(rng, world.shapes[label])], size, rng)
    return labels
