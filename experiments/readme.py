"""Tables in the README that are written from the CSV files of suites, and never by hand.

A table stands between two lines:

    <!-- table: table2 -->
    <!-- /table -->

The first line names a suite; or some of its rows, in the order they are to stand in; or rows of several suites:

    <!-- table: table2: none | all; controls: shuffled question | constant -->
"""

import re
from pathlib import Path

from data.errors import InputError
from data.files import write_text
from experiments.tables import Line, markdown_table, read_lines

_BLOCK = re.compile(r"^<!-- table: (?P<asked>[^\n]*?) -->\n(?P<table>.*?)(?P<end>^<!-- /table -->$|\Z)", re.M | re.S)


def update_readme(readme: Path, results: Path) -> None:
    """Writes every table of `readme` anew from the CSV files in the folder `results`.

    Raises:
        InputError: as `with_tables`.
    """
    text = readme.read_text(encoding="utf-8")
    if (written := with_tables(text, results)) != text:
        write_text(readme, written)


def with_tables(text: str, results: Path) -> str:
    """A README's text, its tables made from the CSV files in the folder `results`.

    Raises:
        InputError: a table names a suite or a row that is not there, or does not end.
    """

    def written(block: re.Match[str]) -> str:
        asked = block["asked"]
        if not block["end"] or "<!-- table:" in block["table"]:
            raise InputError(f"table {asked!r}: no line <!-- /table --> ends it")
        return f"<!-- table: {asked} -->\n{markdown_table(chosen_lines(asked, results))}<!-- /table -->"

    return _BLOCK.sub(written, text)


def chosen_lines(asked: str, results: Path) -> list[Line]:
    """The lines that a table asks for, as `table2` or `table2: none | all; controls: constant`.

    Raises:
        InputError: no such suite or row.
    """
    lines: list[Line] = []
    for part in asked.split(";"):
        name, _, rows = (piece.strip() for piece in part.partition(":"))
        file = results / f"{name}.csv"
        if not file.exists():
            known = sorted(path.stem for path in results.glob("*.csv") if not path.stem.endswith("_runs"))
            raise InputError(f"table {asked!r}: no {file}; there are {', '.join(known) or 'none'}")
        by_row = {line["row"]: line for line in read_lines(file)}
        for row in (row.strip() for row in rows.split("|")) if rows else by_row:
            if row not in by_row:
                raise InputError(f"table {asked!r}: {file} has no row {row!r}; rows are {', '.join(by_row)}")
            lines.append(by_row[row])
    return lines
