"""The results of a suite's finished runs: read them, make the lines of its two CSV files, archive them."""

import math
import shlex
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.evaluate import MOST_TYPES_SHOWN
from experiments.report.statistics import Answered, Difference, compare, mean_and_deviation, seed_interval
from experiments.runner import Job, jobs_of
from experiments.suite import Row, Suite, Test
from vqa.io.errors import InputError
from vqa.io.files import as_cell, read_bytes, written_whole

KIND = "type: "  # how the columns of question types begin
THEN = ", then "  # between values of a run that was resumed with another one
OF_A_RUN = ("config.yaml", "environment.json", "metrics.jsonl")
_OF_DATA = {  # settings that say what a training learns from
    "data": True,
    "scenes": True,
    "guesswhat": True,
    "train": {"splits", "validate_on"},
    "question": {"encoder", "text_encoder"},
}
Line = dict[str, Any]  # of a CSV file, by column; None where there is no value


class _Metrics(msgspec.Struct):
    """`metrics_SPLIT.json`."""

    questions: int
    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    epoch: int | None = None
    asked: str | None = None


class _Epoch(msgspec.Struct):
    """A line of `metrics.jsonl`."""

    epoch: int
    seconds: float
    val_overall: float | None
    peak_memory_mib: float


class _Environment(msgspec.Struct):
    """`environment.json`; the last fields are absent in older runs."""

    trained_parameters: int
    git_commit: str | None = None
    device: str | None = None
    cpu: str | None = None
    processes: int | None = None
    cpus: int | None = None
    threads: int | None = None
    torch: str | None = None
    python: str | None = None
    backbone: str | None = None
    data: str | None = None
    resumed: list["_Environment"] = []


@dataclass(frozen=True)
class Result:
    """The scores of one row and seed."""

    scores: dict[str, float]  # percent, by column
    facts: Line  # how it was made
    answered: Answered
    asked: str | None  # digest of the questions and their answers, and of what it was trained on; older runs lack them
    data: str | None


Results = dict[str, dict[int, Result]]  # of each row, by its name: the seeds that are finished


def collect(suite: Suite, runs: Path) -> Results:
    """Read every row and seed that is finished, in the order of the suite.

    Raises:
        InputError: a file of a finished run is missing or damaged, or it was made with other settings.
    """
    results: Results = {row.name: {} for row in suite.rows}
    for row, seed in product(suite.rows, suite.seeds):
        if (result := _read(row.test, Job(row.run, seed), runs)) is not None:
            results[row.name][seed] = result
    return results


def _read(test: Test, job: Job, runs: Path) -> Result | None:
    folder = job.folder(runs)
    scored, answered_in = (test.folder(folder) / name for name in test.files)
    if not job.is_tested(runs, test):
        return None
    metrics, environment = _decoded(scored, _Metrics), _decoded(folder / "environment.json", _Environment)
    epochs = _decoded(folder / "metrics.jsonl", _Epoch, lines=True)
    if not epochs:
        raise InputError(f"{folder / 'metrics.jsonl'}: damaged (no epoch)")
    answered = _answered(answered_in)
    overall = 100 * answered.accuracies.mean()
    if len(answered.ids) != metrics.questions or not np.isclose(overall, metrics.overall, rtol=0, atol=1e-3):
        raise InputError(f"{scored}: not of the same test as {answered_in.name}; remove it and run again")
    validated = [epoch for epoch in epochs if epoch.val_overall is not None]
    best = max(validated, key=lambda epoch: epoch.val_overall) if validated else epochs[-1]  # its model was kept
    if metrics.epoch not in (None, best.epoch):
        raise InputError(
            f"{scored}: of the model of epoch {metrics.epoch}, but that of epoch {best.epoch} was kept; remove it and "
            "run again"
        )
    facts = {
        "questions": metrics.questions,
        "epochs": len(epochs),
        "best_epoch": best.epoch,
        "seconds": round(math.fsum(epoch.seconds for epoch in epochs), 1),  # the same in every version of Python
        "peak_memory_mib": round(max(epoch.peak_memory_mib for epoch in epochs), 1),
        **_made(environment),
        "folder": job.settings.name,
    }
    kinds = {KIND + kind: score for kind, score in metrics.per_question_type.items()}
    scores = metrics.per_answer_type | {"overall": metrics.overall, "error": 100 - metrics.overall} | kinds
    return Result(scores, facts, answered, metrics.asked, environment.data)


