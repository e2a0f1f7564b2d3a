"""Damage: not one flipped byte, nor a file cut off, passes into training unnoticed."""

import os
import random
import shutil
from pathlib import Path

import h5py
import pytest
import torch
from safetensors import SafetensorError

from data import h5_file
from data.h5_file import H5Images, Store, partial_path
from data.h5_rows import opened_for_filling, set_rows
from data.question_table import ARRAYS, TEXTS
from experiments.training.checkpoint import load_checkpoint
from experiments.training.stage_cache import cached_maps
from tests.experiments.training.test_stage_cache import encode
from tests.raw_files import make, many, write_split
from vqa.backbone import build_resnet
from vqa.io.errors import InputError
from vqa.io.weight_files import as_safetensors, read_safetensors
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings


@pytest.fixture
def small(tmp_path) -> Path:
    """An h5 file of 3 images and 6 questions."""
    entries = [(n, n % 3, f"what is {n} of those", ["yes"] * 10) for n in range(6)]
    make({"train": write_split(tmp_path, "train", entries)}, tmp_path / "data.h5")
    return tmp_path / "data.h5"


def flipped(file: Path, place: int, bit: int = 0) -> Path:
    """A copy with one bit flipped."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    copy = file.with_name(f"flipped{file.suffix}")
    copy.write_bytes(content)
    return copy


def all_of(path: Path) -> tuple:
    """All that training reads of an h5 file."""
    opened, images = Store(path), H5Images(path)
    table = opened.table("train")
    parts = [getattr(table, name).tobytes() for name in ARRAYS]
    parts += [getattr(table, name) for name in TEXTS]
    parts += [images[row].tobytes() for row in range(len(opened.usable))]
    return opened.identity(opened.splits), opened.usable.tobytes(), opened.vocabulary, opened.tokenizer.to_str(), parts


def test_a_flipped_bit_of_an_h5_is_refused_or_changes_nothing(small):
    whole, chosen = all_of(small), random.Random(0)
    with h5py.File(small) as file:
        first = file["images/pixels"].id.get_offset()
    refusals = 0
    # most of them where the tables, the vocabulary and HDF5's own structures are; between these there are zeros
    written = [place for place, byte in enumerate(small.read_bytes()[:first]) if byte]
    for place in [*chosen.sample(written, 90), *chosen.sample(range(first, small.stat().st_size), 10)]:
        try:
            assert all_of(flipped(small, place, chosen.randrange(8))) == whole, place
        except InputError as refusal:
            refusals += 1
            assert "flipped.h5" in str(refusal)
    assert refusals > 20


@pytest.mark.parametrize(
    "name",
    ["images/crc32", "images/usable", "answers/vocabulary", *(f"splits/train/{one}" for one in (*ARRAYS, *TEXTS))],
)
def test_a_value_that_was_changed_is_refused(small, name):
    with h5py.File(small, "r+") as file:
        first = file[name][0]
        file[name][0] = "changed" if isinstance(first, bytes) else first ^ 1
    with pytest.raises(InputError, match=r"data.h5: damaged \(checksum mismatch"):
        Store(small).table("train")


def test_a_damaged_image_is_named(small):
    with h5py.File(small) as file:
        place = file["images/pixels"].id.get_offset() + 1 * 32 * 32 * 3 + 100
    images = H5Images(flipped(small, place))
    assert images[0].shape == images[2].shape == (32, 32, 3)
    message = r"flipped.h5: row 1 of images/pixels is damaged \(checksum mismatch\); remove it and run `prep"
    with pytest.raises(InputError, match=message):
        images[1]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_a_damaged_image_is_one_line(tiny, here, refused, workers):
    whole = Path(load_settings(tiny).data.h5)
    with h5py.File(whole) as file:
        place = file["images/pixels"].id.get_offset() + 5 * 64 * 64 * 3
    copy = shutil.move(flipped(whole, place), here / "copy.h5")
    said = refused("train", "--config", tiny, f"data.h5={copy}", "data.cache_gib=0.0", f"workers={workers}")
    assert said.startswith(f"error: {copy}: row 5 of images/pixels is damaged")


def test_a_file_that_is_cut_off_is_refused(small):
    content = small.read_bytes()
    for length in (0, 10, 1000, len(content) // 2, len(content) - 1):
        small.write_bytes(content[:length])
        with pytest.raises(InputError, match="data.h5: cannot be read as an h5 file"):
            Store(small)


def test_a_file_that_shrinks_while_it_is_read_is_named(small):
    images = H5Images(small)
    assert images[0].shape == (32, 32, 3)
    with h5py.File(small) as file:
        os.truncate(small, file["images/pixels"].id.get_offset() + 32 * 32 * 3 * 5 // 2)
    with pytest.raises(InputError, match="data.h5: ends before row 2 of images/pixels: truncated"):
        images[2]


def test_a_file_of_another_version_is_neither_read_nor_filled(small):
    with h5py.File(small, "r+") as file:
        file.attrs["version"] = 1
    said = r"made by modern-vqa version 1, not modern-vqa version 2; .* remove it and run `preprocess`"
    with pytest.raises(InputError, match=said):
        Store(small)
    small.rename(partial_path(small))
    with pytest.raises(InputError, match=said):
        h5_file.read_provenance(partial_path(small))


def test_rows_without_checksums_are_refused(small):
    with h5py.File(small, "r+") as file:
        del file["images/crc32"]
    with pytest.raises(InputError, match=r"data.h5: cannot be read as an h5 file .*; remove it and"):
        H5Images(small)[0]


@pytest.mark.parametrize("finished", [True, False])
def test_maps_without_checksums_are_refused(tmp_path, finished):
    path = tmp_path / "maps.h5"
    cached_maps(path, {"data": "a"}, 20, encode)
    with h5py.File(path, "r+") as file:
        del file["crc32"]
    if not finished:
        path.rename(partial_path(path))
    with pytest.raises(InputError, match=r"crc32.*; remove it; it is made again"):
        cached_maps(path, {"data": "a"}, 20, encode)[0]


def test_a_damaged_map_is_named(tmp_path):
    path = tmp_path / "maps.h5"
    cached_maps(path, {"data": "a"}, 20, encode)
    with h5py.File(path) as file:
        place = file["maps"].id.get_offset() + 7 * 2 * 2 * 3 * 2
    shutil.move(flipped(path, place), path)
    maps = cached_maps(path, {"data": "a"}, 20, pytest.fail)
    assert (maps[6] == 6).all()
    with pytest.raises(InputError, match=r"maps.h5: row 7 of maps is damaged \(checksum mismatch\); remove it"):
        maps[7]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small one."""
    file = tmp_path / "last.pt"
    torch.save({"model": {"weight": torch.randn(50), "bias": torch.randn(3)}, "progress": {"epoch": 3}}, file)
    return file


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(checkpoint):
    whole, refusals = load_checkpoint(checkpoint), 0
    chosen = random.Random(0)
    places = chosen.sample(range(checkpoint.stat().st_size), 150)
    for place in places:
        try:
            loaded = load_checkpoint(flipped(checkpoint, place, chosen.randrange(8)))
            assert loaded["progress"] == whole["progress"], place
            assert all(torch.equal(loaded["model"][name], whole["model"][name]) for name in whole["model"]), place
        except InputError as refusal:
            refusals += 1
            assert "flipped.pt: cannot be read as a checkpoint" in str(refusal)
    assert refusals > 20


