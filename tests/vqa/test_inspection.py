"""The pages: self-contained, well-formed, complete, and safe whatever a question says."""

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from experiments.demo_page import write_demo
from tests.conftest import ROOT
from vqa.inspect.html import CLASS_COLOURS, STRIP_COLUMNS, grouped, inspection_view, number, percent, signed, write_page

DEMO_LAYERS = [(f"layer{s}.0.bn{n}", s, 32 * 2**s) for s in (1, 2, 3, 4) for n in (1, 2)]
RESNET50_LAYERS = [
    (f"layer{s}.{block}.bn{n}", s, 32 * 2**s * (4 if n == 3 else 1))
    for s, blocks in ((1, 3), (2, 4), (3, 6), (4, 3))
    for block in range(blocks)
    for n in (1, 2, 3)
]
HOSTILE = '<script>alert("1")</script> & </title><img src=x onerror=alert(2)>'
LINKS = {"modulation.json", "modulation.csv", "summary.json", "inspect/modulation.json", "inspect/modulation.csv"}
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Parses a page, fails on unbalanced tags, and keeps what the tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kept = {"script": self.scripts, "style": []}.get(self.open[-1] if self.open else "", self.text)
        kept.append(data)

    def strips(self, kind: str) -> list[np.ndarray]:
        """The strips of `gain` or `shift` in the order of the page, as RGB [rows, columns, 3]."""
        wanted = [a for tag, a in self.tags if tag == "img" and a.get("alt", "").startswith(f"{kind} of the")]
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))).convert("RGB")) for a in wanted
        ]


def layer(name, stage, channels, rng):
    gamma, beta = rng.uniform(0.1, 1.5, channels), rng.normal(0, 0.2, channels)
    delta_gamma, delta_beta = rng.normal(0, 0.4, channels), rng.normal(0, 0.3, channels)
    gamma[0] = 0.0
    gain = [None if g == 0 else (g + d) / g for g, d in zip(gamma.tolist(), delta_gamma.tolist(), strict=True)]
    return {
        "name": name,
        "stage": stage,
        "channels": channels,
        "gamma": gamma.tolist(),
        "beta": beta.tolist(),
        "delta_gamma": delta_gamma.tolist(),
        "delta_beta": delta_beta.tolist(),
        "gain": gain,
        "sign_flips": sum(g is not None and g < 0 for g in gain),
        "nearly_shut": sum(g is not None and abs(g) < 0.1 for g in gain),
    }


def reading(question, layers, seed=0, glimpses=(1, 2, 2)):
    rng = np.random.default_rng(seed)
    attention = rng.dirichlet(np.ones(glimpses[1] * glimpses[2]), glimpses[0]).reshape(glimpses)
    return {
        "question": question,
        "words": question.split(),
        "unknown_words": ["zxqy"],
        "answers": [{"answer": "red", "probability": 0.913}, {"answer": "blue", "probability": 0.0001}],
        "answers_without_modulation": [{"answer": "no idea", "probability": 0.6}],
        "attention": attention.tolist(),
        "layers": [layer(*shape, rng) for shape in layers],
    }


def inspection(*readings):
    model = {
        "backbone": "resnet50",
        "stages": [1, 2, 3, 4],
        "image_size": 224,
        "trained_on": ["train"],
        "epoch": 7,
        "val_overall": None,
    }
    return {"image": "kitchen.jpg", "model": model, "readings": list(readings)}


def demo():
    kinds = ("what color", "what shape", "how many", "is there")
    return {
        "seconds": 312.0,
        "world": "small",
        "machine": "2 CPU cores",
        "seed": 1,
        "questions": 8000,
        **{
            name: {"overall": overall, "per_question_type": {kind: overall + i for i, kind in enumerate(kinds)}}
            for name, overall in (("blind", 38.0), ("baseline", 55.25), ("modern", 95.0))
        },
        "curves": {"baseline": [40.0, 50.0, 55.25], "modern": [50.0, 80.0, 95.0]},
        "settings": {"train questions": 32000, "learning rate": 0.001},
        "examples": [
            {"image": photo(64), "question": HOSTILE, "truth": "red", "baseline": "blue", "modern": "red"},
            {"image": photo(64), "question": "how many?", "truth": "2", "baseline": "2", "modern": "3"},
        ],
        "commands": ['python main.py ask --question "is there <one>?"'],
    }


def photo(size=300):
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def written(tmp_path, content, image=None) -> str:
    write_page(tmp_path / "report.html", "inspection.html", view=inspection_view(content, image or photo()))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def contents(text: str) -> str:
    """What a reader sees, with one space for every gap and between cells."""
    return " ".join(" ".join(Page(text).text).split())


def assert_self_contained(text: str) -> None:
    for tag, attrs in Page(text).tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert not [name for name in attrs if name.startswith("on")], "an event handler came from somewhere"
        if tag == "a":
            assert attrs.pop("href") in LINKS
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attrs.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest", text)


