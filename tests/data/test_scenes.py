"""The small synthetic scenes: right answers, questions that cannot be guessed, official and repeatable files."""

import hashlib
import json
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from data.scenes import write
from data.scenes.asking import MAX_QUESTIONS, SceneQuestion
from data.scenes.draw import COLOURS as RGB
from data.scenes.draw import SHAPES as ALL_SHAPES
from data.scenes.draw import Scene, SceneObject, draw_scene
from data.scenes.small import COLOURS, SHAPES, ask, sample_scene
from data.scenes.write import WORLDS, draw_single_objects, write_world
from data.vqa_files import read_questions
from vqa.io.errors import InputError
from vqa.io.images import decode_image

IMAGES = {"train": 60, "val": 20}
Asked = list[tuple[Scene, SceneQuestion]]


@pytest.fixture(scope="module")
def asked() -> Asked:
    pairs = []
    for index in range(4000):
        rng = np.random.default_rng([11, index])
        scene = sample_scene(rng)
        pairs += [(scene, question) for question in ask(scene, rng, 4)]
    return pairs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, images=IMAGES, processes=2)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    answers = defaultdict(Counter)
    for scene, question in of_type(asked, "is there"):
        value = named(question)[0 if seen == "shape" else 1]
        values = [getattr(item, seen) for item in scene]
        answers[values.count(value), len(values), len(set(values))][question.answer] += 1
    best = sum(max(counts.values()) for counts in answers.values())
    assert best / sum(counts.total() for counts in answers.values()) < 0.72


def test_counts_are_spread(asked):
    counts = Counter(question.answer for _, question in of_type(asked, "how many"))
    assert set(counts) == set("01234")
    assert min(counts.values()) > 0.12 * counts.total() and max(counts.values()) < 0.28 * counts.total()


@pytest.mark.parametrize(
    ("question_type", "bound"), [("what color", 0.22), ("what shape", 0.31), ("how many", 0.31), ("is there", 0.57)]
)
def test_a_blind_model_is_poor(asked, question_type, bound):
    """The best answer to each exact text, chosen on the very questions it is scored on."""
    answers = defaultdict(Counter)
    for _, question in of_type(asked, question_type):
        answers[question.text][question.answer] += 1
    best = sum(max(counts.values()) for counts in answers.values())
    assert best / sum(counts.total() for counts in answers.values()) < bound


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


def test_the_small_world_is_what_it_always_was(world):
    """What was measured on it holds for this world only. Pixels may be rounded otherwise by another numpy."""
    asked = [(world / f"{split}_{part}.json").read_bytes() for split in IMAGES for part in ("questions", "annotations")]
    digest = "a452aa5bca5da12d84ed81d66a47affa3dde309bd60507a7252f3b16c2af425a"
    assert hashlib.sha256(b"".join(asked)).hexdigest() == digest
    drawn = np.stack([decode_image(path, 64) for path in sorted(world.glob("*/*.png"))]).astype(float)
    assert drawn.mean((0, 1, 2)) == pytest.approx([117.678, 116.710, 114.993], abs=0.01)
    cells = drawn[0].reshape(4, 16, 4, 16, 3).mean((1, 3, 4))
    expected = [
        [114.7, 116.2, 119.0, 112.3],
        [111.5, 112.8, 116.5, 108.5],
        [115.6, 115.3, 114.5, 108.3],
        [112.7, 115.3, 119.1, 115.4],
    ]
    assert cells == pytest.approx(np.array(expected), abs=0.1)


def test_one_process_writes_what_two_write(world, tmp_path):
    write_world(tmp_path, seed=3, images=IMAGES, processes=1)
    assert contents(tmp_path) == contents(world)
    assert len(list(world.glob("*/*.png"))) == 80


def test_seeds_splits_and_images_all_differ(world, tmp_path):
    write_world(tmp_path, seed=4, images={"train": 20, "val": 20}, processes=1)
    drawn = [path.read_bytes() for folder in (world, tmp_path) for path in folder.glob("*/*.png")]
    assert len(set(drawn)) == len(drawn) == 120


