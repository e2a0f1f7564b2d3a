"""The large synthetic scenes: objects keep apart, references pick out one, answers are right and cannot be guessed."""

import re
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest

from data.scenes.asking import MAX_QUESTIONS, SceneQuestion
from data.scenes.draw import COLOURS, LOOKS, SHAPES, Scene, SceneObject, draw_scene
from data.scenes.large import CLEAR, SIZES, Description, apart, ask, describe, on_side, place, sample_scene
from data.scenes.write import write_world
from data.vqa_files import read_questions
from tests.guessing import best_guess

Asked = list[tuple[Scene, SceneQuestion]]
AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
ATTRIBUTES = {"color": "colour", "shape": "shape", "size": "size"}
THING = rf"((?:(?:{'|'.join((*SIZES, *COLOURS))}) )*(?:object|{'|'.join(SHAPES)}))(?:e?s)?"
BESIDE = rf"{THING} ({'|'.join(AXES)}) the {THING}"


@pytest.fixture(scope="module")
def asked() -> Asked:
    pairs = []
    for index in range(500):
        rng = np.random.default_rng([12, index])
        scene = sample_scene(rng)
        pairs += [(scene, question) for question in ask(scene, rng, 5)]
    return pairs


def of_type(asked: Asked, question_type: str) -> Asked:
    return [pair for pair in asked if pair[1].question_type == question_type]


def thing(size: str, colour: str, shape: str, x: float = 0.5, y: float = 0.5) -> SceneObject:
    return SceneObject(shape, colour, (x, y), sum(SIZES[size]) / 2, COLOURS[colour], size)


def matching(said: str, items: list[SceneObject]) -> list[SceneObject]:
    words = said.split()
    return [item for item in items if all(word in (item.size, item.colour, item.shape, "object") for word in words)]


def meant(words: str, items: list[SceneObject]) -> list[SceneObject]:
    """The objects that words may mean; "the …" must be one object."""
    if found := re.fullmatch(rf"other objects? (?:of|are) the same (\w+) as the {THING}", words):
        name = ATTRIBUTES[found[1]]
        [one] = matching(found[2], items)
        return [item for item in items if item is not one and getattr(item, name) == getattr(one, name)]
    if found := re.fullmatch(BESIDE, words.replace(" are ", " ")):
        [one] = matching(found[3], items)
        axis, sign = AXES[found[2]]
        distances = [sign * (item.centre[axis] - one.centre[axis]) for item in items]
        assert all(item is one or abs(distance) >= CLEAR for item, distance in zip(items, distances, strict=True))
        return matching(found[1], [item for item, distance in zip(items, distances, strict=True) if distance > 0])
    return matching(re.fullmatch(THING, words)[1], items)


def test_every_answer_is_right_and_every_reference_means_one_object(asked):
    for scene, question in asked:
        words = question.text.removeprefix(f"{question.question_type} ").removesuffix("?")
        match question.question_type.split():
            case "what", attribute:
                [item] = meant(words.removeprefix("is the "), scene)
                assert getattr(item, ATTRIBUTES[attribute]) == question.answer
            case "how", "many":
                assert str(len(meant(words.removesuffix(" are there"), scene))) == question.answer
            case "is", "there":
                found = meant(re.sub(r"^an? ?", "", words), scene)
                assert ("yes" if found else "no") == question.answer


def test_a_relation_is_named_only_where_it_is_needed(asked):
    for scene, question in asked:
        if found := re.fullmatch(rf"what \w+ is the {BESIDE}\?", question.text):
            assert len(matching(found[1], scene)) > 1


def test_kinds_and_their_answer_types(asked):
    types = Counter((question.question_type, question.answer_type) for _, question in asked)
    assert types.keys() == {
        ("what color", "other"),
        ("what shape", "other"),
        ("what size", "other"),
        ("how many", "number"),
        ("is there", "yes/no"),
    }
    assert min(types.values()) > 0.16 * len(asked)
    assert all(question.text.startswith(question.question_type + " ") for _, question in asked)


@pytest.mark.parametrize("question_type", ["what color", "what shape", "what size", "how many", "is there"])
def test_many_questions_of_each_kind_are_about_several_objects(asked, question_type):
    texts = [question.text for _, question in of_type(asked, question_type)]
    for words in (tuple(AXES), ("same",)):
        assert np.mean([any(word in text for word in words) for text in texts]) > 0.06


@pytest.mark.parametrize(
    ("question_type", "answers", "bound"),
    [
        ("what color", set(COLOURS), 0.17),
        ("what shape", set(SHAPES), 0.17),
        ("what size", set(SIZES), 0.55),
        ("how many", {str(number) for number in range(5)}, 0.25),
        ("is there", {"yes", "no"}, 0.55),
    ],
)
def test_answers_are_spread(asked, question_type, answers, bound):
    counts = Counter(question.answer for _, question in of_type(asked, question_type))
    assert counts.keys() >= answers
    assert max(counts.values()) < bound * counts.total()
    assert min(counts[answer] for answer in answers) > 0.5 * counts.total() / len(answers)


def test_a_question_for_a_size_says_none(asked):
    assert not any({*SIZES} & {*question.text.split()} for _, question in of_type(asked, "what size"))


def wording(text: str) -> str:
    """A question's words, values of attributes put out."""
    return re.sub(rf"\b({'|'.join((*COLOURS, *SHAPES))})(e?s)?\b", "…", re.sub(r"\ban\b", "a", text))


