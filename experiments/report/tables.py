"""Format the lines of a suite's CSV file as tables for Markdown and for the terminal."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter

from experiments.report.results import KIND, Line
from experiments.tables import aligned
from vqa.io.errors import printable

NOT_RUN, TOO_FEW = "not run", "too few seeds"
WHOLE = ("overall", "error")  # columns of all questions
_Column = tuple[str, Callable[[Line], str]]  # a heading, and the cell of a line


def markdown_table(lines: Sequence[Line]) -> str:
    """Markdown: accuracies with the paper's, the difference to the baseline, time and memory of training."""
    return markdown(_cells(lines, _columns(lines, brief=False)))


def terminal_table(lines: Sequence[Line]) -> str:
    """Aligned text, narrower than the Markdown: the paper's numbers and deviations only for all questions.

    The differences to the baseline are in a second table, below.
    """
    parts = [aligned(_cells(lines, _columns(lines, brief=True)))]
    if compared := [line for line in lines if line["difference"] is not None]:
        names = (f"difference to {lines[0]['baseline']}", itemgetter("row"))
        parts.append(aligned(_cells(compared, [names, ("over questions", _difference), ("over seeds", _over_seeds)])))
    return "\n\n".join(parts)


def _columns(lines: Sequence[Line], *, brief: bool) -> list[_Column]:
    columns: list[_Column] = [("accuracy, %", itemgetter("row"))]
    means = [key for key in lines[0] if key.endswith("_mean") and not key.startswith(KIND)]
    for column in [key.removesuffix("_mean") for key in means]:
        if brief and column not in WHOLE:
            columns.append((column, partial(_mean, f"{column}_mean")))
        else:
            paper = "paper" if column in WHOLE else f"paper, {column}"
            columns += [(column, partial(_spread, column)), (paper, partial(_mean, f"paper_{column}"))]
    if not brief:
        columns += [(f"difference to {lines[0]['baseline']}, over questions", _difference), ("over seeds", _over_seeds)]
    columns += [("seeds", _seeds), ("training", lambda line: duration(line["seconds"]))]
    if not brief:
        columns += [
            ("memory, GiB", lambda line: _number(line["peak_memory_mib"], unit=1024)),
            ("trained parameters", lambda line: _number(line["trained_parameters"], "{:,.0f}").replace(",", " ")),
        ]
    return columns


def markdown_kinds(lines: Sequence[Line]) -> str:
    """Markdown: mean accuracies by question type; empty where there are many types or no results."""
    kinds = [key for key in lines[0] if key.startswith(KIND)]
    columns = [("accuracy, %", itemgetter("row")), *((key.removeprefix(KIND), partial(_mean, key)) for key in kinds)]
    return markdown(_cells([line for line in lines if line["seeds"]], columns)) if kinds else ""


def contrast_tables(lines: Sequence[Line]) -> list[list[list[str]]]:
    """The lines of `SUITE_contrasts.csv` as cells, a table for each first row.

    A line of cells is a question type, a column a row that is subtracted; contrasts without a common seed are skipped.
    """
    tables = []
    for row in dict.fromkeys(line["row"] for line in lines if line["seeds"]):
        own = [line for line in lines if line["row"] == row and line["seeds"]]
        cells = {(line["questions"], line["less"]): _contrast(line) for line in own}
        questions, others = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
        found = ([kind, *(cells.get((kind, other), "") for other in others)] for kind in questions)
        tables.append([[f"{row} less", *others], *found])
    return tables


def _contrast(line: Line) -> str:
    spread = f"({TOO_FEW}: {line['seeds']})" if line["seeds_low"] is None else _interval(line, "seeds")
    return f"{signed(line['difference'])} {spread}"


def claims(lines: Sequence[Line]) -> list[str]:
    """A sentence for each pair of rows whose order is claimed; it holds if both intervals are above zero."""
    return [_claim(line) for line in lines if line["order_above"]]


def _claim(line: Line) -> str:
    pair = f"{line['row']} above {line['order_above']}"
    if line["order_difference"] is None:
        return f"{pair}: not compared, as one of them was not run"
    points, questions = signed(line["order_difference"]), _interval(line, "order_ci")
    seeds = f"above in {line['order_seeds_above']} of {line['order_seeds']} seeds"
    if line["order_seeds_low"] is not None:
        seeds += f", 95 % interval over seeds {_interval(line, 'order_seeds')}"
    return f"{pair}: {line['order_verdict']}, {points} points, 95 % interval over questions {questions}, {seeds}"


def _difference(line: Line) -> str:
    """The difference to the baseline with its 95 % interval over questions."""
    if line["difference"] is None:
        return ""
    spread = f" ± {_number(line['difference_std'])}" if line["difference_std"] is not None else ""
    return f"{signed(line['difference'])}{spread} {_interval(line, 'ci')}"


def _over_seeds(line: Line) -> str:
    """The 95 % interval of the difference over seeds."""
    if line["difference"] is None:
        return ""
    return TOO_FEW if line["seeds_low"] is None else _interval(line, "seeds")


def _interval(line: Line, name: str) -> str:
    return f"[{signed(line[f'{name}_low'])}, {signed(line[f'{name}_high'])}]"


def _spread(column: str, line: Line) -> str:
    """The mean ± standard deviation over seeds."""
    if not line["seeds"]:
        return NOT_RUN if column in WHOLE else ""
    deviation = line[f"{column}_std"]
    return _number(line[f"{column}_mean"]) + ("" if deviation is None else f" ± {_number(deviation)}")


def _mean(key: str, line: Line) -> str:
    return _number(line[key])


def _seeds(line: Line) -> str:
    return str(len(line["seeds"].split())) if line["seeds"] else ""


def _cells(lines: Sequence[Line], columns: Sequence[_Column]) -> list[list[str]]:
    """Headings and rows; a column that is empty in every line is skipped."""
    filled = [(heading, cells) for heading, shown in columns if any(cells := [shown(line) for line in lines])]
    return [[heading for heading, _ in filled], *map(list, zip(*(cells for _, cells in filled), strict=True))]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table; the first row is its heading."""
    rows = [[_as_markdown(cell) for cell in row] for row in cells]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _as_markdown(text: str) -> str:
    """Escape what Markdown would take for a tag or the end of a cell."""
    return printable(text).replace("<", "&lt;").replace("|", r"\|")


def _number(value: float | None, form: str = "{:.2f}", unit: int = 1) -> str:
    return "" if value is None else form.format(value / unit).replace("-", "−")


def signed(value: float) -> str:
    """A number with sign and two decimals; 0.00 has no sign."""
    return _number(value, "{:+.2f}") if round(value, 2) else "0.00"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return ""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
