"""`vqa.load`: the model of a folder as an object that answers, whatever form an image has."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vqa
from vqa.io.errors import InputError

QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def model(trained):
    return vqa.load(trained)


@pytest.fixture(scope="module")
def images(tiny) -> list[Path]:
    return sorted((tiny.parent / "world" / "val").glob("*.png"))


def test_the_object_and_the_commands_say_the_same(model, done, trained, images, tmp_path):
    said = done("ask", "--run", trained, "--image", images[0], "--question", QUESTION, "--top", 3, "--json").out
    assert json.loads(said)["answers"] == model.ask(images[0], QUESTION, top=3)
    asked = ("--image", images[0], "--question", QUESTION, "--versus", "how many?", "--out", tmp_path)
    done("inspect", "--run", trained, *asked)
    readings = json.loads((tmp_path / "modulation.json").read_text())["readings"]
    assert readings == model.inspect(images[0], [QUESTION, "how many?"])


def test_a_copied_model_and_a_path_as_text_serve_too(model, trained, images, tmp_path):
    (tmp_path / "model").symlink_to(trained / "model")
    loaded = vqa.load(str(tmp_path / "model"), device=torch.device("cpu"))
    assert loaded.ask(str(images[0]), QUESTION)[0]["answer"] == model.ask(images[0], QUESTION)[0]["answer"]


def test_a_model_is_a_key_of_a_cache(model, images):
    ask = functools.cache(lambda model, question: model.ask(images[0], question))
    assert ask(model, QUESTION) is ask(model, QUESTION)


def test_every_form_of_an_image_gives_the_same_answers(model, images):
    opened = Image.open(images[0])
    forms = [str(images[0]), images[0].read_bytes(), opened, np.asarray(opened.convert("RGB"))]
    expected = model.ask(images[0], QUESTION)
    assert [model.ask(form, QUESTION) for form in forms] == [expected] * 4
    assert model.inspect(forms[1], QUESTION) == model.inspect(images[0], QUESTION)


def test_grey_and_rotated_images_are_read_as_from_files(model, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 40), dtype=np.uint8)
    assert model.ask(grey, QUESTION) == model.ask(np.stack([grey] * 3, axis=2), QUESTION)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        assert model.ask(opened, QUESTION) == model.ask(tmp_path / "turned.png", QUESTION)
        assert opened.size == (40, 20), "the caller's image is as it was"


@pytest.mark.parametrize("of_the_process", [torch.float64, torch.bfloat16])
def test_the_default_type_of_the_process_does_not_matter(model, trained, images, of_the_process):
    before = torch.get_default_dtype()
    torch.set_default_dtype(of_the_process)
    try:
        assert vqa.load(trained).inspect(images[0], QUESTION) == model.inspect(images[0], QUESTION)
    finally:
        torch.set_default_dtype(before)


def test_lists_give_lists(model, images):
    questions = [QUESTION, "how many?"]
    each = [model.ask(image, question) for image, question in zip(images[:2], questions, strict=True)]
    assert model.ask(images[:2], questions) == each
    assert model.ask(images[0], questions) == [model.ask(images[0], question) for question in questions]
    assert model.ask(tuple(images[:2]), QUESTION) == [model.ask(image, QUESTION) for image in images[:2]]
    assert model.ask([images[0]], QUESTION, top=1) == [model.ask(images[0], QUESTION, top=1)]
    assert [reading["question"] for reading in model.inspect(images[0], questions)] == questions
    assert model.ask([], []) == model.ask(images[0], []) == []


@pytest.mark.parametrize(
    ("image", "question", "says"),
    [
        ("absent.png", "what?", "absent.png: no such file"),
        (b"text", "what?", "image: cannot be read as an image (none of JPEG"),
        (
            np.zeros((4, 4, 3)),
            "what?",
            "image: an array must be uint8, height x width x 3 or height x width, not float",
        ),
        (np.zeros((2, 4, 4, 3), np.uint8), "what?", "not uint8 2 x 4 x 4 x 3"),
        (np.zeros((0, 4), np.uint8), "what?", "not uint8 0 x 4"),
        (Image.new("F", (4, 4)), "what?", "32 bits per pixel"),
        (Image.new("I", (4, 4), 200), "what?", "32 bits per pixel"),
        (None, "what?", "image: must be a path, bytes, a PIL image or a NumPy array, not NoneType"),
        (Image.new("RGB", (4, 4)), "", "question: '' holds no word"),
        (Image.new("RGB", (4, 4)), None, "question: must be a text, not NoneType"),
        (Image.new("RGB", (4, 4)), ["what?", 3], "question: must be a text, not int"),
        ([b"", b""], ["what?"] * 3, "2 images for 3 questions"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("method", ["ask", "inspect"])
def test_what_cannot_be_answered_is_an_input_error(model, method, image, question, says):
    with pytest.raises(InputError) as refused:
        getattr(model, method)(image, question)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_loaded_is_an_input_error(model, images, trained, tmp_path):
    for folder, device, says in (
        (tmp_path, "cpu", "no model here"),
        (trained, "tpu", "unknown device 'tpu'"),
        (trained, "meta", "unknown device 'meta'"),
        (trained, "cuda:99", "cuda:99 is not available"),
    ):
        with pytest.raises(InputError, match=says):
            vqa.load(folder, device)
    with pytest.raises(InputError, match="top: must be at least 1, not 0"):
        model.ask(images[0], QUESTION, top=0)
