"""Rows of an array in an h5 file: where they are written."""

import os
import tracemalloc
import zlib

import h5py
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.h5_rows import LAYOUT, H5Rows, reserve_rows, set_rows
from tests.conftest import fuzzed

PWRITE = os.pwrite


def test_a_reader_keeps_no_row(tmp_path):
    size = 100_000
    with h5py.File(tmp_path / "file.h5", "w", libver=LAYOUT) as file:
        reserve_rows(file, "array", (50, size), np.uint8)
        checksum = zlib.crc32(bytes(size))
        set_rows(file, "crc32", range(50), [checksum] * 50)
    rows = H5Rows(tmp_path / "file.h5", "array")
    assert not rows[0].any()
    tracemalloc.start()
    for row in range(50):
        assert rows[row].shape == (size,)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2 * size


@fuzzed(max_examples=60)
@given(st.lists(st.integers(0, 30), unique=True))
def test_small_values_go_to_their_rows(tmp_path_factory, monkeypatch, rows):
    """Also where the disk takes a part of each first."""
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: PWRITE(file, data[:3], offset))
    path = tmp_path_factory.mktemp("rows") / "file.h5"
    with h5py.File(path, "w", libver=LAYOUT) as file:
        reserve_rows(file, "array", (31, 2), np.uint8)
    with h5py.File(path, "r+") as file:
        set_rows(file, "crc32", rows, [7 + row for row in rows])
    with h5py.File(path) as file:
        assert file["crc32"][:].tolist() == [7 + row if row in rows else 0 for row in range(31)]
