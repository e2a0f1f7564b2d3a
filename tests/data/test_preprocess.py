"""The h5 file: what it holds, which vocabularies, which images, and what is reported and refused."""

import hashlib
import json
import warnings

import h5py
import numpy as np
import pytest

from data import h5_file
from data.h5_file import H5Images, Store
from data.vqa_files import SplitFiles
from experiments.prepare import split_files
from tests.conftest import ROOT
from tests.raw_files import TRAIN, VAL, change, make, many, write_split
from vqa.io.errors import InputError
from vqa.io.images import decode_image
from vqa.settings.recipes import load_settings
from vqa.text.answers import NO_ANSWER
from vqa.text.tokenizer import UNKNOWN_ID


def test_the_file_holds_everything_and_where_it_came_from(raw, tmp_path, capsys):
    path = tmp_path / "data.h5"
    make(raw, path)
    with h5py.File(path) as file:
        assert file.attrs["complete"]
        assert file["images/pixels"].dtype == np.uint8
        assert file["images/pixels"].shape == (3, 32, 32, 3)
        assert file["images/pixels"].chunks is None
    opened = Store(path)
    assert opened.splits == ["train", "val"]
    train, val = opened.table("train"), opened.table("val")
    assert train.ids.tolist() == [10, 11, 12]
    assert train.images.tolist() == [0, 0, 1]
    assert val.texts == ["What zebra is the cat?", ""]
    assert val.lengths.tolist() == [6, 1]
    assert train.question_types == ["What", "How", "Is"]
    assert opened.vocabulary == ["2", "black", "yes", "no"]
    sources = opened.provenance["sources"]["train"]["files"]
    assert sources[0]["name"] == "train_q.json"
    assert sources[0]["bytes"] == raw["train"].questions.stat().st_size
    assert len(sources[1]["sha256"]) == 64
    image = H5Images(path)[1]
    assert np.array_equal(image, decode_image(raw["train"].image(2), 32))
    capsys.readouterr()
    make(raw, path)
    assert "complete, nothing to do" in capsys.readouterr().out


def test_vocabularies_are_of_the_training_split_only(raw, tmp_path):
    make(raw, tmp_path / "data.h5")
    opened = Store(tmp_path / "data.h5")
    assert "zebra" not in opened.tokenizer.get_vocab()
    assert UNKNOWN_ID in opened.table("val").words(0)
    assert "lilac" not in opened.vocabulary
    assert (opened.table("val").labels()[0] == NO_ANSWER).all()


def test_vocabularies_are_of_the_splits_that_are_named(raw, tmp_path, capsys):
    make(raw, tmp_path / "both.h5", vocabulary_from=["train", "val"])
    assert "5 answers from train and val" in capsys.readouterr().out
    both = Store(tmp_path / "both.h5")
    assert UNKNOWN_ID not in both.table("val").words(0)
    assert set(both.vocabulary) == {"2", "black", "yes", "no", "lilac"}
    make(raw, tmp_path / "turned.h5", vocabulary_from=["val", "train"])
    assert Store(tmp_path / "turned.h5").vocabulary == both.vocabulary
    make(raw, tmp_path / "val.h5", vocabulary_from=["val"])
    assert Store(tmp_path / "val.h5").vocabulary == ["lilac", "yes"]
    make(raw, tmp_path / "train.h5", vocabulary_from=["train"])
    make(raw, tmp_path / "default.h5")
    assert (tmp_path / "train.h5").read_bytes() == (tmp_path / "default.h5").read_bytes()


def test_a_file_of_vqa_is_that_of_before_there_were_other_datasets(tmp_path):
    """Names of all that it holds, provenance, image ids, checksums of the pixels, digests of the tables."""
    (folder := tmp_path / "vqa").mkdir()
    make({"train": write_split(folder, "train", TRAIN), "val": write_split(folder, "val", VAL)}, folder / "data.h5")
    digest, names = hashlib.sha256(), []
    with h5py.File(folder / "data.h5") as file:
        file.visit(names.append)
        digest.update(f"{sorted(names)} {file.attrs['provenance']}".encode())
        for name in ("id", "crc32"):
            digest.update(file[f"images/{name}"][:].tobytes())
        for name in ("train", "val"):
            digest.update(file[f"splits/{name}"].attrs["digest"])
    assert digest.hexdigest() == "1fcfaf3730ec2a4ddb10093f8c5660eb02d1a2929588fea42f0dcde7631a543e"


