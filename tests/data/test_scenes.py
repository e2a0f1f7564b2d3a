"""The small synthetic scenes: drawings, right answers, questions that cannot be guessed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data.scenes.asking import MAX_QUESTIONS, SceneQuestion
from data.scenes.draw import COLOURS as RGB
from data.scenes.draw import SHAPES as ALL_SHAPES
from data.scenes.draw import Scene, SceneObject, draw_scene
from data.scenes.small import COLOURS, SHAPES, ask, sample_scene
from data.scenes.write import WORLDS, draw_single_objects
from tests.guessing import best_guess

Asked = list[tuple[Scene, SceneQuestion]]


@pytest.fixture(scope="module")
def asked() -> Asked:
    pairs = []
    for index in range(4000):
        rng = np.random.default_rng([11, index])
        scene = sample_scene(rng)
        pairs += [(scene, question) for question in ask(scene, rng, 4)]
    return pairs


def named(question: SceneQuestion) -> tuple[str | None, str | None]:
    """The shape and the colour that a question's words name."""
    words = question.text.rstrip("?").split()
    shapes = [shape for shape in SHAPES if {shape, shape + "s", shape + "es"} & set(words)]
    colours = [colour for colour in COLOURS if colour in words]
    assert len(shapes) <= 1 and len(colours) <= 1
    return (shapes or [None])[0], (colours or [None])[0]


def of_type(asked: Asked, question_type: str) -> Asked:
    return [pair for pair in asked if pair[1].question_type == question_type]


def thing(shape: str, colour: str, centre=(0.25, 0.25)) -> SceneObject:
    return SceneObject(shape, colour, centre, 0.16, RGB[colour])


def test_objects_stay_in_their_own_cells():
    for index in range(300):
        objects = sample_scene(np.random.default_rng(index))
        assert 2 <= len(objects) <= 4
        cells = set()
        for item in objects:
            cell = tuple(int(place * 2) for place in item.centre)
            for place, start in zip(item.centre, cell, strict=True):
                assert start / 2 <= place - item.radius and place + item.radius <= start / 2 + 0.5
            cells.add(cell)
        assert len(cells) == len(objects)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_draw_scene_paints_the_object_and_nothing_else(shape):
    scene = [thing(shape, "red")]
    image = draw_scene(scene, 64, np.random.default_rng(0))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    if shape != "ring":
        assert np.abs(image[14:18, 14:18].mean((0, 1)) - RGB["red"]).max() < 10
    coloured = np.ptp(image.astype(int), axis=2) > 100  # more than the background's noise can do
    assert 100 < coloured.sum() < 450
    assert not coloured[28:].any() and not coloured[:, 28:].any()


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_a_tilted_object_is_the_same_object_turned(shape):
    def drawn(tilt):
        item = replace(thing(shape, "red", (0.5, 0.5)), radius=0.3, tilt=tilt)
        return np.ptp(draw_scene([item], 63, np.random.default_rng(0)).astype(int), axis=2) > 100

    upright = drawn(0.0)
    assert (np.rot90(upright, -1) ^ drawn(np.pi / 2)).sum() < 0.1 * upright.sum()  # clockwise; edges are noisy
    assert drawn(0.3).sum() == pytest.approx(upright.sum(), rel=0.05)


def test_shapes_differ_however_they_are_tilted():
    def drawn(shape, tilt):
        item = replace(thing(shape, "red", (0.5, 0.5)), radius=0.3, tilt=tilt)
        return np.ptp(draw_scene([item], 64, np.random.default_rng(0)).astype(int), axis=2) > 100

    upright = {shape: drawn(shape, 0.0) for shape in ALL_SHAPES}
    for shape in ALL_SHAPES:
        for tilt in np.linspace(-0.7, 0.7, 15):
            tilted = drawn(shape, tilt)
            for other in set(ALL_SHAPES) - {shape}:
                overlap = (tilted & upright[other]).sum() / (tilted | upright[other]).sum()
                assert overlap < 0.88, (shape, other, tilt)


