"""Published tables are what their published evidence gives."""

import zipfile

import pytest

from experiments.report.results import collect, row_lines
from experiments.report.tables import markdown_table, read_lines, write_lines
from experiments.suite import load_suite
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