def test_splits_without_answers_give_no_vocabulary(raw, tmp_path):
    splits = raw | {"test": SplitFiles(raw["val"].questions, None, raw["val"].images)}
    with pytest.raises(InputError, match="data.vocabulary_from: no split 'vla'; data.splits has train, val, test"):
        make(splits, tmp_path / "data.h5", vocabulary_from=["train", "vla"])
    with pytest.raises(InputError, match="data.vocabulary_from: split 'test' has no annotations, and so no answers"):
        make(splits, tmp_path / "data.h5", vocabulary_from=["train", "test"])
    assert not list(tmp_path.glob("*data.h5*"))


def test_an_image_two_splits_share_is_stored_once(raw, tmp_path):
    make(
        raw | {"dev": raw["val"], "test": SplitFiles(raw["val"].questions, None, raw["val"].images)}, tmp_path / "d.h5"
    )
    opened = Store(tmp_path / "d.h5")
    assert len(opened.usable) == 3
    assert opened.table("test").images.tolist() == opened.table("val").images.tolist()
    assert opened.table("test").given.shape == (2, 0)


def test_few_answers_are_warned_of(tmp_path, capsys):
    asked = [(1, 1, "is it?", ["yes"] * 3), (2, 1, "is it?", ["yes"] * 4)]
    make({"train": write_split(tmp_path, "train", asked)}, tmp_path / "data.h5")
    assert "1 question(s) have fewer than 4 answers" in capsys.readouterr().out


def test_remarks_on_the_questions_are_printed_once(tmp_path, capsys):
    files = write_split(tmp_path, "train", [(1, 1, "这是什么", ["红色"] * 10)])
    change(files.annotations, lambda content: content["annotations"][0]["answers"][0].pop("answer_id"))
    make({"train": files, "val": files}, tmp_path / "data.h5")
    out = capsys.readouterr().out
    assert out.count("2 question(s) have answers whose answer_id is missing or repeated") == 1
    assert out.count("2 question(s) are in a script without blanks between words") == 1
    make({"train": files, "val": files}, tmp_path / "data.h5")
    assert "question(s)" not in capsys.readouterr().out


def test_words_that_are_all_too_rare_are_an_error(raw, tmp_path):
    with pytest.raises(InputError, match="data.min_word_count: no word occurs 99 times in the questions of train"):
        make(raw, tmp_path / "data.h5", min_word_count=99)
    assert not list(tmp_path.glob("*data.h5*"))


def test_how_many_answers_are_classes_is_said(tmp_path, capsys):
    splits = {
        "train": write_split(
            tmp_path, "train", [(1, 1, "what is it", ["cat"] * 3 + ["dog"]), (2, 1, "and", ["cat"] * 4)]
        ),
        "val": write_split(tmp_path, "val", [(3, 2, "what is it", ["fish"] * 4)]),
    }
    make(splits, tmp_path / "data.h5", answers=1)
    told = capsys.readouterr().out
    assert "train: 87.5 % of the given answers are classes" in told
    assert "val: 0.0 % of the given answers are classes" in told


def test_any_number_of_threads_gives_the_same_file(tmp_path):
    splits = many(tmp_path, 150)
    for number in (1, 40, 149):
        splits["train"].image(number).write_bytes(b"no image")
    files = []
    filters = list(warnings.filters)
    for threads in (1, 2, 5):
        path = tmp_path / f"{threads}.h5"
        make(splits, path, threads=threads, skip_bad_images=True)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]
    assert warnings.filters == filters
    stored = H5Images(tmp_path / "2.h5")
    for number in (0, 7, 148):
        assert np.array_equal(stored[number], decode_image(splits["train"].image(number), 32))


def test_bad_images_are_all_listed_and_can_be_skipped(raw, tmp_path, capsys):
    raw["train"].image(1).unlink()
    raw["val"].image(3).write_bytes(b"no image")
    path = tmp_path / "data.h5"
    write_split(tmp_path, "val", [*VAL, (22, 4, "Is it?", ["yes"] * 10)])
    raw["val"].image(3).write_bytes(b"no image")
    with pytest.raises(InputError, match="2 image.*by id: 1, 3; .*data.skip_bad_images=true"):
        make(raw, path)
    out = capsys.readouterr().out
    assert f"1: {raw['train'].image(1)}: no such file" in out
    assert f"3: {raw['val'].image(3)}: cannot be read" in out
    assert not path.exists()
    make(raw, path, skip_bad_images=True)
    opened = Store(path)
    assert opened.usable.tolist() == [False, True, False, True]
    assert len(opened.table("train")) == 3
    assert np.ptp(H5Images(path)[0], axis=(0, 1)).tolist() == [0, 0, 0]


