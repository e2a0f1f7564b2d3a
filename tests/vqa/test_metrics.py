"""The official metric, equal to the official code on every reference case."""

import json

import numpy as np
import pytest

from data.question_table import QuestionTable, question_table
from data.vqa_files import Question
from experiments.tasks.vqa import VQATask, score
from vqa.metrics import normalise_answer, question_accuracy
from vqa.text.answers import strip_answer
from vqa.text.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def cases(shared):
    return json.loads((shared / "vqa_metric" / "reference_cases.json").read_text(encoding="utf-8"))


def test_normal_form_of_every_reference_case(cases):
    assert [normalise_answer(raw) for raw, _ in cases["normalised"]] == [normal for _, normal in cases["normalised"]]


def test_accuracy_of_every_reference_case(cases):
    for case in cases["questions"]:
        assert 100 * question_accuracy(case["prediction"], case["answers"]) == pytest.approx(
            case["accuracy"], abs=0.005
        )


def test_summary_of_the_reference_cases(cases):
    asked = cases["questions"]
    table = table_of(
        [Question(c["question_id"], 0, "?", c["question_type"], c["answer_type"], tuple(c["answers"])) for c in asked]
    )
    ours = score([case["prediction"] for case in asked], table)
    assert round(ours["overall"], 2) == cases["summary"]["overall"]
    assert ours["per_answer_type"] == pytest.approx(cases["summary"]["perAnswerType"], abs=1e-6)
    assert ours["per_question_type"] == pytest.approx(cases["summary"]["perQuestionType"], abs=1e-6)


def table_of(questions) -> QuestionTable:
    return question_table(questions, {0: 0}, train_tokenizer(["what"], 1), [])


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Two", "2"),
        ("a dog", "dog"),
        ("The Dog!", "dog"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("u.s.", "us"),
        ("2.5", "2.5"),
        (" tab\there ", "tab here"),
    ],
)
def test_normal_form(raw, normal):
    assert normalise_answer(raw) == normal


def test_three_others_must_agree():
    answers = ["red"] * 3 + ["blue"] * 7
    assert question_accuracy("red", answers) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert question_accuracy("blue", answers) == 1
    assert question_accuracy("green", answers) == 0
    assert question_accuracy("red", ["red", *["blue"] * 9]) == pytest.approx(0.3)


def test_nothing_is_normalised_where_all_agree():
    assert question_accuracy("2", ["two"] * 10) == 0
    assert question_accuracy("2", ["two"] * 9 + ["2"]) == 1
    assert question_accuracy("lamp, chair", ["lamp, chair"] * 10) == 1


def test_accuracy_needs_answers():
    with pytest.raises(ValueError, match="answer"):
        question_accuracy("2", [])


def accuracy_by_its_definition(prediction, answers):
    form = strip_answer if len(set(map(strip_answer, answers))) == 1 else normalise_answer
    right = [form(answer) == form(prediction) for answer in answers]
    return sum(min(1, (sum(right) - own) / 3) for own in right) / len(right)


def test_all_questions_at_once_are_scored_as_one_by_one():
    random = np.random.default_rng(0)
    ways = ["2", "two", "Two.", "a dog", "dog", "dog ", "DOG\n", "lamp, chair", "lamp chair", "yes", "no", ""]
    asked = [
        Question(n, 0, "?", "a", "b", tuple(random.choice(ways[: random.integers(1, 13)], random.integers(1, 11))))
        for n in range(600)
    ]
    predictions = random.choice([*ways, "never given", " yes"], 600).tolist()
    pairs = list(zip(predictions, (q.answers for q in asked), strict=True))
    expected = [question_accuracy(*pair) for pair in pairs]
    assert VQATask.accuracies(predictions, table_of(asked)) == expected
    assert expected == pytest.approx([accuracy_by_its_definition(*pair) for pair in pairs])
    assert len(set(expected)) > 20
    assert VQATask.accuracies([], table_of([])) == []
    with pytest.raises(ValueError, match="at least one given answer"):
        VQATask.accuracies(["2", "2"], table_of([Question(1, 0, "?"), asked[0]]))
    with pytest.raises(ValueError, match="1 predictions for 600"):
        VQATask.accuracies(["2"], table_of(asked))


def test_means_are_over_questions_not_over_types():
    kinds = [("yes/no", "yes"), ("yes/no", "yes"), ("other", "red")]
    table = table_of([Question(n, 0, "?", kind, kind, (a,) * 10) for n, (kind, a) in enumerate(kinds)])
    scores = score(["yes", "no", "red"], table)
    assert scores["overall"] == pytest.approx(200 / 3)
    assert scores["per_answer_type"] == {"other": 100.0, "yes/no": 50.0}
    assert scores["questions"] == 3
