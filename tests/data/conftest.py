"""Fixtures of the tests of data."""

import shutil
from pathlib import Path

import pytest

import data.sources
from vqa.io.images import read_image


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
