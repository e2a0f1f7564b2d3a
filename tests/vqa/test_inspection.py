"""The inspection's page and the demo's: self-contained, complete, and safe whatever a question says."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models import example, model_of
from tests.pages import (
    DEMO_LAYERS,
    HOSTILE,
    Page,
    assert_self_contained,
    contents,
    inspection,
    reading,
    written,
    written_demo,
)
from vqa.inspect.html import CLASS_COLOURS, STRIP_COLUMNS, percent
from vqa.inspect.inspection import _layers
from vqa.norms import Modulation

RESNET50_LAYERS = [
    (f"layer{s}.{block}.bn{n}", s, 32 * 2**s * (4 if n == 3 else 1))
    for s, blocks in ((1, 3), (2, 4), (3, 6), (4, 3))
    for block in range(blocks)
    for n in (1, 2, 3)
]


def test_an_adaptive_norm_is_described_as_the_batch_norm_that_it_equals(tiny):
    model = model_of(tiny, "cbn.normaliser=adaptive")
    modulation = model(*example(batch=1)).modulation
    first = model.resnet.layers[0]
    norm = model.resnet.norm(first.name)
    for value in (norm.a, norm.b, norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(value)
    torch.nn.init.uniform_(norm.running_var, 0.3, 3)
    layer = _layers(SimpleNamespace(model=model), modulation)[0]
    gamma, beta = (torch.tensor(layer[name]) + torch.tensor(layer[f"delta_{name}"]) for name in ("gamma", "beta"))
    x, deltas = torch.randn(1, first.channels, 4, 4), (part[:, : first.channels] for part in modulation)
    expected = torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, gamma, beta, eps=norm.eps)
    torch.testing.assert_close(norm(x, Modulation(*deltas)), expected, rtol=1e-4, atol=1e-5)
    assert layer["sign_flips"] == int((gamma / torch.tensor(layer["gamma"]) < 0).sum())


def test_answers_with_and_without_modulation(tmp_path):
    shown = contents(written(tmp_path, inspection(reading("what color?", DEMO_LAYERS))))
    assert "red 91.3 %" in shown
    assert "blue < 0.1 %" in shown
    assert "no idea 60.0 %" in shown
    assert "the same model answers no idea" in shown
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
    strongly = np.mean([g is not None and abs(g - 1) > 0.5 for each in one["layers"] for g in each["gain"]])
    assert f"{100 * strongly:.1f} % with a gain more than 0.5 away from 1" in shown


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
    assert "layer4.0.bn1: 2.000" in shown, "the chart's point of the difference"
    assert "gain B layer2.0.bn1 9 1.000 +5.000 −5.000 6.00 −4.00" in shown
    assert sum(tag == "polyline" for tag, _ in page.tags) == 6


def shifts_alone(one):
    """The reading of a model that predicts no Δγ."""
    for each in one["layers"]:
        each.update(delta_gamma=[0.0] * each["channels"], gain=[1.0] * each["channels"])
    return one


def test_a_model_that_predicts_shifts_alone_is_ranked_by_them(tmp_path):
    two = [shifts_alone(reading(q, DEMO_LAYERS, seed)) for seed, q in enumerate(("what color?", "how many?"))]
    two[0]["layers"][4]["delta_beta"][17], two[1]["layers"][4]["delta_beta"][17] = 9.0, -9.0
    shown = contents(written(tmp_path, inspection(*two)))
    assert "Channels, by |Δβ A − Δβ B | layer channel β Δβ A Δβ B gain A gain B layer3.0.bn1 17" in shown
    assert shown.count("Ranked by |Δβ|") == 2


def test_questions_that_a_control_does_not_tell_apart(tmp_path):
    content = inspection(*(reading(q, DEMO_LAYERS) for q in ("what color?", "how many?")))
    content["model"] |= {"condition": "mean_question", "trained_on": [], "epoch": None, "recalibrated_on": "test"}
    shown = contents(written(tmp_path, content))
    assert "Nowhere: both have the same Δγ and Δβ." in shown
    assert "conditioned on one fixed vector (a control)" in shown
    assert "from one fixed vector (a control), the model predicts" in shown
    assert "trained on not recorded statistics re-estimated on test" in shown
    content["model"]["condition"] = "shuffled"
    assert "a vector of ones takes its place" in contents(written(tmp_path, content))
    content["readings"][0]["layers"][2]["delta_beta"][9] += 1
    assert "Nowhere" not in contents(written(tmp_path, content))


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
    weights = np.ones(shape)
    weights[:, -1, -1] = 20
    weights /= weights[0].sum()
    one["attention"] = weights.tolist()
    text = written(tmp_path, inspection(one), Image.new("RGB", size, (250, 250, 250)))
    maps = [a for tag, a in Page(text).tags if tag == "img" and a.get("alt", "").startswith("Attention")]
    assert len(maps) == shape[0]
    for drawn in maps:
        opened = Image.open(io.BytesIO(base64.b64decode(drawn["src"].split(",")[1]))).convert("L")
        assert opened.width / opened.height == pytest.approx(size[0] / size[1], rel=0.02)
        assert opened.getpixel((opened.width - 1, opened.height - 1)) > 220
        assert opened.getpixel((0, 0)) < 120
    of_cells = (weights[0].max(), weights[0].mean(), weights[0].min())
    highest, mean, least = (percent(weight).replace("\u00a0", " ") for weight in of_cells)
    shown = contents(text)
    assert f"holds {highest} of the weight; the average is {mean}" in shown
    assert (f"{least} {least}" in shown) == (shape[1] * shape[2] <= 16), "few cells are labelled one by one"


def test_a_box_is_drawn_around_its_object(tmp_path):
    content = inspection(reading("what?", DEMO_LAYERS[:1])) | {"box": [10, 20, 30, 8]}
    page = Page(written(tmp_path, content, Image.new("RGB", (100, 50))))
    (photo,) = (a["src"] for tag, a in page.tags if tag == "img" and a.get("alt", "").startswith("The image"))
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(photo.split(",")[1]))))
    rows, columns = drawn.any(2).nonzero()
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (9, 40, 19, 28)
    assert not drawn[20:28, 10:40].any()


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
    assert "gains 5 to 24 of about 37 points in three epochs" in shown
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
