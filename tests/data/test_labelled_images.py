"""Labelled images: what is read of folders and zip files, which are held out, and errors that name them."""

import errno
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.labelled_images import LabelledImages
from tests.photographs import COLOURS


def zipped(folder, file):
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder).as_posix())
    return file


def test_a_folder_and_a_zip_file_of_it_are_the_same(photos, tmp_path):
    folder, archive = LabelledImages(photos), LabelledImages(zipped(photos, tmp_path / "photos.zip"))
    assert (folder.names, folder.digest) == (archive.names, archive.digest)
    one, other = np.zeros((2, 60, 32, 32, 3), np.uint8)
    folder.decode_into(one)
    archive.decode_into(other)
    assert one.any(axis=(1, 2, 3)).all()
    assert np.array_equal(one, other)


def test_a_folder_that_cannot_be_listed_is_not_an_absent_class(refused, photos, tmp_path, monkeypatch):
    listed = os.scandir

    def scandir(folder):
        if Path(folder).name == "red":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    line = refused("pretrain", "--images", photos, "--out", tmp_path / "b.safetensors", "--device", "cpu")
    assert line == f"error: {photos}/red: permission denied"


def test_a_link_to_nothing_is_a_bad_image(refused, photos, tmp_path):
    for file in (photos / "red").iterdir():
        file.unlink()
        file.symlink_to(tmp_path / "unmounted" / file.name)
    line = refused("pretrain", "--images", photos, "--out", tmp_path / "b.safetensors", "--device", "cpu")
    assert line.startswith(f"error: {photos}/red/")
    assert "no such file or directory; 19 more cannot be read" in line


def test_folders_train_and_val_inside_the_classes_are_refused(refused, photos, tmp_path):
    for folder in [path for path in photos.iterdir() if path.is_dir()]:
        for number, part in enumerate(("train", "val")):
            (folder / part).mkdir()
            (folder / f"0{number}.png").rename(folder / part / "0.png")
    line = refused("pretrain", "--images", photos, "--out", tmp_path / "b.safetensors", "--device", "cpu")
    assert line == f"error: {photos}: images lie in blue/train; put train and val outside, as train/CLASS"


@pytest.mark.parametrize("renamed", [lambda name: f"./{name}", lambda name: name.replace("/", "\\")])
def test_other_programs_names_in_zip_files(photos, tmp_path, renamed):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.rglob("*.*"):
            archive.writestr(renamed(path.relative_to(photos).as_posix()), path.read_bytes())
    folder, archive = LabelledImages(photos), LabelledImages(tmp_path / "photos.zip")
    assert (folder.names, folder.digest) == (archive.names, archive.digest)
    assert np.array_equal(*(one.decode(one.names[0], 32) for one in (folder, archive)))


def test_waiting_images_cost_no_memory_each(photos, monkeypatch):
    submitted = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments):
            submitted.append(arguments)
            return super().submit(*arguments)

    monkeypatch.setattr("data.labelled_images.ThreadPoolExecutor", Pool)
    pixels = np.zeros((60, 32, 32, 3), np.uint8)
    LabelledImages(photos).decode_into(pixels)
    assert pixels.any(axis=(1, 2, 3)).all()
    assert len(submitted) == 4


def test_links_to_folders_are_followed_but_not_in_circles(photos, tmp_path):
    plain = LabelledImages(photos)
    (photos / "red").rename(tmp_path / "elsewhere")
    (photos / "red").symlink_to(tmp_path / "elsewhere")
    for link, target in (("again", photos), ("blue/above", photos), ("blue/here", photos / "blue")):
        (photos / link).symlink_to(target)
    assert LabelledImages(photos).names == plain.names
    assert LabelledImages(photos).digest == plain.digest


def test_a_tenth_of_each_class_is_held_out_by_name(photos):
    first = LabelledImages(photos)
    held_out = first.names[first.training :]
    assert sorted(name.split("/")[0] for name in held_out) == sorted([*COLOURS] * 2)
    for path in (photos / "red").glob("*.png"):
        path.write_bytes(path.read_bytes() + b"\0")  # by name, whatever the file holds
    (photos / "red" / "notes.txt").write_text("skipped")
    (photos / "red" / ".hidden.png").write_text("skipped")
    again = LabelledImages(photos)
    assert again.names[again.training :] == held_out
    assert again.digest != first.digest
    (photos / "single").mkdir()
    shutil.copy(photos / "red" / "03.png", photos / "single")  # the only one of its class is trained on
    alone = LabelledImages(photos)
    assert alone.names[alone.training :] == held_out


def test_train_val_and_groups_are_read_as_they_are_given(photos, tmp_path):
    (photos / "classes.csv").write_text("class,group\nred,warm\ngreen,cold\nblue,cold\n")
    outer = tmp_path / "outer"
    for split in ("train", "val", "test"):
        shutil.copytree(photos, outer / split)
    images = LabelledImages(outer)
    assert images.training == 60
    assert {name.split("/")[0] for name in images.names[:60]} == {"train"}
    assert {name.split("/")[0] for name in images.names[60:]} == {"val"}
    assert images.groups == ["cold", "cold", "warm"]
    assert [images.classes[label] for label in images.labels] == [name.split("/")[1] for name in images.names]
    (outer / "classes.csv").write_text("class,group\nred,warm\ngreen,warm\nblue,cold\n")
    regrouped = LabelledImages(outer)
    assert regrouped.groups == ["cold", "warm", "warm"]
    assert regrouped.digest != images.digest


def test_images_that_cannot_be_read_are_named(refused, photos, tmp_path):
    for name in ("blue/03.png", "red/04.png"):
        (photos / name).write_bytes(b"no image")
    archive = zipped(photos, tmp_path / "photos.zip")
    content = bytearray(archive.read_bytes())
    place = content.index((photos / "green" / "05.png").read_bytes()) + 200
    content[place] ^= 1
    archive.write_bytes(content)
    for images, count, others in ((photos, 1, "red/04.png"), (archive, 2, "green/05.png, red/04.png")):
        line = refused("pretrain", "--images", images, "--out", tmp_path / "b.safetensors", "--device", "cpu")
        assert line.startswith(f"error: {images}/blue/03.png: cannot be read as an image")
        assert line.endswith(f"; {count} more cannot be read: {others}; repair or remove them")
    assert not (tmp_path / "b.safetensors").exists()