def test_a_checkpoint_that_is_cut_off_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"last.pt: cannot be read as a checkpoint \(\w"):
            load_checkpoint(checkpoint)


def test_a_flipped_bit_of_weights_is_refused_or_changes_nothing(tmp_path):
    file, chosen = tmp_path / "some.safetensors", random.Random(0)
    weights, said = {"a": torch.randn(20), "b": torch.arange(4).to(torch.bfloat16)}, {"training": '{"epoch": 3}'}
    file.write_bytes(as_safetensors(weights, said))
    refusals = 0
    for place in range(file.stat().st_size):
        try:
            read, told = read_safetensors(flipped(file, place, chosen.randrange(8)))
        except (ValueError, SafetensorError):
            refusals += 1
            continue
        assert told.items() >= said.items(), place
        assert all(torch.equal(read[name], weights[name]) for name in weights), place
    assert refusals > 200


def test_a_damaged_model_is_named(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    shutil.move(flipped(file, file.stat().st_size - 1000), file)
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read as weights \(damaged: checksum mismatch"):
        load_model(tmp_path)


def test_damaged_weights_of_a_backbone_are_named(tmp_path):
    net = build_resnet("resnet10")
    for name, write in (("w.safetensors", None), ("w.pth", torch.save)):
        file = tmp_path / name
        if write is None:
            file.write_bytes(as_safetensors(net.state_dict(), {}))
        else:
            write(net.state_dict(), file)
        build_resnet("resnet10", file)
        with pytest.raises(ValueError, match=f"flipped{file.suffix}: cannot be read as weights .damaged: "):
            build_resnet("resnet10", flipped(file, file.stat().st_size // 2))


def test_the_same_weights_are_the_same_file():
    weights = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.int64)}
    made = {as_safetensors(weights, {"training": "{}", "by": "us", "for": "you"}) for _ in range(20)}
    assert len(made) == 1


@pytest.mark.parametrize("finished", [True, False])
def test_a_flipped_bit_of_stored_maps_is_refused_or_changes_nothing(tmp_path, finished):
    path, chosen = tmp_path / "maps.h5", random.Random(0)
    maps = cached_maps(path, {"data": "a"}, 20, encode)
    whole, refusals = [maps[row].tobytes() for row in range(20)], 0
    for place in chosen.sample(range(path.stat().st_size), 60):
        copy = flipped(path, place, chosen.randrange(8))
        if not finished:
            copy.rename(partial_path(copy))
        try:
            found = cached_maps(copy, {"data": "a"}, 20, encode)
            assert [found[row].tobytes() for row in range(20)] == whole, place
        except InputError as error:
            refusals += 1
            assert "flipped.h5" in str(error)
        for made in (copy, partial_path(copy)):
            made.unlink(missing_ok=True)
    assert refusals > 10


def test_an_image_that_was_mended_after_a_kill_counts_again(tmp_path):
    splits, path = many(tmp_path, 3), tmp_path / "data.h5"
    damaged = splits["train"].image(1)
    whole = damaged.read_bytes()
    damaged.write_bytes(b"no image")
    with pytest.raises(InputError, match="1 image"):
        make(splits, path)
    with opened_for_filling(partial_path(path)) as file:  # killed before the row was marked as filled
        set_rows(file, "images/usable", [1], [False])
    damaged.write_bytes(whole)
    make(splits, path)
    assert Store(path).usable.all()
