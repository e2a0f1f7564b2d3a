"""`export`: the folders it writes, the content of the model card, and what is refused."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

import vqa
from experiments.export import export
from tests.conftest import ROOT
from vqa.build import build_model
from vqa.hub.onnx import save_onnx_folder
from vqa.io.errors import InputError
from vqa.io.files import read_json
from vqa.preprocessing import Preprocessing
from vqa.saved_model import SavedModel
from vqa.settings.recipes import load_settings
from vqa.text.tokenizer import encode, train_tokenizer

SHAPES = ("circle", "square", "triangle")
STAGE_4 = "cbn.stages=[4]"  # exported sooner than all stages, as the model of the other tests has them
QUESTIONS = [
    "what?",
    "is there a zebra?",
    "how many are left of the square, and how many of the circle or so?",
    *(f"{start} the {shape}?" for start in ("what color is", "is there a blue", "how many of") for shape in SHAPES),
]


def code_of_the_page(number):
    """A Python block of docs/export.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL)[
        number
    ]


def fed(saved, image, question):
    """What `model.onnx` takes."""
    tokens = encode(saved.tokenizer, [question])[0].astype(np.int64)[None]
    return {"image": saved.preprocessing.decode(image)[None], "tokens": tokens}


@pytest.fixture(scope="module")
def onnx_folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export(trained / "model", folder, "onnx")
    return folder


@pytest.fixture
def there(finished, images, here):
    """The working directory has the image that the page names; returns the run directory."""
    (here / "runs" / "demo").mkdir(parents=True)
    shutil.copy(images[0], here / "runs" / "demo" / "example.png")
    return finished


@pytest.fixture(scope="module")
def images(tiny):
    return sorted((tiny.parent / "world").rglob("*.png"))


def test_a_folder_for_transformers(done, finished, images, tmp_path):
    done("eval", "--run", finished)
    ended = done("export", "--run", finished, "--to", tmp_path / "hub")
    assert ended == (0, f"{tmp_path / 'hub'}\n", "")
    written = {file.name for file in (tmp_path / "hub").iterdir()}
    assert written == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    said = [
        done("ask", "--run", run, "--image", images[0], "--question", "what?") for run in (finished, tmp_path / "hub")
    ]
    assert said[0] == said[1]


@pytest.fixture(scope="module")
def two_hundred(trained, images):
    """Pairs of an image and a question, and the model's logits for them."""
    saved, pairs = vqa.load(trained / "model"), [(image, question) for question in QUESTIONS for image in images][:200]
    assert len(pairs) == 200
    return saved, pairs, torch.cat([saved.run(*pair).logits for pair in pairs])


def assert_same_answers(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.argmax(1).equal(expected.argmax(1))


def test_hub_folder_and_model_give_the_same_answers_to_two_hundred_questions(trained, two_hundred, tmp_path):
    export(trained / "model", tmp_path / "hub", "hub")
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "hub")
    processor = AutoProcessor.from_pretrained(tmp_path / "hub")
    _, pairs, expected = two_hundred
    with torch.inference_mode():
        batches = [zip(*pairs[first : first + 25], strict=True) for first in range(0, 200, 25)]
        assert_same_answers(
            torch.cat([model(**processor(images=about, text=asked)).logits for about, asked in batches]), expected
        )


def test_onnx_file_and_model_give_the_same_answers_to_two_hundred_questions(onnxruntime, onnx_folder, two_hundred):
    session = onnxruntime.InferenceSession(onnx_folder / "model.onnx")
    saved, pairs, expected = two_hundred
    logits = np.concatenate([session.run(["logits"], fed(saved, *pair))[0] for pair in pairs])
    assert_same_answers(torch.from_numpy(logits), expected)


def test_the_card_says_what_was_measured_and_where(done, finished, tmp_path):
    done("export", "--run", finished, "--to", tmp_path / "before")
    assert "its accuracy is not stated" in (tmp_path / "before" / "README.md").read_text()
    done("eval", "--run", finished)
    done("export", "--run", finished, "--to", tmp_path / "after")
    card = (tmp_path / "after" / "README.md").read_text()
    overall = read_json(finished / "metrics_val.json")["overall"]
    assert f"| val | 24 | {overall:.2f} | no | `metrics_val.json` |" in card
    assert "Trained on: train (epoch 1). In training it had " in card
    words = read_json(finished / "model/tokenizer.json")["model"]["vocab"].keys() - {"<pad>", "<unk>"}
    for part in (
        f"Its vocabulary has {len(words)} words.",
        f"one of its {len(read_json(finished / 'model/answers.json'))} answers",
        "## What it cannot do",
        "## Licence",
        "pipeline_tag: visual-question-answering",
        "8 norms, 480 channels",
    ):
        assert part in card
    os.utime(finished / "metrics_val.json", (0, 0))
    ended = done("export", "--run", finished, "--to", tmp_path / "stale")
    assert "metrics_val.json: older than the model" in ended.out
    assert "metrics_val.json" not in (tmp_path / "stale" / "README.md").read_text()


