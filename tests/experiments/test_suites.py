"""Every suite is expanded, and each of its runs takes two tiny training steps and all its tests."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.prepare import prepare_backbone, split_files
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
    settings = next(iter(run.settings.values()))
    return {(settings.task, settings.precision, changes, test.words, test.recalibrate) for test in tests}


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_the_runs_of_every_suite_take_two_steps(file, runs, walked, monkeypatch):
    """But for runs that would walk where another one did."""
    monkeypatch.chdir(runs)
    seed, recipe = next(iter(load_suite(file).runs[0].settings.items()))
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
        # two runs may be the same with these words
        settings = load_settings(suite.recipe, (*run.words, *words, f"seed={seed}", f"name={run.settings[seed].name}"))
        job = Job(replace(run, settings={seed: settings}), seed)
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
            for settings in run.settings.values():
                named.setdefault(settings.name, []).append(settings)
    for same in named.values():
        assert all(settings == same[0] for settings in same)
    assert max(len(same) for same in named.values()) >= 4  # MODERN itself
    suites = (load_suite(ROOT / f"experiments/suites/{name}.yaml") for name in ("pretrainings", "settled"))
    one, other = ({run.name: run.settings for run in suite.runs}["MODERN"] for suite in suites)
    assert [seed for seed in one if one[seed].name == other[seed].name] == [1]  # the seed that changes nothing else


def test_a_seed_changes_nothing_but_the_seed_and_the_place():
    run = load_suite(ROOT / "experiments" / "suites" / "table2.yaml").runs[0]
    one, two = run.settings[1], run.settings[2]
    assert one.model_copy(update={"seed": 2, "name": two.name}) == two
    assert one.name != two.name


@pytest.fixture
def suite_of(tmp_path):
    def write(text: str):
        file = tmp_path / "suite.yaml"
        file.write_text(f"title: t\nrecipe: {ROOT}/config/demo.yaml\n{text}")
        return file

    return write


ONE_SEED = "seeds: [1]\nbaseline: a\nruns: "
ONE_RUN = ONE_SEED + "{a: {}}\n"
GOOD = ONE_SEED + "{a: {}, b: {settings: train.epochs=2}}\n"


def test_a_suite_changes_its_recipe(suite_of):
    suite = load_suite(suite_of(GOOD), ("train.batch_size=8",))
    a, b = suite.runs
    recipe = load_settings(ROOT / "config" / "demo.yaml", ["train.batch_size=8"])
    assert a.settings[1].model_copy(update={"name": "demo"}) == recipe
    assert b.settings[1].train.epochs == 2
    assert a.settings[1].name != b.settings[1].name
    assert [row.name for row in suite.rows] == ["a", "b"]


ON_TWO = 'seeds: {{1: "", 2: "{}"}}\nbaseline: a\nruns: {{a: {{}}, b: {{settings: train.epochs=2}}}}\n'


def test_a_seed_changes_the_recipe_before_the_run_and_the_command_line_do(suite_of):
    plain, recipe = load_suite(suite_of(GOOD)), load_settings(ROOT / "config" / "demo.yaml")
    text = ON_TWO.format("train.epochs=5 train.batch_size=7 cbn.stem=true")
    a, b = load_suite(suite_of(text), ("cbn.stem=false",)).runs
    for run, epochs in ((a, {1: recipe.train.epochs, 2: 5}), (b, {1: 2, 2: 2})):
        assert {seed: settings.train.epochs for seed, settings in run.settings.items()} == epochs
        assert {seed: settings.train.batch_size for seed, settings in run.settings.items()} == {1: 64, 2: 7}
        assert not run.settings[2].cbn.stem
    # a seed that changes nothing else has the run directory that it has where seeds are a list
    assert [run.settings[1] for run in (a, b)] == [run.settings[1] for run in plain.runs]
    names = {settings.name.rpartition("/")[0] for run in (a, b) for settings in run.settings.values()}
    assert len(names) == 4


@pytest.mark.parametrize(("words", "seed"), [((), 1), (("backbone.seed=7",), 7)])
@pytest.mark.parametrize("recipe", ["demo", "photos", "guesswhat/games"])
def test_the_seed_of_a_pretraining(monkeypatch, recipe, words, seed):
    asked = []
    for name in ("pretrain_backbone", "pretrain_on_images"):
        monkeypatch.setattr(
            f"experiments.prepare.{name}", lambda *_, **named: asked.append(named) or {"held_out_accuracy": 50.0}
        )
    prepare_backbone(load_settings(ROOT / "config" / f"{recipe}.yaml", words))
    assert [named["seed"] for named in asked] == [seed]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: [1]\nbaseline: c\nruns: {a: {}}\n", "no row 'c'; rows are a"),
        ("seeds: []\nbaseline: a\nruns: {a: {}}\n", "seeds"),
        (ONE_SEED + "{a: {setings: x}}\n", "runs.a.setings"),
        (ONE_SEED + "{a: {paper: {error: 1.0}}}\n", "a: no column 'error'; columns are overall, yes/no"),
        (ONE_SEED + "{a: {settings: trian.epochs=2}}\n", "did you mean train"),
        (ONE_SEED + "{a: {settings: nonsense}}\n", "'nonsense' is not a setting"),
        (ONE_SEED + "{a: {paper: {overal: 1.0}}}\n", "a: no column 'overal'; columns are overall"),
        ("seeds: [1]\nbaseline: a\norder: [b]\nruns: {a: {}}\n", "no row 'b'"),
        ("seeds: [1]\nbaseline: a\ncontrasts: {a: [b]}\nruns: {a: {}}\n", "no row 'b'"),
        (ONE_SEED + '{a: {settings: "\'"}}\n', "quotation"),
        ("seeds: [-1]\nbaseline: a\nruns: {a: {}}\n", "seeds"),
        (ONE_SEED + "{a: {}, b: {settings: cbn.gamma=true}}\n", "have the same settings"),
        (ONE_SEED + "{a: {settings: 'train.splits=[val] train.validate_on='}}\n", "trains on val"),
        (ONE_RUN + "tests: {'': {settings: cbn.stem=true}}\n", "a test can change only"),
        (
            ONE_RUN + "tests: {dark: {settings: data.folder=datasets/dark}}\n",
            "dark: data.folder=datasets/dark needs a data.h5 of its own",
        ),
        (
            ONE_SEED + "{a: {}, b: {settings: data.folder=datasets/dark}}\n",
            "b: data.folder=datasets/dark needs a data.h5 of its own",
        ),
        (ONE_RUN + "tests: {'': {recalibrate: trian}}\n", "no split 'trian'"),
        (
            "seeds: [1]\nbaseline: a\nsplit: tset\nruns: {a: {}}\n",
            "a: no split 'tset' to be tested on; there are train, val",
        ),
        (ONE_SEED + "{a: {settings: data.splits.val.annotations=null}}\n", "a: split val has no annotations"),
        ("seeds: [1]\nbaseline: a\nruns: {a: null}\n", "runs.a: input should be a valid dictionary$"),
        ("seeds: [1, 1]\nbaseline: a\nruns: {a: {}}\n", "seeds: duplicate value"),
        ("seeds: {1: '', 1: ''}\nbaseline: a\nruns: {a: {}}\n", "key '1' is given twice"),
        ("seeds: [one]\nbaseline: a\nruns: {a: {}}\n", "seeds: must be whole numbers: a list, or SEED:"),
        ("seeds: {one: ''}\nbaseline: a\nruns: {a: {}}\n", "seeds: must be whole numbers: a list, or SEED:"),
        ("seeds: 3\nbaseline: a\nruns: {a: {}}\n", "seeds: must be whole numbers: a list, or SEED:"),
        ("seeds: {-1: ''}\nbaseline: a\nruns: {a: {}}\n", "seeds.-1: input should be greater than or equal to 0"),
        ("seeds: {1: 5}\nbaseline: a\nruns: {a: {}}\n", "seeds.1: input should be a valid string"),
        ("seeds: {}\nbaseline: a\nruns: {a: {}}\n", "seeds: dictionary should have at least 1 item"),
        (ON_TWO.format("trian.epochs=2"), "suite.yaml: a, seed 2: unknown key trian; did you mean train"),
        (ON_TWO.format("nonsense"), "suite.yaml: a, seed 2: 'nonsense' is not a setting"),
        (ON_TWO.format("backbone.weights=none backbone.seed=2"), "a, seed 2: backbone.seed: needs weights that"),
        (ON_TWO.format("seed=3"), "suite.yaml: a, seed 2: seed=3: a suite gives each run its seed and its name"),
        (ON_TWO.format("train.epochs=2"), "suite.yaml: 'a' and 'b, seed 2' have the same settings"),
        (ON_TWO.format("data.folder=dark"), "suite.yaml: a, seed 2: data.folder=dark needs a data.h5 of its own"),
        (ON_TWO.format("backbone.seed=2"), "suite.yaml: a, seed 2: .*safetensors is of another backbone.seed; name a"),
        (ON_TWO.format("train.splits=[val] train.validate_on="), "suite.yaml: a, seed 2: trains on val, which it is"),
        (ON_TWO.format("data.splits.val=null"), "suite.yaml: a, seed 2: no split 'val' to be tested on"),
        (ON_TWO.format("data.splits.val.annotations=null"), "suite.yaml: a, seed 2: split val has no annotations"),
        (ONE_RUN + "tests: {}\n", "tests: dictionary should have at least 1 item"),
        (
            ONE_SEED + "{a: {}, 'a, b': {settings: cbn.beta=false}}\ntests: {'': {}, b: {recalibrate: train}}\n",
            "two rows have the name 'a, b'",
        ),
    ],
)
def test_a_wrong_suite_is_refused(suite_of, text, says):
    with pytest.raises(InputError, match=says) as refused:
        load_suite(suite_of(text))
    assert "suite.yaml" in str(refused.value)


def test_a_wrong_word_of_the_command_line_is_named_as_such(suite_of):
    with pytest.raises(InputError, match="suite.yaml: a with epochs=2: unknown key epochs; did you mean train.epochs"):
        load_suite(suite_of(ONE_RUN), ("epochs=2",))
