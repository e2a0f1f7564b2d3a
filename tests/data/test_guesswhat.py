"""GuessWhat?!: what its files hold, what is refused, and the h5 file with the crop of each object."""

import copy
import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data.sources
from data import h5_file
from data.batches import FileImages
from data.guesswhat.source import GuessWhatSource
from data.h5_file import H5Images, Store
from data.preprocess import preprocess
from data.sources import number_images
from data.vqa_files import SplitFiles
from tests.conftest import ROOT, fuzzed
from tests.fabricated_games import read_lines, write_lines
from tests.faults.test_fuzz import damage, replaced, result_or_refusal
from vqa.io.errors import InputError
from vqa.io.images import read_image
from vqa.tasks.objects import crop_region, spatial_features
from vqa.text.tokenizer import train_tokenizer

NAMES = {"train": "train", "val": "valid", "test": "test"}


def split_files(folder: Path, pattern: str = "{file_name}", ending: str = "jsonl.gz") -> dict[str, SplitFiles]:
    images = f"{folder}/images/{pattern}"
    return {name: SplitFiles(folder / f"guesswhat.{file}.{ending}", None, images) for name, file in NAMES.items()}


def source(status=("success",), factor=1.1, whole=False, categories=None) -> GuessWhatSource:
    return GuessWhatSource(status, factor, ["crop", "image"] if whole else ["crop"], categories)


def make(folder: Path, path: Path, made=None, **changed) -> Store:
    settings = {"image_size": 32, "min_word_count": 1, "answers": 3, "skip_bad_images": False, "threads": 1}
    preprocess(split_files(folder), path, source=made or source(), **(settings | changed))
    return Store(path)


@pytest.fixture
def copied(games, tmp_path) -> Path:
    """A copy of the games, for tests that change them."""
    return Path(shutil.copytree(games, tmp_path / "official"))


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded from now on."""
    names = []
    monkeypatch.setattr(data.sources, "read_image", lambda path: (names.append(path), read_image(path))[1])
    return names


def asked_in(games: Path, file: str, status=("success",)):
    """Each question of the games of some status with its game, in the file's order."""
    read = read_lines(games / f"guesswhat.{file}.jsonl.gz")
    return [(game, asked) for game in read if game["status"] in status for asked in game["qas"]]


@pytest.mark.parametrize("whole", [False, True])
def test_the_h5_holds_each_crop_and_the_tables_are_those_of_the_games(games, tmp_path, whole):
    store = make(games, tmp_path / "games.h5", source(whole=whole))
    images, names = H5Images(store.path), ["person", "car", "cat", "chair", "toothbrush"]  # as their ids are ordered
    assert store.vocabulary == ["yes", "no", "n/a"]
    assert store.categories == names
    stored = set()
    for split, file in NAMES.items():
        table, expected = store.table(split), asked_in(games, file)
        assert len(table) == len(expected) > 10
        assert table.images.shape == ((len(table), 2) if whole else (len(table),))
        for row, (game, asked) in enumerate(expected):
            it, width, height = game["objects"][str(game["object_id"])], *map(game["picture"].get, ("width", "height"))
            assert table.ids[row] == asked["id"]
            assert table.texts[row] == asked["q"]
            assert table.answers(row) == [table.answer_types[row]] == [asked["a"].lower()]
            assert store.vocabulary[table.labels()[row, 0]] == asked["a"].lower()
            assert table.question_types[row] == asked["q"].split()[0].lower()
            assert names[table.extras["category"][row]] == it["category"]
            np.testing.assert_array_equal(table.extras["spatial"][row], spatial_features(it["bbox"], width, height))
            region = crop_region(it["bbox"], width, height, 1.1)
            original = read_image(games / "images" / game["picture"]["file_name"])
            parts = [original.crop(region), original] if whole else [original.crop(region)]
            for part, place in zip(parts, np.atleast_1d(table.images[row]), strict=True):
                np.testing.assert_array_equal(
                    images[place], np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR))
                )
            stored |= {(game["picture_id"], region)} | ({(game["picture_id"], None)} if whole else set())
    assert len(store.usable) == len(stored)  # each once
    assert table.extras["spatial"].dtype == np.float32
    assert table.extras["category"].dtype == np.int64


def test_a_file_is_decoded_once_for_all_its_crops(games, tmp_path, decoded):
    store = make(games, tmp_path / "games.h5", source(("success", "failure", "incomplete"), whole=True))
    with h5py.File(store.path) as file:
        names = list(file["images/file"].asstr()[:])
    assert len(decoded) == len(set(decoded)) == 12 < len(names)


