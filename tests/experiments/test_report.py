"""The report of a suite, from made-up run directories."""

import csv
import json
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments.report.figure import draw
from experiments.report.page import write_report
from experiments.report.results import collect, keep_evidence, row_lines, run_lines
from experiments.report.tables import duration, markdown_table, terminal_table
from experiments.suite import load_suite
from tests.conftest import ROOT
from vqa.io.errors import InputError

SUITE = """\
title: Which stages, by how much
recipe: {root}/config/demo.yaml
seeds: [1, 2, 3]
baseline: none
order: [none, last, all]
contrasts: {{all: [last, none]}}
paper: VQA v1, accuracy on val
runs:
  none: {{settings: "cbn.stages=[]", paper: {{overall: 56.12}}}}
  last: {{settings: "cbn.stages=[4] train.epochs=2", paper: {{overall: 57.68, number: 36.5}}}}
  all: {{paper: {{overall: 58.56}}}}
not_run:
  MCB | ResNet-152: {{overall: 62.5}}
"""
ALWAYS_RIGHT, OFTEN_RIGHT, NEVER_RIGHT = [1.0] * 8, [1, 1, 0.6, 1, 1, 0.3, 1, 1], [0.0] * 8


@pytest.fixture
def suite(tmp_path):
    return suite_of(tmp_path, SUITE)


def suite_of(folder, text):
    file = folder / "stages.yaml"
    file.write_text(text.format(root=ROOT))
    return load_suite(file)


def finish(
    suite, runs, row_name, seed, accuracies, first=0, kinds=("how many", "is there"), seconds=100.0, backbone=None
):
    """Writes what training and testing leave behind; question n has the id `first` + n, and every other is a number."""
    row = next(row for row in suite.rows if row.name == row_name)
    folder = runs / row.run.seeded(seed).name
    tested = row.test.folder(folder)
    tested.mkdir(parents=True, exist_ok=True)
    epochs = [{"epoch": n, "val_overall": value, "peak_memory_mib": 900.0 + n} for n, value in ((1, 40.0), (2, 39.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e | {"seconds": seconds / 2}) + "\n" for e in epochs))
    environment = {
        "torch": "2.15.0",
        "python": "3.11.7",
        "git_commit": "0123456789abcdef-dirty",
        "device": "cpu",
        "cpu": "EPYC",
    }
    environment |= {"processes": 1, "cpus": 2, "threads": 2, "trained_parameters": 1058002, "backbone": backbone}
    (folder / "environment.json").write_text(json.dumps(environment))
    row.run.seeded(seed).save(folder / "config.yaml")
    values = np.array(accuracies, float)
    np.savez(tested / "accuracies_val.npz", ids=np.arange(first, first + len(values)), accuracies=values)
    by_kind = {kind: 100 * values[n :: len(kinds)].mean() for n, kind in enumerate(kinds[: len(values)])}
    types = {"number": 100 * values[::2].mean(), "yes/no": 100 * values[1::2].mean()}
    scores = {"overall": 100 * values.mean(), "per_answer_type": types, "per_question_type": by_kind}
    (tested / "metrics_val.json").write_text(json.dumps({"questions": len(values)} | scores))


def lines_by_row(file):
    return {line["row"]: line for line in csv.DictReader(file.open())}


def test_means_spreads_and_differences(suite, tmp_path):
    for seed in (1, 2, 3):
        finish(suite, tmp_path, "none", seed, NEVER_RIGHT)
    finish(suite, tmp_path, "last", 1, [1.0] * 4 + [0.0] * 4, seconds=50)
    finish(suite, tmp_path, "last", 2, [1.0] * 4 + [0.6] + [0.0] * 3, seconds=90)
    finish(suite, tmp_path, "all", 2, OFTEN_RIGHT)
    write_report(suite, tmp_path, tmp_path / "out")
    lines = lines_by_row(tmp_path / "out/stages.csv")
    last = lines["last"]
    assert (last["settings"], last["test"], last["seeds"]) == ("'cbn.stages=[4]' train.epochs=2", "plain", "1 2")
    assert [float(last[key]) for key in ("overall_mean", "overall_std")] == [53.75, pytest.approx(5.3033)]
    assert [float(last[key]) for key in ("number_mean", "type: how many", "yes/no_mean")] == [57.5, 57.5, 50]
    assert (last["other_mean"], last["paper_overall"], last["paper_number"]) == ("", "57.68", "36.5")
    assert [float(last[key]) for key in ("difference", "difference_std")] == [53.75, pytest.approx(5.3033)]
    assert 10 < float(last["ci_low"]) < 53.75 < float(last["ci_high"]) < 100
    assert (last["compared"], last["questions"], last["trained_parameters"]) == ("8", "8", "1058002")
    assert (last["seconds"], last["peak_memory_mib"]) == ("70.0", "902.0")
    assert (lines["none"]["difference"], lines["none"]["overall_std"]) == ("", "0.0")
    assert lines["all"]["difference_std"] == lines["all"]["overall_std"] == ""
    assert [lines[row]["seeds_low"] for row in ("none", "last", "all")] == ["", "", ""]  # too few seeds
    assert (tmp_path / "out/stages.md").read_text().count("| too few seeds |") == 2


