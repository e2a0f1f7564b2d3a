"""Published reports are what their published evidence gives."""

import zipfile

import pytest

from experiments.report.page import RESULTS, write_report
from experiments.suite import load_suite
from tests.conftest import ROOT

SUITES = sorted(path.stem for path in RESULTS.glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("suite", SUITES)
def test_a_published_report_is_what_its_evidence_gives(suite, tmp_path):
    if (RESULTS / f"{suite}_runs.zip").exists():  # else nothing of it was run
        with zipfile.ZipFile(RESULTS / f"{suite}_runs.zip") as archive:
            archive.extractall(tmp_path / "runs")
    write_report(load_suite(ROOT / "experiments" / "suites" / f"{suite}.yaml"), tmp_path / "runs", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        if file.suffix == ".png":  # its bytes depend on matplotlib's version
            assert (RESULTS / file.name).exists()
        else:
            assert file.read_text(encoding="utf-8") == (RESULTS / file.name).read_text(encoding="utf-8")
