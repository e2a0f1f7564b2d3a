"""The reader of the official files: what it joins, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.vqa_files import Question, SplitFiles, read_questions, remarks
from tests.conftest import fuzzed
from tests.raw_files import change
from vqa.io.errors import InputError
from vqa.metrics import question_accuracy

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


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
        (lambda c: c["questions"][1].pop("question"), r"missing required field `question` - at `\$.questions\[1\]`"),
        (lambda c: c["questions"][1].update(image_id="1"), r"`int`, got `str` - at `\$.questions\[1\].image_id`"),
        (lambda c: c["questions"][0].update(question_id=True), r"`bool` - at `\$.questions\[0\].question_id`"),
        (lambda c: c["questions"][0].update(question=None), r"`str`, got `null` - at `\$.questions\[0\].question`"),
        (lambda c: c["questions"][0].update(image_id=7), "annotation of question 10: image_id 1"),
        (lambda c: c["questions"][0].update(question="a\0b"), "a text that is not usable: it holds a null character"),
        (lambda c: c["questions"][0].update(question="\ud800"), "train_q.json: line 1, column .*escape"),
        (lambda c: c["questions"][0].update(image_id=10**30), r"<= 9223372036854775807 - at `\$.questions\[0\].image"),
        (lambda c: c["questions"].clear(), r"Expected `array` of length >= 1 - at `\$.questions`"),
    ],
)
def test_wrong_question_files_are_named(raw, edit, message):
    change(raw["train"].questions, edit)
    with pytest.raises(InputError, match=message):
        read_questions(raw["train"].questions, raw["train"].annotations)


@pytest.mark.parametrize(
    ("edit", "warned"),
    [
        (lambda entry: entry.pop("answer_id"), True),
        (lambda entry: entry.update(answer_id=1), True),
        (lambda entry: entry.update(answer_id=str(entry["answer_id"])), False),
        (lambda entry: entry.update(answer_id=[1]), True),
        (lambda entry: entry.update(answer_id=entry["answer_id"] + 1), False),
    ],
    ids=["missing", "repeated", "texts", "a list", "one to ten"],
)
def test_answers_that_the_official_tool_cannot_tell_apart_are_said(raw, edit, warned):
    def of_the_first(content):
        for entry in content["annotations"][0]["answers"]:
            edit(entry)

    change(raw["train"].annotations, of_the_first)
    questions = read_questions(raw["train"].questions, raw["train"].annotations)
    listed = json.loads(raw["train"].annotations.read_text())["annotations"][0]["answers"]
    # as the official tool counts: the entries that agree with the answer, among those that differ from each entry
    agreeing = [sum(other["answer"] == "black" for other in listed if other != entry) for entry in listed]
    official = np.mean([min(1, count / 3) for count in agreeing])
    assert question_accuracy("black", questions[0].answers) == 1
    assert official == (0 if warned else 1)
    said = [remark for remark in remarks(questions) if "answer_id" in remark]
    assert len(said) == warned
    assert all(remark.startswith("1 question(s)") for remark in said)


def test_answers_that_agree_in_another_spelling_are_said():
    given = ["yes", "yes", "Yes", "yes.", "no"]
    questions = [Question(number, 1, "is it?", answers=(one,) * 10) for number, one in enumerate(given)]
    questions.append(Question(9, 1, "is it?", answers=("YES", *["yes"] * 9)))  # the normal form counts
    (said,) = remarks(questions)
    assert said.startswith("2 question(s) have one answer throughout, in another spelling")
    assert [question_accuracy("yes", question.answers) for question in questions] == [1, 1, 0, 0, 0, 1]
    assert list(remarks(questions[:2])) == []


@pytest.mark.parametrize("text", ["这是什么颜色？", "これは何色", "นี่สีอะไร", "ນີ້ສີຫຍັງ", "នេះពណ៌អ្វី", "ဒါဘာအရောင်လဲ"])
def test_scripts_without_blanks_are_said(text):
    (said,) = remarks([Question(1, 1, text), Question(2, 1, "what colour is it? 色"), Question(3, 1, "आज मौसम कैसा है")])
    assert said.startswith("1 question(s) are in a script without blanks")


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


@pytest.mark.parametrize(
    "answers", [[{"answer": ["2"]}], [{"answer": 2}], ["2"], [{}], [], [{"answer": "a"}] * 101, [{"answer": "a\0"}], 2]
)
def test_answers_of_another_form_are_refused(raw, answers):
    change(raw["train"].annotations, lambda content: content["annotations"][1].update(answers=answers))
    with pytest.raises(InputError, match=r"train_a.json: .* - at `\$.annotations\[1\]"):
        read_questions(raw["train"].questions, raw["train"].annotations)


ENTRY = '{"question_id": 1, "image_id": 2, "question": "?"'


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff {"a": {"questions": [1]}, "questions" :\n[ ' + ENTRY + '} ] , "b": "]"}\t',
        '{"x": "\\"questions\\"", "questions":[' + ENTRY + ', "questions": ["x, ]" , [1,2]], "x": null}]}',
    ],
)
def test_only_the_list_of_the_outermost_object_is_read(tmp_path, text):
    (tmp_path / "file").write_text(text, encoding="utf-8")
    assert read_questions(tmp_path / "file") == [Question(1, 2, "?")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: Input data was truncated"),
        ("[]", "not an official VQA file: Expected `object`, got `array`"),
        ("{}", "missing required field `questions`"),
        ('{"questions": 1}', "Expected `array`, got `int` - at `$.questions`"),
        ('{"questions": [1]}', "Expected `object`, got `int` - at `$.questions[0]`"),
        ('{"questions": [], "questions": []}', "'questions' occurs twice"),
        ('{"questions": [1] 2}', "line 1, column 19: JSON is malformed: expected ',' or '}'"),
        ('{"questions": ["é"\n 2]}', "line 2, column 2: JSON is malformed: expected ',' or ']'"),
        ('{"questions": [1,]}', "line 1, column 18: JSON is malformed: trailing comma"),
        ('{"questions": [1]} 2', "line 1, column 21: JSON is malformed: trailing characters"),
        ('{"questions" [1]}', "line 1, column 14: JSON is malformed: expected ':'"),
        ('{"questions": [1]', "line 1, column 18: Input data was truncated"),
        ('{"questions": [], "x": Infinity}', "line 1, column 24: JSON is malformed: invalid character"),
        ("{1: 2}", "line 1, column 2: JSON is malformed: object keys must be strings"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_a_malformed_file_is_named_with_its_place(tmp_path, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match=f"file: .*{re.escape(message)}"):
        read_questions(tmp_path / "file")


@fuzzed(max_examples=60)
@given(st.dictionaries(st.sampled_from("xy"), JSON), JSON, st.sampled_from([None, 2]), st.integers(0, 200))
def test_whatever_stands_beside_the_questions_is_read_over(tmp_path_factory, beside, more, indent, cut):
    """Also where a file is cut off: it is refused unless it is still whole."""
    file = tmp_path_factory.mktemp("json") / "file"
    asked = {"question_id": 1, "image_id": 2, "question": "?", "more": more}
    whole = json.dumps(beside | {"questions": [asked], "z": more}, indent=indent)
    file.write_text(whole)
    assert read_questions(file) == [Question(1, 2, "?")]
    if whole[:cut] != whole:
        file.write_text(whole[:cut])
        with pytest.raises(InputError, match="line"):
            read_questions(file)


def test_a_pattern_without_an_image_id_is_refused():
    for pattern in ("images/{id}.jpg", "images/one.jpg", "{image_id.x}", "{image_id[0]}", "{image_id:x y}", "{"):
        with pytest.raises(InputError, match="image_id"):
            SplitFiles(Path("q"), None, pattern).image(3)
    files = SplitFiles(Path("q"), None, "val2014/COCO_val2014_{image_id:012d}.jpg")
    assert files.image(42) == Path("val2014/COCO_val2014_000000000042.jpg")
