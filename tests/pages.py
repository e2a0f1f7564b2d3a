"""Made-up inspections and demo summaries, and a parser of the pages made of them."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from experiments.demo import write_demo
from vqa.inspect.html import inspection_view, write_page

DEMO_LAYERS = [(f"layer{s}.0.bn{n}", s, 32 * 2**s) for s in (1, 2, 3, 4) for n in (1, 2)]
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
        "condition": "question",
        "image_size": 224,
        "trained_on": ["train"],
        "epoch": 7,
        "val_overall": None,
        "recalibrated_on": "",
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


def written_demo(tmp_path) -> str:
    write_demo(tmp_path / "demo.html", demo(), inspection(reading("what color?", DEMO_LAYERS)), photo(64))
    return (tmp_path / "demo.html").read_text(encoding="utf-8")
