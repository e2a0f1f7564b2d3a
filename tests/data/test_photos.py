"""Mosaics of photographs: right answers that cannot be guessed, changes that can be seen, repeatable files."""

import json
import os
import shutil
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import pytest

from data.labelled_images import LabelledImages
from data.scenes import photos
from data.scenes.asking import MAX_QUESTIONS
from data.scenes.write import write_world
from data.vqa_files import read_questions
from tests.guessing import best_guess
from tests.photographs import GROUP_OF, GROUPS, photographs
from vqa.io.errors import InputError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("source") / "photographs")


@pytest.fixture(scope="module")
def asked(source):
    images, pairs = LabelledImages(source), []
    for index in range(3000):
        rng = np.random.default_rng([5, index])
        mosaic = photos.sample_mosaic(rng, images, held_out=False)
        pairs += [(mosaic, question) for question in photos.ask(mosaic, images, rng, 4)]
    return pairs


def shown(mosaic, text):
    """The tiles that a question's words fit."""
    text = text.replace("_", " ")
    names = [name for name in (*GROUPS, *GROUP_OF) if f" {name.replace('_', ' ')}" in text]
    changes = [change for change in photos.CHANGES if f" {change}" in text]
    assert len(names) <= 1 and len(changes) <= 1
    name, change = (names or [None])[0], (changes or [None])[0]
    return [tile for tile in mosaic if name in (None, tile.group, tile.class_) and change in (None, tile.change)]


def of_type(asked, question_type):
    return [pair for pair in asked if pair[1].question_type == question_type]


def test_every_answer_is_right(asked):
    for mosaic, (question_type, _, text, answer) in asked:
        found = shown(mosaic, text)
        match question_type:
            case "what color":
                assert [tile.change for tile in found] == [answer] and answer in photos.TINTS
            case "what is":
                assert [tile.group.replace("_", " ") for tile in found] == [answer]
            case "how many":
                assert str(len(found)) == answer
            case "is there":
                assert ("yes" if found else "no") == answer
            case _:
                pytest.fail(text)


def test_kinds_are_common_and_answers_spread(asked):
    answers = defaultdict(Counter)
    for _, question in asked:
        answers[question.question_type][question.answer] += 1
    total = len(asked)
    assert min(counts.total() for counts in answers.values()) > 0.15 * total
    for kind, least, most in (("what color", 0.2, 0.3), ("what is", 0.2, 0.3), ("how many", 0.1, 0.3)):
        shares = [count / answers[kind].total() for count in answers[kind].values()]
        assert least < min(shares) and max(shares) < most, (kind, shares)
    yes = answers["is there"]["yes"] / answers["is there"].total()
    assert abs(yes - 0.5) < 2 / answers["is there"].total() ** 0.5


def test_a_blind_model_is_poor(asked):
    for kind, bound in (("what color", 0.35), ("what is", 0.32), ("how many", 0.36), ("is there", 0.6)):
        assert best_guess(of_type(asked, kind), lambda _, question: question.text) < bound


def test_existence_needs_group_and_change_together(asked):
    """Best answer for how many tiles have the asked group (change), and how many groups (changes) there are."""

    def known(seen, mosaic, question):
        values = [getattr(tile, seen) for tile in mosaic]
        return sum(f" {value.replace('_', ' ')}" in question.text for value in values), len(set(values))

    for seen in ("group", "change"):
        assert best_guess(of_type(asked, "is there"), partial(known, seen)) < 0.75


@pytest.mark.parametrize("count", [1, 4, MAX_QUESTIONS])
def test_as_many_different_questions_as_wanted(source, count):
    images = LabelledImages(source)
    alike = [photos.Tile("insect", "ant", photos.PLAIN, 0)] * 4
    questions = photos.ask(alike, images, np.random.default_rng(0), count)
    assert len({question.text for question in questions}) == len(questions) == count


