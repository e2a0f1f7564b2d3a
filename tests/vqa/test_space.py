"""Room on the disk: large files are refused before the work, and what is there already counts."""

import numpy as np
import pytest

from data import h5_file
from data.h5_rows import opened_for_filling
from experiments.training.stage_cache import cached_maps
from tests.raw_files import make, write_split
from vqa.io.errors import InputError
from vqa.io.files import check_room


def test_what_a_file_has_allocated_counts_and_its_holes_do_not(tmp_path, left):
    file = tmp_path / "file"
    with file.open("wb") as opened:
        opened.write(b"x" * 2**20)
        opened.truncate(2**30)
    there = file.stat().st_blocks * 512
    assert there < 2**22
    asked = left(2**30 - there)
    check_room(file, 2**30, "do otherwise")
    left(2**30 - there - 1)
    with pytest.raises(
        InputError, match=r"file: needs 1.07 GB more, but its disk has 1.07 GB left; make room or do oth"
    ):
        check_room(file, 2**30, "do otherwise")
    check_room(tmp_path / "absent" / "file", 2**29, "do otherwise")
    assert asked == [tmp_path] * 3


def test_a_file_that_cannot_fit_is_refused_before_it_is_begun(raw, tmp_path, left, capsys):
    path = tmp_path / "disk" / "data.h5"
    left(3 * 512**2 * 3)  # the pixels alone
    with pytest.raises(InputError, match=r"data.h5.partial: needs 2.4 MB more, .* left; make room or name another"):
        make(raw, path, image_size=512)
    assert not list(path.parent.iterdir())
    left(10**7)
    make(raw, path, image_size=512)
    assert f"{path}.partial: needs 2.4 MB, 2.4 MB of them for 3 images" in capsys.readouterr().out


def test_the_estimate_is_near_the_size_of_the_file(tmp_path, monkeypatch):
    entries = [(n, n % 50, f"what is {n} beside it", [f"thing {n % 90}"] * 10) for n in range(3000)]
    asked = []
    monkeypatch.setattr("data.preprocess.check_room", lambda _file, size, _otherwise: asked.append(size))
    make({"train": write_split(tmp_path, "train", entries)}, tmp_path / "data.h5")
    assert asked[0] == pytest.approx((tmp_path / "data.h5").stat().st_size, rel=0.15)


def test_a_begun_file_needs_only_the_rest(tmp_path, left):
    entries = [(n, n, "what is it", ["yes"] * 10) for n in range(40)]
    splits, path = {"train": write_split(tmp_path, "train", entries)}, tmp_path / "data.h5"
    bad = splits["train"].image(39)
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match="1 image"):
        make(splits, path, image_size=256)
    bad.write_bytes(whole)
    partial = h5_file.partial_path(path)
    with opened_for_filling(partial) as file:
        missing = file.id.get_filesize() - partial.stat().st_blocks * 512
    assert 0 < missing < 2 * 3 * 256**2
    left(missing - 1)
    with pytest.raises(InputError, match="more, but its disk has"):
        make(splits, path, image_size=256)
    left(missing)
    make(splits, path, image_size=256)
    assert h5_file.Store(path).usable.all()


def test_stored_maps_are_refused_too(tmp_path, left):
    left(1000)
    with pytest.raises(InputError, match=r"maps.h5.partial: needs .* left; make room or set data.cache_gib=0"):
        cached_maps(tmp_path / "maps.h5", {"data": "a"}, 10_000, lambda rows: np.zeros((len(rows), 4, 4, 8)))
    assert not (tmp_path / "maps.h5").exists()
    left(10_000 * 4 * 4 * 8 * 2)
    assert cached_maps(tmp_path / "maps.h5", {"data": "a"}, 9_999, lambda rows: np.ones((len(rows), 4, 4, 8)))[5].all()