def test_the_same_games_in_every_form_are_the_same_questions(copied, tmp_path):
    whole = make(copied, tmp_path / "games.h5")
    for file in NAMES.values():
        games = read_lines(copied / f"guesswhat.{file}.jsonl.gz")
        write_lines(
            copied / f"guesswhat.{file}.jsonl", [b"\xef\xbb\xbf" + json.dumps(games[0]).encode(), *games[1:], b""]
        )
        later = [
            {
                "id": game["dialogue_id"],
                "status": game["status"],
                "image": game["picture"] | {"id": game["picture_id"]},
                "object_id": game["object_id"],
                "objects": [found | {"id": int(id_)} for id_, found in game["objects"].items()],
                "qas": [{"id": asked["id"], "question": asked["q"], "answer": asked["a"]} for asked in game["qas"]],
            }
            for game in games
        ]
        write_lines(copied / f"guesswhat.{file}.later.gz", later)
    for image in (copied / "images").iterdir():
        shutil.copy(image, copied / "images" / f"{int(image.stem[-12:])}.jpg")
    forms = {"jsonl": "{file_name}", "later.gz": "COCO_val2014_{image_id:012d}.jpg", "jsonl.gz": "{image_id}.jpg"}
    for ending, pattern in forms.items():
        for name, files in split_files(copied, pattern, ending).items():
            reader, table = source(), whole.table(name)
            asked = reader.read(files)
            assert [question.question_id for question in asked] == table.ids.tolist()
            assert [question.answers[0] for question in asked] == table.answer_types
            assert all(Path(image.file).is_file() for (image,) in reader.images(files, asked))
            assert [question.target.spatial.tolist() for question in asked] == table.extras["spatial"].tolist()


def edited(file: Path, number: int, edit) -> None:
    """Changes the game in a line, counted from 1."""
    games = read_lines(file)
    edit(games[number - 1])
    write_lines(file, games)


def target(game) -> dict:
    return game["objects"][str(game["object_id"])]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda game: game["qas"][0].update(a="Maybe"), "Invalid enum value 'Maybe' - at `$.qas[0].a`"),
        (lambda game: game["qas"][1].update(id="x"), "Expected `int`, got `str` - at `$.qas[1].id`"),
        (lambda game: game["qas"][0].update(q="a\0b"), "holds a text that is with a null character"),
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
        (lambda game: game["picture"].update(file_name="x" * 300), "is not the name of a file"),
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
        (gzip.compress(b"\n")[:-3], "line 2: truncated or damaged"),
        (b"\x1f\x8b" + b"x" * 50, "line 1: truncated or damaged"),
        (b"x" * (2**24 + 1), "line 1: longer than 16777216 bytes"),
    ],
)
def test_what_holds_no_games_is_one_line(tmp_path, content, said):
    (tmp_path / "games").write_bytes(content)
    with pytest.raises(InputError) as refused:
        source().read(SplitFiles(tmp_path / "games", None, "{file_name}"))
    assert f"games: {said}" in str(refused.value)


def test_a_truncated_download_is_named(copied, tmp_path):
    files = split_files(copied)["train"]
    content = files.questions.read_bytes()
    files.questions.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"guesswhat.train.jsonl.gz: line \d+: truncated or damaged"):
        make(copied, tmp_path / "games.h5")
    assert not list(tmp_path.glob("games.h5*"))


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
            drawn.draw(damage(drawn.draw(st.sampled_from([content, gzip.compress(content)]))))
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