def test_the_error_of_guesswhat_stands_beside_the_papers(tmp_path):
    text = (
        SUITE.replace("overall:", "error:").replace(", number: 36.5", "").replace("demo.yaml", "guesswhat/games.yaml")
    )
    suite = suite_of(tmp_path, text)
    finish(suite, tmp_path, "last", 1, [1.0] * 6 + [0.0] * 2)
    told = write_report(suite, tmp_path, tmp_path / "out")
    last = lines_by_row(tmp_path / "out/stages.csv")["last"]
    assert [float(last[key]) for key in ("overall_mean", "error_mean", "paper_error")] == [75, 25, 57.68]
    assert not {"number_mean", "paper_overall"} & {key for key in last if last[key]}
    assert re.search(r"^last +75.00 +25.00 +57.68 ", told, re.MULTILINE)
    assert re.search(r"^none +not run +not run +56.12", told, re.MULTILINE)


def test_intervals_over_seeds_and_contrasts_by_question_type(suite, tmp_path):
    """Reference: t(0.975, 2) = 4.302653; differences of 0, 50 and 100 points have a standard error of 50 / sqrt(3)."""
    for seed, right in ((1, [0, 0] * 4), (2, [0, 1] * 4), (3, [1, 1] * 4)):
        finish(suite, tmp_path, "none", seed, NEVER_RIGHT)
        finish(suite, tmp_path, "all", seed, right)
    finish(suite, tmp_path, "last", 2, ALWAYS_RIGHT)
    told = write_report(suite, tmp_path, tmp_path / "out")
    half = 4.302653 * 50 / 3**0.5
    line = lines_by_row(tmp_path / "out/stages.csv")["all"]
    assert [float(line[key]) for key in ("seeds_low", "seeds_high")] == pytest.approx([50 - half, 50 + half], abs=1e-3)
    found = {
        (line["less"], line["questions"]): [line[key] for key in ("difference", "seeds_low", "seeds_high", "seeds")]
        for line in csv.DictReader((tmp_path / "out/stages_contrasts.csv").open())
    }
    assert list(found) == [(less, kind) for less in ("last", "none") for kind in ("overall", "how many", "is there")]
    half = 4.302653 * np.std([0, 0, 100], ddof=1) / 3**0.5
    counting = pytest.approx([100 / 3, 100 / 3 - half, 100 / 3 + half, 3], abs=1e-3)
    assert list(map(float, found["none", "how many"])) == counting
    assert found["last", "how many"] == ["-100.0", "", "", "1"]
    page = (tmp_path / "out/stages.md").read_text()
    assert "| all less | last | none |\n" in page
    assert "| how many | −100.00 (too few seeds: 1) | +33.33 [−110.09, +176.76] |\n" in page
    assert re.search(r"how many +−100.00 \(too few seeds: 1\) +\+33.33 \[−110.09, \+176.76\]\n", told)


def test_a_line_for_every_training(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path, "last", 3, OFTEN_RIGHT)
    write_report(suite, tmp_path, tmp_path / "out")
    first, second = csv.DictReader((tmp_path / "out/stages_runs.csv").open())
    assert (first["row"], first["seed"], second["row"], second["seed"]) == ("none", "1", "last", "3")
    assert (first["best_epoch"], first["epochs"], first["git_commit"]) == ("1", "2", "0123456789abcdef-dirty")
    assert float(second["overall"]) == pytest.approx(86.25)
    assert second["folder"] == suite.runs[1].seeded(3).name
    assert not second["folder"].startswith("/")


