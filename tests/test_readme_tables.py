"""The README's tables say what the CSV files say."""

import shutil

import pytest

from data.errors import InputError
from experiments.readme import update_readme, with_tables
from experiments.tables import write_lines
from tests.conftest import ROOT

RESULTS = ROOT / "experiments" / "results"
COLUMNS = ("overall", "yes/no", "number", "other")


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    table2 = [line("none", 40), line("all", 90, difference=50, ci_low=48.5, ci_high=51.5)]
    write_lines(folder / "table2.csv", [*table2, line("only the paper's", None, paper_overall=60.46)])
    shuffled = line("shuffled question", 41.5, difference=-1.234, ci_low=-3, ci_high=1, baseline="CBN")
    write_lines(folder / "controls.csv", [shuffled, line("CBN, dark", 30)])
    write_lines(folder / "table2_runs.csv", [{"row": "none"}])
    return folder


def line(row, overall, **more):
    keys = ["row", "seeds", "baseline", "difference", "ci_low", "ci_high", "difference_std"]
    keys += [key for column in COLUMNS for key in (f"{column}_mean", f"{column}_std", f"paper_{column}")]
    keys += ["seconds", "peak_memory_mib", "trained_parameters"]
    run = {} if overall is None else {"overall_mean": overall, "overall_std": 0.5, "seeds": "1 2", "baseline": "none"}
    return dict.fromkeys(keys) | {"row": row} | run | more


def block(asked, table=""):
    return f"<!-- table: {asked} -->\n{table}<!-- /table -->\n"


def test_the_readme_is_as_its_results():
    """If this fails: `python main.py experiment SUITE.yaml --report --publish` writes the tables anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_tables(text, RESULTS) == text


def test_a_whole_suite(results):
    written = with_tables("before\n\n" + block("table2", "old\n") + "after\n", results)
    assert written == (
        "before\n\n<!-- table: table2 -->\n"
        "| accuracy, % | overall | paper | difference to none | seeds |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| none | 40.00 ± 0.50 |  |  | 2 |\n"
        "| all | 90.00 ± 0.50 |  | +50.00 [+48.50, +51.50] | 2 |\n"
        "| only the paper's | not run | 60.46 |  |  |\n"
        "<!-- /table -->\nafter\n"
    )
    assert with_tables(written, results) == written


def test_rows_of_several_suites_in_the_order_asked_for(results):
    written = with_tables(block("controls: CBN, dark|shuffled question; table2: all"), results).splitlines()
    assert written[1] == "| accuracy, % | overall | difference | seeds |"
    assert written[3:6] == [
        "| CBN, dark | 30.00 ± 0.50 |  | 2 |",
        "| shuffled question | 41.50 ± 0.50 | −1.23 [−3.00, +1.00] to CBN | 2 |",
        "| all | 90.00 ± 0.50 | +50.00 [+48.50, +51.50] to none | 2 |",
    ]


def test_a_changed_number_is_seen_and_written_again(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(block("table2") + "text\n" + block("table2: none"))
    update_readme(readme, results)
    written = readme.read_text()
    readme.write_text(written.replace("90.00", "95.00"))
    assert with_tables(readme.read_text(), results) != readme.read_text()
    update_readme(readme, results)
    assert readme.read_text() == written
    shutil.copyfile(results / "controls.csv", results / "table2.csv")
    with pytest.raises(InputError, match="has no row 'none'"):
        update_readme(readme, results)
    assert readme.read_text() == written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (block("tabel2"), "table 'tabel2': no .*tabel2.csv; there are controls, table2$"),
        (block("table2: none | nonee"), "table2.csv has no row 'nonee'; rows are none, all, only the paper's$"),
        (block("table2: none, all"), "no row 'none, all'"),
        ("<!-- table: table2 -->\n", "table 'table2': no line <!-- /table --> ends it"),
        ("<!-- table: table2 -->\n" + block("table2"), "table 'table2': no line <!-- /table --> ends it"),
    ],
)
def test_what_is_not_there_is_named(results, text, said):
    with pytest.raises(InputError, match=said):
        with_tables(text, results)


def test_a_marker_within_a_line_is_text(results):
    text = "write `<!-- table: NAME -->` for a table\n"
    assert with_tables(text, results) == text