def test_one_line_says_why_nothing_is_written(refused, finished, tmp_path, monkeypatch, left):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (finished, "."):
        assert "must be a new folder, or an empty one" in refused("export", "--run", finished, "--to", folder)
    assert "no model here" in refused("export", "--run", tmp_path / "absent", "--to", tmp_path / "to")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("export", "--run", finished, "--to", tmp_path / "file" / "to")
    (finished / "metrics_val.json").write_text("[]")
    assert "metrics_val.json: not the metrics of a split" in refused(
        "export", "--run", finished, "--to", tmp_path / "to"
    )
    left(10**12)
    monkeypatch.setattr("vqa.hub.onnx.find_spec", lambda _: None)
    line = refused("export", "--run", finished, "--to", tmp_path / "to", "--format", "onnx")
    assert line == "error: --format onnx: needs onnx and onnxscript; pip install onnx onnxscript onnxruntime"
    left(1000)
    assert "make room or name another folder" in refused("export", "--run", finished, "--to", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_link_to_an_empty_folder_is_followed(done, finished, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    done("export", "--run", finished, "--to", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "config.json").exists()


def test_nothing_of_another_model_is_written_into_an_exported_folder(done, refused, finished, trained, tmp_path):
    done("export", "--run", finished, "--to", tmp_path / "to")
    before = sorted((tmp_path / "to").rglob("*"))
    assert "must name another directory" in refused("recalibrate", "--run", trained, "--out", tmp_path / "to")
    assert "holds another model" in refused("eval", "--run", trained, "--out", tmp_path / "to")
    assert sorted((tmp_path / "to").rglob("*")) == before
    done("eval", "--run", tmp_path / "to")  # its own


def test_the_code_of_the_page_answers_as_the_model_does(done, there):
    done("export", "--run", there, "--to", "exported/hub")
    exec(code_of_the_page(0), names := {})
    assert names["answer"] == vqa.load(there).ask("runs/demo/example.png", "is there a red circle?")[0]["answer"]


def test_an_onnx_file_returns_attention_and_deltas_too(onnxruntime, there, onnx_folder, images):
    Path("exported").symlink_to(onnx_folder.parent)
    saved = vqa.load(there)
    session = onnxruntime.InferenceSession("exported/onnx/model.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits", "attention", "gamma", "beta"]
    for question in QUESTIONS:
        given, output = session.run(None, fed(saved, images[0], question)), saved.run(images[0], question)
        expected = (output.logits, output.attention, *output.modulation)
        for name, ours, theirs in zip(names, expected, map(torch.from_numpy, given), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5, msg=name)
    exec(code_of_the_page(1), names := {})
    assert names["answer"] == saved.ask("runs/demo/example.png", "is there a red circle?")[0]["answer"]


def random_model(tiny, words, folder):
    """A model of random weights: what is exported is what is computed."""
    settings, tokenizer = load_settings(tiny, words), train_tokenizer(QUESTIONS, 1)
    model = build_model(settings, tokenizer.get_vocab_size(), 4, pretrained=False).eval().requires_grad_(False)
    return SavedModel(folder, model, settings, tokenizer, list("abcd"), Preprocessing(64), {})


@pytest.mark.parametrize(
    "words",
    [
        ["cbn.stages=[]"],
        ["inputs=[image]", "cbn.stages=[]"],
        ["inputs=[question]", "cbn.stages=[]"],
        ["question.encoder=gru", "attention.kind=mlb", "cbn.beta=false", "cbn.condition=mean_question", STAGE_4],
        ["question.encoder=bag_of_words", "cbn.normaliser=group", "cbn.condition=kind", STAGE_4],
        ["cbn.normaliser=adaptive", "cbn.condition=image", STAGE_4],
    ],
    ids=" ".join,
)
def test_every_kind_of_model_is_an_onnx_file(onnxruntime, tiny, tmp_path, words):
    saved = random_model(tiny, words, tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = [saved.run(image, question).logits for question in QUESTIONS]
    save_onnx_folder(saved, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for question, logits in zip(QUESTIONS, expected, strict=True):
        used = {put.name: fed(saved, image, question)[put.name] for put in session.get_inputs()}
        torch.testing.assert_close(torch.from_numpy(session.run(["logits"], used)[0]), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onnxruntime")
def test_a_file_for_questions_of_one_length_is_refused(tiny, tmp_path, monkeypatch):
    """As torch 2.11 writes it."""
    shape = {"image": None, "tokens": None}
    export_whole = torch.onnx.export
    monkeypatch.setattr(
        "torch.onnx.export", lambda *given, **named: export_whole(*given, **named | {"dynamic_shapes": shape})
    )
    saved = random_model(tiny, ["inputs=[question]", "cbn.stages=[]"], tmp_path / "of")
    with pytest.raises(InputError, match="exports a recurrent layer for questions of one length only; torch 2.15"):
        save_onnx_folder(saved, tmp_path)
    assert not any(tmp_path.iterdir())
