"""The numbers of a report, from made-up run directories."""

import csv
import json
import re

import numpy as np
import pytest

from experiments.report.results import collect
from tests.fabricated_runs import ALWAYS_RIGHT, NEVER_RIGHT, OFTEN_RIGHT, SUITE, finish, lines_by_row, report, suite_of
from vqa.io.errors import InputError


@pytest.fixture
def suite(tmp_path):
    return suite_of(tmp_path, SUITE)


def test_means_spreads_and_differences(suite, tmp_path):
    for seed in (1, 2, 3):
        finish(suite, tmp_path, "none", seed, NEVER_RIGHT)
    finish(suite, tmp_path, "last", 1, [1.0] * 4 + [0.0] * 4, seconds=50)
    finish(suite, tmp_path, "last", 2, [1.0] * 4 + [0.6] + [0.0] * 3, seconds=90)
    finish(suite, tmp_path, "all", 2, OFTEN_RIGHT)
    _, page = report(suite, tmp_path)
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
    assert page.count("| too few seeds |") == 2


def test_the_error_of_guesswhat_stands_beside_the_papers(tmp_path):
    text = (
        SUITE.replace("overall:", "error:").replace(", number: 36.5", "").replace("demo.yaml", "guesswhat/games.yaml")
    )
    suite = suite_of(tmp_path, text)
    finish(suite, tmp_path, "last", 1, [1.0] * 6 + [0.0] * 2)
    told, _ = report(suite, tmp_path)
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
    told, page = report(suite, tmp_path)
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
    assert "| all less | last | none |\n" in page
    assert "| how many | −100.00 (too few seeds: 1) | +33.33 [−110.09, +176.76] |\n" in page
    assert re.search(r"how many +−100.00 \(too few seeds: 1\) +\+33.33 \[−110.09, \+176.76\]\n", told)


def test_a_line_for_every_training(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path, "last", 3, OFTEN_RIGHT)
    report(suite, tmp_path)
    first, second = csv.DictReader((tmp_path / "out/stages_runs.csv").open())
    assert (first["row"], first["seed"], second["row"], second["seed"]) == ("none", "1", "last", "3")
    assert (first["best_epoch"], first["epochs"], first["git_commit"]) == ("1", "2", "0123456789abcdef-dirty")
    assert float(second["overall"]) == pytest.approx(86.25)
    assert second["folder"] == suite.runs[1].settings[3].name
    assert not second["folder"].startswith("/")