def test_a_group_that_no_mosaic_shows_is_not_asked_about(source, tmp_path):
    (tmp_path / "val").mkdir()
    for name, group in GROUP_OF.items():
        shutil.copytree(source / name, tmp_path / "train" / name)
        if group != "tree":
            shutil.copytree(source / name, tmp_path / "val" / name)
    shutil.copy(source / "classes.csv", tmp_path)
    images = LabelledImages(tmp_path)
    assert "tree" in images.groups
    for index in range(50):
        mosaic = photos.sample_mosaic(rng := np.random.default_rng(index), images, held_out=False)
        assert all("tree" not in question.text for question in photos.ask(mosaic, images, rng, 4))


def test_each_change_can_be_seen():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    either = [pixels, pixels[:, ::-1]]
    made = {change: photos.changed(pixels, change, np.random.default_rng(1)).astype(int) for change in photos.CHANGES}
    assert any((made["plain"] == one).all() for one in either)
    assert any((made["upside down"] == one[::-1]).all() for one in either)
    assert (np.ptp(made["grey"], axis=2) == 0).all()
    assert made["dark"].mean() == pytest.approx(0.35 * pixels.mean(), abs=1)
    tinted = {tint: (made[tint] - made["plain"]).mean((0, 1)) for tint in photos.TINTS}
    assert tinted["red"].argmax() == 0 and tinted["green"].argmax() == 1 and tinted["blue"].argmax() == 2
    assert tinted["yellow"].argmin() == 2
    mirrored = [photos.changed(pixels, "plain", np.random.default_rng(seed))[0, 0, 0] for seed in range(100)]
    assert 30 < sum(value == pixels[0, -1, 0] for value in mirrored) < 70


def test_a_mosaic_shows_its_photographs_and_splits_share_none(source):
    images = LabelledImages(source)
    for held_out in (False, True):
        mosaic = photos.sample_mosaic(np.random.default_rng(3), images, held_out)
        assert all((tile.row >= images.training) == held_out for tile in mosaic)
        assert all(images.classes[images.labels[tile.row]] == tile.class_ for tile in mosaic)
        assert all(GROUP_OF[tile.class_] == tile.group for tile in mosaic)
    plain = [tile._replace(change=photos.PLAIN) for tile in mosaic]
    drawn = photos.draw_mosaic(plain, images, 32, np.random.default_rng(0))
    for tile, corner in zip(plain, [(0, 0), (0, 16), (16, 0), (16, 16)], strict=True):
        part = drawn[corner[0] : corner[0] + 16, corner[1] : corner[1] + 16]
        photo = images.decode(images.names[tile.row], 16)
        assert np.array_equal(part, photo) or np.array_equal(part, photo[:, ::-1])


def test_the_files_are_the_same_for_a_seed_and_refused_for_another_source(source, tmp_path):
    made = {"seed": 3, "images": {"train": 6, "val": 3}, "world": "photos", "size": 32, "source": str(source)}
    for name in ("one", "other"):
        write_world(tmp_path / name, processes=1, **made)
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")}
    assert len(files) == 9 + 4 + 1
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)
    questions = read_questions(tmp_path / "one" / "train_questions.json", tmp_path / "one" / "train_annotations.json")
    assert len(questions) == 24
    header = json.loads((tmp_path / "one" / "train_questions.json").read_text())["info"]
    assert header["source"] == LabelledImages(source).digest[:12]  # an h5 file of other photographs is refused
    with pytest.raises(InputError, match="seed 3, not 4"):
        write_world(tmp_path / "one", processes=1, **made | {"seed": 4})
    for wrong in ({"source": None}, {"world": "small"}):
        with pytest.raises(InputError, match=r"data\.photographs"):
            write_world(tmp_path / "new", processes=1, **made | wrong)
    with pytest.raises(InputError, match=r"scenes\.look"):
        write_world(tmp_path / "new", processes=1, **made | {"look": "dark"})


def test_a_class_whose_name_is_not_utf_8_cannot_be_asked_about(tmp_path):
    """As archives of other systems unpack their names."""
    folder = photographs(tmp_path / "photographs")
    (folder / "classes.csv").unlink()
    (folder / "lion").rename(folder / os.fsdecode(b"l\xf6we"))
    with pytest.raises(InputError, match=r"photographs: class 'l\\udcf6we' is not UTF-8 text"):
        write_world(tmp_path / "new", seed=3, images={"val": 40}, world="photos", processes=1, source=str(folder))
