"""Write the report of a suite: two CSV files and, from their lines, a page, a figure and a table for the terminal."""

import csv
import io
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments import ROOT
from experiments.report.results import (
    THEN,
    Line,
    collect,
    contrast_lines,
    keep_evidence,
    on_other_data,
    row_lines,
    run_lines,
)
from experiments.report.tables import (
    claims,
    contrast_tables,
    markdown,
    markdown_kinds,
    markdown_table,
    terminal_table,
)
from experiments.runner import missing_jobs
from experiments.suite import Suite
from experiments.tables import aligned, write_lines
from vqa.io.errors import InputError
from vqa.io.files import read_text, write_text

RESULTS = ROOT / "experiments" / "results"
_LEGEND = """\
Overall and by answer type: mean ± sample standard deviation over seeds.
Difference, in points: of the means over seeds, ± the standard deviation of the differences seed by seed.
Over questions: its 95 % interval by a paired bootstrap over the {questions} that both rows were asked, for these
trainings. Over seeds, for these questions: the 95 % interval of the mean of the differences seed by seed (Student's t),
from three seeds on.
Only the second interval covers the variation between seeds, {pretrainings}.
{scored}
Training: the time of all training steps, without validation.{machines}
Memory: the peak of the training process (on a GPU: of its allocations there).
"""
_CONTRASTS = """\
In points: the mean of the differences seed by seed, with its 95 % interval over seeds (Student's t), not corrected for
how many there are.
"""


def write_report(suite: Suite, runs: Path, out: Path) -> str:
    """Report the finished runs of a suite into the folder `out`.

    Writes `SUITE.csv` (a line per row), `SUITE.md`. If anything is finished, also `SUITE_runs.csv` (one line per row
    and seed), `SUITE.png` and, for contrasts, `SUITE_contrasts.csv` (one line per contrast and question type). Returns
    the tables as plain text, the claims about the order of rows, and where the page is.

    Raises:
        InputError: a file of a finished run is missing or damaged.
    """
    ends = (".csv", ".md", "_runs.csv", ".png", "_contrasts.csv")
    table, page, trainings, figure, contrasted = (out / f"{suite.report_name}{end}" for end in ends)
    results = collect(suite, runs)
    lines, seeds, contrasts = row_lines(suite, results), run_lines(suite, results), contrast_lines(suite, results)
    write_lines(table, lines)
    if seeds:
        from experiments.report.figure import write_figure  # matplotlib

        write_lines(trainings, seeds)
        write_figure(figure, suite.title, seeds, suite.baseline)
    else:
        trainings.unlink(missing_ok=True)
        figure.unlink(missing_ok=True)
    if contrasts and seeds:
        write_lines(contrasted, contrasts)
    else:
        contrasted.unlink(missing_ok=True)
    tables = contrast_tables(contrasts)
    facts = [*_facts(seeds), *on_other_data(suite, results)] if seeds else []
    write_text(page, _page(suite, lines, seeds, tables, facts))
    warnings = "\n".join(fact.strip("*") for fact in facts if fact.startswith("**"))
    parts = [suite.title, terminal_table(lines), *map(aligned, tables), "\n".join(claims(lines)), warnings, str(page)]
    return "\n\n".join(filter(None, parts))


def publish(suite: Suite, runs: Path) -> str:
    """Report into `experiments/results`, with the evidence as a zip file; returns what `write_report` does.

    Raises:
        InputError: the suite is changed by words, or a result that is published is not in `runs`, or another one.
    """
    if suite.words:
        raise InputError("--publish: a suite is published unchanged; give no KEY=VALUE")
    table, evidence = (RESULTS / f"{suite.name}_runs.{kind}" for kind in ("csv", "zip"))
    found = {(line["folder"], line["test"]): line["overall"] for line in run_lines(suite, collect(suite, runs))}
    published = csv.DictReader(io.StringIO(read_text(table), newline="")) if table.exists() else ()
    for line in published:
        place, overall = (line.get("folder"), line.get("test")), line.get("overall")
        if place in found and overall == str(found[place]):
            continue
        has = f"another result ({found[place]} %, not {overall} %)" if place in found else "no result"
        raise InputError(
            f"--publish: {runs} has {has} of {line.get('row')}, seed {line.get('seed')}, which is published: unzip -n "
            f"{evidence} -d {runs} where no other runs are, or remove {table} to publish without it"
        )
    if missing := missing_jobs(suite, runs):
        print(f"{len(missing)} runs are not finished; they are published without them")
    keep_evidence(suite, runs, evidence)
    return write_report(suite, runs, RESULTS)


def _page(
    suite: Suite,
    lines: Sequence[Line],
    trainings: Sequence[Line],
    contrasts: Sequence[list[list[str]]],
    facts: Sequence[str],
) -> str:
    command = shlex.join(["python", "main.py", "experiment", _below_root(suite.file), *suite.words])
    about = f"The runs change settings of `{_below_root(suite.recipe)}`; `{suite.report_name}.csv` names them."
    if suite.paper:
        about += f" The paper's numbers are of {suite.paper}."
    if changes := [f"{seed}: `{shlex.join(words)}`" for seed, words in suite.seeds.items() if words]:
        about += f" What else changes with the seed: {'; '.join(changes)}."
    parts = [f"# {suite.title}\n", f"```sh\n{command}\n```\n", f"{about}\n", markdown_table(lines)]
    if trainings:
        parts += [_legend(suite, lines, trainings), f"![Accuracy of every row and seed]({suite.report_name}.png)\n"]
    if kinds := markdown_kinds(lines):
        parts += ["## By question type\n", kinds]
    if contrasts:
        parts += ["## Differences by question type\n", _CONTRASTS, *map(markdown, contrasts)]
    if ordered := claims(lines):
        parts += ["## The claimed order\n", "".join(f"- {claim}\n" for claim in ordered)]
    if trainings:
        parts += ["## Where these numbers are from\n", "".join(f"- {fact}\n" for fact in facts)]
    return "\n".join(parts)


