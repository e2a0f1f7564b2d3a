"""Preprocessing that was stopped or killed resumes, and nothing of other sources is mixed in."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import h5_file
from data.h5_file import H5Images, Store
from data.vqa_files import SplitFiles
from tests.calls import failing
from tests.conftest import ROOT
from tests.raw_files import KILLED_IN_A_FLUSH, TRAIN, VAL, change, make, many, write_split
from vqa.io.errors import InputError
from vqa.io.images import decode_image


def test_a_finished_file_of_other_images_is_not_touched(raw, tmp_path):
    make(raw, tmp_path / "data.h5")
    before = (tmp_path / "data.h5").read_bytes()
    with pytest.raises(InputError, match="made with image_size 32, now 48; name another data.h5 or remove it"):
        make(raw, tmp_path / "data.h5", image_size=48)
    with pytest.raises(InputError, match=r"holds a split 'val'; name it in data.splits, name another data.h5 or rem"):
        make({"train": raw["train"]}, tmp_path / "data.h5")
    change(raw["val"].questions, lambda c: c["questions"][0].update(question="Other?"))
    with pytest.raises(InputError, match="split 'val' was made from other files"):
        make(raw, tmp_path / "data.h5")
    assert (tmp_path / "data.h5").read_bytes() == before


def test_a_run_killed_at_any_flush_keeps_what_it_marked(tmp_path):
    splits = many(tmp_path, 100)
    whole = tmp_path / "whole.h5"
    make(splits, whole)
    with h5py.File(whole) as file:
        expected = file["images/pixels"][:]
    partial = h5_file.partial_path(tmp_path / "data.h5")
    # three end the creation; from then on there is one for every 16 images, before they are marked
    for flush, kept in ((1, None), (2, None), (3, 0), (1, 0), (2, 16), (3, 48)):
        arguments = [sys.executable, "-c", KILLED_IN_A_FLUSH, str(tmp_path), str(flush)]
        ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, check=False)
        assert ended.returncode == -9
        assert not (tmp_path / "data.h5").exists()
        assert partial.exists() == (kept is not None)
        if kept is None:
            continue
        with h5py.File(partial) as file:
            filled = file["images/filled"][:]
            assert filled.sum() == kept
            assert np.array_equal(file["images/pixels"][:][filled], expected[filled])
    with pytest.raises(InputError, match="not finished"):
        Store(tmp_path / "data.h5")
    make(splits, tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5") as file:
        assert np.array_equal(file["images/pixels"][:], expected)
    assert not partial.exists()


def test_annotations_that_are_wrong_leave_nothing_behind(tmp_path):
    splits, path = many(tmp_path, 100), tmp_path / "data.h5"
    change(splits["train"].annotations, lambda content: content["annotations"][99].update(image_id=7))
    with pytest.raises(InputError, match="annotation of question 99: image_id 7"):
        make(splits, path)
    assert [file.name for file in tmp_path.glob("*data.h5*")] in ([], [".data.h5.lock"])


def test_a_begun_file_of_other_settings_is_kept(raw, tmp_path):
    raw["train"].image(1).unlink()
    path = tmp_path / "data.h5"
    with pytest.raises(InputError, match="missing or unreadable"):
        make(raw, path)
    before = h5_file.partial_path(path).read_bytes()
    with pytest.raises(InputError, match=r"begun with data.answers=10; finish it with these first"):
        make(raw, path, answers=3)
    with pytest.raises(InputError, match=r"begun with data.vocabulary_from=\['train'\]; finish it with these first"):
        make(raw, path, vocabulary_from=["train", "val"])
    assert h5_file.partial_path(path).read_bytes() == before


def test_the_folder_of_the_sources_may_move(raw, tmp_path):
    make(raw, tmp_path / "data.h5")
    moved = tmp_path / "moved"
    moved.mkdir()
    again = {"train": write_split(moved, "train", TRAIN), "val": write_split(moved, "val", VAL)}
    with pytest.raises(InputError, match="other files"):  # other bytes: the patterns' last folder is another one
        make(again, tmp_path / "data.h5")
    same = {
        name: SplitFiles(f.questions, f.annotations, f"{tmp_path}/./{Path(f.images).name}") for name, f in raw.items()
    }
    make(same, tmp_path / "data.h5")


def test_images_directly_in_the_folder_of_the_data_may_move_too(raw, tmp_path, capsys):
    path = tmp_path / "data.h5"
    names = {name: Path(files.images).name for name, files in raw.items()}
    make({k: replace(files, within=names[k]) for k, files in raw.items()}, path)
    for folder in (".", "photos", "/data/images"):
        make({k: replace(files, images=f"{folder}/{names[k]}", within=names[k]) for k, files in raw.items()}, path)
    assert capsys.readouterr().out.count("complete, nothing to do") == 3
    with pytest.raises(InputError, match="other files"):
        make({k: replace(files, within=f"blurred/{names[k]}") for k, files in raw.items()}, path)


@pytest.mark.parametrize("skip", [False, True])
def test_the_folder_of_the_sources_may_move_while_it_is_not_finished(tmp_path, skip):
    def files_in(folder):
        return {
            name: SplitFiles(
                folder / f"{name}_q.json", folder / f"{name}_a.json", f"{folder}/{name}_{{image_id:012d}}.png"
            )
            for name in ("train", "val")
        }

    folder, moved, path = tmp_path / "one/raw", tmp_path / "two/raw", tmp_path / "data.h5"
    folder.mkdir(parents=True)
    for name, entries in (("val", VAL), ("train", TRAIN)):
        write_split(folder, name, entries)
    late = files_in(folder)["train"].image(2)
    late.rename(tmp_path / "late.png")
    with pytest.raises(InputError, match="missing or unreadable, by id: 2"):
        make(files_in(folder), path)
    (tmp_path / "late.png").rename(late)
    moved.parent.mkdir()
    folder.rename(moved)
    make(files_in(moved), path, skip_bad_images=skip)
    assert Store(path).usable.all()
    assert np.array_equal(H5Images(path)[1], decode_image(moved / late.name, 32))


def test_pixels_that_cannot_be_written_are_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("os.pwrite", failing(errno.ENOSPC))
    with pytest.raises(
        InputError, match=r"data.h5.partial: cannot be written \(no space left on device\); free some space, then"
    ):
        make(many(tmp_path, 3), tmp_path / "data.h5")
    monkeypatch.undo()
    real = os.pwrite  # writes less than it is given, as it may
    monkeypatch.setattr("os.pwrite", lambda file, data, offset: real(file, data[:1000], offset))
    make(many(tmp_path, 3), tmp_path / "data.h5")
    assert np.array_equal(H5Images(tmp_path / "data.h5")[2], decode_image(tmp_path / "train_000000000002.png", 32))


def test_a_file_with_an_empty_row_is_never_finished(raw, tmp_path):
    make(raw, tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        file["images/filled"][1] = False
    with pytest.raises(RuntimeError, match="not every image"):
        h5_file.finish(tmp_path / "data.h5", tmp_path / "final.h5")
