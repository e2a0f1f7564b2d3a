"""Every suite is expanded, and each of its runs takes two tiny training steps and all its tests."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.prepare import split_files
from experiments.runner import Job, run_job
from experiments.suite import load_suite
from tests.conftest import ROOT
from tests.fabricated_games import write_games
from tests.photographs import photographs
from tests.test_recipes import write_split
from tests.tiny_suite import TINY
from vqa.io.errors import InputError
from vqa.settings.recipes import load_settings

SUITES = sorted((ROOT / "experiments" / "suites").glob("*.yaml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for all suites: what they share is run once."""
    return tmp_path_factory.mktemp("suites")


@pytest.fixture(scope="module")
def walked():
    """The paths that runs have taken."""
    return set()


OF_PHOTOGRAPHS = (
    "backbone.weights=none",
    "question.glove=null",
    "question.layers=1",
    "data.image_size=64",
    "train.batch_size=16",
)

# Words of a run that decide only how long, how large or how fast something is, or where its data lie.
OF_SIZES = ("train.epochs", "cbn.hidden_size", "attention.units", "train.learning_rate", "train.predictor", "data.")


def paths_of(run, tests):
    """What decides which code a run walks through with each test: what it changes of its recipe, and the precision.

    The recipes as they are, with all their other settings, are trained by test_recipes.py.
    """
    changes = frozenset(word for word in run.words if not word.startswith(OF_SIZES))
    return {(run.settings.task, run.settings.precision, changes, test.words, test.recalibrate) for test in tests}


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_the_runs_of_every_suite_take_two_steps(file, runs, walked, monkeypatch):
    """But for runs that would walk where another one did."""
    monkeypatch.chdir(runs)
    recipe = load_suite(file).runs[0].settings
    drawn = recipe.scenes is not None
    words = TINY if drawn else tuple(word for word in TINY if "scenes" not in word) + OF_PHOTOGRAPHS
    if drawn and recipe.data.image_size == 224:
        words += ("data.image_size=64",)
    if drawn and recipe.scenes.world == "photos":
        words += (f"data.photographs={photographs(runs / 'photographs')}",)
    suite = replace(load_suite(file), words=words)
    if recipe.task == "guesswhat" and not drawn and not Path(recipe.data.folder).exists():
        write_games(Path(recipe.data.folder))
    if not drawn and recipe.task == "vqa":
        for first, (name, files) in enumerate(split_files(recipe).items()):
            write_split(files, range(100 * first, 100 * first + (32 if name == "train" else 4)))
    for run in suite.runs:
        if (paths := paths_of(run, suite.tests)) <= walked:
            continue
        walked |= paths
        settings = load_settings(suite.recipe, (*run.words, *words))  # two runs may be the same with these words
        job = Job(
            replace(run, settings=settings.model_copy(update={"name": run.settings.name})), next(iter(suite.seeds))
        )
        run_job(job, suite, runs)
        assert job.is_finished(runs, suite.tests)
        line = json.loads((job.folder(runs) / "metrics.jsonl").read_text())
        assert (line["epoch"], line["steps"]) == (1, 2)
        for test in suite.tests:
            scores = json.loads((test.folder(job.folder(runs)) / test.files[0]).read_text())
            assert 0 <= scores["overall"] <= 100


def test_runs_of_the_same_settings_are_one_run_whatever_suite_asks():
    named = {}
    for file in SUITES:
        for run in load_suite(file).runs:
            seeded = run.seeded(3)
            named.setdefault(seeded.name, []).append(seeded)
    for same in named.values():
        assert all(settings == same[0] for settings in same)
    assert max(len(same) for same in named.values()) >= 4  # MODERN itself


def test_a_seed_changes_nothing_but_the_seed_and_the_place():
    run = load_suite(ROOT / "experiments" / "suites" / "table2.yaml").runs[0]
    one, two = run.seeded(1), run.seeded(2)
    assert one.model_copy(update={"seed": 2, "name": two.name}) == two
    assert one.name != two.name


@pytest.fixture
def suite_of(tmp_path):
    def write(text: str):
        file = tmp_path / "suite.yaml"
        file.write_text(f"title: t\nrecipe: {ROOT}/config/demo.yaml\n{text}")
        return file

    return write