def test_every_answer_is_right(asked):
    for scene, question in asked:
        shape, colour = named(question)
        matching = [i for i in scene if shape in (None, i.shape) and colour in (None, i.colour)]
        match question.question_type:
            case "what color":
                assert [i.colour for i in matching] == [question.answer] and colour is None
            case "what shape":
                assert [i.shape for i in matching] == [question.answer] and shape is None
            case "how many":
                assert str(len(matching)) == question.answer and (shape is None) != (colour is None)
            case "is there":
                assert ("yes" if matching else "no") == question.answer and shape and colour


def test_kinds_and_their_answer_types(asked):
    types = Counter((question.question_type, question.answer_type) for _, question in asked)
    assert set(types) == {
        ("what color", "other"),
        ("what shape", "other"),
        ("how many", "number"),
        ("is there", "yes/no"),
    }
    assert min(types.values()) > 0.2 * len(asked)
    assert all(question.text.startswith(question.question_type + " ") for _, question in asked)
    first = Counter(question.question_type for _, question in asked[::4])
    assert min(first.values()) > 0.2 * len(asked) / 4  # the order does not depend on the kind


def test_most_scenes_are_asked_one_question_of_each_kind(asked):
    kinds = [{question.question_type for _, question in asked[start : start + 4]} for start in range(0, len(asked), 4)]
    assert np.mean([len(four) == 4 for four in kinds]) > 0.75


def test_existence_is_half_yes_and_decided_by_the_combination(asked):
    existence = of_type(asked, "is there")
    yes = [question.answer == "yes" for _, question in existence]
    assert abs(np.mean(yes) - 0.5) < 4 * 0.5 / len(yes) ** 0.5
    both_occur = []
    for scene, question in existence:
        shape, colour = named(question)
        if question.answer == "no":
            shapes, colours = {i.shape for i in scene}, {i.colour for i in scene}
            both_occur.append(shape in shapes and colour in colours)
    assert 0.2 < np.mean(both_occur) < 0.5


@pytest.mark.parametrize("seen", ["shape", "colour"])
def test_existence_cannot_be_answered_from_shapes_or_colours_alone(asked, seen):
    """Best answer for how many objects have the asked shape (colour), among how many objects of how many shapes."""

    def known(scene, question):
        values = [getattr(item, seen) for item in scene]
        return values.count(named(question)[0 if seen == "shape" else 1]), len(values), len(set(values))

    assert best_guess(of_type(asked, "is there"), known) < 0.72


def test_counts_are_spread(asked):
    counts = Counter(question.answer for _, question in of_type(asked, "how many"))
    assert set(counts) == set("01234")
    assert min(counts.values()) > 0.12 * counts.total() and max(counts.values()) < 0.28 * counts.total()


@pytest.mark.parametrize(
    ("question_type", "bound"), [("what color", 0.22), ("what shape", 0.31), ("how many", 0.31), ("is there", 0.57)]
)
def test_a_blind_model_is_poor(asked, question_type, bound):
    assert best_guess(of_type(asked, question_type), lambda _, question: question.text) < bound


@pytest.mark.parametrize("count", [1, 2, 7, MAX_QUESTIONS])
def test_ask_gives_as_many_different_questions_as_wanted(count):
    alike = [thing("cross", "cyan", (0.25, 0.25)), thing("cross", "cyan", (0.75, 0.75))]
    for scene in (alike, sample_scene(np.random.default_rng(1))):
        questions = ask(scene, np.random.default_rng(0), count)
        assert len({(question.question_type, *named(question)) for question in questions}) == len(questions) == count


@pytest.mark.parametrize("name", WORLDS)
def test_single_objects_are_balanced_and_repeatable(name):
    drawn = []
    for seed in (5, 5, 6):
        images = np.empty((400, 32, 32, 3), np.uint8)
        labels = draw_single_objects(WORLDS[name], seed, images)
        assert labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [400 // len(WORLDS[name].SHAPES)] * len(WORLDS[name].SHAPES)
        drawn.append(images)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