def test_no_wording_gives_its_answer_away(asked):
    """The best answer to each wording, values of attributes aside, chosen on the very questions it is scored on."""
    bounds = {"what color": 0.24, "what shape": 0.24, "what size": 0.57, "how many": 0.32, "is there": 0.6}
    for question_type, bound in bounds.items():
        answers = defaultdict(Counter)
        for _, question in of_type(asked, question_type):
            answers[wording(question.text)][question.answer] += 1
        common = [counts for counts in answers.values() if counts.total() > 25]
        best = sum(max(counts.values()) for counts in common)
        assert best / sum(counts.total() for counts in common) < bound


@pytest.mark.parametrize("seen", ["shape", "colour"])
def test_existence_cannot_be_answered_from_shapes_or_colours_alone(asked, seen):
    """Best answer for how many objects have the asked shape (colour)."""
    pattern = re.compile(r"is there an? (?:(?:small|large) )?(\w+) (\w+)\?")
    both = [pair for pair in of_type(asked, "is there") if pattern.fullmatch(pair[1].text)]

    def known(scene, question):
        value = pattern.fullmatch(question.text)[2 if seen == "shape" else 1]
        return sum(getattr(item, seen) == value for item in scene)

    assert len(both) > 250
    assert best_guess(both, known) < 0.7


def test_objects_lie_inside_and_keep_apart():
    for index in range(300):
        objects = sample_scene(np.random.default_rng(index))
        assert 3 <= len(objects) <= 8
        for item in objects:
            assert SIZES[item.size][0] <= item.radius <= SIZES[item.size][1]
            assert all(item.radius < place < 1 - item.radius for place in item.centre)
        for one, other in combinations(objects, 2):
            assert apart(one.centre, one.radius, other.centre, other.radius)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tilt", [0.0, 0.35, np.pi / 4])
def test_no_shape_reaches_farther_than_is_reckoned(shape, tilt):
    """Two objects that are just apart, drawn: some background is left between them."""
    radius, gap = 0.12, 1.21 * 0.24 + 0.01
    items = [SceneObject(shape, "red", (x, 0.5), radius, COLOURS["red"], "large", tilt) for x in (0.3, 0.3 + gap)]
    assert apart(items[0].centre, radius, items[1].centre, radius)
    coloured = np.ptp(draw_scene(items, 224, np.random.default_rng(0)).astype(int), axis=2) > 100
    assert not coloured[:, round(224 * (0.3 + gap / 2))].any()


def test_placing_ends_where_darts_find_no_room(monkeypatch):
    monkeypatch.setattr("data.scenes.large._TRIES", 1)
    radii = [max(SIZES["large"])] * 9
    centres = place(np.random.default_rng(0), radii)
    assert len(set(centres)) == 9
    assert all(apart(one, radii[0], other, radii[0]) for one, other in combinations(centres, 2))
    assert all(0.15 < value < 0.85 for centre in centres for value in centre)


def test_describe_says_no_more_than_it_must():
    star, ring, other = thing("small", "red", "star"), thing("small", "red", "ring"), thing("large", "blue", "ring")
    items = [star, ring, other]
    assert list(map(str, describe(star, items))) == ["star"]
    assert list(map(str, describe(ring, items))) == ["small ring", "red ring"]
    assert list(map(str, describe(ring, items, ["shape"]))) == []
    assert list(map(str, describe(other, items, ["colour"]))) == ["large object"]
    assert describe(ring, [ring]) == [Description()]


def test_on_side_says_nothing_where_it_is_not_clear():
    anchor = thing("small", "red", "star", 0.5, 0.5)
    near, far = thing("small", "red", "ring", 0.5 - CLEAR / 2, 0.2), thing("small", "blue", "ring", 0.1, 0.9)
    assert on_side([anchor, near, far], anchor, "left of") is None
    assert on_side([anchor, near, far], anchor, "above") == [near]
    assert on_side([anchor, near, far], anchor, "below") == [far]


def test_ask_gives_as_many_different_questions_as_wanted():
    alike = [thing("small", "cyan", "cross", 0.1 + 0.3 * place, 0.5) for place in range(3)]
    for scene in (alike, sample_scene(np.random.default_rng(1))):
        for count in (1, 7, MAX_QUESTIONS):
            questions = ask(scene, np.random.default_rng(0), count)
            assert len({question.text for question in questions}) == len(questions) == count


def test_its_files_are_repeatable_and_do_not_depend_on_processes_or_the_look(tmp_path):
    def contents(folder, pattern):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern)}

    def asked_in(folder):
        return read_questions(folder / "val_questions.json", folder / "val_annotations.json")

    made = {"seed": 3, "images": {"train": 6, "val": 3}, "world": "large", "size": 96, "questions_per_image": 5}
    for name, processes in (("one", 1), ("two", 2)):
        write_world(tmp_path / name, **made, processes=processes)
    assert contents(tmp_path / "one", "*.*") == contents(tmp_path / "two", "*.*")
    assert len(asked_in(tmp_path / "one")) == 15
    images = {tuple(sorted(contents(tmp_path / "one", "*.png").values()))}
    for look in set(LOOKS) - {"plain"}:
        write_world(tmp_path / look, **made, look=look, processes=1)
        images.add(tuple(sorted(contents(tmp_path / look, "*.png").values())))
        assert asked_in(tmp_path / look) == asked_in(tmp_path / "one")
    assert len(images) == len(LOOKS)
