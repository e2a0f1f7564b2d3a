"""A finished run is used only for the settings it was made with, whatever base.yaml has today."""

import json
import shutil
import zipfile

import pytest
import yaml

from experiments.report.results import collect, keep_evidence
from experiments.runner import jobs_of, missing_jobs
from experiments.suite import load_suite
from tests.conftest import ROOT
from tests.fabricated_runs import OFTEN_RIGHT, finish
from vqa.io.errors import InputError
from vqa.settings import recipes
from vqa.settings.schema import ROLES, Role, role_of

EVIDENCE = sorted((ROOT / "experiments" / "results").glob("*_runs.zip"))
SUITE = "title: t\nrecipe: config/demo.yaml\nseeds: [1]\nbaseline: a\nruns: {a: {}}\n"


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Gives a line of base.yaml another value, as a later version of the code may."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    base = tmp_path / "base.yaml"
    shutil.copy(recipes.BASE, base)
    for module in ("vqa.settings.recipes", "experiments.suite"):
        monkeypatch.setattr(f"{module}.BASE", base)

    def change(old: str, new: str) -> None:
        text = base.read_text()
        assert text.count(f"{old} ") == 1
        base.write_text(text.replace(f"{old} ", f"{new} "))

    return change


@pytest.fixture
def suite(tmp_path, changed):  # noqa: ARG001 (the recipes are its copies)
    (tmp_path / "one.yaml").write_text(SUITE)
    suite = load_suite(tmp_path / "one.yaml")
    finish(suite, tmp_path / "runs", "a", 1, OFTEN_RIGHT)
    return suite


def test_results_of_other_settings_are_refused_wherever_they_are_taken(suite, here, changed, refused):
    changed("clip: 5.0", "clip: 0.5")
    now, runs = load_suite(suite.file), here / "runs"
    assert jobs_of(now)[0].folder(runs) == jobs_of(suite)[0].folder(runs)
    for take in (
        lambda: missing_jobs(now, runs),
        lambda: collect(now, runs),
        lambda: keep_evidence(now, runs, here / "kept.zip"),
    ):
        with pytest.raises(InputError, match=r"seed_1: its results .* train.clip is 5.0, not 0.5; move the directory"):
            take()
    for words in ([], ["--list"], ["--report"], ["--publish"], ["--only", "a", "--seed", 1]):
        assert "train.clip is 5.0, not 0.5" in refused("experiment", "one.yaml", *words)
    assert not missing_jobs(suite, runs)


@pytest.mark.parametrize(
    ("old", "new"), [("fused: true", "fused: eager"), ("cache_gib: 8", "cache_gib: 0"), ("workers: 2", "workers: 1")]
)
def test_results_are_taken_where_only_speed_or_machine_differ(suite, tmp_path, changed, old, new):
    changed(old, new)
    now = load_suite(suite.file)
    assert not missing_jobs(now, tmp_path / "runs")
    assert collect(now, tmp_path / "runs")["a"].keys() == {1}


def test_a_run_that_was_evaluated_by_hand_is_not_finished(suite, tmp_path):
    runs = tmp_path / "runs"
    (jobs_of(suite)[0].folder(runs) / "accuracies_val.npz").unlink()
    assert missing_jobs(suite, runs) == jobs_of(suite)


def test_results_of_an_earlier_model_are_refused(suite, tmp_path):
    runs = tmp_path / "runs"
    file = jobs_of(suite)[0].folder(runs) / "metrics_val.json"
    scores = json.loads(file.read_text())
    file.write_text(json.dumps(scores | {"epoch": 1}))
    assert collect(suite, runs)["a"].keys() == {1}
    file.write_text(json.dumps(scores | {"epoch": 2}))
    with pytest.raises(InputError, match=r"metrics_val.json: of the model of epoch 2, but that of epoch 1 was kept"):
        collect(suite, runs)


def published(name, folder, to):
    """A suite beside the recipes in `folder`, and its published runs in `to`."""
    shutil.copytree(ROOT / "experiments" / "suites", folder / "experiments" / "suites", dirs_exist_ok=True)
    shutil.unpack_archive(ROOT / "experiments" / "results" / f"{name}_runs.zip", to)
    return load_suite(folder / "experiments" / "suites" / f"{name}.yaml")


def test_a_key_that_published_runs_lack_differs_where_its_default_was_changed(tmp_path, changed):
    suite = published("table2", tmp_path, tmp_path / "runs")
    assert not missing_jobs(suite, tmp_path / "runs")
    changed("together: 1", "together: 2")
    with pytest.raises(InputError, match=r"train.together is 1, not 2"):
        missing_jobs(load_suite(suite.file), tmp_path / "runs")


@pytest.mark.parametrize("file", EVIDENCE, ids=lambda file: file.stem)
def test_what_was_done_before_a_key_is_written_down_for_each_that_published_runs_lack(file):
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if not name.endswith("config.yaml"):
                continue
            content = yaml.safe_load(archive.read(name))
            for key, role in ROLES.items():
                section, _, last = key.rpartition(".")
                known = content.get(section)  # None of a section that a recipe does without
                if known is not None and last not in known and role is not Role.SPEED:
                    assert last in recipes._BEFORE.get(section, {}), f"vqa/settings/recipes.py: _BEFORE must name {key}"


def test_every_role_is_given():
    assert set(ROLES.values()) == {None, *Role}
    assert role_of("data.splits.val.questions") is Role.DATA
    assert role_of("speed.fused") is Role.SPEED
    assert role_of("data.nothing") is role_of("scenes.seed") is role_of("") is None


@pytest.mark.parametrize("command_name", ["eval", "features", "recalibrate", "ask", "inspect"])
def test_a_model_of_other_settings_than_its_run_is_refused(finished, refused, command_name):
    config = finished / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002"))
    words = ["--image", "x.png", "--question", "what?"] if command_name in ("ask", "inspect") else []
    told = refused(command_name, "--run", finished, *words)
    assert f"{finished}/model/config.yaml: not a model of {config}" in told
    assert "train.learning_rate is 0.001, not 0.002" in told
