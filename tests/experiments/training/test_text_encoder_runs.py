"""A text encoder in the place of the LSTM: trained, resumed, warm-started; `model/` answers without its folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor, AutoTokenizer

import vqa
from data.batches import padded_words
from experiments.evaluate import evaluate
from experiments.tasks.vqa import VQATask
from experiments.training.train import train
from tests.tiny_encoder import write_encoder
from vqa.io.errors import InputError
from vqa.io.files import read_json
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings
from vqa.text.tokenizer import encode

QUESTIONS = ["what color is the circle?", "how many?", "is there a zebra left of the [PAD] square?"]
WEIGHTS = "model.safetensors"


def recipe(tiny, folder, *words):
    return load_settings(tiny, ["question.encoder=transformers", f"question.text_encoder={folder}", *words])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def run(tiny, encoder):
    """A run with a trained encoder whose states are as large as e_q."""
    return train(recipe(tiny, encoder, "name=bert", "question.frozen=false"), runs=tiny.parent / "runs").path


@pytest.fixture
def moved(run, encoder, tmp_path, monkeypatch):
    """The run's `model/`, copied to where there are neither the encoder's folder nor a network."""
    copied = shutil.copytree(run / "model", tmp_path / "model")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network is used"))
    shutil.move(encoder, tmp_path / "away")
    yield copied
    shutil.move(tmp_path / "away", encoder)


def logits(saved, image):
    return torch.cat([saved.run(image, question).logits for question in QUESTIONS])


def test_a_copied_model_does_everything_without_the_encoder(moved, run, image, done, tmp_path):
    expected = json.loads((run / "metrics.jsonl").read_text())["val_overall"]
    assert evaluate(moved, "val", tmp_path / "scores")["overall"] == pytest.approx(expected)
    raw = [f"data.h5={tmp_path}/absent.h5"]
    assert evaluate(moved, "val", tmp_path / "raw", raw)["overall"] == pytest.approx(expected)
    saved = vqa.load(moved)
    assert len(saved.ask(image, QUESTIONS)) == 3
    assert saved.inspect(image, QUESTIONS[2])["unknown_words"] == ["zebra", "[", "pad", "]"]
    done("ask", "--run", moved, "--image", image, "--question", QUESTIONS[0])
    done("recalibrate", "--run", moved, "--out", tmp_path / "other")
    done("inspect", "--run", tmp_path / "other", "--image", image, "--question", "how many?")
    files = {file.name for file in moved.iterdir()} - {"scores", "inspect"}
    assert files - {file.name for file in (tmp_path / "other" / "model").iterdir()} == set()
    tokens = AutoTokenizer.from_pretrained(moved)(QUESTIONS[2])["input_ids"]
    assert tokens == encode(saved.tokenizer, [QUESTIONS[2]])[0].tolist()


def test_the_exported_folder_answers_as_the_model_does(moved, image, done, tmp_path):
    done("export", "--run", moved, "--to", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "a text encoder of `transformers` (`bert`), of each at most 38 tokens" in card
    assert "the pretrained backbone and text encoder that" in card
    saved = vqa.load(moved)
    assert logits(vqa.load(tmp_path / "hub"), image).equal(logits(saved, image))
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "hub")
    processor = AutoProcessor.from_pretrained(tmp_path / "hub")
    asked = [*QUESTIONS, "what " * 1000]
    inputs = processor(images=[image] * 4, text=asked)
    with torch.inference_mode():
        expected = torch.cat([logits(saved, image), saved.run(image, asked[3]).logits])
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        del inputs["attention_mask"]
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert logits(vqa.load(tmp_path / "again"), image).equal(logits(saved, image))


def test_an_onnx_file_answers_as_the_model_does(onnxruntime, moved, image, done, tmp_path):
    done("export", "--run", moved, "--to", tmp_path / "onnx", "--format", "onnx")
    saved = vqa.load(moved)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for question in QUESTIONS:
        tokens = encode(saved.tokenizer, [question])[0].astype(np.int64)[None]
        given = session.run(["logits"], {"image": saved.preprocessing.decode(image)[None], "tokens": tokens})[0]
        torch.testing.assert_close(torch.from_numpy(given), saved.run(image, question).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["question_encoder.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_broken_model_directory_is_named(moved, file, image, refused):
    content = read_json(moved / file)
    content |= {"vocab_size": 9, "model": {}, "pad_token": None}
    for text in (json.dumps(content), "[]", None):
        (moved / file).write_text(text) if text else (moved / file).unlink()
        told = refused("ask", "--run", moved, "--image", image, "--question", "what?")
        assert f"{moved / 'question_encoder.json'}: " in told or f"{moved / file}: " in told


def test_only_a_trained_encoder_changes(tiny, encoder, run):
    fixed = train(recipe(tiny, encoder, "name=frozen"), runs=run.parent).path
    begun, (kept, changed) = load_file(encoder / WEIGHTS), (load_file(of / "model" / WEIGHTS) for of in (fixed, run))
    names = [name for name in begun if not name.startswith("pooler.")]
    assert all(kept[f"question.encoder.{name}"].equal(begun[name]) for name in names)
    assert not any(changed[f"question.encoder.{name}"].equal(begun[name]) for name in names if "weight" in name)
    counts = [read_json(of / "environment.json")["trained_parameters"] for of in (fixed, run)]
    assert counts[1] - counts[0] == sum(begun[name].numel() for name in names)


def test_a_run_is_resumed_bit_for_bit_and_not_with_other_tokens(tiny, encoder, tmp_path):
    words = ("question.frozen=false", "question.hidden_size=24", "train.schedule=constant", "train.validate_on=null")
    mine = shutil.copytree(encoder, tmp_path / "mine")

    def begun(name, epochs, **how):
        return train(recipe(tiny, mine, f"name={name}", *words, f"train.epochs={epochs}"), runs=tmp_path, **how).path

    whole = begun("whole", 2)
    begun("parts", 1)
    parts = begun("parts", 2, resume=True)
    ours, theirs = (load_file(path / "model" / WEIGHTS) for path in (whole, parts))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    text = (mine / "tokenizer.json").read_text()
    (mine / "tokenizer.json").write_text(text.replace('"circle"', '"circus"'))
    with pytest.raises(InputError, match="not the data that .* was trained on"):
        begun("parts", 3, resume=True)
    shutil.rmtree(mine)
    with pytest.raises(InputError, match=f"question.text_encoder: {mine}: no such folder"):
        begun("parts", 3, resume=True)


@pytest.mark.parametrize(("kind", "taken"), [("bert", True), ("roberta", False), ("gpt2", False)])
def test_a_warm_start_takes_the_encoder_whole_or_not_at_all(tiny, run, tmp_path, kind, taken):
    other, told = write_encoder(tmp_path / kind, kind, seed=1), []
    task = VQATask(recipe(tiny, other))
    warm = task.new_model(fresh=True, say=told.append, init_from=load_model(run)).state_dict()
    theirs, fresh = load_file(run / "model" / WEIGHTS), load_file(other / WEIGHTS)
    for name in (name for name in fresh if not name.startswith("pooler.")):
        assert warm[f"question.encoder.{name}"].equal(theirs[f"question.encoder.{name}"] if taken else fresh[name])
    assert ("question.*" in told[0]) is not taken
    assert warm["fusion.visual.weight"].equal(theirs["fusion.visual.weight"])


def test_the_mean_question_is_the_mean_of_its_embeddings(tiny, encoder):
    task = VQATask(recipe(tiny, encoder, "cbn.condition=mean_question"))
    model = task.new_model(fresh=True, say=print)
    with torch.inference_mode():
        embeddings = model.eval().question(*padded_words(task.training, range(len(task.training))))
    mean = embeddings.mean(0)
    expected = mean * embeddings.norm(dim=1).mean() / mean.norm()
    torch.testing.assert_close(model.mean_question, expected, rtol=1e-4, atol=1e-5)
