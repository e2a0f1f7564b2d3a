"""The reader of the official files: what it joins, and what it refuses."""

from pathlib import Path

import pytest

from data.errors import InputError
from data.vqa_files import Question, SplitFiles, read_questions
from tests.raw_files import change


def test_questions_are_joined_with_their_annotations(raw):
    first, second, _ = read_questions(raw["train"].questions, raw["train"].annotations)
    assert first == Question(10, 1, "What colour is the cat?", "What", "other", ("black",) * 10)
    assert second.answers[-1] == "two"
    assert read_questions(raw["train"].questions, None)[0] == Question(10, 1, "What colour is the cat?")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["questions"].pop(0), "train_q.json: no entry for 1 question"),
        (lambda c: c["questions"].append({"question_id": 99, "image_id": 1, "question": "?"}), "train_a.json: .*99"),
        (lambda c: c["questions"].append(c["questions"][0]), "question_id 10 occurs twice"),
        (lambda c: c["questions"][1].pop("question"), r"questions\[1\] needs 'question' \(str\), got None"),
        (lambda c: c["questions"][1].update(image_id="1"), r"questions\[1\] needs 'image_id' \(int\)"),
        (lambda c: c["questions"][0].update(image_id=7), "annotation of question 10: image_id 1"),
        (lambda c: c["questions"][0].update(question="a\0b"), "has a question that is with a null character"),
        (lambda c: c["questions"][0].update(question="\ud800"), "has a question that is not UTF-8 text"),
        (lambda c: c["questions"][0].update(image_id=10**30), "has a image_id that is not of 64 bits"),
        (lambda c: c["questions"].clear(), "the list 'questions' is empty"),
        (lambda c: c.pop("questions"), "not an official VQA file"),
    ],
)
def test_wrong_question_files_are_named(raw, edit, message):
    change(raw["train"].questions, edit)
    with pytest.raises(InputError, match=message):
        read_questions(raw["train"].questions, raw["train"].annotations)


def test_what_else_stands_beside_an_answer_is_no_matter(raw):
    expected = read_questions(raw["train"].questions, raw["train"].annotations)

    def more(content):
        for annotation in content["annotations"]:
            annotation["answer"] = "not asked for"
            annotation["answers"] = [
                given | {"annotator": 7, "answer_confidence": "no"} for given in annotation["answers"]
            ]
        content["answer"] = "neither"

    change(raw["train"].annotations, more)
    assert read_questions(raw["train"].questions, raw["train"].annotations) == expected


def test_equal_answers_are_one_text_in_memory(raw):
    read = read_questions(raw["train"].questions, raw["train"].annotations)
    assert all(len({id(answer) for answer in question.answers}) == len(set(question.answers)) for question in read)


@pytest.mark.parametrize("answers", [[{"answer": ["2"]}], [{"answer": 2}], ["2"], [{}], [], [{"answer": "a\0"}]])
def test_answers_of_another_form_are_refused(raw, answers):
    change(raw["train"].annotations, lambda content: content["annotations"][1].update(answers=answers))
    with pytest.raises(InputError, match="train_a.json: annotation of question 11: 'answers' must"):
        read_questions(raw["train"].questions, raw["train"].annotations)


def test_malformed_json_is_named_with_its_line(raw):
    raw["train"].questions.write_text('{"questions": [\n{"question_id": 1,}\n]}')
    with pytest.raises(InputError, match="train_q.json: line 2"):
        read_questions(raw["train"].questions, None)
    with pytest.raises(InputError, match="absent.json: no such file"):
        read_questions(Path("absent.json"), None)


def test_a_pattern_without_an_image_id_is_refused():
    with pytest.raises(InputError, match="image_id"):
        SplitFiles(Path("q"), None, "images/{id}.jpg").image(3)
    with pytest.raises(InputError, match="image_id"):
        SplitFiles(Path("q"), None, "images/one.jpg").image(3)
    for pattern in ("{image_id.x}", "{image_id[0]}", "{image_id:x y}", "{"):
        with pytest.raises(InputError, match="image_id"):
            SplitFiles(Path("q"), None, pattern).image(3)
    files = SplitFiles(Path("q"), None, "val2014/COCO_val2014_{image_id:012d}.jpg")
    assert files.image(42) == Path("val2014/COCO_val2014_000000000042.jpg")
