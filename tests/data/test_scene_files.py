"""Synthetic scenes as files: official, repeatable, kept when they are finished."""

import errno
import hashlib
import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from data.guesswhat.source import GuessWhatSource
from data.scenes import write
from data.scenes.asking import MAX_QUESTIONS
from data.scenes.draw import COLOURS as RGB
from data.scenes.small import COLOURS
from data.scenes.write import write_world
from data.sources import Source
from data.vqa_files import SplitFiles, read_questions
from tests.calls import failing
from tests.raw_files import make
from vqa.io.errors import InputError
from vqa.io.images import decode_image

IMAGES = {"train": 60, "val": 20}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, images=IMAGES, processes=2)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    with pytest.raises(InputError, match="world None, not small; remove it or name another"):
        write_world(tmp_path, seed=3, images={"val": 2})


def test_a_world_that_was_not_finished_is_made_again(tmp_path):
    write_world(tmp_path, seed=3, images={"val": 5}, processes=1)
    whole = contents(tmp_path)
    (tmp_path / "world.json").rename(tmp_path / ".world.json.begun")
    (tmp_path / "val_questions.json").write_text("{")
    write_world(tmp_path, seed=3, images={"val": 5}, processes=1)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(("world", "file"), [("small", "val_annotations.json"), ("games", "guesswhat.valid.jsonl.gz")])
def test_files_that_are_not_of_scenes_are_left_alone(tmp_path, world, file):
    made = {"seed": 3, "images": {"val": 2}, "processes": 1, "world": world}
    for name in (file, "val/000000000002.png"):
        own = tmp_path / "own" / name
        own.parent.mkdir(parents=True)
        own.write_text("mine")
        with pytest.raises(InputError, match=f"{name}: would be replaced by drawn scenes; `scenes=null`"):
            write_world(tmp_path / "own", **made)
        assert [path for path in (tmp_path / "own").rglob("*") if path.is_file() and path.suffix != ".lock"] == [own]
        own.unlink()
        write_world(tmp_path / "own", **made)  # an empty folder is in nobody's way
        shutil.rmtree(tmp_path / "own")


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


@pytest.mark.parametrize("world", ["small", "games"])
def test_scenes_that_are_drawn_again_with_another_look_are_no_longer_those_of_the_h5_file(tmp_path, world):
    """Their questions are the same: the old images would be kept, and nothing said."""
    folder, path, source = tmp_path / "scenes", tmp_path / "data.h5", Source(5)
    files = SplitFiles(folder / "train_questions.json", folder / "train_annotations.json", "{image_id:012d}.png")
    if world == "games":
        source = GuessWhatSource(["success"], 2.0, ["crop"])
        files = SplitFiles(folder / "guesswhat.train.jsonl.gz", None, "{file_name}")
    splits = {"train": replace(files, images=f"{folder}/train/{files.images}")}
    questions = []
    for look in ("plain", "dark"):
        write_world(folder, seed=3, images={"train": 3}, world=world, look=look, processes=1)
        questions.append([asked.text for asked in source.read(splits["train"])])
        if look == "plain":
            make(splits, path, source=source)
            make(splits, path, source=source)
            shutil.rmtree(folder)
    assert questions[0] == questions[1]
    with pytest.raises(InputError, match="split 'train' was made from other files"):
        make(splits, path, source=source)


@pytest.mark.parametrize("count", [0, MAX_QUESTIONS + 1])
def test_questions_per_image_has_bounds(tmp_path, count):
    with pytest.raises(InputError, match="questions_per_image"):
        write_world(tmp_path, seed=3, images=IMAGES, questions_per_image=count)


@pytest.mark.parametrize("world", ["small", "games"])
def test_an_image_that_cannot_be_written_is_named(tmp_path, monkeypatch, world):
    monkeypatch.setattr("PIL.Image.Image.save", failing(errno.ENOSPC))
    with pytest.raises(InputError, match=r"train/0+1.png: cannot be written \(no space left on device\); free some"):
        write_world(tmp_path, seed=1, images={"train": 2}, world=world, processes=1)
    assert not list(tmp_path.glob("[!.]*.json*"))
