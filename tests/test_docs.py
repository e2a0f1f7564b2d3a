"""docs/: each page says what its reader will be able to do; rows that promise something name tests, and they exist."""

import re

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
RELIABILITY = re.findall(
    r"^\| (?!fault|\*\*|---)(.*) \| (.*) \| (.*) \|$",
    (DOCS / "reliability.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
ROWS = [
    line.replace(r"\|", "")
    for line in (DOCS / "input.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| (?!input|output)", line)
]
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "docs/*.ipynb", "experiments/results/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
}


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), link
        assert not anchor or anchor in anchors(linked), link


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_every_row_is_held_by_a_test(row):
    _, given, happens, named, end = row.split("|")
    assert given.strip()
    assert happens.strip()
    assert not end
    names = re.findall(r"`(\w+)`", named)
    assert names
    assert set(names) <= TESTS


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_opens_with_what_its_reader_will_be_able_to_do(page):
    title, _, opening, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert opening.startswith("After this page you ")
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", RELIABILITY, ids=lambda row: row[0][:40])
def test_every_promise_is_held_by_a_test(row):
    _, promise, named = row
    assert promise.strip()
    files = re.findall(r"`(test_\w+\.py)`", named)
    assert files or named == "by hand"
    assert set(files) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_no_promise_is_passed_over():
    assert len(RELIABILITY) > 50
