"""Write the report of a suite: two CSV files and, from these alone, a page, a figure and a table for the terminal."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.report.figure import write_figure
from experiments.report.results import collect, row_lines, run_lines
from experiments.report.tables import (
    Line,
    claims,
    markdown_kinds,
    markdown_table,
    read_lines,
    terminal_table,
    write_lines,
)
from experiments.runner import MAIN
from experiments.suite import Suite
from vqa.io.files import write_text

ROOT = MAIN.parent.resolve()
_LEGEND = """\
Overall and by answer type: mean ± sample standard deviation over seeds. Difference, in points: of the means over seeds,
± the standard deviation of the differences seed by seed, and the 95 % interval of a paired bootstrap over {questions}
questions; the interval does not cover the spread between seeds. Of each run that epoch counts which was best on these
very questions. Training: the time of all training steps, without validation. Memory: the most that the training process
held (on a GPU: that was allocated there).
"""


def write_report(suite: Suite, runs: Path, out: Path) -> str:
    """Report the finished runs of a suite.

    Writes `SUITE.csv` (a line a row) and `SUITE.md`, and, where anything is finished, `SUITE_runs.csv` (a line a row
    and seed) and `SUITE.png`.

    Args:
        suite: what was run.
        runs: where run directories are.
        out: where the report is written.

    Returns:
        The table as plain text, the claims about the order of rows, and where the page is.

    Raises:
        InputError: a file of a finished run is missing or damaged.
    """
    table, trainings, picture = (out / f"{suite.report_name}{ending}" for ending in (".csv", "_runs.csv", ".png"))
    results = collect(suite, runs)
    write_lines(table, row_lines(suite, results))
    if results:
        write_lines(trainings, run_lines(results))
        write_figure(picture, suite.title, read_lines(trainings), suite.baseline)
    else:
        trainings.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)
    lines = read_lines(table)
    page = out / f"{suite.report_name}.md"
    write_text(page, _page(suite, lines, read_lines(trainings) if results else []))
    told = [suite.title, "", terminal_table(lines), ""]
    if ordered := claims(lines):
        told += [*ordered, ""]
    return "\n".join([*told, str(page)])


def _page(suite: Suite, lines: Sequence[Line], trainings: Sequence[Line]) -> str:
    command = shlex.join(["python", "main.py", "experiment", _below_root(suite.file), *suite.words])
    about = f"Runs are deltas over `{_below_root(suite.recipe)}`; `{suite.report_name}.csv` names them."
    if suite.paper:
        about += f" The paper's numbers are of {suite.paper}."
    parts = [f"# {suite.title}\n", f"```sh\n{command}\n```\n", f"{about}\n", markdown_table(lines)]
    if trainings:
        parts += [_legend(lines, suite), f"![Accuracy of every row and seed]({suite.report_name}.png)\n"]
    if kinds := markdown_kinds(lines):
        parts += ["## By question type\n", kinds]
    if ordered := claims(lines):
        parts += ["## The claimed order\n", "".join(f"- {claim}\n" for claim in ordered)]
    if trainings:
        parts += ["## Where these numbers are from\n", "".join(f"- {fact}\n" for fact in facts(trainings))]
    return "\n".join(parts)


def _legend(lines: Sequence[Line], suite: Suite) -> str:
    compared = {line["compared"] for line in lines if line["compared"]}
    asked = {line["row"]: line["questions"] for line in lines}
    legend = _LEGEND.format(questions=" or ".join(sorted(compared, key=int)) or "the")
    split, validated = suite.tests[0].split, suite.runs[0].settings.train.validate_on
    if split != validated:
        legend = legend.replace("these\nvery questions.", f"the\nsplit `{validated}`; the accuracies are of `{split}`.")
    for line in lines:
        theirs = asked.get(line["baseline"])
        if line["compared"] and {line["compared"]} != {line["questions"], theirs}:
            legend += (
                f"\n{line['row']} was asked {line['questions']} questions and {line['baseline']} {theirs}; they are "
                f"compared on the {line['compared']} that both were asked.\n"
            )
        elif line["seeds"] and theirs and not line["compared"] and line["row"] != line["baseline"]:
            legend += f"\n{line['row']} was asked other questions than {line['baseline']}: they are not compared.\n"
    return legend


def facts(trainings: Sequence[Line]) -> list[str]:
    """Machines, commits, backbones and seeds of the lines of `SUITE_runs.csv`."""
    own = {line["folder"]: line for line in trainings}.values()  # a training may be tested in several rows
    machines, commits = ([told(line) for line in own] for told in (_machine, _commit))
    seeds = sorted({int(line["seed"]) for line in own})
    told = [f"{_trainings(machines.count(machine))} on {machine}" for machine in dict.fromkeys(machines)]
    told += [f"{_trainings(commits.count(commit))} with the code of {commit}" for commit in dict.fromkeys(commits)]
    told += _backbones([line["backbone"] for line in own])
    return [*told, f"seeds {', '.join(map(str, seeds))}"]


def _backbones(digests: Sequence[str]) -> list[str]:
    """The backbone weights that were used, with a warning where there are several."""
    told = [f"{_trainings(digests.count(one))} on the backbone {one}" for one in dict.fromkeys(digests) if one]
    if len(told) > 1:
        told.append("**several backbones: a difference between two trainings may be one between their backbones**")
    return told


def _trainings(count: int) -> str:
    return f"{count} training{'s' if count > 1 else ''}"


def _machine(line: Line) -> str:
    processes = f"{line['processes']} processes, " if line["processes"] != "1" else ""
    cores = f"{line['cpus']} CPU cores, {line['threads']} thread{'s' if line['threads'] != '1' else ''}"
    return f"{line['device']} ({processes}{cores}), torch {line['torch']}, Python {line['python']}"


def _commit(line: Line) -> str:
    commit, dirty, _ = line["git_commit"].partition("-dirty")
    if not commit:
        return "an unknown commit"
    return f"commit {commit[:10]}{' with changes that are not committed' if dirty else ''}"


def _below_root(file: Path) -> str:
    """A path relative to the checkout, if it is inside."""
    file = file.resolve()
    return str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)
