"""Published reports follow from their published evidence."""

import csv
import shutil

import pytest

from experiments.report.page import RESULTS, write_report
from experiments.suite import load_suite
from tests.conftest import ROOT

# Computed by someone else from the same evidence: a difference in points and its 95 % interval over seeds.
TO_THE_BASELINE = {
    "constant": (23.9, 18.1, 29.6),
    "shuffled question": (21.6, 10.3, 32.8),
    "MODERN": (37.5, 34.2, 40.9),
}
OF_MODERN = {
    ("constant", "overall"): (13.7, 5.4, 22.0),
    ("shuffled question", "overall"): (16.0, 6.4, 25.6),
    ("constant", "what color"): (-3.4, -12.3, 5.4),
}
OF_MODERN_BY_KIND = {"what shape": 25, "how many": 18, "is there": 14}  # less the constant
SUITES = sorted(path.stem for path in RESULTS.glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("suite", SUITES)
def test_a_published_report_is_what_its_evidence_gives(suite, tmp_path):
    if (RESULTS / f"{suite}_runs.zip").exists():  # else nothing of it was run
        shutil.unpack_archive(RESULTS / f"{suite}_runs.zip", tmp_path / "runs")
    write_report(load_suite(ROOT / "experiments" / "suites" / f"{suite}.yaml"), tmp_path / "runs", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        if file.suffix == ".png":  # its bytes depend on matplotlib's version
            assert (RESULTS / file.name).exists()
        else:
            assert file.read_text(encoding="utf-8") == (RESULTS / file.name).read_text(encoding="utf-8")


def test_the_controls_are_what_others_computed():
    with (RESULTS / "controls.csv").open(encoding="utf-8") as file:
        rows = {line["row"]: line for line in csv.DictReader(file)}
    with (RESULTS / "controls_contrasts.csv").open(encoding="utf-8") as file:
        contrasts = {
            (line["less"], line["questions"]): line for line in csv.DictReader(file) if line["row"] == "MODERN"
        }
    expected = [(rows[row], numbers) for row, numbers in TO_THE_BASELINE.items()]
    expected += [(contrasts[pair], numbers) for pair, numbers in OF_MODERN.items()]
    for line, numbers in expected:
        assert [float(line[key]) for key in ("difference", "seeds_low", "seeds_high")] == pytest.approx(
            numbers, abs=0.0501
        )
    for kind, points in OF_MODERN_BY_KIND.items():
        assert round(float(contrasts["constant", kind]["difference"])) == points
    assert {line["seeds"] for line in contrasts.values()} == {"5"}