def test_what_is_not_finished_is_absent_and_a_row_without_seeds_not_run(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    unfinished = tmp_path / suite.runs[1].settings[1].name
    unfinished.mkdir(parents=True)
    (unfinished / "metrics.jsonl").write_text("")
    told, page = report(suite, tmp_path)
    assert "last above none: not compared, as one of them was not run" in told
    assert "| last | not run | 57.68 |" in page
    assert r"| MCB \| ResNet-152 | not run | 62.50 |" in page
    assert list(lines_by_row(tmp_path / "out/stages_runs.csv")) == ["none"]


def test_the_claimed_order(suite, tmp_path):
    for seed in (1, 2, 3):
        finish(suite, tmp_path, "none", seed, OFTEN_RIGHT)
        finish(suite, tmp_path, "last", seed, NEVER_RIGHT)
        finish(suite, tmp_path, "all", seed, ALWAYS_RIGHT if seed == 1 else NEVER_RIGHT)
    told, page = report(suite, tmp_path)
    assert "last above none: reversed, −86.25 points, 95 % interval over questions [−100.00, " in told
    assert "all above last: inconclusive, +33.33 points, 95 % interval over questions [+33.33, +33.33], " in told
    assert "above in 1 of 3 seeds, 95 % interval over seeds [−110.09, +176.76]" in told
    assert "- all above last: inconclusive" in page
    for seed in (1, 2, 3):
        finish(suite, tmp_path, "last", seed, OFTEN_RIGHT[::-1])
    assert "last above none: inconclusive, 0.00 points" in report(suite, tmp_path)[0]


def test_rows_that_were_asked_other_questions(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path, "last", 1, OFTEN_RIGHT, first=5)
    finish(suite, tmp_path, "all", 1, ALWAYS_RIGHT, first=100)
    _, page = report(suite, tmp_path)
    lines = lines_by_row(tmp_path / "out/stages.csv")
    assert "## Differences by question type" not in page
    contrasts = csv.DictReader((tmp_path / "out/stages_contrasts.csv").open())
    assert {(line["difference"], line["seeds"]) for line in contrasts} == {("", "0")}  # only of the same questions
    assert lines["last"]["compared"] == "3"
    assert float(lines["last"]["difference"]) == pytest.approx(100 * 2.6 / 3, abs=1e-3)
    assert lines["all"]["difference"] == lines["all"]["compared"] == ""
    assert "over the 3 questions that both rows were asked" in " ".join(page.split())


def test_equal_ids_of_other_questions_are_not_compared(suite, tmp_path):
    for seed in (1, 2, 3):
        finish(suite, tmp_path, "none", seed, NEVER_RIGHT, asked="a0", data="d0")
        finish(suite, tmp_path, "last", seed, ALWAYS_RIGHT, asked="b1", data="d0")
        finish(suite, tmp_path, "all", seed, OFTEN_RIGHT, asked="a0" if seed != 2 else None, data="d0")
    told, page = report(suite, tmp_path)
    lines = lines_by_row(tmp_path / "out/stages.csv")
    assert lines["last"]["difference"] == lines["last"]["order_difference"] == ""
    assert float(lines["all"]["difference"]) == pytest.approx(86.25)  # an older run did not record what was asked
    with (tmp_path / "out/stages_contrasts.csv").open() as file:
        contrasts = {(line["less"], line["questions"]): line["seeds"] for line in csv.DictReader(file)}
    assert (contrasts["last", "overall"], contrasts["none", "overall"]) == ("1", "3")
    assert "other data" not in told + page
    finish(suite, tmp_path, "none", 3, NEVER_RIGHT, asked="a0", data="d1")
    told, page = report(suite, tmp_path)
    assert "- **other data under the same names: a difference between rows may be" in page
    assert "\nother data under the same names: a difference" in told


def test_question_types_in_the_contrasts(suite, tmp_path):
    """One is called as the column of all questions, one as a formula of a spreadsheet."""
    for seed in (1, 2, 3):
        for row, right in (("none", NEVER_RIGHT), ("last", OFTEN_RIGHT), ("all", ALWAYS_RIGHT)):
            finish(suite, tmp_path, row, seed, right, kinds=("overall", "=1+1"))
    told, _ = report(suite, tmp_path)
    with (tmp_path / "out/stages_contrasts.csv").open() as file:
        found = {line["questions"]: line["difference"] for line in csv.DictReader(file) if line["less"] == "last"}
    assert found == {"overall": "13.75", "type: overall": "10.0", "'=1+1": "17.5"}
    assert [line.split()[0] for line in told.splitlines() if "+13.75 [" in line] == ["overall"]


def test_a_run_in_several_tests(tmp_path):
    tests = 'tests: {"": {}, recalibrated: {recalibrate: train}}\n'.replace("{", "{{").replace("}", "}}")
    suite = suite_of(tmp_path, SUITE.replace("order: [none, last, all]\n", tests))
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    finish(suite, tmp_path, "none, recalibrated", 1, OFTEN_RIGHT)
    told, page = report(suite, tmp_path)
    lines = lines_by_row(tmp_path / "out/stages.csv")
    assert (lines["none"]["paper_overall"], lines["none, recalibrated"]["paper_overall"]) == ("56.12", "")
    assert float(lines["none, recalibrated"]["difference"]) == pytest.approx(86.25)
    assert "- 1 training on EPYC (2 CPU cores, 2 threads), torch 2.15.0" in page
    assert "claimed order" not in page
    assert "above" not in told


def test_types_may_be_named_as_the_reports_own_columns(suite, tmp_path):
    for row in ("none", "last", "all"):
        finish(suite, tmp_path, row, 1, OFTEN_RIGHT, kinds=("k_mean", "is there"), number="overall")
    _, page = report(suite, tmp_path)
    line = lines_by_row(tmp_path / "out" / "stages.csv")["all"]
    assert float(line["overall_mean"]) == pytest.approx(100 * sum(OFTEN_RIGHT) / 8)
    assert float(line["type: k_mean"]) == pytest.approx(100 * sum(OFTEN_RIGHT[::2]) / 4)
    assert "k_mean" in page and "type: k" not in page


def test_many_question_types_are_skipped(suite, tmp_path):
    for count in (12, 13):
        finish(suite, tmp_path, "none", 1, [0.5] * 26, kinds=[f"kind {n}" for n in range(count)])
        _, page = report(suite, tmp_path)
        shown = ["kind 3" in text for text in ((tmp_path / "out/stages.csv").read_text(), page)]
        assert shown == [count == 12] * 2


def test_a_damaged_run_is_named_and_one_that_was_evaluated_by_hand_not_finished(suite, tmp_path):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    file = tmp_path / suite.runs[0].settings[1].name / "accuracies_val.npz"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match=r"accuracies_val.npz: missing or damaged"):
        collect(suite, tmp_path)
    file.unlink()
    assert not any(collect(suite, tmp_path).values())


@pytest.mark.parametrize("other", [{"questions": 7}, {"overall": 1.0}])
def test_metrics_that_are_not_of_the_accuracies_beside_them_are_refused(suite, tmp_path, other):
    finish(suite, tmp_path, "none", 1, NEVER_RIGHT)
    file = tmp_path / suite.runs[0].settings[1].name / "metrics_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    with pytest.raises(InputError, match=r"metrics_val.json: not of the same test as accuracies_val.npz"):
        collect(suite, tmp_path)