def test_what_is_not_finished_is_absent_and_a_row_without_seeds_not_run(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    unfinished = tmp_path / suite.runs[1].seeded(1).name
    unfinished.mkdir(parents=True)
    (unfinished / "metrics.jsonl").write_text("")
    told = write_report(suite, tmp_path, tmp_path / "out")
    assert "last above none: not compared, as one of them was not run" in told
    page = (tmp_path / "out/stages.md").read_text()
    assert "| last | not run | 57.68 |" in page
    assert r"| MCB \| ResNet-152 | not run | 62.50 |" in page
    assert list(lines_by_row(tmp_path / "out/stages_runs.csv")) == ["none"]


def test_nothing_finished(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    write_report(suite, tmp_path, tmp_path / "out")
    told = write_report(suite, tmp_path / "elsewhere", tmp_path / "out")
    assert told.count("not run") == 4 + 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stages.csv", "stages.md"]


def test_the_claimed_order(suite, tmp_path):
    for seed in (1, 2, 3):
        finish(suite, tmp_path, "none", seed, OFTEN_RIGHT)
        finish(suite, tmp_path, "last", seed, NEVER_RIGHT)
        finish(suite, tmp_path, "all", seed, ALWAYS_RIGHT if seed == 1 else NEVER_RIGHT)
    told = write_report(suite, tmp_path, tmp_path / "out")
    assert "last above none: reversed, −86.25 points, 95 % interval over questions [−100.00, " in told
    assert "all above last: inconclusive, +33.33 points, 95 % interval over questions [+33.33, +33.33], " in told
    assert "above in 1 of 3 seeds, 95 % interval over seeds [−110.09, +176.76]" in told
    assert "- all above last: inconclusive" in (tmp_path / "out/stages.md").read_text()
    for seed in (1, 2, 3):
        finish(suite, tmp_path, "last", seed, OFTEN_RIGHT[::-1])
    told = write_report(suite, tmp_path, tmp_path / "out")
    assert "last above none: inconclusive, 0.00 points" in told


def test_rows_that_were_asked_other_questions(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path, "last", 1, OFTEN_RIGHT, first=5)
    finish(suite, tmp_path, "all", 1, ALWAYS_RIGHT, first=100)
    write_report(suite, tmp_path, tmp_path / "out")
    lines = lines_by_row(tmp_path / "out/stages.csv")
    assert lines["last"]["compared"] == "3"
    assert float(lines["last"]["difference"]) == pytest.approx(100 * 2.6 / 3, abs=1e-3)
    assert lines["all"]["difference"] == lines["all"]["compared"] == ""
    page = " ".join((tmp_path / "out/stages.md").read_text().split())
    assert "over the 3 questions that both rows were asked" in page


def test_a_run_in_several_tests(tmp_path):
    tests = 'tests: {"": {}, recalibrated: {recalibrate: train}}\n'.replace("{", "{{").replace("}", "}}")
    suite = suite_of(tmp_path, SUITE.replace("order: [none, last, all]\n", tests))
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path, "none, recalibrated", 1, OFTEN_RIGHT)
    told = write_report(suite, tmp_path, tmp_path / "out")
    lines = lines_by_row(tmp_path / "out/stages.csv")
    assert (lines["none"]["paper_overall"], lines["none, recalibrated"]["paper_overall"]) == ("56.12", "")
    assert float(lines["none, recalibrated"]["difference"]) == pytest.approx(86.25)
    page = (tmp_path / "out/stages.md").read_text()
    assert "- 1 training on EPYC (2 CPU cores, 2 threads), torch 2.15.0" in page
    assert "claimed order" not in page
    assert "above" not in told


def test_the_evidence_holds_every_row_of_the_report(tmp_path):
    """Also of a run of which one test is missing."""
    tests = 'tests: {"": {}, recalibrated: {recalibrate: train}}\n'.replace("{", "{{").replace("}", "}}")
    suite = suite_of(tmp_path, SUITE.replace("order: [none, last, all]\n", tests))
    finish(suite, tmp_path / "runs", "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path / "runs", "none, recalibrated", 1, OFTEN_RIGHT)
    finish(suite, tmp_path / "runs", "all", 1, ALWAYS_RIGHT)
    keep_evidence(suite, tmp_path / "runs", tmp_path / "kept.zip")
    with zipfile.ZipFile(tmp_path / "kept.zip") as archive:
        archive.extractall(tmp_path / "kept")
    kept, all_ = (run_lines(suite, collect(suite, tmp_path / folder)) for folder in ("kept", "runs"))
    assert kept == all_
    assert len(kept) == 3


def test_the_page(suite, tmp_path):
    for seed in (1, 2):
        finish(suite, tmp_path, "none", seed, NEVER_RIGHT)
        finish(suite, tmp_path, "all", seed, OFTEN_RIGHT)
    altered = replace(suite, words=("train.epochs=2", "cbn.stages=[4]"))
    told = write_report(altered, tmp_path, tmp_path / "out")
    assert altered.report_name.startswith("stages-")  # beside the report of the suite as it is
    page = (tmp_path / "out" / f"{altered.report_name}.md").read_text()
    assert page.startswith("# Which stages, by how much\n")
    assert f"python main.py experiment {tmp_path}/stages.yaml train.epochs=2 'cbn.stages=[4]'\n" in page
    assert "deltas over `config/demo.yaml`" in page
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
    write_report(suite, tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "stages.md").read_text()
    assert "- 1 training on the backbone 4e467da68ac9\n" in page
    assert "- 1 training recorded no backbone\n" in page
    assert "several backbones" not in page
    finish(suite, tmp_path, "all", 1, OFTEN_RIGHT, backbone="3422989552e2")
    write_report(suite, tmp_path, tmp_path / "out")
    assert "several backbones" in (tmp_path / "out" / "stages.md").read_text()


def test_a_run_that_was_resumed_elsewhere_names_both_and_several_machines_are_reported(suite, tmp_path):
    for row in ("none", "all"):
        finish(suite, tmp_path, row, 1, NEVER_RIGHT)
    file = tmp_path / suite.runs[2].seeded(1).name / "environment.json"
    begun = json.loads(file.read_text())
    file.write_text(json.dumps(begun | {"resumed": [begun]}))
    write_report(suite, tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "stages.md").read_text()
    assert "several machines" not in page
    assert "then" not in page
    elsewhere = begun | {"git_commit": "fedcba9876543210", "device": "NVIDIA H200", "cpu": "Xeon", "threads": 1}
    file.write_text(json.dumps(begun | {"resumed": [begun, elsewhere]}))
    write_report(suite, tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "stages.md").read_text()
    assert "- 1 training on EPYC, then NVIDIA H200 (2 CPU cores, 2, then 1 threads), torch 2.15.0" in page
    assert "- **several machines: times and memory" in page
    committed = "commit 0123456789 with changes that are not committed"
    assert f"- 1 training with the code of {committed}\n" in page
    assert f"- 1 training with the code of {committed}, then commit fedcba9876\n" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none", "last", "all"), "Each run is scored at its last epoch; the accuracies are of `val`."),
        (("all",), "at its best epoch on split `val`, or at its last where it has no validation; the accuracies are"),
        ((), "Each run is scored at its best epoch on these same questions."),
    ],
)
def test_the_page_says_which_epoch_is_scored(suite, tmp_path, words, said):
    for number, run in enumerate(suite.runs):
        if run.name in words:
            train = run.settings.train.model_copy(update={"validate_on": None})
            suite.runs[number] = replace(run, settings=run.settings.model_copy(update={"train": train}))
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    write_report(suite, tmp_path, tmp_path / "out")
    assert said in (tmp_path / "out/stages.md").read_text()


