"""Fixtures of the tests of data."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copied(games, tmp_path) -> Path:
    """A copy of the games, for tests that change them."""
    return Path(shutil.copytree(games, tmp_path / "official"))