def test_page_is_self_contained_and_balanced(tmp_path):
    assert_self_contained(written(tmp_path, inspection(reading("what color?", DEMO_LAYERS))))


def test_hostile_text_stays_text(tmp_path):
    first, second = reading(HOSTILE, DEMO_LAYERS), reading("how many?", DEMO_LAYERS, seed=1)
    for one in (first, second):
        one["unknown_words"] = [HOSTILE]
        one["answers"][0]["answer"] = one["answers_without_modulation"][0]["answer"] = HOSTILE
        one["layers"][0]["name"] = HOSTILE
    content = inspection(first, second) | {"image": HOSTILE}
    text = written(tmp_path, content)
    assert_self_contained(text)
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert HOSTILE in "".join(page.text)
    assert "alert(" not in "".join(page.scripts)


def test_answers_with_and_without_modulation(tmp_path):
    shown = contents(written(tmp_path, inspection(reading("what color?", DEMO_LAYERS))))
    assert "red 91.3 %" in shown
    assert "blue < 0.1 %" in shown
    assert "no idea 60.0 %" in shown
    assert "the same model says no idea" in shown
    assert "zxqy" in shown


def test_every_layer_has_its_strips_a_pixel_a_channel(tmp_path):
    one = reading("what color?", DEMO_LAYERS)
    text = written(tmp_path, inspection(one))
    page = Page(text)
    for kind in ("gain", "shift"):
        strips = page.strips(kind)
        assert [s.shape[0] * s.shape[1] for s in strips] == [channels for *_, channels in DEMO_LAYERS]
        assert [s.shape[1] for s in strips] == [min(channels, STRIP_COLUMNS) for *_, channels in DEMO_LAYERS]
    for name, *_ in DEMO_LAYERS:
        assert name in "".join(page.text)
    told = json.loads(page.scripts[0])
    assert told[0][0][0][0] is None
    assert told[3][0][0][5] == pytest.approx(one["layers"][3]["gain"][5], rel=0.01)
    assert told[3][0][1][5] == pytest.approx(one["layers"][3]["delta_beta"][5], rel=0.01)


def test_colours_of_a_strip(tmp_path):
    flip, shut, undefined, _ = (tuple(bytes.fromhex(colour[1:])) for colour in CLASS_COLOURS)
    one = reading("what color?", [("layer1.0.bn1", 1, 64)])
    gain = [None, -0.5, -0.05, 0.05, 1.0, 0.3, 1.7, 1e7, 3.0, *[1.0] * 55]
    one["layers"][0]["gain"] = gain
    one["layers"][0]["delta_beta"] = [-9.0, 0.0, 9.0] + [1.0, -1.0] * 30 + [0.0]
    page = Page(written(tmp_path, inspection(one)))
    (gains,), (shifts,) = page.strips("gain"), page.strips("shift")
    assert [tuple(pixel) for pixel in gains[0, :4].tolist()] == [undefined, flip, shut, shut]
    neutral, less, more, huge, large = gains[0, 4:9].astype(int)
    assert neutral.min() > 240
    assert less[2] > less[0] + 30, "a gain below 1 is blue"
    assert more[0] > more[2] + 30, "a gain above 1 is orange"
    assert (huge == large).all()
    negative, none, positive = shifts[0, :3].astype(int)
    assert none.min() > 240
    assert negative[1] < negative[[0, 2]].min(), "a shift down is purple"
    assert positive[1] > positive[[0, 2]].max(), "a shift up is green"


def test_layers_of_odd_width_are_padded(tmp_path):
    (strip,) = Page(written(tmp_path, inspection(reading("what?", [("layer1.0.bn1", 1, 300)])))).strips("gain")
    assert strip.shape[:2] == (2, STRIP_COLUMNS)
    assert (strip[1, 300 - STRIP_COLUMNS :] == 255).all()


def test_numbers_of_a_layer_and_its_strongest_channel(tmp_path):
    one = reading("what color?", DEMO_LAYERS)
    chosen = one["layers"][4]
    chosen["gamma"][17], chosen["delta_gamma"][17], chosen["gain"][17] = 0.5, -6.0, -11.0
    chosen["beta"][17], chosen["delta_beta"][17] = 0.25, 8.125
    chosen["sign_flips"], chosen["nearly_shut"] = 1234, 77
    shown = contents(written(tmp_path, inspection(one)))
    assert "β Δβ layer3.0.bn1 17 0.500 −6.000 −11.00 0.250 +8.125" in shown
    median = np.median([abs(g - 1) for g in chosen["gain"] if g is not None])
    assert f"layer3.0.bn1 256 channels {median:.2f} 1 234 77 8.12" in shown