def _legend(suite: Suite, lines: Sequence[Line], trainings: Sequence[Line]) -> str:
    compared = " or ".join(map(str, sorted({line["compared"] for line in lines if line["compared"]})))
    validated = {settings.train.validate_on for run in suite.runs for settings in run.settings.values()}
    best = " or ".join(f"split `{one}`" for one in sorted(validated - {None}))
    scored = f"Each run is scored at its best epoch on {best}" if best else "Each run is scored at its last epoch"
    if best and None in validated:
        scored += ", or at its last where it has no validation"
    scored += f"; the accuracies are of `{suite.split}`."
    if validated == {suite.split}:
        scored = "The best epoch of each run was chosen on these same questions, which favours every row."
    seeds = {line["row"]: set(line["seeds"].split()) for line in lines if line["seeds"]}
    others = [seeds[line["row"]] for line in lines if line["difference"] is not None]
    if any(own != seeds[suite.baseline] for own in others):
        scored += "\nRows with different seeds are compared by the seeds that both have"
        disjoint = any(own.isdisjoint(seeds[suite.baseline]) for own in others)
        scored += ", or by all of theirs where they have none in common." if disjoint else "."
    questions = f"{compared} questions" if compared else "questions"
    several = len({_machine(line) for line in trainings}) > 1
    machines = " **Do not compare it: several machines, see below.**" if several else ""
    return _LEGEND.format(questions=questions, pretrainings=_pretrainings(trainings), scored=scored, machines=machines)


def _pretrainings(trainings: Sequence[Line]) -> str:
    """Whether the interval over seeds covers the variation between pretrainings of the backbone."""
    rows = dict.fromkeys(line["row"] for line in trainings)
    backbones = [[line["backbone"] for line in trainings if line["row"] == row] for row in rows]
    distinct = [(len({*own} - {None}), len(own)) for own in backbones if len(own) > 1]
    if all(count <= 1 for count, _ in distinct):
        return "and neither covers another pretraining of the backbone"
    if all(count == seeds for count, seeds in distinct):
        return "and with it that between pretrainings of the backbone: each seed of a row has its own"
    return "and that between pretrainings of the backbone only as far as the seeds of a row have different ones"


def _facts(lines: Sequence[Line]) -> list[str]:
    """Machines, commits, backbones and seeds of the lines of `SUITE_runs.csv`."""
    trainings = {line["folder"]: line for line in lines}.values()  # a training may be tested in several rows
    machines, commits = (Counter(map(described, trainings)) for described in (_machine, _commit))
    backbones = Counter(line["backbone"] for line in trainings if line["backbone"])
    seeds = {digest: sorted({line["seed"] for line in trainings if line["backbone"] == digest}) for digest in backbones}
    facts = [f"{_trainings(count)} on {machine}" for machine, count in machines.items()]
    if len(machines) > 1:
        facts.append("**several machines: times and memory of two rows, or of a row's seeds, may differ by them**")
    facts += [f"{_trainings(count)} with the code of {commit}" for commit, count in commits.items()]
    for digest, count in backbones.items():
        of_seeds = f" (seed {', '.join(map(str, seeds[digest]))})" if len(backbones) > 1 else ""
        facts.append(f"{_trainings(count)} on the backbone {digest}{of_seeds}")
    if unrecorded := len(trainings) - backbones.total():
        strong = "**" if backbones else ""  # it may be another one
        facts.append(f"{strong}{_trainings(unrecorded)} recorded no backbone{strong}")
    if len(backbones) > 1 and (unrecorded or sum(map(len, seeds.values())) > len(set().union(*seeds.values()))):
        facts.append("**several backbones of a seed: a difference between rows may be one between their backbones**")
    return [*facts, f"seeds {', '.join(map(str, sorted({line['seed'] for line in trainings})))}"]


def _trainings(count: int) -> str:
    return f"{count} training{'s' if count > 1 else ''}"


def _machine(line: Line) -> str:
    processes = f"{line['processes']} processes, " if line["processes"] != 1 else ""
    cores = f"{line['cpus']} CPU cores, {line['threads']} thread{'s' if line['threads'] != 1 else ''}"
    return f"{line['device']} ({processes}{cores}), torch {line['torch']}, Python {line['python']}"


def _commit(line: Line) -> str:
    if not line["git_commit"]:
        return "an unknown commit"
    commits = (commit.partition("-dirty") for commit in line["git_commit"].split(THEN))
    return THEN.join(
        f"commit {commit[:10]}{' with changes that are not committed' if dirty else ''}" for commit, dirty, _ in commits
    )


def _below_root(file: Path) -> str:
    """A path relative to the checkout, if it is inside."""
    file, root = file.resolve(), ROOT.resolve()
    return str(file.relative_to(root) if file.is_relative_to(root) else file)
