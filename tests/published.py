"""The published files and the pages that quote them, read as tables."""

import csv
import re

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "experiments" / "results"
README, EXPERIMENTS, SPEED = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/experiments.md", "docs/speed.md")
)


def read_lines(file):
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def rows_of(text, header):
    """The cells of the table whose first line begins with `header`, one list a row."""
    lines = text[text.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(cell):
    return [
        float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(\d)\s(\d{3})\b", r"\1\2", cell.replace("−", "-")))
    ]


def shown(cell, *values, digits=2):
    """Whether a cell shows these values, rounded."""
    return numbers(cell) == pytest.approx(values, abs=0.5001 * 10**-digits)
