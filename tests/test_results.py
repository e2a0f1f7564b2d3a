"""What is published: tables that their evidence gives again, and a README that shows the controls first."""

import re
import zipfile

import pytest

from experiments.collection import collect, row_lines
from experiments.suite import COLUMNS, load_suite
from experiments.tables import markdown_table, read_lines, write_lines
from tests.conftest import ROOT

RESULTS = ROOT / "experiments" / "results"
TABLES = sorted(
    path for path in RESULTS.glob("*.csv") if not path.stem.endswith("_runs") and not path.stem.startswith("bench_")
)


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_a_published_table_is_what_its_evidence_gives(table, tmp_path):
    if (RESULTS / f"{table.stem}_runs.zip").exists():  # else nothing of it was run
        with zipfile.ZipFile(RESULTS / f"{table.stem}_runs.zip") as archive:
            archive.extractall(tmp_path)
    suite = load_suite(ROOT / "experiments" / "suites" / f"{table.stem}.yaml")
    write_lines(tmp_path / "again.csv", row_lines(suite, collect(suite, tmp_path)))
    assert read_lines(tmp_path / "again.csv") == read_lines(table)
    assert markdown_table(read_lines(table)) in table.with_suffix(".md").read_text(encoding="utf-8")


README = (ROOT / "README.md").read_text(encoding="utf-8")


SHOWN = {column: (f"{column}_mean", f"{column}_std") for column in COLUMNS}
SHOWN["difference"] = ("difference", "difference_std", "ci_low", "ci_high")


def rows_of_accuracies(text):
    """The rows of every table of `overall` and `seeds`: the cells by the first word of their column's heading."""
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        heading, _, *rows = ([cell.strip(" *") for cell in line[1:-1].split("|")] for line in table.splitlines())
        if {"overall", "seeds"} <= set(heading):
            words = ["row", *(title.partition(" ")[0] for title in heading[1:])]
            yield from (dict(zip(words, row, strict=True)) for row in rows)


def is_measured(cells, line):
    """Whether the cells of a row say, rounded, what a line of a CSV file says."""
    if cells["row"] != line["row"] or cells.get("seeds") not in (None, "", str(len(line["seeds"].split()))):
        return False
    for column, keys in SHOWN.items():
        numbers = re.findall(r"[-+]?\d+(?:\.\d+)?", cells.get(column, "").replace("−", "-"))
        for number, key in zip(numbers, keys, strict=False):
            half_a_digit = 0.501 * 10 ** -len(number.partition(".")[2])
            if not line[key] or abs(float(number) - float(line[key])) > half_a_digit:
                return False
    return True


def test_the_readmes_accuracies_are_measured_ones_and_the_controls_stand_first():
    lines = [line for table in TABLES for line in read_lines(table)]
    rows = list(rows_of_accuracies(README))
    assert [row for row in rows if not any(is_measured(row, line) for line in lines)] == []
    changed = rows[0] | {"overall": "99.9"}
    assert not any(is_measured(changed, line) for line in lines)
    assert {"baseline", "constant", "shuffled question", "MODERN"} <= {row["row"] for row in rows[:6]}


HALF_A_TENTH = 0.0501
ITEMS = re.findall(
    r"^- \[[^\]]+\]\(experiments/results/(\w+)\.md\):(.*?)(?=\n- |\n\n)", README, re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize(("suite", "said"), ITEMS, ids=[suite for suite, _ in ITEMS])
def test_accuracies_in_the_readmes_sentences_are_measured_ones(suite, said):
    means = [float(line["overall_mean"]) for line in read_lines(RESULTS / f"{suite}.csv") if line["overall_mean"]]
    found = re.findall(r"\d+\.\d(?= %|(?: →|,| \(|;))", said)
    assert found
    for accuracy in map(float, found):
        assert min(abs(accuracy - mean) for mean in means) <= HALF_A_TENTH, accuracy


def test_the_readmes_table_of_steps_is_the_measured_one():
    lines = {
        line["way"]: line
        for line in read_lines(RESULTS / "bench_step.csv")
        if (line["network"], line["pixels"], line["layout"]) == ("resnet50", "224", "channels last")
    }
    rows = re.findall(r"^\| (ours|plain|usual|stacked)\b[^|]*\|(.*)\|$", README, re.MULTILINE)
    assert [way for way, _ in rows] == ["ours", "plain", "usual", "stacked"]
    for way, cells in rows:
        numbers = re.sub(r"(\d)\s(\d{3})\b", r"\1\2", cells)
        training, forward, kept = (re.findall(r"\d+(?:\.\d+)?", cell) for cell in numbers.split("|"))
        for shown, value, ratio in (
            (training, "training_ms", "ours_training"),
            (forward, "forward_ms", "ours_forward"),
            (kept, "kept_mib_an_image", "ours_kept"),
        ):
            assert float(shown[0]) == pytest.approx(float(lines[way][value]), abs=0.5)
            assert way == "ours" or float(shown[1]) == pytest.approx(float(lines[way][ratio]), abs=0.0051)


def test_the_readmes_table_of_jobs_of_vqas_size_is_the_measured_one():
    lines = {(line["job"].split(",")[0], line["images"]): line for line in read_lines(RESULTS / "bench_scale.csv")}
    table = README[README.index("| job, 2 processes |") :].split("\n\n")[0].splitlines()[2:]
    jobs = ("preprocess", "reading questions", "decoding alone", "train", "eval")
    for job, row in zip(jobs, table, strict=True):
        _, seconds, memory, fewer = (re.sub(r"\D", "", cell) for cell in row.split("|")[1:-1])
        line = lines[job, "20000"]
        assert int(seconds) == round(float(line["seconds"])), job
        assert memory == line["peak_mib"], job
        assert not fewer or fewer == lines[job, "5000"]["peak_mib"], job
