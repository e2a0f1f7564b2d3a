"""DAQUAR's own files become those of VQA v1."""

import json

import pytest
from PIL import Image

from data import daquar
from data.vqa_files import read_questions
from vqa.io.errors import InputError

QUESTIONS = """\
what is on the right side of the black telephone in the image3 ?
desk
how many chairs are to the left of the image12 on the floor ?
2
what is on the desk in the image3 ?
book, lamp
"""


@pytest.fixture
def download(tmp_path):
    """The files of the download: the same questions to train and to test on."""
    folder = tmp_path / "download"
    (folder / "nyu_depth_images").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"qa.894.raw.{split}.txt").write_text(QUESTIONS)
    for number in (3, 12):
        Image.new("RGB", (640, 480), (number, 0, 0)).save(folder / f"nyu_depth_images/image{number}.png")
    return folder


def test_questions_answers_and_images(download, tmp_path):
    daquar.rewrite(download, tmp_path / "out")
    for name, first in (("train2014", 1_000_000), ("val2014", 2_000_000)):
        questions = tmp_path / "out" / f"OpenEnded_mscoco_{name}_questions.json"
        annotations = tmp_path / "out" / f"mscoco_{name}_annotations.json"
        images = str(tmp_path / "out" / "images" / name / f"COCO_{name}_{{image_id:012d}}.jpg")
        asked = read_questions(questions, annotations)
        assert [one.question_id for one in asked] == [first, first + 1, first + 2]
        assert [one.image_id for one in asked] == [3, 12, 3]
        assert [one.text for one in asked] == [
            "what is on the right side of the black telephone?",
            "how many chairs are to the left of the image12 on the floor?",
            "what is on the desk?",
        ]
        assert [one.answers for one in asked] == [("desk",) * 10, ("2",) * 10, ("book, lamp",) * 10]
        assert [one.answer_type for one in asked] == ["other", "number", "other"]
        assert [one.question_type for one in asked] == ["what is", "how many", "what is"]
        with Image.open(images.format(image_id=3)) as image:
            assert image.size == (341, 256)


def test_the_folder_of_reference_data_is_what_its_questions_become(download, tmp_path, shared, monkeypatch):
    monkeypatch.setattr(daquar, "read_image", lambda _: Image.new("RGB", (4, 4)))
    folder, read = shared / "daquar", {}
    for split, name in (("train", "train2014"), ("test", "val2014")):
        for kind, file in (
            ("questions", f"OpenEnded_mscoco_{name}_questions"),
            ("annotations", f"mscoco_{name}_annotations"),
        ):
            read[name, kind] = json.loads((folder / f"{file}.json").read_text())[kind]
        lines = []
        for question, annotation in zip(read[name, "questions"], read[name, "annotations"], strict=True):
            where = "" if "image" in question["question"] else f" in the image{question['image_id']}"
            lines += [f"{question['question'][:-1]}{where} ?", annotation["answers"][0]["answer"]]
        (download / f"qa.894.raw.{split}.txt").write_text("\n".join(lines))
    daquar.rewrite(download, tmp_path / "out")
    for (name, kind), expected in read.items():
        file = f"OpenEnded_mscoco_{name}_{kind}" if kind == "questions" else f"mscoco_{name}_{kind}"
        found = json.loads((tmp_path / "out" / f"{file}.json").read_text())[kind]
        for entry in expected:
            entry.pop("multiple_choice_answer", None)
            for answer in entry.get("answers", ()):
                del answer["answer_confidence"]
        assert found == expected


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "expected a line with an answer after each question; 0 lines"),
        ("what is in the image3 ?", "expected a line with an answer after each question; 1 lines"),
        ("what is it?\ndesk", "question 1 names no image: what is it?"),
    ],
)
def test_other_files_are_one_clear_line(download, tmp_path, lines, said, monkeypatch, capsys):
    (download / "qa.894.raw.train.txt").write_text(lines)
    with pytest.raises(InputError, match=rf"qa.894.raw.train.txt: {said}".replace("?", r"\?")):
        daquar.rewrite(download, tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["daquar", str(tmp_path / "absent"), str(tmp_path / "out")])
    assert daquar.main() == 2
    assert capsys.readouterr().err.endswith("absent/qa.894.raw.train.txt: no such file or directory\n")
    monkeypatch.setattr("sys.argv", ["daquar"])
    assert daquar.main() == 2
    assert capsys.readouterr().err == "error: usage: python -m data.daquar DOWNLOAD FOLDER\n"
