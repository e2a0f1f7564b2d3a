"""Generated raw data of VQA's size: the official format, frequencies as in VQA, the same files every time."""

import errno
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.vqa_files import read_questions
from experiments.bench.vqa_sized_data import sample_questions, write_coco_like
from tests.raw_files import make
from vqa.io.errors import InputError
from vqa.text.answers import answer_vocabulary, normalise_answer

IMAGES, ASKED = {"train": 6, "val": 3}, {"train": 90, "val": 40}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("like")
    return folder, write_coco_like(folder, IMAGES, ASKED, processes=1)


def test_the_files_are_named_and_read_as_the_official_ones(made):
    folder, splits = made
    ids = set()
    for split, count in ASKED.items():
        files = splits[split]
        assert files.questions == folder / f"OpenEnded_mscoco_{split}2014_questions.json"
        assert files.annotations == folder / f"mscoco_{split}2014_annotations.json"
        read = read_questions(files.questions, files.annotations)
        assert len(read) == count
        ids |= {question.question_id for question in read}
        assert len({question.image_id for question in read}) == IMAGES[split]
        assert all(len(question.answers) == 10 and question.text.endswith("?") for question in read)
        assert all(question.text.lower().startswith(question.question_type) for question in read)
        assert {question.answer_type for question in read} == {"yes/no", "number", "other"}
        for question in read:
            path = files.image(question.image_id)
            assert path == folder / f"{split}2014" / f"COCO_{split}2014_{question.image_id:012d}.jpg"
            with Image.open(path) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (640, 480), "RGB")
    assert len(ids) == sum(ASKED.values())
    annotation = json.loads(splits["val"].annotations.read_text())["annotations"][7]
    fields = ["question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id"]
    assert sorted(annotation) == sorted(fields)
    assert [given["answer_id"] for given in annotation["answers"]] == list(range(1, 11))
    assert annotation["multiple_choice_answer"] == most_common([given["answer"] for given in annotation["answers"]])
    images = [path.read_bytes() for path in folder.glob("*/*.jpg")]
    assert len(set(images)) == len(images) == 9
    assert all(100_000 < len(image) < 220_000 for image in images)


def most_common(answers):
    return Counter(answers).most_common(1)[0][0]


def test_they_are_the_same_every_time(made, tmp_path):
    folder, _ = made
    write_coco_like(tmp_path, IMAGES, ASKED, processes=2)
    for file in sorted(folder.rglob("*.*")):
        assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_preprocess_takes_them(made, tmp_path):
    make(made[1], tmp_path / "data.h5")


def test_words_and_answers_are_distributed_as_people_use_them():
    questions = sample_questions(30_000, range(10_000), 1)
    kinds = Counter(question.answer_type for question in questions)
    assert kinds["yes/no"] / 30_000 == pytest.approx(0.38, abs=0.02)
    assert kinds["number"] / 30_000 == pytest.approx(0.12, abs=0.02)
    given = [answer for question in questions for answer in question.answers]
    spellings = Counter(given)
    assert 10_000 < len(spellings) < 40_000
    assert Counter(map(normalise_answer, given)).most_common(1)[0][0] == "yes"
    assert any(normalise_answer(spelling) != spelling for spelling in spellings)
    classes = set(answer_vocabulary(given, 2000))
    covered = sum(most_common(question.answers) in classes for question in questions) / 30_000
    assert 0.8 < covered < 0.95  # of VQA v1's questions, 2 000 classes answer about nine in ten
    words = Counter(word for question in questions for word in question.text.lower().rstrip("?").split())
    assert len(words) > 8_000
    assert sum(count == 1 for count in words.values()) > len(words) / 10
    agreeing = np.mean([Counter(question.answers).most_common(1)[0][1] for question in questions])
    assert 6 < agreeing < 9


def test_an_image_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    monkeypatch.setattr("experiments.bench.vqa_sized_data._noise", lambda: np.zeros((1024, 1024, 3), np.uint8))
    with pytest.raises(InputError, match=r"train2014_0+1.jpg: cannot be written \(no space left on device\); free"):
        write_coco_like(tmp_path, {"train": 1}, {"train": 1}, processes=1)
