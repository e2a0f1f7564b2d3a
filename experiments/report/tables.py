"""Read and write CSV files; format the lines of a suite's CSV file as tables."""

import csv
import io
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from experiments.report.results import KIND
from experiments.suite import COLUMNS
from vqa.io.errors import printable
from vqa.io.files import write_text

NOT_RUN = "not run"
Line = dict[str, str]  # of a CSV file; an empty string where there is no value
_Column = tuple[str, Callable[[Line], str]]  # a heading, and the cell of a line


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write lines as CSV; their keys are the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(file, text.getvalue())


def read_lines(file: Path) -> list[Line]:
    """The lines of a CSV file."""
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def markdown_table(lines: Sequence[Line]) -> str:
    """Markdown: accuracies beside the paper's, the difference to the baseline, time and memory of training."""
    columns: list[_Column] = [("accuracy, %", itemgetter("row"))]
    for column in COLUMNS:
        columns += [(column, _spread(column)), ("paper", _mean(f"paper_{column}"))]
    columns += [
        (f"difference to {lines[0]['baseline']}", _difference(with_spread=True)),
        ("seeds", _seeds),
        ("training", lambda line: duration(line["seconds"])),
        ("memory, GiB", lambda line: _number(line["peak_memory_mib"], "{:.2f}", 1 / 1024)),
        ("trained parameters", lambda line: _number(line["trained_parameters"], "{:,.0f}").replace(",", " ")),
    ]
    return _markdown(lines, columns)


def markdown_kinds(lines: Sequence[Line]) -> str:
    """Markdown: mean accuracies by question type; empty where there are many types or no results."""
    kinds = [key for key in lines[0] if key.startswith(KIND)]
    if not kinds:
        return ""
    columns = [("accuracy, %", itemgetter("row")), *((key.removeprefix(KIND), _mean(key)) for key in kinds)]
    return _markdown([line for line in lines if line["seeds"]], columns)


def terminal_table(lines: Sequence[Line]) -> str:
    """Aligned text, narrower than the Markdown: standard deviations for the overall accuracy only."""
    columns: list[_Column] = [
        ("accuracy, %", itemgetter("row")),
        ("overall", _spread("overall")),
        ("paper", _mean("paper_overall")),
        *((column, _mean(f"{column}_mean")) for column in COLUMNS[1:]),
        (f"difference to {lines[0]['baseline']}", _difference(with_spread=False)),
        ("seeds", _seeds),
        ("training", lambda line: duration(line["seconds"])),
    ]
    return aligned(_cells(lines, columns))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def claims(lines: Sequence[Line]) -> list[str]:
    """A sentence for each pair of rows whose order is claimed; it holds if both intervals are above zero."""
    return [_claim(line) for line in lines if line["order_above"]]


def _claim(line: Line) -> str:
    pair = f"{line['row']} above {line['order_above']}"
    if not line["order_difference"]:
        return f"{pair}: not compared, as one of them was not run"
    points, low, high = (signed(line[f"order_{key}"]) for key in ("difference", "ci_low", "ci_high"))
    seeds = f"above in {line['order_seeds_above']} of {line['order_seeds']} seeds"
    if line["order_seeds_low"]:
        seeds += f", 95 % interval over seeds [{signed(line['order_seeds_low'])}, {signed(line['order_seeds_high'])}]"
    return f"{pair}: {line['order_verdict']}, {points} points, 95 % interval over questions [{low}, {high}], {seeds}"


def _difference(*, with_spread: bool) -> Callable[[Line], str]:
    """The difference to the baseline with its 95 % interval over questions."""

    def shown(line: Line) -> str:
        if not line["difference"]:
            return ""
        spread = f" ± {_number(line['difference_std'])}" if with_spread and line["difference_std"] else ""
        return f"{signed(line['difference'])}{spread} [{signed(line['ci_low'])}, {signed(line['ci_high'])}]"

    return shown


def _spread(column: str) -> Callable[[Line], str]:
    """A column's mean ± standard deviation over seeds."""

    def shown(line: Line) -> str:
        if not line["seeds"]:
            return NOT_RUN if column == "overall" else ""
        deviation = line[f"{column}_std"]
        return _number(line[f"{column}_mean"]) + (f" ± {_number(deviation)}" if deviation else "")

    return shown


def _mean(key: str) -> Callable[[Line], str]:
    return lambda line: _number(line[key])


def _seeds(line: Line) -> str:
    return str(len(line["seeds"].split()) or "")


def _cells(lines: Sequence[Line], columns: Sequence[_Column]) -> list[list[str]]:
    """Headings and rows; a column that is empty in every line is skipped."""
    filled = [(heading, cells) for heading, shown in columns if any(cells := [shown(line) for line in lines])]
    return [[heading for heading, _ in filled], *map(list, zip(*(cells for _, cells in filled), strict=True))]


def _markdown(lines: Sequence[Line], columns: Sequence[_Column]) -> str:
    rows = [[_as_markdown(cell) for cell in row] for row in _cells(lines, columns)]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _as_markdown(text: str) -> str:
    """Escape what Markdown would take for a tag or the end of a cell."""
    return printable(text).replace("<", "&lt;").replace("|", r"\|")


def _number(text: str, form: str = "{:.2f}", unit: float = 1.0) -> str:
    return form.format(unit * float(text)).replace("-", "−") if text else ""


def signed(text: str) -> str:
    """A number of a CSV file with sign and two decimals; 0.00 has no sign."""
    return _number(text, "{:+.2f}") if round(float(text), 2) else "0.00"


def duration(seconds: str) -> str:
    """Seconds of a CSV file as seconds, minutes or hours."""
    if not seconds:
        return ""
    value = float(seconds)
    if value < 600:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