def test_files_are_official(world):
    ids, image_ids = [], []
    for split, number in IMAGES.items():
        questions = json.loads((world / f"{split}_questions.json").read_text())
        annotations = json.loads((world / f"{split}_annotations.json").read_text())
        header = {"info", "license", "data_type", "data_subtype"}
        assert set(questions) == header | {"task_type", "questions"} and set(annotations) == header | {"annotations"}
        assert questions["task_type"] == "Open-Ended" and questions["data_subtype"] == split
        fields = {"question_id", "image_id", "question_type", "answer_type", "multiple_choice_answer", "answers"}
        for annotation in annotations["annotations"]:
            assert set(annotation) == fields
            assert [given["answer_id"] for given in annotation["answers"]] == list(range(1, 11))
            assert {given["answer"] for given in annotation["answers"]} == {annotation["multiple_choice_answer"]}
            assert all(given["answer_confidence"] == "yes" for given in annotation["answers"])
        read = read_questions(world / f"{split}_questions.json", world / f"{split}_annotations.json")
        ids += [question.question_id for question in read]
        image_ids += sorted({question.image_id for question in read})
        assert Counter(Counter(question.image_id for question in read).values()) == {4: number}
    assert len(set(ids)) == len(ids) == 320 and len(set(image_ids)) == len(image_ids) == 80


def test_images_show_what_the_questions_ask_about(world):
    checked = 0
    for question in read_questions(world / "train_questions.json", world / "train_annotations.json"):
        colours = [colour for colour in COLOURS if colour in question.text]
        if question.question_type == "how many" and colours:
            image = decode_image(world / "train" / f"{question.image_id:012d}.png", 64)
            assert Counter(colours_seen(image))[colours[0]] == int(question.answers[0])
            checked += 1
    assert checked > 15


def colours_seen(image: np.ndarray) -> list[str]:
    """The colour of the object in each cell that has one, from the pixels alone."""
    seen = []
    for cell in (image[row : row + 32, column : column + 32].reshape(-1, 3) for row in (0, 32) for column in (0, 32)):
        vivid = cell[np.ptp(cell.astype(int), axis=1) > 95]
        if len(vivid) > 10:
            seen.append(min(COLOURS, key=lambda name: np.abs(vivid.mean(0) - RGB[name]).sum()))
    return seen


def test_a_finished_world_is_left_alone(world):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    write_world(world, seed=3, images=dict(reversed(IMAGES.items())))
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_a_world_that_does_not_say_its_name_is_refused(tmp_path):
    write_world(tmp_path, seed=3, images={"val": 2}, processes=1)
    made = json.loads((tmp_path / "world.json").read_text())
    assert made.pop("world") == "small"
    (tmp_path / "world.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="world None, not small: remove it or name another folder"):
        write_world(tmp_path, seed=3, images={"val": 2})


def test_a_world_that_was_not_finished_is_made_again(tmp_path):
    write_world(tmp_path, seed=3, images={"val": 5}, processes=1)
    whole = contents(tmp_path)
    (tmp_path / "world.json").unlink()
    (tmp_path / "val_questions.json").write_text("{")
    write_world(tmp_path, seed=3, images={"val": 5}, processes=1)
    assert contents(tmp_path) == whole


def test_a_world_that_two_processes_need_is_written_once(tmp_path, monkeypatch):
    real, written, begun = write._write_image, [], threading.Event()

    def slow(*arguments):
        written.append(arguments[-1])
        begun.set()
        time.sleep(0.05)
        return real(*arguments)

    monkeypatch.setattr(write, "_write_image", slow)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(write_world, tmp_path, seed=3, images={"val": 4}, processes=1)
        assert begun.wait(10)
        other = pool.submit(write_world, tmp_path, seed=3, images={"val": 4}, processes=1)
    assert one.result() is other.result() is None
    assert written == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changed", "named_in_error"),
    [
        ({"seed": 4}, "seed 3, not 4"),
        ({"size": 32}, "size 64, not 32"),
        ({"images": {"val": 20}}, "images"),
        ({"world": "large"}, "world small, not large"),
    ],
)
def test_another_world_in_the_folder_is_refused(world, changed, named_in_error):
    with pytest.raises(InputError, match=named_in_error) as error:
        write_world(world, **{"seed": 3, "images": IMAGES, **changed})
    assert str(world) in str(error.value)


@pytest.mark.parametrize("count", [0, MAX_QUESTIONS + 1])
def test_questions_per_image_has_bounds(tmp_path, count):
    with pytest.raises(InputError, match="questions_per_image"):
        write_world(tmp_path, seed=3, images=IMAGES, questions_per_image=count)