GOOD = "seeds: [1]\nbaseline: a\nruns: {a: {}, b: {settings: train.epochs=2}}\n"


def test_a_suite_is_a_delta_over_its_recipe(suite_of):
    suite = load_suite(suite_of(GOOD), ("train.batch_size=8",))
    a, b = suite.runs
    recipe = load_settings(ROOT / "config" / "demo.yaml", ["train.batch_size=8"])
    assert a.settings.model_copy(update={"name": "demo"}) == recipe
    assert b.settings.train.epochs == 2
    assert a.settings.name != b.settings.name
    assert [row.name for row in suite.rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: [1]\nbaseline: c\nruns: {a: {}}\n", "no row 'c'; rows are a"),
        ("seeds: []\nbaseline: a\nruns: {a: {}}\n", "seeds"),
        ("seeds: [1]\nbaseline: a\nruns: {a: {setings: x}}\n", "runs.a.setings"),
        (
            "seeds: [1]\nbaseline: a\nruns: {a: {paper: {error: 1.0}}}\n",
            "a: no column 'error'; columns are overall, yes/no",
        ),
        ("seeds: [1]\nbaseline: a\nruns: {a: {settings: trian.epochs=2}}\n", "did you mean train"),
        ("seeds: [1]\nbaseline: a\nruns: {a: {settings: nonsense}}\n", "'nonsense' is not a setting"),
        (
            "seeds: [1]\nbaseline: a\nruns: {a: {paper: {overal: 1.0}}}\n",
            "runs.a.paper.overal.*should be 'overall'",
        ),
        ("seeds: [1]\nbaseline: a\norder: [b]\nruns: {a: {}}\n", "no row 'b'"),
        ("seeds: [1]\nbaseline: a\ncontrasts: {a: [b]}\nruns: {a: {}}\n", "no row 'b'"),
        ('seeds: [1]\nbaseline: a\nruns: {a: {settings: "\'"}}\n', "quotation"),
        ("seeds: [-1]\nbaseline: a\nruns: {a: {}}\n", "seeds"),
        ("seeds: [1]\nbaseline: a\nruns: {a: {}, b: {settings: cbn.gamma=true}}\n", "have the same settings"),
        (
            "seeds: [1]\nbaseline: a\nruns: {a: {settings: 'train.splits=[val] train.validate_on='}}\n",
            "trains on val",
        ),
        ("seeds: [1]\nbaseline: a\nruns: {a: {}}\ntests: {'': {settings: cbn.stem=true}}\n", "a test can change only"),
        (
            "seeds: [1]\nbaseline: a\nruns: {a: {}}\ntests: {dark: {settings: data.folder=datasets/dark}}\n",
            "dark: data.folder=datasets/dark needs a data.h5 of its own",
        ),
        (
            "seeds: [1]\nbaseline: a\nruns: {a: {}, b: {settings: data.folder=datasets/dark}}\n",
            "b: data.folder=datasets/dark needs a data.h5 of its own",
        ),
        ("seeds: [1]\nbaseline: a\nruns: {a: {}}\ntests: {'': {recalibrate: trian}}\n", "no split 'trian'"),
        ("seeds: [1]\nbaseline: a\nsplit: tset\nruns: {a: {}}\n", "split: no split 'tset'; there are train, val"),
        (
            "seeds: [1]\nbaseline: a\nruns: {a: {settings: data.splits.val.annotations=null}}\n",
            "split: val has no annotations",
        ),
        ("seeds: [1, 1]\nbaseline: a\nruns: {a: {}}\n", "seeds: duplicate value"),
        ("seeds: [1]\nbaseline: a\nruns: {a: {}}\ntests: {}\n", "tests: dictionary should have at least 1 item"),
        (
            "seeds: [1]\nbaseline: a\nruns: {a: {}, 'a, b': {settings: cbn.beta=false}}\n"
            "tests: {'': {}, b: {recalibrate: train}}\n",
            "two rows have the name 'a, b'",
        ),
    ],
)
def test_a_wrong_suite_is_refused(suite_of, text, says):
    with pytest.raises(InputError, match=says) as refused:
        load_suite(suite_of(text))
    assert "suite.yaml" in str(refused.value)
