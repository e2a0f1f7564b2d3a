"""GuessWhat?!: the h5 file with the crop of each object."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from data import h5_file
from data.h5_file import H5Images, Store
from data.preprocess import preprocess
from tests.calls import calling, interrupt
from tests.conftest import ROOT
from tests.fabricated_games import NAMES, asked_in, edited, read_lines, source, split_files, target, write_lines
from vqa.io.errors import InputError
from vqa.io.images import read_image
from vqa.tasks.objects import crop_region, spatial_features


def make(folder: Path, path: Path, made=None, splits=tuple(NAMES), **changed) -> Store:
    settings = {"image_size": 32, "min_word_count": 1, "skip_bad_images": False, "threads": 1}
    files = {name: files for name, files in split_files(folder).items() if name in splits}
    preprocess(files, path, source=made or source(), **(settings | changed))
    return Store(path)


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


def test_a_truncated_download_is_named(copied, tmp_path):
    files = split_files(copied)["train"]
    content = files.questions.read_bytes()
    files.questions.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"guesswhat.train.jsonl.gz: line \d+: truncated or damaged"):
        make(copied, tmp_path / "games.h5")
    assert not list(tmp_path.glob("games.h5*"))


def test_a_stopped_run_resumes_where_it_stopped(games, tmp_path, monkeypatch, decoded):
    make(games, tmp_path / "whole.h5", source(whole=True))
    monkeypatch.setattr("data.preprocess._IMAGES_A_FLUSH", 4)
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(h5_file, "mark", calling(h5_file.mark, 3, interrupt))
            make(games, tmp_path / "games.h5", source(whole=True))
    assert not (tmp_path / "games.h5").exists()
    with pytest.raises(InputError, match=r"begun with data.min_word_count=1; finish it with these first"):
        make(games, tmp_path / "games.h5", source(whole=True), min_word_count=2)
    decoded.clear()
    make(games, tmp_path / "games.h5", source(whole=True))
    assert 0 < len(decoded) < 12
    assert (tmp_path / "games.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


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
    first, before = make(games, path, splits=["train"]), len(decoded)
    make(games, path)
    assert len(decoded) == before + 2 + 3  # val's and test's
    assert Store(path).checksums[: len(first.usable)].tolist() == first.checksums.tolist()
    decoded.clear()
    make(games, path, min_word_count=3)
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
    with h5py.File(other, "r+") as file:
        file["splits/train/extras/spatial"][0, 0] += 1
    with pytest.raises(InputError, match="checksum mismatch in split 'train'"):
        changed.table("train")


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
    for size in ((48, 64), (64, 64), (48, 48)):  # turned by 90 degrees, or padded or cut: every box would be wrong
        Image.new("RGB", size).save(file)
        with pytest.raises(InputError, match=r"by id: 500"):
            make(copied, tmp_path / "games.h5", source(whole=True))
        said = "an image of {} x {} pixels, where the boxes of its objects need 64 x 48".format(*size)
        assert said in capsys.readouterr().out
    file.write_bytes(whole)
    make(copied, tmp_path / "games.h5", source(whole=True))
    assert make(copied, tmp_path / "games.h5", source(whole=True)).usable.all()


def test_the_recipe_names_its_files(games, tmp_path, done, refused):
    recipe = ["preprocess", "--config", f"{ROOT}/config/guesswhat/cbn.yaml", "data.image_size=32"]
    missing = [f"data.folder={tmp_path}", f"data.h5={tmp_path}/games.h5"]
    assert refused(*recipe, *missing) == f"error: {tmp_path}/guesswhat.train.jsonl.gz: no such file (split 'train')"
    there = [f"data.folder={games}", f"data.h5={tmp_path}/games.h5"]
    done(*recipe, *there, "inputs=[image, question]")
    assert Store(tmp_path / "games.h5").splits == ["test", "train", "val"]
    assert "complete, nothing to do" in done(*recipe, *there).out  # that it holds whole images, too, does not matter
    crops = [*there, f"data.h5={tmp_path}/crops.h5"]
    done(*recipe, *crops)
    said = refused(*recipe, *crops, "inputs=[image, question]")
    assert "crops.h5: made with guesswhat.images ['crop'], now ['crop', 'image']; name another data.h5" in said
    assert "split 'val' was made from other files" in refused(*recipe, *there, "data.splits.val.images='x/{file_name}'")
