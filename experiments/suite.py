"""Suites: which runs an experiment compares, as short deltas over a recipe, and how each is tested.

A suite file (`experiments/suites/*.yaml`) holds

    title:     what is asked
    recipe:    the recipe that runs are deltas over, relative to the suite file
    seeds:     seeds each run is trained with
    baseline:  the row that others are compared with
    runs:      NAME: {settings: "key.sub=value …", paper: {column: number}}
    tests:     (may be absent) NAME: {settings: "key.sub=value …", recalibrate: SPLIT}; each run is tested in each of
               these ways: on other data, or with the norms' statistics re-estimated on a split's images
    split:     (may be absent) the split whose accuracy is reported; `val` if absent
    order:     (may be absent) rows whose accuracies are claimed to rise in this order
    paper:     (may be absent) what the paper's numbers are of
    not_run:   (may be absent) NAME: {column: number} of the paper that have no run here
"""

import hashlib
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vqa.io.errors import InputError
from vqa.settings.recipes import BASE, load_settings, read_yaml
from vqa.settings.schema import FileName, Role, Settings, SplitName, different_keys, flat, role_of

_Column = Literal["overall", "yes/no", "number", "other"]
COLUMNS = get_args(_Column)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# Rows stand in tables, in CSV files (where spreadsheets take what begins with = + - @ for formulas) and in commands.
_Name = Annotated[str, Field(max_length=100, pattern=r"^[^=+\-@\s\x00-\x1f][^\x00-\x1f\x7f]*$")]
_TestName = Annotated[str, Field(max_length=100, pattern=r"^([^=+\-@\s\x00-\x1f][^\x00-\x1f\x7f]*)?$")]


class _RunForm(_Form):
    settings: str = ""
    paper: dict[_Column, float] = {}


class _TestForm(_Form):
    settings: str = ""
    recalibrate: SplitName | None = None


class _SuiteForm(_Form):
    title: _Name
    recipe: FileName
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(min_length=1)
    baseline: str
    runs: dict[_Name, _RunForm] = Field(min_length=1)
    tests: dict[_TestName, _TestForm] = {"": _TestForm()}
    split: SplitName = "val"
    order: list[str] = []
    paper: str = ""
    not_run: dict[_Name, dict[_Column, float]] = {}


@dataclass(frozen=True)
class Test:
    """A way in which every run is tested; `name` is empty where there is only the plain one."""

    name: str
    words: tuple[str, ...]  # `key.sub=value` over the run's settings: where other data are
    recalibrate: str | None  # the split on whose images the norms' statistics are re-estimated first
    split: str = "val"  # whose questions are answered

    @property
    def files(self) -> tuple[str, str]:
        """The names of its results: the metrics, and every question's accuracy."""
        return f"metrics_{self.split}.json", f"accuracies_{self.split}.npz"

    @property
    def label(self) -> str:
        """A name for files: the same for the same test, whatever suite asks."""
        parts = [f"recalibrated-{self.recalibrate}"] if self.recalibrate else []
        if self.words:
            parts.append(f"{slug(self.words[0].rpartition('.')[2])}-{_digest(sorted(self.words))}")
        return "_".join(reversed(parts)) or "plain"


@dataclass(frozen=True)
class Run:
    """What is trained with each seed."""

    name: str
    words: tuple[str, ...]  # its delta over the recipe
    settings: Settings  # resolved; `name` is the directory that holds one run directory a seed
    paper: dict[str, float]

    def seeded(self, seed: int) -> Settings:
        """The settings of one training: `name` says where it is, below runs/."""
        return self.settings.model_copy(update={"seed": seed, "name": f"{self.settings.name}/seed_{seed}"})


@dataclass(frozen=True)
class Row:
    """A line of the table: a run, tested in one way."""

    name: str
    run: Run
    test: Test