def test_a_split_without_any_image_is_refused_before_the_work(raw, tmp_path):
    wrong = SplitFiles(raw["val"].questions, raw["val"].annotations, str(tmp_path / "test2015/{image_id}.jpg"))
    with pytest.raises(InputError, match="test2015/3.jpg: no such file, nor any other image of split 'val'"):
        make(raw | {"val": wrong}, tmp_path / "data.h5")
    assert not h5_file.partial_path(tmp_path / "data.h5").exists()


def test_a_folder_may_have_braces_in_its_name(tmp_path):
    folder = tmp_path / "{vqa} {image_id}}"
    folder.mkdir()
    write_split(folder, "train", TRAIN)
    names = {"questions": "train_q.json", "annotations": "train_a.json", "images": "train_{image_id:012d}.png"}
    words = [f"data.folder={json.dumps(str(folder))}", f"data.splits={json.dumps({'train': names})}"]
    files = split_files(load_settings(ROOT / "config/daquar.yaml", words))["train"]
    make({"train": files}, tmp_path / "data.h5")
    assert Store(tmp_path / "data.h5").usable.all()


def test_a_training_split_is_needed(raw, tmp_path):
    with pytest.raises(InputError, match="'train'"):
        make({"val": raw["val"]}, tmp_path / "data.h5")
    blank = SplitFiles(raw["train"].questions, None, raw["train"].images)
    with pytest.raises(InputError, match="needs annotations"):
        make({"train": blank}, tmp_path / "data.h5")


def test_other_files_are_refused(raw, tmp_path):
    path = tmp_path / "data.h5"
    with pytest.raises(InputError, match=f"{tmp_path}: not a file"):
        make(raw, tmp_path)
    make(raw, path)
    with pytest.raises(InputError, match="no split 'test'; it holds train, val"):
        Store(path).table("test")
    with h5py.File(path, "r+") as file:
        file.attrs["complete"] = False
    with pytest.raises(InputError, match="not complete"):
        Store(path)


def test_texts_of_every_script_are_kept_as_they_are(tmp_path):
    entries = [
        (1, 1, "这是什么颜色？", ["红色"] * 10),
        (2, 1, "ما هذا؟", ["قطة"] * 3),
        (3, 1, "🐈 or 🐕?", ["🐈"]),
        (4, 2, "  \t ", ["", "yes", " "]),
        (5, 2, "?!", ["yes"] * 10),
        (6, 2, "a\x1b[2J\tb\u202e", ["\x07x"] * 2),
        (7, 2, "word " * 1_999, ["2"] * 100),
    ]
    make({"train": write_split(tmp_path, "train", entries)}, tmp_path / "odd.h5")
    store = Store(tmp_path / "odd.h5")
    table = store.table("train")
    assert table.texts == [text for _, _, text, _ in entries]
    assert [table.answers(row) for row in range(len(table))] == [answers for *_, answers in entries]
    assert table.lengths.min() == 1
    assert table.lengths.max() == 1_999
    assert "" not in store.vocabulary
    assert {"红色", "قطة", "🐈", "yes"} <= set(store.vocabulary)


def test_of_many_bad_images_a_few_are_listed_and_all_are_counted(tmp_path, capsys):
    files = write_split(tmp_path, "train", [(n, n, "a?", ["b"]) for n in range(60)])
    for n in range(1, 60):
        files.image(n).write_bytes(b"")
    with pytest.raises(InputError, match=r"59 image\(s\) missing or unreadable, by id: 1, 2, 3, 4, 5, …"):
        make({"train": files}, tmp_path / "bad.h5")
    assert capsys.readouterr().out.count("cannot be read") == 20
    assert not (tmp_path / "bad.h5").exists()


def test_a_link_to_another_disk_is_followed(raw, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "data.h5"
    link.symlink_to(tmp_path / "disk" / "there.h5")
    make({"train": raw["train"]}, link)
    make(raw, link)
    assert link.is_symlink()
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["there.h5"]
    assert list(Store(link).provenance["sources"]) == ["train", "val"]


def test_an_empty_answer_is_not_that_of_an_article(tmp_path):
    files = write_split(tmp_path, "train", [(1, 1, "what", ["the"] * 5 + ["", " "]), (2, 1, "why", [""] * 3)])
    make({"train": files}, tmp_path / "data.h5")
    store = Store(tmp_path / "data.h5")
    assert store.vocabulary == ["the"]
    labels = store.table("train").labels()
    assert labels[0].tolist() == [0] * 5 + [NO_ANSWER] * 2
    assert labels[1, :3].tolist() == [NO_ANSWER] * 3
