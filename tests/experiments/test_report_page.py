"""The page, figure and table of a report, and its publication with the evidence, from made-up run directories."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments.report.figure import draw
from experiments.report.page import write_report
from experiments.report.results import collect, keep_evidence, row_lines, run_lines
from experiments.report.tables import duration, markdown_table, terminal_table
from tests.fabricated_runs import ALWAYS_RIGHT, NEVER_RIGHT, OFTEN_RIGHT, SUITE, finish, report, suite_of


@pytest.fixture
def suite(tmp_path):
    return suite_of(tmp_path, SUITE)


def test_nothing_finished(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    write_report(suite, tmp_path, tmp_path / "out")
    told = write_report(suite, tmp_path / "elsewhere", tmp_path / "out")
    assert told.count("not run") == 4 + 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stages.csv", "stages.md"]


def test_the_evidence_holds_every_row_of_the_report(tmp_path):
    """Also of a run of which one test is missing."""
    tests = 'tests: {"": {}, recalibrated: {recalibrate: train}}\n'.replace("{", "{{").replace("}", "}}")
    suite = suite_of(tmp_path, SUITE.replace("order: [none, last, all]\n", tests))
    finish(suite, tmp_path / "runs", "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path / "runs", "none, recalibrated", 1, OFTEN_RIGHT)
    finish(suite, tmp_path / "runs", "all", 1, ALWAYS_RIGHT)
    keep_evidence(suite, tmp_path / "runs", tmp_path / "kept.zip")
    shutil.unpack_archive(tmp_path / "kept.zip", tmp_path / "kept")
    kept, all_ = (run_lines(suite, collect(suite, tmp_path / folder)) for folder in ("kept", "runs"))
    assert kept == all_
    assert len(kept) == 3


def test_the_page(suite, tmp_path):
    for seed in (1, 2):
        finish(suite, tmp_path, "none", seed, NEVER_RIGHT)
        finish(suite, tmp_path, "all", seed, OFTEN_RIGHT)
    altered = replace(suite, words=("train.epochs=2", "cbn.stages=[4]"))
    told, page = report(altered, tmp_path)
    assert altered.report_name.startswith("stages-")  # beside the report of the suite as it is
    assert page.startswith("# Which stages, by how much\n")
    assert f"python main.py experiment {tmp_path}/stages.yaml train.epochs=2 'cbn.stages=[4]'\n" in page
    assert "The runs change settings of `config/demo.yaml`" in page
    assert "The paper's numbers are of VQA v1, accuracy on val." in page
    lines = row_lines(altered, collect(altered, tmp_path))
    assert markdown_table(lines) in page
    row = next(line for line in page.splitlines() if line.startswith("| all | 86.25 ± 0.00 | 58.56 |"))
    assert re.search(
        r"\| \+86.25 ± 0.00 \[\+6\d.\d\d, \+100.00\] \| too few seeds \| 2 \| 100 s \| 0.88 \| 1 058 002 \|$", row
    )
    assert "| all | 90.00 | 82.50 |" in page, "by question type"
    assert "- 4 trainings with the code of commit 0123456789 with changes that are not committed" in page
    assert "- seeds 1, 2\n" in page
    assert told.endswith(f"{altered.report_name}.md")
    assert terminal_table(lines) in told


def test_several_backbones_are_reported(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT, backbone="4e467da68ac9")
    finish(suite, tmp_path, "none", 2, NEVER_RIGHT)  # made before it was written down
    told, page = report(suite, tmp_path)
    assert "- 1 training on the backbone 4e467da68ac9\n" in page
    assert "- **1 training recorded no backbone**\n" in page
    assert "\n1 training recorded no backbone\n" in told
    assert "several backbones" not in page
    finish(suite, tmp_path, "all", 1, OFTEN_RIGHT, backbone="3422989552e2")
    told, page = report(suite, tmp_path)
    assert "**several backbones of a seed: a difference between rows may be" in page
    assert "\nseveral backbones of a seed: a difference between rows may be" in told
    assert "neither covers another pretraining" in page


SEEDS = """seeds:
  1: ""
  2: backbone.seed=2 backbone.weights=b2.safetensors
  3: backbone.seed=3 backbone.weights=b3.safetensors