def test_two_readings_are_compared(tmp_path):
    first, second = (reading(q, DEMO_LAYERS, seed) for seed, q in enumerate(("what color?", "how many?")))
    for one, delta in ((first, 5.0), (second, -5.0)):
        one["layers"][2]["gamma"][9], one["layers"][2]["gain"][9] = 1.0, 1 + delta
        one["layers"][2]["delta_gamma"][9] = delta
    first["layers"][6]["delta_gamma"] = (np.array(second["layers"][6]["delta_gamma"]) + 2).tolist()
    text = written(tmp_path, inspection(first, second))
    page, shown = Page(text), contents(text)
    assert "what color?" in shown
    assert "how many?" in shown
    assert len(page.strips("gain")) == 2 * len(DEMO_LAYERS)
    assert "B | layer4.0.bn1 2.000" in shown, "the layer where the questions differ most comes first"
    assert "gain B layer2.0.bn1 9 1.000 +5.000 −5.000 6.00 −4.00" in shown
    assert sum(tag == "polyline" for tag, _ in page.tags) == 6


def test_readings_of_different_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        written(tmp_path, inspection(reading("what?", DEMO_LAYERS), reading("why?", DEMO_LAYERS[:3])))
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_conditioned_norms_says_so(tmp_path):
    text = written(tmp_path, inspection(reading("is there one?", [])))
    assert_self_contained(text)
    assert "no conditioned norms" in contents(text)
    assert "switched off" not in contents(text)
    assert Page(text).strips("gain") == []


@pytest.mark.parametrize("change", ["zero deltas", "every gamma zero"])
def test_degenerate_layers(tmp_path, change):
    one = reading("what?", DEMO_LAYERS)
    for each in one["layers"]:
        zeros = [0.0] * each["channels"]
        if change == "zero deltas":
            each |= {"delta_gamma": zeros, "delta_beta": zeros, "gain": [1.0] * each["channels"]}
        else:
            each |= {"gamma": zeros, "gain": [None] * each["channels"]}
    text = written(tmp_path, inspection(one))
    Page(text)
    assert "nan" not in contents(text).lower()


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 7, 7), (2, 14, 14), (1, 3, 7)])
@pytest.mark.parametrize("size", [(64, 64), (640, 200)])
def test_attention_lies_over_the_image(tmp_path, shape, size):
    one = reading("where?", DEMO_LAYERS[:1], glimpses=shape)
    weights = np.full(shape, 0.002)
    weights[:, -1, -1] = 1 - 0.002 * (shape[1] * shape[2] - 1)
    one["attention"] = weights.tolist()
    text = written(tmp_path, inspection(one), Image.new("RGB", size, (250, 250, 250)))
    maps = [a for tag, a in Page(text).tags if tag == "img" and a.get("alt", "").startswith("Attention")]
    assert len(maps) == shape[0]
    for drawn in maps:
        picture = Image.open(io.BytesIO(base64.b64decode(drawn["src"].split(",")[1]))).convert("L")
        assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.02)
        assert picture.getpixel((picture.width - 1, picture.height - 1)) > 220
        assert picture.getpixel((0, 0)) < 120
    highest, mean = percent(weights[0].max()), percent(weights[0].mean())
    shown = contents(text)
    assert f"holds {highest} of the weight; the average is {mean}".replace("\u00a0", " ") in shown
    assert ("0.2 % 0.2 %" in shown) == (shape[1] * shape[2] <= 16), "few cells are labelled one by one"


def test_resnet50_with_two_questions_stays_small(tmp_path):
    two = [reading(question, RESNET50_LAYERS, seed, (2, 14, 14)) for seed, question in enumerate(("what?", "why?"))]
    text = written(tmp_path, inspection(*two))
    page = Page(text)
    assert sum(s.shape[0] * s.shape[1] for s in page.strips("gain")) == 2 * 22_656
    assert "Of the 22 656 channels" in contents(text)
    assert len(text) < 3e6


def test_demo_page(tmp_path):
    text = written_demo(tmp_path)
    assert_self_contained(text)
    page, shown = Page(text), contents(text)
    assert "+39.8 points" in shown
    assert "blind 38.0 % the most common answer" in shown
    assert "its effect size says nothing about VQA" in shown
    assert "Most of the gain over the baseline needs no question" in shown
    assert "5 min 12 s on 2 CPU cores" in shown
    assert "train questions 32 000" in shown
    assert HOSTILE in "".join(page.text)
    assert '--question "is there <one>?"' in shown
    assert "baseline ✗ blue MODERN ✓ red" in shown
    assert "baseline ✓ 2 MODERN ✗ 3" in shown
    assert "how many blind 40.0 % baseline 57.2 % MODERN 97.0 %" in shown
    bars = [(a["class"], a["style"]) for tag, a in page.tags if tag == "span" and a.get("class", "")[:4] == "fill"]
    for name, value in (("blind", 38), ("baseline", 55.25), ("modern", 95)):
        drawn = [style for kind, style in bars if kind == f"fill {name}"]
        assert drawn == [f"width:{float(value + i)}%" for i in range(4)]
    assert len(page.strips("gain")) == len(DEMO_LAYERS)


def written_demo(tmp_path) -> str:
    write_demo(tmp_path / "demo.html", demo(), inspection(reading("what color?", DEMO_LAYERS)), photo(64))
    return (tmp_path / "demo.html").read_text(encoding="utf-8")


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
