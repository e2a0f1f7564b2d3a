"""Suites: the runs that an experiment compares, as changes to a recipe, and how each run is tested.

A suite file (`experiments/suites/*.yaml`) holds

    title:     the question that the experiment asks
    recipe:    the recipe that the runs change, relative to the suite file
    seeds:     the seeds each run is trained with: a list, or SEED: "key.sub=value …", what else changes with the seed
    baseline:  the row that the others are compared with
    runs:      NAME: {settings: "key.sub=value …", paper: {column: number}}
    tests:     (optional) NAME: {settings: "key.sub=value …", recalibrate: SPLIT}; each run is tested in each of these
               ways: on other data, or after the norms' statistics are re-estimated on a split's images
    split:     (optional) the split whose accuracy is reported; by default `val`
    order:     (optional) rows whose accuracies are claimed to rise in this order
    contrasts: (optional) ROW: [ROW, …]: the first row less each of the others, by question type
    paper:     (optional) what the paper's numbers were measured on
    not_run:   (optional) NAME: {column: number}: rows of the paper without a run here

A key that several of them set has the value of the last: recipe, seed, run, words of the command line; and of the data
that a run is tested on, the test.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vqa.io.errors import InputError
from vqa.settings.recipes import BASE, load_settings, read_yaml
from vqa.settings.schema import FileName, Role, Settings, SplitName, different_keys, flat, role_of

# of a suite's tables, by task; the error is 100 % less the overall accuracy
COLUMNS = {"vqa": ("overall", "yes/no", "number", "other"), "guesswhat": ("overall", "error", "yes", "no", "n/a")}

# Names appear in tables, in CSV files (where spreadsheets take what begins with = + - @ for formulas) and in commands.
_NAME = r"[^=+\-@\s\x00-\x1f][^\x00-\x1f\x7f\x85\u2028\u2029]*"
_Name = Annotated[str, Field(max_length=100, pattern=f"^{_NAME}$")]
_TestName = Annotated[str, Field(max_length=100, pattern=f"^({_NAME})?$")]
_Words = Annotated[str, AfterValidator(lambda text: tuple(shlex.split(text)))]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _with_words(seeds: Any) -> Any:
    """A list of seeds as a mapping; the words of a seed that changes nothing else are empty."""
    if not isinstance(seeds, list | dict) or any(type(seed) is not int for seed in seeds):
        raise ValueError('must be whole numbers: a list, or SEED: "key.sub=value …"')
    if len(set(seeds)) < len(seeds):
        raise ValueError("duplicate value")
    return dict.fromkeys(seeds, "") if isinstance(seeds, list) else seeds


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _RunForm(_Form):
    settings: _Words = ()
    paper: dict[str, float] = {}


class _TestForm(_Form):
    settings: _Words = ()
    recalibrate: SplitName | None = None


class _SuiteForm(_Form):
    title: _Name
    recipe: FileName
    seeds: Annotated[dict[_Seed, _Words], BeforeValidator(_with_words)] = Field(min_length=1)
    baseline: str
    runs: dict[_Name, _RunForm] = Field(min_length=1)
    tests: dict[_TestName, _TestForm] = Field({"": _TestForm()}, min_length=1)
    split: SplitName = "val"
    order: list[str] = []
    contrasts: dict[str, list[str]] = {}
    paper: str = ""
    not_run: dict[_Name, dict[str, float]] = {}


@dataclass(frozen=True)
class Test:
    """A way in which every run is tested; `name` is empty where there is only one."""

    name: str
    words: tuple[str, ...]  # `key.sub=value` over the run's settings: other data
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
            parts.append(f"{_slug(self.words[0].rpartition('.')[2])}-{_digest(sorted(self.words))}")
        return "_".join(reversed(parts)) or "plain"

    def folder(self, run: Path) -> Path:
        """Where its results are written: into the run directory itself for the plain test."""
        return run if self.label == "plain" else run / "tests" / self.label


@dataclass(frozen=True)
class Run:
    """Settings that are trained with each seed."""

    name: str
    words: tuple[str, ...]  # what it changes of the recipe, `key.sub=value`
    settings: Mapping[int, Settings]  # of each seed, resolved; `name` is the run directory
    paper: dict[str, float]


@dataclass(frozen=True)
class Row:
    """A line of the table: a run, tested in one way."""

    name: str
    run: Run
    test: Test


@dataclass(frozen=True)
class Suite:
    """A suite file with every run's settings resolved."""

    file: Path
    title: str
    recipe: Path
    seeds: dict[int, tuple[str, ...]]  # with what each changes beside itself, `key.sub=value`
    baseline: str
    runs: list[Run]
    tests: list[Test]
    split: str  # whose questions are answered
    order: list[str]
    contrasts: dict[str, list[str]]
    paper: str
    not_run: dict[str, dict[str, float]]
    words: tuple[str, ...] = ()  # over the settings of every run and test

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    @property
    def report_name(self) -> str:
        """The name of its report's files; words make it another one."""
        return f"{self.name}-{_digest(list(self.words))}" if self.words else self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its tables: of the task of its runs."""
        return COLUMNS[next(iter(self.runs[0].settings.values())).task]

    @property
    def rows(self) -> list[Row]:
        """Every run in every test, in the order of the file."""
        return [
            Row(", ".join(filter(None, (run.name, test.name))), run, test) for run in self.runs for test in self.tests
        ]


def load_suite(file: Path, words: tuple[str, ...] = ()) -> Suite:
    """Reads a suite; `words` (`key.sub=value`) change the recipe of all its runs.

    Raises:
        InputError: the file is missing or malformed, or a run's settings are wrong.
    """
    if file.stem.endswith(("_runs", "_contrasts")):
        raise InputError(f"{file}: a suite's name must not end like the files of its results, {file.stem}.csv")
    content = read_yaml(file)
    if "base" in content and "runs" not in content:
        raise InputError(f"{file}: a recipe, not a suite; `train --config {file}` trains it")
    try:
        form = _SuiteForm.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])).removesuffix(".[key]")
        why = first["msg"].removeprefix("Value error, ").partition(" or instance of")[0]
        raise InputError(f"{file}: {key}: {why[0].lower()}{why[1:]}") from None
    recipe = file.parent / form.recipe
    plain = load_settings(recipe)

    def resolved(name: str, changes: Sequence[str], seed: int) -> Settings:
        where = f"{file}: {_named(name, seed, form.seeds)}" + (f" with {shlex.join(words)}" if words else "")
        changes = *form.seeds[seed], *changes, *words
        if given := next((word for word in changes if word.startswith(("seed=", "name="))), None):
            raise InputError(f"{where}: {given}: a suite gives each run its seed and its name")
        settings = load_settings(recipe, changes, where=where)
        directory = f"experiments/{plain.name}/{_directory(settings, plain)}/seed_{seed}"
        return settings.model_copy(update={"seed": seed, "name": directory})

    runs = [
        Run(name, run.settings, {seed: resolved(name, run.settings, seed) for seed in form.seeds}, run.paper)
        for name, run in form.runs.items()
    ]
    tests = [Test(name, test.settings, test.recalibrate, form.split) for name, test in form.tests.items()]
    suite = Suite(**dict(form) | {"file": file, "recipe": recipe, "runs": runs, "tests": tests, "words": words})
    if problem := next(_problems(suite, plain), None):
        raise InputError(f"{file}: {problem}")
    return suite


def _named(run: str, seed: int, words: Mapping[int, Sequence[str]]) -> str:
    """A run in messages, with a seed that changes more."""
    return f"{run}, seed {seed}" if words[seed] else run


def _problems(suite: Suite, recipe: Settings) -> Iterator[str]:
    names: dict[str, str] = {}
    folders: dict[str, str] = {}
    pretrainings: dict[str, int | None] = {}
    for run, seed in product(suite.runs, suite.seeds):
        name, settings = _named(run.name, seed, suite.seeds), run.settings[seed]
        data, backbone = settings.data, settings.backbone
        if folders.setdefault(data.h5, data.folder) != data.folder:
            yield f"{name}: data.folder={data.folder} needs a data.h5 of its own"
        if pretrainings.setdefault(backbone.weights, backbone.seed) != backbone.seed:
            yield f"{name}: {backbone.weights} is of another backbone.seed; name a backbone.weights of its own"
        other = names.setdefault(settings.name, run.name)
        if other != run.name:
            yield f"{other!r} and {name!r} have the same settings"
        yield from _problems_of_split(name, suite.split, settings, suite.tests)
    for name, numbers in ({run.name: run.paper for run in suite.runs} | suite.not_run).items():
        if other := sorted(set(numbers) - {*suite.columns}):
            yield f"{name}: no column {other[0]!r}; columns are {', '.join(suite.columns)}"
    for test in suite.tests:
        yield from _problems_of_test(test, recipe)
    rows = [row.name for row in suite.rows]
    if twice := next((name for name in rows if rows.count(name) > 1), None):
        yield f"two rows have the name {twice!r}; rename a run or a test"
    contrasted = [name for row, others in suite.contrasts.items() for name in (row, *others)]
    for name in (suite.baseline, *suite.order, *contrasted):
        if name not in rows:
            yield f"no row {name!r}; rows are {', '.join(rows)}"


def _problems_of_test(test: Test, recipe: Settings) -> Iterator[str]:
    keys = [word.partition("=")[0] for word in test.words]
    for key, word in zip(keys, test.words, strict=True):
        if role_of(key) is not Role.DATA and not key.startswith("scenes."):
            yield f"{test.name}: {word}: a test can change only data.folder, data.h5, data.splits and scenes"
        # an h5 file that is there holds the same questions, perhaps, but other images
        if "data.h5" not in keys and (key == "data.folder" or key.startswith("scenes.")):
            yield f"{test.name}: {word} needs a data.h5 of its own"
    if test.recalibrate is not None and test.recalibrate not in recipe.data.splits:
        yield f"{test.name}: no split {test.recalibrate!r}; there are {', '.join(recipe.data.splits)}"


def _problems_of_split(name: str, split: str, settings: Settings, tests: Sequence[Test]) -> Iterator[str]:
    """The problems of a run with the split that it is tested on; a test may bring splits of its own."""
    if split in settings.train.splits:
        yield f"{name}: trains on {split}, which it is tested on"
    splits = settings.data.splits
    if not splits or any(word.startswith("data.splits") for test in tests for word in test.words):
        return
    if split not in splits:
        yield f"{name}: no split {split!r} to be tested on; there are {', '.join(splits)}"
    elif settings.task == "vqa" and splits[split].annotations is None:
        yield f"{name}: split {split} has no annotations, so that nothing could be scored"


def _slug(text: str) -> str:
    """A text as a directory's name."""
    return re.sub(r"[^\w.\-]+", "_", text).strip("_.-")


def _directory(settings: Settings, recipe: Settings) -> str:
    """A name that shows how settings differ from the recipe; the same for the same settings in every suite.

    Its digest is of the differences from `base.yaml`, so that a key that is added there later does not change it.
    """
    changed = "_".join(
        _slug(f"{key.rpartition('.')[2]}-{_brief(value)}") for key, value in _changes(settings, recipe).items()
    )
    return f"{changed[:60] or 'recipe'}-{_digest(_changes(settings, load_settings(BASE)))}"


def _changes(settings: Settings, over: Settings) -> dict[str, Any]:
    """The settings, apart from the seed, whose values make it another run than one of `over`."""
    values = flat(settings)
    return {key: values.get(key) for key in different_keys(settings, over, [Role.COMPUTING]) if key != "seed"}


def _brief(value: Any) -> str:
    return "-".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]