def test_a_stopped_run_goes_on_where_it_stopped(games, tmp_path, monkeypatch, decoded):
    make(games, tmp_path / "whole.h5", source(whole=True))
    monkeypatch.setattr("data.preprocess._IMAGES_A_FLUSH", 4)
    real, marked = h5_file.mark, []

    def stopping(file, written):
        if len(marked) == 2:
            raise KeyboardInterrupt
        marked.append(len(written))
        real(file, written)

    for _ in range(3):
        marked.clear()
        monkeypatch.setattr(h5_file, "mark", stopping)
        with pytest.raises(KeyboardInterrupt):
            make(games, tmp_path / "games.h5", source(whole=True))
    assert not (tmp_path / "games.h5").exists()
    with pytest.raises(InputError, match=r"begun with data.min_word_count=1; finish it with these first"):
        make(games, tmp_path / "games.h5", source(whole=True), min_word_count=2)
    monkeypatch.setattr(h5_file, "mark", real)
    decoded.clear()
    make(games, tmp_path / "games.h5", source(whole=True))
    assert 0 < len(decoded) < 12
    assert (tmp_path / "games.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_any_number_of_threads_gives_the_same_file(games, tmp_path):
    files = [make(games, tmp_path / f"{threads}.h5", threads=threads).path.read_bytes() for threads in (1, 3)]
    assert files[0] == files[1]


def test_another_crop_or_other_games_are_refused_by_name(games, tmp_path):
    path = tmp_path / "games.h5"
    make(games, path)
    before = path.read_bytes()
    for other, said in (
        (source(factor=1.5), "made with guesswhat.crop_factor 1.1, now 1.5; name another data.h5"),
        (source(("success", "failure")), "made with guesswhat.status ['success'], now ['success', 'failure']"),
        (source(whole=True), "made with guesswhat.images ['crop'], now ['crop', 'image']"),
    ):
        with pytest.raises(InputError) as refused:
            make(games, path, other)
        assert said in str(refused.value)
    assert path.read_bytes() == before


def test_other_words_and_an_added_split_decode_nothing_twice(games, tmp_path, decoded):
    path = tmp_path / "games.h5"
    settings = {"image_size": 32, "min_word_count": 1, "answers": 3, "skip_bad_images": False, "threads": 1}
    files = split_files(games)
    preprocess({"train": files["train"]}, path, source=source(), **settings)
    first, before = Store(path), len(decoded)
    preprocess(files, path, source=source(), **settings)
    assert len(decoded) == before + 2 + 3  # val's and test's
    assert Store(path).checksums[: len(first.usable)].tolist() == first.checksums.tolist()
    decoded.clear()
    preprocess(files, path, source=source(), **settings | {"min_word_count": 3})
    assert decoded == []


def test_categories_are_part_of_what_is_learnt_from(games, copied, tmp_path):
    (one := tmp_path / "one.h5", other := tmp_path / "other.h5")
    store = make(games, one)
    for number in range(1, 7):  # a category that only the test split has
        edited(
            copied / "guesswhat.test.jsonl.gz", number, lambda game: target(game).update(category="tie", category_id=2)
        )
    changed = make(copied, other)
    assert changed.categories == ["person", "tie", "car", "cat", "chair", "toothbrush"]
    assert changed.identity(["train"]) != store.identity(["train"])
    with h5py.File(one, "r+") as file:
        file["categories"][0] = "persona"
    with pytest.raises(InputError, match="damaged"):
        Store(one)


def test_bad_images_are_listed_once_and_can_be_skipped(copied, tmp_path, capsys):
    game = read_lines(copied / "guesswhat.train.jsonl.gz")[0]
    file = copied / "images" / game["picture"]["file_name"]
    whole = file.read_bytes()
    file.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 image\(s\) missing or unreadable, by id: 500; repair"):
        make(copied, tmp_path / "games.h5", source(whole=True))
    assert capsys.readouterr().out.count("cannot be read") == 1
    store = make(copied, tmp_path / "games.h5", source(whole=True), skip_bad_images=True)
    bad = [row for row, (game, _) in enumerate(asked_in(copied, "train")) if game["picture_id"] == 500]
    usable = store.usable[store.table("train").images]
    assert np.flatnonzero(~usable.all(1)).tolist() == bad
    Image.new("RGB", (48, 64)).save(file)  # turned by 90 degrees: every box would be wrong
    with pytest.raises(InputError, match=r"by id: 500"):
        make(copied, tmp_path / "games.h5", source(whole=True))
    assert "an image of 48 x 64 pixels, where the boxes of its objects need 64 x 48" in capsys.readouterr().out
    file.write_bytes(whole)
    make(copied, tmp_path / "games.h5", source(whole=True))
    assert make(copied, tmp_path / "games.h5", source(whole=True)).usable.all()


def test_the_recipe_names_its_files(games, tmp_path, command, refused):
    recipe = ["preprocess", "--config", f"{ROOT}/config/guesswhat/cbn.yaml", "data.image_size=32"]
    missing = [f"data.folder={tmp_path}", f"data.h5={tmp_path}/games.h5"]
    assert refused(*recipe, *missing) == f"error: {tmp_path}/guesswhat.train.jsonl.gz: no such file (split 'train')"
    there = [f"data.folder={games}", f"data.h5={tmp_path}/games.h5"]
    ended = command(*recipe, *there, "inputs=[image, question]")
    assert ended.code == 0, ended
    assert Store(tmp_path / "games.h5").splits == ["test", "train", "val"]
    assert "complete, nothing to do" in command(*recipe, *there).out  # that it holds whole images, too, does not matter
    crops = [*there, f"data.h5={tmp_path}/crops.h5"]
    assert command(*recipe, *crops).code == 0
    said = refused(*recipe, *crops, "inputs=[image, question]")
    assert "crops.h5: made with guesswhat.images ['crop'], now ['crop', 'image']; name another data.h5" in said
    assert "split 'val' was made from other files" in refused(*recipe, *there, "data.splits.val.images='x/{file_name}'")


def test_images_from_files_equal_those_of_the_h5(games, tmp_path):
    reader, files = source(whole=True), split_files(games)["val"]
    rows = {}
    places = number_images(reader.images(files, reader.read(files)), rows)
    store = make(games, tmp_path / "games.h5", source(whole=True))
    one, other, table = FileImages(list(rows), 32), H5Images(store.path), store.table("val")
    for place, stored in zip(places.ravel(), table.images.ravel(), strict=True):
        assert np.array_equal(one[place], other[stored])
    assert not one.bad.any()


def test_a_model_s_categories_number_the_objects(games):
    files, names = split_files(games)["val"], ["toothbrush", "chair", "cat", "car", "person", "dog"]

    def numbers(categories):
        reader = source(categories=categories)
        asked = reader.read(files)
        table = reader.table(asked, np.zeros(len(asked), int), train_tokenizer([], 1), reader.vocabulary([]))
        return table.extras["category"]

    expected = [target(game)["category"] for game, _ in asked_in(games, "valid")]
    assert [names[number] for number in numbers(names)] == expected
    with pytest.raises(InputError, match="is not the model's"):
        numbers(["dog"])
