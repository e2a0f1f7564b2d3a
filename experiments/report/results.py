"""Read the finished runs of a suite; make the lines of its two CSV files: one a row and seed, and one a row."""

import json
import shlex
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.evaluate import MOST_TYPES_SHOWN
from experiments.report.statistics import Answered, Difference, compare, mean_and_deviation
from experiments.runner import check_settings, folder_of, jobs_of
from experiments.suite import COLUMNS, Row, Suite
from vqa.io.errors import InputError
from vqa.io.files import read_json, written_whole

KIND = "type: "  # what the columns of question types begin with
_MADE_BY = ("git_commit", "device", "processes", "cpus", "threads", "torch", "python", "backbone")
Line = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The scores of one row and seed."""

    row: Row
    seed: int
    scores: dict[str, float]  # percent, by column
    facts: Line
    answered: Answered


def collect(suite: Suite, runs: Path) -> list[Result]:
    """Read every row and seed that is finished, in the order of the suite.

    Raises:
        InputError: a file of a finished run is missing or damaged, or it was made with other settings.
    """
    results = []
    for row in suite.rows:
        for seed in suite.seeds:
            try:
                results.append(_read(row, seed, runs))
            except (LookupError, TypeError, AttributeError) as error:
                folder = runs / row.run.seeded(seed).name
                raise InputError(f"{folder}: its metrics or environment are damaged ({error!r:.80})") from None
    return [result for result in results if result is not None]


def _read(row: Row, seed: int, runs: Path) -> Result | None:
    settings = row.run.seeded(seed)
    folder = runs / settings.name
    tested = folder_of(folder, row.test)
    scored, answered_in = (tested / name for name in row.test.files)
    if not scored.exists():
        return None
    check_settings(settings, runs)
    metrics, environment = read_json(scored), read_json(folder / "environment.json")
    answered = _answered(answered_in)
    if len(answered.ids) != metrics["questions"] or abs(100 * answered.accuracies.mean() - metrics["overall"]) > 1e-3:
        raise InputError(f"{scored}: not of the same test as {answered_in.name}; remove it, run again")
    kinds = {KIND + kind: score for kind, score in metrics["per_question_type"].items()}
    epochs = _epochs(folder / "metrics.jsonl")
    best = _best(epochs)
    if metrics.get("epoch", best) != best:
        raise InputError(
            f"{scored}: of the model of epoch {metrics['epoch']}, but that of epoch {best} was "
            "kept; remove it, run again"
        )
    facts = {
        "questions": metrics["questions"],
        "epochs": len(epochs),
        "best_epoch": best,
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
        "peak_memory_mib": _peak(epochs),
        "trained_parameters": environment["trained_parameters"],
        **{key: environment.get(key) for key in _MADE_BY},
        "folder": settings.name,
    }
    scores = {"overall": metrics["overall"]} | metrics["per_answer_type"] | kinds
    return Result(row, seed, scores, facts, answered)


def _epochs(file: Path) -> list[Line]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        raise InputError(f"{file}: missing or damaged") from None


def _peak(epochs: Sequence[Line]) -> float | None:
    """The most memory of all epochs; None if it was not measured in some."""
    peaks = [epoch["peak_memory_mib"] for epoch in epochs]
    return None if None in peaks else round(max(peaks), 1)


def _best(epochs: Sequence[Line]) -> int:
    """The epoch whose model was kept: the first of those that scored highest, or the last if none was scored."""
    if epochs[-1]["val_overall"] is None:
        return epochs[-1]["epoch"]
    return max(epochs, key=lambda epoch: epoch["val_overall"])["epoch"]


def _answered(file: Path) -> Answered:
    try:
        with np.load(file) as arrays:
            return Answered(arrays["ids"], arrays["accuracies"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{file}: missing or damaged; remove the metrics beside it and run again") from None


def run_lines(results: Sequence[Result]) -> list[Line]:
    """A line for each row and seed."""
    columns = [*COLUMNS, *_kinds(results)]
    return [
        _rounded(
            _names(result.row)
            | {"seed": result.seed}
            | {column: result.scores.get(column) for column in columns}
            | result.facts
        )
        for result in results
    ]


def row_lines(suite: Suite, results: Sequence[Result]) -> list[Line]:
    """A line for each row of the suite, then one for each row that only the paper has."""
    by_row = {row.name: [result for result in results if result.row.name == row.name] for row in suite.rows}
    after = dict(zip(suite.order[1:], suite.order, strict=False))
    kinds = _kinds(results)
    lines = []
    for row in suite.rows:
        own = by_row[row.name]
        compared = None if row.name == suite.baseline else _compared(own, by_row[suite.baseline])
        below = after.get(row.name)
        line = _names(row) | {
            "settings": shlex.join(row.run.words),
            "seeds": " ".join(str(result.seed) for result in own),
            "questions": own[0].facts["questions"] if own else None,
            **_means(own, kinds),
            "baseline": suite.baseline,
            **_interval(compared),
            "difference_std": compared and compared.deviation,
            "compared": compared and compared.questions,
            **_paper(row.run.paper if row.test.label == "plain" else {}),
            **{key: _mean(own, key) for key in ("seconds", "peak_memory_mib")},
            "trained_parameters": own[0].facts["trained_parameters"] if own else None,
            "order_above": below,
            **_claim(_compared(own, by_row[below]) if below is not None else None),
        }
        lines.append(_rounded(line))
    return lines + [dict.fromkeys(lines[0]) | {"row": name} | _paper(paper) for name, paper in suite.not_run.items()]


def _names(row: Row) -> Line:
    return {"row": row.name, "run": row.run.name, "test": row.test.label}


def _kinds(results: Sequence[Result]) -> list[str]:
    """The columns of question types; none where they are many."""
    kinds = sorted({column for result in results for column in result.scores if column.startswith(KIND)})
    return kinds if len(kinds) <= MOST_TYPES_SHOWN else []


def _means(results: Sequence[Result], kinds: Sequence[str]) -> Line:
    line: Line = {}
    for column in [*COLUMNS, *kinds]:
        scores = [result.scores[column] for result in results if column in result.scores]
        mean, deviation = mean_and_deviation(scores) if scores else (None, None)
        line |= {f"{column}_mean": mean, f"{column}_std": deviation} if column in COLUMNS else {column: mean}
    return line


def _interval(found: Difference | None) -> Line:
    """A difference in points and its 95 % interval over questions."""
    return {"difference": found and found.points, "ci_low": found and found.low, "ci_high": found and found.high}


def _claim(found: Difference | None) -> Line:
    """How a row compares with the one that is claimed to be next below it."""
    low, high = (found and found.seed_interval) or (None, None)
    return {f"order_{key}": value for key, value in _interval(found).items()} | {
        "order_seeds_low": low,
        "order_seeds_high": high,
        "order_verdict": found and found.verdict,
        "order_seeds_above": found and found.seeds_above,
        "order_seeds": found and len(found.per_seed),
    }


def _compared(ours: Sequence[Result], theirs: Sequence[Result]) -> Difference | None:
    """Two rows question by question; None where one was not run, or they were asked different questions."""
    if not ours or not theirs:
        return None
    return compare(*({result.seed: result.answered for result in row} for row in (ours, theirs)))


def _paper(numbers: dict[str, float]) -> Line:
    return {f"paper_{column}": numbers.get(column) for column in COLUMNS}


def _mean(results: Sequence[Result], key: str) -> float | None:
    known = [result.facts[key] for result in results if result.facts[key] is not None]
    return round(float(np.mean(known)), 1) if known else None


def _rounded(line: Line) -> Line:
    return {
        key: round(value, 4) + 0.0 if isinstance(value, float) else value  # + 0.0, as there is a −0.0
        for key, value in line.items()
    }


_OF_A_RUN = ("config.yaml", "environment.json", "metrics.jsonl")


def keep_evidence(suite: Suite, runs: Path, file: Path) -> None:
    """Write the small files of the suite's finished runs, if there are any, into a zip file."""
    contents: dict[str, bytes] = {}
    for job in jobs_of(suite):
        if not job.is_finished(runs, suite.tests):
            continue
        folder = job.folder(runs)
        paths = [folder / name for name in _OF_A_RUN]
        paths += [folder_of(folder, test) / name for test in suite.tests for name in test.files]
        contents |= {path.relative_to(runs).as_posix(): path.read_bytes() for path in paths}
    if not contents:
        return
    with written_whole(file) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):  # without times: the same runs give the same file
            archive.writestr(zipfile.ZipInfo(name), contents[name], zipfile.ZIP_DEFLATED)
