"""Every page is readable: headings, text size, colours of both schemes, links, formats of numbers."""

import itertools
import re

import pytest

from tests.conftest import ROOT
from tests.pages import DEMO_LAYERS, Page, inspection, reading, written, written_demo
from vqa.inspect.html import grouped, number, percent, signed


@pytest.fixture(params=["one question", "two questions", "no modulation", "demo"])
def page(request, tmp_path) -> str:
    if request.param == "demo":
        return written_demo(tmp_path)
    layers = [] if request.param == "no modulation" else [("bn1", 0, 64), *DEMO_LAYERS]
    readings = [reading(q, layers, seed, (2, 14, 14)) for seed, q in enumerate(("what?", "why?"))]
    return written(tmp_path, inspection(*readings[: 1 + (request.param == "two questions")]))


def test_headings_leave_out_no_level(page):
    levels = [int(tag[1]) for tag, _ in Page(page).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_numbers_behind_a_page_are_linked(page):
    links = {attrs["href"] for tag, attrs in Page(page).tags if tag == "a"}
    of_demo = {"summary.json", "inspect/modulation.json", "inspect/modulation.csv"}
    assert links == (of_demo if "summary.json" in links else {"modulation.json", "modulation.csv"})


def screen_style(page: str) -> str:
    """The page's style sheet without its rules for print, which come last in each file."""
    style = page[page.index("<style>") : page.index("</style>")]
    return re.sub(r"@media print \{\n(?:  .*\n)+\}", "", style)


def test_text_is_at_least_11_px_high_at_any_width(page):
    style = screen_style(page)
    sizes = re.findall(r"font(?:-size)?:\s*([^;}]+)", style)
    assert len(sizes) > 20
    for size in sizes:
        assert float(re.match(r"([\d.]+)px", size)[1]) >= 11, size
    assert re.search(r"sub, small \{ font-size", style), "browsers make these smaller than the text around them"
    assert not re.search(r"zoom|scale\(", style)
    assert not re.search(r"font-size|font:", page[page.index("</style>") :])
    for scaled in re.findall(r"<svg[^>]*viewBox.*?</svg>", page, re.DOTALL):
        assert "<text" not in scaled, "a drawing scaled to the page's width would scale its text too"


def luminance(colour: str) -> float:
    parts = [part / 255 for part in bytes.fromhex(colour[1:])]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_charts_stand_out_in_both_colour_schemes(tmp_path, scheme):
    style = screen_style(written_demo(tmp_path))
    light, dark = re.split(r"@media screen and \(prefers-color-scheme: dark\)", style)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light))
    colours |= dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", dark)) if scheme == "dark" else {}
    assert (luminance(colours["paper"]) < 0.1) == (scheme == "dark")

    def contrast(one: str, other: str) -> float:
        darker, lighter = sorted(luminance(colours[name]) for name in (one, other))
        return (lighter + 0.05) / (darker + 0.05)

    for text in ("ink", "soft", "accent", "right", "wrong"):
        assert min(contrast(text, ground) for ground in ("paper", "band")) >= 4.5, text
    for mark in ("grey", "pale", "accent"):
        assert contrast(mark, "paper") >= 3, mark
    used = set(re.findall(r"var\(--(\w+)\)", style)) - {"mark", "dash", "rows", "columns", "veil"}
    assert used == set(colours), "no chart has a colour of its own"


def test_the_librarys_page_knows_nothing_of_the_demo():
    for file in (ROOT / "vqa" / "inspect" / "html.py", *(ROOT / "vqa" / "inspect" / "templates").iterdir()):
        assert not re.search("demo|baseline|blind", file.read_text(encoding="utf-8").replace("colour-blind", "")), file


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.000"),
        (1.23456, "1.235"),
        (-0.0123, "−0.012"),
        (-0.00002, "−2.0×10⁻⁵"),
        (123456.0, "1.2×10⁵"),
        (float("nan"), "–"),
    ],
)
def test_number(value, shown):
    assert number(value) == shown


def test_other_number_formats():
    assert number(1.005, 1) == "1.0"
    assert signed(0.5) == "+0.500"
    assert signed(-0.5) == "−0.500"
    assert signed(0.0) == "0.000"
    assert percent(0.5) == "50.0\u00a0%"
    assert percent(0.0) == "0.0\u00a0%"
    assert percent(0.0001) == "<\u00a00.1\u00a0%"
    assert grouped(22656) == "22\u202f656"
    assert grouped(999) == "999"