@dataclass(frozen=True)
class Suite:
    """A suite, expanded."""

    file: Path
    title: str
    recipe: Path
    seeds: tuple[int, ...]
    baseline: str
    runs: tuple[Run, ...]
    tests: tuple[Test, ...]
    order: tuple[str, ...]
    paper: str
    not_run: dict[str, dict[str, float]] = field(default_factory=dict)
    words: tuple[str, ...] = ()  # over the settings of every run and test

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    @property
    def report_name(self) -> str:
        """What its report's files are called: altered by words it is another suite."""
        return f"{self.name}-{_digest(list(self.words))}" if self.words else self.name

    @property
    def rows(self) -> list[Row]:
        """Every run in every test, in the order of the file."""
        return [
            Row(", ".join(part for part in (run.name, test.name) if part), run, test)
            for run in self.runs
            for test in self.tests
        ]


def load_suite(file: Path, words: tuple[str, ...] = ()) -> Suite:
    """Reads a suite; `words` (`key.sub=value`) change the recipe of all its runs.

    Raises:
        InputError: the file is missing or malformed, or a run's settings are wrong.
    """
    try:
        form = _SuiteForm.model_validate(read_yaml(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    recipe = file.parent / form.recipe
    plain = load_settings(recipe)
    runs = []
    for name, run in form.runs.items():
        delta = _words(file, name, run.settings)
        settings = load_settings(recipe, (*delta, *words), where=f"{file}: {name}")
        directory = f"experiments/{plain.name}/{_directory(settings, plain)}"
        runs.append(Run(name, delta, settings.model_copy(update={"name": directory}), run.paper))
    _check_runs_differ(file, runs, form.split)
    tests = tuple(
        Test(name, _words(file, name, test.settings), test.recalibrate, form.split) for name, test in form.tests.items()
    )
    if len(set(form.seeds)) < len(form.seeds):
        raise InputError(f"{file}: seeds: duplicate value")
    for test in tests:
        _check_test(file, test, plain)
    same = form.model_dump(include={"title", "baseline", "paper", "not_run"})
    order, seeds = tuple(form.order), tuple(form.seeds)
    suite = Suite(file, recipe=recipe, seeds=seeds, runs=tuple(runs), tests=tests, order=order, words=words, **same)
    rows = [row.name for row in suite.rows]
    for named in (form.baseline, *form.order):
        if named not in rows:
            raise InputError(f"{file}: no row {named!r}; rows are {', '.join(rows)}")
    return suite


def _check_runs_differ(file: Path, runs: list[Run], split: str) -> None:
    named: dict[str, str] = {}
    for run in runs:
        other = named.setdefault(run.settings.name, run.name)
        if other != run.name:
            raise InputError(f"{file}: {other!r} and {run.name!r} come to the same settings")
        if split in run.settings.train.splits:
            raise InputError(f"{file}: {run.name}: trains on {split}, which it is tested on")


def _check_test(file: Path, test: Test, recipe: Settings) -> None:
    for word in test.words:
        if role_of(word.partition("=")[0]) is not Role.DATA and not word.startswith("scenes."):
            raise InputError(
                f"{file}: {test.name}: {word}: a test can change only data.folder, data.h5, data.splits and scenes"
            )
    if test.recalibrate is not None and test.recalibrate not in recipe.data.splits:
        raise InputError(
            f"{file}: {test.name}: no split {test.recalibrate!r}; there are {', '.join(recipe.data.splits)}"
        )


def _words(file: Path, name: str, settings: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(settings))
    except ValueError as error:
        raise InputError(f"{file}: {name}: {str(error).lower()} in its settings") from None


def slug(text: str) -> str:
    """A text as a directory's name."""
    return re.sub(r"[^\w.\-]+", "_", text).strip("_.-")


def _directory(settings: Settings, recipe: Settings) -> str:
    """A name that says how settings differ from the recipe; the same for the same settings, whatever suite asks.

    It is made of what differs from `base.yaml`, so that a setting that is added there later leaves it as it is.
    """
    changed = _changes(settings, recipe)
    told = "_".join(slug(f"{key.rpartition('.')[2]}-{_brief(value)}") for key, value in changed.items())
    return f"{told[:60] or 'recipe'}-{_digest(_changes(settings, load_settings(BASE)))}"


def _changes(settings: Settings, over: Settings) -> dict[str, Any]:
    """The settings, apart from the seed, that make it another run than one of `over`."""
    values = flat(settings)
    keys = different_keys(settings, over, [Role.COMPUTING])
    return {key: values.get(key) for key in keys if key != "seed"}


def _brief(value: Any) -> str:
    return "-".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]