def _made(environment: _Environment) -> Line:
    """With what a run was made; of one that was resumed with something else, both in their order."""
    first, *others = (msgspec.structs.asdict(one) for one in (environment, *environment.resumed))
    for made in (first, *others):
        cpu = made.pop("cpu")
        if made["device"] == "cpu" and cpu is not None:
            made["device"] = cpu  # of the machine, as the name of a GPU
    del first["resumed"], first["data"]
    for key in first.keys() - {"backbone"}:  # a checkpoint holds the backbone
        values = dict.fromkeys(made[key] for made in (first, *others) if made[key] is not None)
        if len(values) > 1:
            first[key] = THEN.join(map(str, values))
    return first


def _decoded(file: Path, kind: type, *, lines: bool = False) -> Any:
    """The content of a JSON file, or of each of its lines."""
    decoder = msgspec.json.Decoder(kind)
    try:
        content = read_bytes(file)
        return decoder.decode_lines(content) if lines else decoder.decode(content)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InputError(f"{file}: damaged ({str(error)[:80]})") from None


def _answered(file: Path) -> Answered:
    try:
        with np.load(file) as arrays:
            return Answered(arrays["ids"], arrays["accuracies"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{file}: missing or damaged; remove the metrics beside it and run again") from None


def run_lines(suite: Suite, results: Results) -> list[Line]:
    """A line for each row and seed."""
    columns = [*suite.columns, *_kinds(results)]
    lines = []
    for row in suite.rows:
        for seed, result in results[row.name].items():
            changes = {"seed_settings": shlex.join(suite.seeds[seed])} if any(suite.seeds.values()) else {}
            scores = {column: result.scores.get(column) for column in columns}
            lines.append(_line(row, seed=seed, **changes, **scores, **result.facts))
    return lines


def row_lines(suite: Suite, results: Results) -> list[Line]:
    """A line for each row of the suite, then one for each row that only the paper has."""
    below = dict(zip(suite.order[1:], suite.order, strict=False))
    kinds = _kinds(results)
    lines = []
    for row in suite.rows:
        own = results[row.name]
        compared = None if row.name == suite.baseline else _compared(own, results[suite.baseline])
        following = below.get(row.name)
        facts = [result.facts for result in own.values()]
        line = _line(
            row,
            settings=shlex.join(row.run.words),
            seeds=" ".join(map(str, own)),
            questions=facts[0]["questions"] if facts else None,
            **_means(own, suite.columns, kinds),
            baseline=suite.baseline,
            **_interval(compared),
            difference_std=compared and compared.deviation,
            compared=compared and compared.questions,
            **_paper(suite, row.run.paper if row.test.label == "plain" else {}),
            seconds=_mean(facts, "seconds"),
            peak_memory_mib=_mean(facts, "peak_memory_mib"),
            trained_parameters=facts[0]["trained_parameters"] if facts else None,
            order_above=following,
            **_claim(_compared(own, results.get(following, {}))),
        )
        lines.append(line)
    only_paper = ({"row": name} | _paper(suite, numbers) for name, numbers in suite.not_run.items())
    return lines + [dict.fromkeys(lines[0]) | line for line in only_paper]


def contrast_lines(suite: Suite, results: Results) -> list[Line]:
    """A line for each contrast of the suite, overall and by question type: the mean of the differences seed by seed."""
    lines = []
    for row, controls in suite.contrasts.items():
        for control, column in product(controls, ["overall", *_kinds(results)]):
            kind = column.removeprefix(KIND)
            questions = column if kind == "overall" else as_cell(kind)
            differences = _differences(results[row], results[control], column)
            low, high = seed_interval(differences) or (None, None)
            mean = float(np.mean(differences)) if differences else None
            found = {"difference": mean, "seeds_low": low, "seeds_high": high, "seeds": len(differences)}
            lines.append(_rounded({"row": row, "less": control, "questions": questions} | found))
    return lines


def _differences(ours: Mapping[int, Result], theirs: Mapping[int, Result], column: str) -> list[float]:
    """The differences in a column of the seeds with which two rows were asked the same questions."""
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    same = [pair for pair in pairs if _alike(*pair) and np.array_equal(*(result.answered.ids for result in pair))]
    return [
        our.scores[column] - their.scores[column] for our, their in same if column in our.scores.keys() & their.scores
    ]


def _kinds(results: Results) -> list[str]:
    """The columns of question types; none where they are many."""
    scores = (result.scores for row in results.values() for result in row.values())
    kinds = sorted({column for columns in scores for column in columns if column.startswith(KIND)})
    return kinds if len(kinds) <= MOST_TYPES_SHOWN else []


def _means(row: Mapping[int, Result], columns: Sequence[str], kinds: Sequence[str]) -> Line:
    """Means over seeds, and standard deviations but for question types."""
    line: Line = {}
    for column in [*columns, *kinds]:
        scores = [result.scores[column] for result in row.values() if column in result.scores]
        mean, deviation = mean_and_deviation(scores) if scores else (None, None)
        line |= {f"{column}_mean": mean, f"{column}_std": deviation} if column in columns else {column: mean}
    return line


def _interval(found: Difference | None) -> Line:
    """A difference in points and its 95 % intervals over questions and over seeds."""
    low, high = (found and found.seed_interval) or (None, None)
    return {
        "difference": found and found.points,
        "ci_low": found and found.low,
        "ci_high": found and found.high,
        "seeds_low": low,
        "seeds_high": high,
    }


def _claim(found: Difference | None) -> Line:
    """The comparison of a row with the one that is claimed to be next below it."""
    return {f"order_{key}": value for key, value in _interval(found).items()} | {
        "order_verdict": found and found.verdict,
        "order_seeds_above": found and found.seeds_above,
        "order_seeds": found and len(found.per_seed),
    }


def _compared(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> Difference | None:
    """Two rows question by question; None where one was not run, or they were asked different questions."""
    if not ours or not theirs or not all(_alike(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()):
        return None
    return compare(*({seed: result.answered for seed, result in row.items()} for row in (ours, theirs)))


def _alike(one: Result, other: Result) -> bool:
    """Whether two results are of the same questions, as far as they recorded it: equal ids may be of others."""
    return None in (one.asked, other.asked) or one.asked == other.asked


def on_other_data(suite: Suite, results: Results) -> list[str]:
    """A warning, if trainings with the same settings of the data had different data."""
    trained: dict[str, set[str]] = defaultdict(set)
    for row in suite.rows:
        for seed, result in results[row.name].items():
            if result.data is not None:
                trained[row.run.settings[seed].model_dump_json(include=_OF_DATA)].add(result.data)
    if all(len(found) == 1 for found in trained.values()):
        return []
    return ["**other data under the same names: a difference between rows may be one between their training data**"]


def _paper(suite: Suite, numbers: Mapping[str, float]) -> Line:
    return {f"paper_{column}": numbers.get(column) for column in suite.columns}


def _mean(facts: Sequence[Line], key: str) -> float | None:
    return round(float(np.mean([of_seed[key] for of_seed in facts])), 1) if facts else None


def _line(row: Row, **values: Any) -> Line:
    """A line that begins with the row's names, its numbers rounded."""
    return _rounded({"row": row.name, "run": row.run.name, "test": row.test.label} | values)


def _rounded(line: Line) -> Line:
    # + 0.0 turns −0.0 into 0.0
    return {key: round(value, 4) + 0.0 if isinstance(value, float) else value for key, value in line.items()}


def keep_evidence(suite: Suite, runs: Path, file: Path) -> None:
    """Archive the settings, versions, epochs and every question's accuracy of each tested row and seed, if any.

    Extracted into `runs`, they are enough to report without training; an extended suite trains only what is new.
    """
    contents: dict[str, bytes] = {}
    for job in jobs_of(suite):
        if tests := [test for test in suite.tests if job.is_tested(runs, test)]:
            folder = job.folder(runs)
            paths = [folder / name for name in OF_A_RUN]
            paths += [test.folder(folder) / name for test in tests for name in test.files]
            contents |= {path.relative_to(runs).as_posix(): path.read_bytes() for path in paths}
    if not contents:
        return
    with written_whole(file) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):  # without times: the same runs make the same file
            archive.writestr(zipfile.ZipInfo(name), contents[name], zipfile.ZIP_DEFLATED)
