"""The kinds of synthetic scenes by name: what is in them and what is asked about them."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data import large_questions, large_world, small_world
from data.progress import progress
from data.scene_questions import SceneQuestion
from data.scenes import Scene, SceneObject, draw_scene


class World(NamedTuple):
    """How scenes are sampled and asked about; all randomness is of the generator."""

    shapes: tuple[str, ...]
    sample_scene: Callable[[np.random.Generator], Scene]
    single_object: Callable[[np.random.Generator, str], SceneObject]  # of a shape, anywhere in the image
    ask: Callable[[Scene, np.random.Generator, int], list[SceneQuestion]]  # so many different questions


WORLDS: dict[str, World] = {
    "small": World(small_world.SHAPES, small_world.sample_scene, small_world.single_object, small_world.ask),
    "large": World(large_world.SHAPES, large_world.sample_scene, large_world.single_object, large_questions.ask),
}


def draw_single_objects(world: World, seed: int, images: np.ndarray) -> np.ndarray:
    """Draws one object into each of `images`, uint8 [N, S, S, 3], for learning to name its shape.

    Returns:
        The shapes as places in `world.shapes`, int64 [N]; equally many of each as far as N divides. Sizes, colours and
        background are those of the world's scenes.
    """
    count, size = images.shape[:2]
    rng = np.random.default_rng([seed, zlib.crc32(b"single objects")])
    labels = rng.permutation(np.arange(count) % len(world.shapes))
    for image, label in zip(images, progress(labels, count, "single objects"), strict=True):
        item = world.single_object(rng, world.shapes[label])
        image[:] = draw_scene(Scene((item,)), size, rng)
    return labels