"""


@pytest.mark.parametrize(
    ("backbones", "covers"),
    [
        (("a", "b", "c"), "and with it that between pretrainings of the backbone: each seed of a row has its own."),
        (("a", "b", "b"), "and that between pretrainings of the backbone only as far as the seeds of a row"),
        (("a", "b", None), "and that between pretrainings of the backbone only as far as the seeds of a row"),
        (("a", "a", "a"), "and neither covers another pretraining of the backbone."),
    ],
)
def test_seeds_with_backbones_of_their_own(tmp_path, backbones, covers):
    """What a seed changes, the backbones of the seeds, and whether the interval over seeds covers pretraining."""
    suite = suite_of(tmp_path, SUITE.replace("seeds: [1, 2, 3]\n", SEEDS))
    for seed, backbone in enumerate(backbones, 1):
        finish(suite, tmp_path, "none", seed, NEVER_RIGHT, backbone=backbone)
        finish(suite, tmp_path, "all", seed, OFTEN_RIGHT, backbone=backbone)
    finish(suite, tmp_path, "last", 1, OFTEN_RIGHT, backbone="a")
    _, page = report(suite, tmp_path)
    assert f"Only the second interval covers the variation between seeds, {covers}" in page
    assert "seed: 2: `backbone.seed=2 backbone.weights=b2.safetensors`; 3: `backbone.seed=3 backbone.weights=b3" in page
    assert ("several backbones of a seed" in page) is (None in backbones)
    if backbones == ("a", "b", "b"):
        assert "- 3 trainings on the backbone a (seed 1)\n- 4 trainings on the backbone b (seed 2, 3)\n" in page
    trainings = list(csv.DictReader((tmp_path / "out" / "stages_runs.csv").open()))
    words = {line["seed"]: line["seed_settings"] for line in trainings}
    assert words == {str(seed): " ".join(words) for seed, words in suite.seeds.items()}
    assert len({line["folder"] for line in trainings}) == 7
    keep_evidence(suite, tmp_path, tmp_path / "kept.zip")
    shutil.unpack_archive(tmp_path / "kept.zip", tmp_path / "kept")
    assert run_lines(suite, collect(suite, tmp_path / "kept")) == run_lines(suite, collect(suite, tmp_path))


@pytest.mark.parametrize(
    ("none", "last", "said"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (2,), "compared by the seeds that both have.\n"),
        ((1,), (1, 2), "compared by the seeds that both have.\n"),
        ((1,), (2, 3), "compared by the seeds that both have, or by all of theirs where they have none in common.\n"),
    ],
)
def test_the_page_says_which_seeds_of_two_rows_are_compared(suite, tmp_path, none, last, said):
    for row, seeds in (("none", none), ("last", last)):
        for seed in seeds:
            finish(suite, tmp_path, row, seed, OFTEN_RIGHT)
    _, page = report(suite, tmp_path)
    assert (f"\nRows with different seeds are {said}" in page) if said else ("Rows with different seeds" not in page)


def test_a_run_that_was_resumed_elsewhere_names_both_and_several_machines_are_reported(suite, tmp_path):
    for row in ("none", "all"):
        finish(suite, tmp_path, row, 1, NEVER_RIGHT, backbone="4e467da68ac9")
    file = tmp_path / suite.runs[2].settings[1].name / "environment.json"
    begun = json.loads(file.read_text())
    file.write_text(json.dumps(begun | {"resumed": [begun]}))
    _, page = report(suite, tmp_path)
    assert "several machines" not in page
    assert "then" not in page
    elsewhere = begun | {"git_commit": "fedcba9876543210", "device": "NVIDIA H200", "cpu": "Xeon", "threads": 1}
    elsewhere["backbone"] = "3422989552e2"  # of a file that was changed since: its weights are in the checkpoint
    file.write_text(json.dumps(begun | {"resumed": [begun, elsewhere]}))
    _, page = report(suite, tmp_path)
    assert "- 1 training on EPYC, then NVIDIA H200 (2 CPU cores, 2, then 1 threads), torch 2.15.0" in page
    assert "- **several machines: times and memory" in page
    assert "Training: the time of all training steps, without validation. **Do not compare it: several machines" in page
    assert "- 2 trainings on the backbone 4e467da68ac9\n" in page
    committed = "commit 0123456789 with changes that are not committed"
    assert f"- 1 training with the code of {committed}\n" in page
    assert f"- 1 training with the code of {committed}, then commit fedcba9876\n" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none", "last", "all"), "Each run is scored at its last epoch; the accuracies are of `val`."),
        (("all",), "at its best epoch on split `val`, or at its last where it has no validation; the accuracies are"),
        ((), "The best epoch of each run was chosen on these same questions, which favours every row."),
    ],
)
def test_the_page_says_which_epoch_is_scored(suite, tmp_path, words, said):
    for number, run in enumerate(suite.runs):
        if run.name in words:
            train = run.settings[1].train.model_copy(update={"validate_on": None})
            settings = {seed: each.model_copy(update={"train": train}) for seed, each in run.settings.items()}
            suite.runs[number] = replace(run, settings=settings)
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    assert said in report(suite, tmp_path)[1]


def test_the_terminal_table_is_aligned_and_narrow(suite, tmp_path):
    for row, accuracies in (("none", NEVER_RIGHT), ("last", OFTEN_RIGHT), ("all", ALWAYS_RIGHT)):
        for seed in (1, 2, 3):
            finish(suite, tmp_path, row, seed, accuracies, seconds=4000)
    heading, *rows = terminal_table(row_lines(suite, collect(suite, tmp_path))).splitlines()
    assert max(map(len, [heading, *rows])) <= 110
    assert heading.endswith("seeds  training")
    assert all(row.endswith("3    67 min") and len(row) == len(heading) for row in rows[:3])


def test_the_figure_rounds_a_mean_as_the_table():
    lines = [{"row": "all", "overall": accuracy} for accuracy in (99.3, 99.0, 98.625)]  # 98.975: halfway
    assert f"{np.mean([99.3, 99.0, 98.625]):.2f}" != f"{98.975:.2f}"
    assert [text.get_text() for text in draw("title", lines, "none").axes[0].texts] == [f"{98.975:.2f}"]


def test_the_image_shows_every_seed(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    for seed, accuracies in ((1, OFTEN_RIGHT), (2, ALWAYS_RIGHT), (3, OFTEN_RIGHT)):
        finish(suite, tmp_path, "all", seed, accuracies)
    write_report(suite, tmp_path, tmp_path / "out")
    axes = draw("title", run_lines(suite, collect(suite, tmp_path)), "none").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "all"]
    none, every = (dots.get_offsets() for dots in axes.collections)
    assert none.tolist() == [[0, 0]]
    assert every[:, 0].tolist() == pytest.approx([86.25, 100, 86.25])
    assert len({tuple(dot) for dot in every.tolist()}) == 3
    assert [text.get_text() for text in axes.texts] == ["0.00", f"{(2 * 86.25 + 100) / 3:.2f}"]
    with Image.open(tmp_path / "out/stages.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_durations():
    assert [duration(seconds) for seconds in (None, 83.2, 900, 9000)] == ["", "83 s", "15 min", "2.5 h"]


def test_the_command_reports_without_running(done, suite, here):
    finish(suite, here / "runs", "none", 1, NEVER_RIGHT)
    ended = done("experiment", suite.file, "--report")
    assert "runs/experiments/reports/stages.md" in ended.out
    assert (here / "runs/experiments/reports/stages.csv").exists()


def test_the_command_publishes(done, refused, suite, here, monkeypatch):
    monkeypatch.setattr("experiments.report.page.RESULTS", here / "results")
    finish(suite, here / "runs", "none", 1, OFTEN_RIGHT)
    done("experiment", suite.file, "--publish")
    assert "| none | 86.25 | 56.12 |" in (here / "results/stages.md").read_text()
    assert "not allowed with" in refused("experiment", suite.file, "--publish", "--only", "none", "--seed", "1")


def test_published_results_are_not_replaced_by_fewer(done, refused, suite, here, monkeypatch):
    monkeypatch.setattr("experiments.report.page.RESULTS", results := here / "results")
    for seed in (1, 2):
        finish(suite, here / "runs", "none", seed, OFTEN_RIGHT)
    done("experiment", suite.file, "--publish")
    kept = {file: file.read_bytes() for file in results.iterdir()}
    (here / "runs").rename(here / "elsewhere")
    finish(suite, here / "runs", "none", 2, OFTEN_RIGHT)
    finish(suite, here / "runs", "none", 3, OFTEN_RIGHT)
    told = refused("experiment", suite.file, "--publish")
    assert "runs has no result of none, seed 1, which is published: unzip" in told
    assert f"unzip -n {results}/stages_runs.zip -d runs where no other runs are, or remove" in told
    finish(suite, here / "runs", "none", 1, ALWAYS_RIGHT)  # of another training in the same run directory
    told = refused("experiment", suite.file, "--publish")
    assert "runs has another result (100.0 %, not 86.25 %) of none, seed 1, which is published" in told
    shutil.rmtree(next((here / "runs").rglob("seed_1")))
    assert {file: file.read_bytes() for file in results.iterdir()} == kept
    shutil.unpack_archive(results / "stages_runs.zip", here / "runs")
    done("experiment", suite.file, "--publish")
    assert "- seeds 1, 2, 3\n" in (results / "stages.md").read_text()
    (results / "stages_runs.csv").write_text("row;seed\nnone;1\n")  # as another program saved it
    assert "runs has no result of None, seed None" in refused("experiment", suite.file, "--publish")
