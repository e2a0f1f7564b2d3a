"""GuessWhat?!: what its files hold, in every form, and what is refused."""

import copy
import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.vqa_files import SplitFiles
from tests.conftest import fuzzed
from tests.fabricated_games import asked_in, edited, read_lines, source, split_files, target, write_lines
from tests.faults.test_fuzz import damage, replaced, result_or_refusal
from vqa.io.errors import InputError
from vqa.text.tokenizer import train_tokenizer


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda game: game["qas"][0].update(a="Maybe"), "Invalid enum value 'Maybe' - at `$.qas[0].a`"),
        (lambda game: game["qas"][1].update(id="x"), "Expected `int`, got `str` - at `$.qas[1].id`"),
        (lambda game: game["qas"][0].update(q="a\0b"), "holds a text that is not usable: it holds a null character"),
        (lambda game: game["qas"][1].update(id=game["qas"][0]["id"]), "question id 10 occurs twice in the file"),
        (lambda game: game.update(object_id=7), "object_id 7 is not among its objects"),
        (lambda game: target(game).update(bbox=[3, 3, 0, 5]), "box [3, 3, 0, 5] is empty"),
        (
            lambda game: target(game).update(bbox=[30, 3, 60, 5]),
            "box [30, 3, 60, 5] is not within its image of 48 x 64",
        ),
        (lambda game: target(game).update(bbox=[3, 3, 5]), "Expected `array` of length 4 - at `$.objects"),
        (lambda game: target(game).update(category="zebra"), "is 'zebra' here, and '"),
        (lambda game: target(game).update(category=" "), "holds an object without the name of its category"),
        (lambda game: target(game).update(category_id=9), "category_id 9 is '"),
        (lambda game: game["picture"].update(file_name="../x.jpg"), "file_name '../x.jpg' is not the name of a file"),
        (lambda game: game["picture"].update(file_name="a\\x.jpg"), "is not the name of a file"),
        (lambda game: game["picture"].update(file_name=".."), "is not the name of a file"),
        (lambda game: game["picture"].update(file_name="é" * 150), "is not the name of a file"),
        (lambda game: game["picture"].update(width=0), "Expected `int` >= 1 - at `$.picture.width`"),
        (lambda game: game.pop("qas"), "missing required field `qas`"),
        (lambda game: game.update(status="won"), "Invalid enum value 'won'"),
        (lambda game: game.update(dialogue_id=2**70), "$.dialogue_id"),
    ],
)
def test_a_wrong_game_is_named_with_file_line_and_number(copied, edit, said):
    files = split_files(copied)["train"]
    edited(files.questions, 2, edit)
    with pytest.raises(InputError) as refused:
        source().read(files)
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"{files.questions}: line 2, game 1")


def test_games_of_another_status_and_without_questions_are_skipped(copied):
    files = split_files(copied)["train"]
    count = len(source().read(files))
    lost = len(read_lines(files.questions)[1]["qas"])
    edited(files.questions, 2, lambda game: game.update(qas=[]))
    edited(files.questions, 3, lambda game: target(game).update(bbox=[1, 1, 0, 0]))  # a failure: not looked at
    assert len(source().read(files)) == count - lost
    with pytest.raises(InputError, match="line 3, game 2: box"):
        source(("success", "failure")).read(files)
    for number in range(1, 21):
        edited(files.questions, number, lambda game: game.update(status="failure", qas=[]))
    with pytest.raises(InputError, match="train.jsonl.gz: no question in a game of status success"):
        source().read(files)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"dialogue_id": 1,\n', "line 1: Input data was truncated"),
        (b"\n\n[]\n", "line 3: not a game of GuessWhat?!: Expected `object`, got `array`"),
        (b'{"a": 1} x\n', "line 1: JSON is malformed: trailing characters"),
        (b'{"a": "\\ud800?"}\n', "line 1: Input data was truncated"),
        (b'{"a": 1}\n', "line 1: not a game of GuessWhat?!: Object missing required field `dialogue_id`"),
        (b"{" + b'"a":[' * 10_000, "line 1: "),
        (b'{"dialogue_id": 4, "status": "\xff"}\n', "line 1"),
        (b"", "no question in a game"),
        (gzip.compress(b"\n", mtime=0)[:-3], "line 2: truncated or damaged"),
        (b"\x1f\x8b" + b"x" * 50, "line 1: truncated or damaged"),
        (b"x" * (2**24 + 1), "line 1: longer than 16777216 bytes"),
    ],
)
def test_what_holds_no_games_is_one_line(tmp_path, content, said):
    (tmp_path / "games").write_bytes(content)
    with pytest.raises(InputError) as refused:
        source().read(SplitFiles(tmp_path / "games", None, "{file_name}"))
    assert f"games: {said}" in str(refused.value)


def test_a_long_file_is_read_a_line_at_a_time(games, tmp_path):
    game = read_lines(games / "guesswhat.train.jsonl.gz")[0]
    target(game)["segment"] = [list(range(20_000))]

    def lines():
        for number in range(60):
            yield json.dumps(game | {"qas": [{"id": number, "q": "Is it?", "a": "Yes"}]}).encode() + b"\n"

    with gzip.open(tmp_path / "games.gz", "wb", compresslevel=1) as file:
        file.writelines(lines())
    tracemalloc.start()
    assert len(source().read(SplitFiles(tmp_path / "games.gz", None, "{file_name}"))) == 60
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2_000_000  # of 6.5 MB


@fuzzed(max_examples=60)
@given(drawn=st.data())
def test_any_other_bytes_are_games_or_one_line(games, tmp_path, drawn):
    good = read_lines(games / "guesswhat.train.jsonl.gz")[:2]
    if drawn.draw(st.booleans()):
        write_lines(tmp_path / "games", [drawn.draw(replaced(copy.deepcopy(game))) for game in good])
    else:
        content = b"\n".join(json.dumps(game).encode() for game in good)
        (tmp_path / "games").write_bytes(
            drawn.draw(damage(drawn.draw(st.sampled_from([content, gzip.compress(content, mtime=0)]))))
        )
    for question in result_or_refusal(source().read, SplitFiles(tmp_path / "games", None, "{file_name}")) or []:
        assert question.answers[0] in ("yes", "no", "n/a")
        assert np.isfinite(question.target.spatial).all()


def test_annotations_and_patterns_that_name_no_image_are_refused(games):
    files = split_files(games)["train"]
    with pytest.raises(InputError, match="a.json: a game's answers are in its own file"):
        source().read(SplitFiles(files.questions, Path("a.json"), files.images))
    for pattern in ("images/one.jpg", "{file_name.x}", "{file_name!r}", "{file_name:>999999}"):
        with pytest.raises(InputError, match="must hold {file_name}, or {image_id}"):
            source().read(SplitFiles(files.questions, None, pattern))


def test_a_model_s_categories_number_the_objects(games):
    files, names = split_files(games)["val"], ["toothbrush", "chair", "cat", "car", "person", "dog"]

    def numbers(categories):
        reader = source(categories=categories)
        asked = reader.read(files)
        table = reader.table(asked, np.zeros(len(asked), int), train_tokenizer([], 1), reader.vocabulary([]))
        return table.extras["category"]

    expected = [target(game)["category"] for game, _ in asked_in(games, "valid")]
    assert [names[number] for number in numbers(names)] == expected
    with pytest.raises(InputError, match="the model has no category"):
        numbers(["dog"])
