"""Tables: aligned text for a terminal, and CSV files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqa.io.files import write_csv


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write lines as CSV; their keys are the columns."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    write_csv(file, columns, ([line.get(column) for column in columns] for line in lines), end="\n")
