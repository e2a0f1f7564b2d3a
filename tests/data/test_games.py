"""Synthetic GuessWhat?! games: right answers that cannot be guessed, exact boxes, official and repeatable files."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from math import dist

import numpy as np
import pytest

from data.scenes.draw import Look, draw_scene
from data.scenes.games import ask, official, sample_scene
from data.scenes.large import CLEAR
from data.scenes.small import COLOURS, SHAPES
from data.scenes.write import write_world
from tests.guessing import best_guess
from vqa.io.errors import InputError
from vqa.io.images import decode_image
from vqa.tasks.objects import check_box

IMAGES = {"train": 12, "val": 5, "test": 4}
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "upper": (1, -1), "bottom": (1, 1), "lower": (1, 1)}


@pytest.fixture(scope="module")
def asked():
    pairs = []
    for index in range(2000):
        rng = np.random.default_rng([7, index])
        scene = sample_scene(rng)
        pairs += [(scene, question) for question in ask(scene, rng, 5)]
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("games")
    write_world(folder, world="games", seed=3, images=IMAGES, processes=2)
    return folder


def games_of(folder, split):
    with gzip.open(folder / f"guesswhat.{split}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fits(item, words):
    """Whether an object has the colour and the shape that are among the words."""
    shapes, colours = ([value for value in values if value in words] for values in (SHAPES, COLOURS))
    assert shapes or colours
    return item.shape in (shapes or SHAPES) and item.colour in (colours or COLOURS)


def answer(scene, text):
    """The right answer, by the words alone."""
    target, *others = scene
    words = text.rstrip("?").split()
    said = " ".join(words)
    if words[:2] == ["next", "to"]:
        return any(fits(item, words) and dist(item.centre, target.centre) < 0.35 for item in others)
    if words[0] == "beside":
        meant = [item for item in scene if fits(item, words)]
        assert len(meant) < 2
        return dist(meant[0].centre, target.centre) < 0.35 if meant else None
    side = next((SIDES[word] for word in words if word in SIDES), None)
    if "of the two" in said:
        shape = next(shape for shape in SHAPES if said.endswith((f"{shape}s", f"{shape}es")))
        alike = [item for item in others if item.shape == shape]
        assert shape == target.shape
        return (target.centre[side[0]] - alike[0].centre[side[0]]) * side[1] > 0 if len(alike) == 1 else None
    if side is not None:
        return (target.centre[side[0]] - 0.5) * side[1] > 0
    if words[0] == "one":
        return (target.radius > 0.1) == ("large" in words)
    return fits(target, words)


def test_every_answer_is_right(asked):
    for scene, question in asked:
        assert question.answer == {True: "yes", False: "no", None: "n/a"}[answer(scene, question.text)], question


@pytest.mark.parametrize(("kind", "values"), [("is it", COLOURS), ("does it", SHAPES)])
def test_every_value_of_an_attribute_is_asked_for_and_no_other(asked, kind, values):
    named = {question.text.rstrip("?").split()[-1] for _, question in asked if question.question_type == kind}
    assert {*values} <= named
    assert named <= {*values, "one"}


def test_what_is_not_clear_is_not_asked(asked):
    for scene, question in asked:
        target, *others = scene
        if question.question_type in ("next to", "beside"):
            words = question.text.rstrip("?").split()
            meant = [dist(item.centre, target.centre) for item in others if fits(item, words)]
            assert any(d <= 0.33 for d in meant) or all(d >= 0.38 for d in meant)
        if question.question_type == "in the":
            assert max(abs(place - 0.5) for place in target.centre) > CLEAR


@pytest.mark.parametrize(
    ("kind", "by_text", "by_category"),
    [
        ("is it", 0.55, 0.55),
        ("does it", 0.55, 0.55),
        ("a", 0.56, 0.54),
        ("one of", 0.54, 0.54),
        ("in the", 0.54, 0.54),
        ("the", 0.44, 0.43),
        ("next to", 0.58, 0.55),
        ("beside", 0.5, 0.48),
    ],
)
def test_neither_the_question_nor_the_category_gives_the_answer(asked, kind, by_text, by_category):
    of_kind = [(scene, question) for scene, question in asked if question.question_type == kind]
    assert len(of_kind) > 0.06 * len(asked)
    assert best_guess(of_kind, lambda _, question: question.text) < by_text
    assert best_guess(of_kind, lambda scene, _: scene[0].shape) < by_category


def test_some_questions_presuppose_what_is_not_so(asked):
    answers = Counter(question.answer for _, question in asked)
    assert 0.04 < answers["n/a"] / len(asked) < 0.12
    assert abs(answers["yes"] - answers["no"]) < 0.04 * len(asked)


def test_boxes_hold_the_pixels_of_their_objects_and_no_others():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        game = official(scene, ask(scene, rng, 2), 7, "7.png", 96)
        for item in scene:
            white = replace(item, rgb=(255, 255, 255))
            rows, columns = np.nonzero(draw_scene([white], 96, rng, Look((0, 0), noise=0, noise_on_objects=0)).any(2))
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            found = [entry for entry in game["objects"].values() if entry["bbox"] == box]
            assert [entry["category"] for entry in found] == [item.shape]
            assert (found[0]["object_id"] == game["object_id"]) == (item is scene[0])
            assert 0.3 * box[2] * box[3] < found[0]["area"] <= len(rows)


def test_files_are_official(folder):
    dialogues, questions, places = [], [], Counter()
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        games = games_of(folder, name)
        assert len(games) == IMAGES[split]
        for game in games:
            picture = game["picture"]
            assert game["status"] == "success"
            assert (picture["width"], picture["height"]) == (128, 128)  # twice the crop's side
            assert decode_image(folder / split / picture["file_name"], 128).shape == (128, 128, 3)
            for object_id, entry in game["objects"].items():
                assert int(object_id) == entry["object_id"]
                assert entry["category"] == SHAPES[entry["category_id"] - 1]
                check_box(tuple(entry["bbox"]), 128, 128)
            places[list(game["objects"]).index(str(game["object_id"]))] += 1
            assert len(game["qas"]) == 4
            assert {qa["a"] for qa in game["qas"]} <= {"Yes", "No", "N/A"}
            dialogues.append(game["dialogue_id"])
            questions += [qa["id"] for qa in game["qas"]]
    assert len(set(dialogues)) == len(dialogues) == 21
    assert len(set(questions)) == len(questions) == 84
    assert len(places) > 2  # the order of the objects does not reveal the target


def test_one_process_writes_what_two_write_and_finished_games_are_kept(folder, tmp_path):
    write_world(tmp_path, world="games", seed=3, images=IMAGES, processes=1)
    assert contents(tmp_path) == contents(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_world(folder, world="games", seed=3, images=IMAGES)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(InputError, match="world games, not small"):
        write_world(folder, seed=3, images=IMAGES)