def test_many_question_types_are_skipped(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, [0.5] * 26, kinds=[f"kind {n}" for n in range(13)])
    write_report(suite, tmp_path, tmp_path / "out")
    assert "kind 3" not in (tmp_path / "out/stages.csv").read_text() + (tmp_path / "out/stages.md").read_text()


def test_the_terminal_table_is_aligned_and_narrow(suite, tmp_path):
    for row, accuracies in (("none", NEVER_RIGHT), ("last", OFTEN_RIGHT), ("all", ALWAYS_RIGHT)):
        for seed in (1, 2, 3):
            finish(suite, tmp_path, row, seed, accuracies, seconds=4000)
    heading, *rows = terminal_table(row_lines(suite, collect(suite, tmp_path))).splitlines()
    assert max(map(len, [heading, *rows])) <= 110
    assert heading.endswith("seeds  training")
    assert all(row.endswith("3    67 min") and len(row) == len(heading) for row in rows[:3])


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


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_run_is_named(suite, tmp_path, damage):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    file = tmp_path / suite.runs[0].seeded(1).name / "accuracies_val.npz"
    file.write_bytes(file.read_bytes()[:50]) if damage == "cut" else file.unlink()
    with pytest.raises(InputError, match=r"accuracies_val.npz: missing or damaged"):
        collect(suite, tmp_path)


def test_durations():
    assert [duration(seconds) for seconds in (None, 83.2, 900, 9000)] == ["", "83 s", "15 min", "2.5 h"]


def test_the_command_reports_without_running(command, suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish(suite, tmp_path / "runs", "none", 1, NEVER_RIGHT)
    ended = command("experiment", suite.file, "--report")
    assert ended.code == 0, ended.err
    assert "runs/experiments/reports/stages.md" in ended.out
    assert (tmp_path / "runs/experiments/reports/stages.csv").exists()


def test_the_command_publishes(command, refused, suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.report.page.RESULTS", tmp_path / "results")
    finish(suite, tmp_path / "runs", "none", 1, OFTEN_RIGHT)
    assert command("experiment", suite.file, "--publish").code == 0
    assert "| none | 86.25 | 56.12 |" in (tmp_path / "results/stages.md").read_text()
    assert "not allowed with" in refused("experiment", suite.file, "--publish", "--only", "none", "--seed", "1")
