"""docs/input.md: every row names tests, and they exist."""

import re

import pytest

from tests.conftest import ROOT

ROWS = [
    line.replace(r"\|", "")
    for line in (ROOT / "docs" / "input.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| (?!input|output)", line)
]
TESTS = {
    name
    for file in (ROOT / "tests").glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_every_row_is_held_by_a_test(row):
    _, given, happens, named, end = row.split("|")
    assert given.strip()
    assert happens.strip()
    assert not end
    names = re.findall(r"`(\w+)`", named)
    assert names
    assert set(names) <= TESTS
