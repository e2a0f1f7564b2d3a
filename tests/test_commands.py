"""The commands as a user types them: what they write, what they say, and how they refuse."""

import csv
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.evaluate import scores_table
from vqa.cbn import Modulation
from vqa.inspect.inspection import describe_channels, inspect
from vqa.io.progress import progress
from vqa.saved_model import load_model
from vqa.saved_model.files import save_weights
from vqa.settings.recipes import load_settings


@pytest.fixture
def copied(trained, here):
    """A copy of `model/` alone, in another place."""
    shutil.copytree(trained / "model", here / "copy")
    return here / "copy"


# ---- train, eval


def test_preprocess_train_eval(done, tiny, here):
    h5 = f"data.h5={here}/new.h5"
    done("preprocess", "--config", tiny, h5)
    assert "nothing to do" in done("preprocess", "--config", tiny, h5).out
    ended = done("train", "--config", tiny, "name=cli", h5)
    assert re.search(r"epoch 1/1  loss \d", ended.out)
    ended = done("eval", "--run", "runs/cli")
    assert "val: 24 questions" in ended.out
    for kind in ("overall", "yes/no", "number", "other"):
        assert re.search(rf"^{kind} +\d+\.\d\d %$", ended.out, re.MULTILINE)
    metrics = json.loads((here / "runs/cli/metrics_val.json").read_text())
    assert {"split", "trained_on", "questions", "overall", "per_answer_type", "per_question_type"} == metrics.keys()
    assert (metrics["split"], metrics["trained_on"], metrics["questions"]) == ("val", ["train"], 24)
    logged = json.loads((here / "runs/cli/metrics.jsonl").read_text())
    assert metrics["overall"] == logged["val_overall"]
    assert metrics["per_answer_type"] == logged["val_per_answer_type"]
    results = json.loads((here / "runs/cli/results_val.json").read_text())
    asked = json.loads((tiny.parent / "world/val_questions.json").read_text())["questions"]
    assert {entry["question_id"] for entry in results} == {entry["question_id"] for entry in asked}
    assert all(entry.keys() == {"question_id", "answer"} and isinstance(entry["answer"], str) for entry in results)


def test_a_run_starts_from_another_runs_weights(done, refused, tiny, trained, here):
    ended = done("train", "--config", tiny, "--init-from", trained, "name=warm", "attention.units=4")
    assert re.search(rf"{trained}/model: \d+ of \d+ tensors taken, .*; not taken: attention\.", ended.out)
    told = refused("train", "--config", tiny, "--init-from", here, "name=nothing")
    assert f"{here}: no model here" in told


def test_other_raw_files_are_not_passed_over_for_the_h5_file(refused, done, tiny, trained, tmp_path):
    """The accuracy on other images, with the same questions, would be that of the images in the h5 file."""
    folder = Path(load_settings(tiny).data.folder)
    for name in ("eval", "recalibrate", "features"):
        told = refused(name, "--run", trained, "--split", "val", "--out", tmp_path / "out", "data.folder=elsewhere")
        assert "world.h5: is there and holds split 'val', so that nothing is read from elsewhere" in told
    assert not (tmp_path / "out").exists()
    done("eval", "--run", trained, "--out", tmp_path / "same", f"data.folder={folder}/../{folder.name}/")
    assert "elsewhere/val_questions.json: no such file" in refused(
        "eval", "--run", trained, "--out", tmp_path / "out", "data.folder=elsewhere", "data.h5=absent.h5"
    )


@pytest.mark.usefixtures("here")
def test_a_split_that_is_not_in_the_h5_file_is_said_before_training(done, tiny):
    words = ["train", "--config", tiny, "train.epochs=1"]
    assert "holds no split" not in done(*words, "name=whole").out
    said = done(*words, "name=lacking", "data.splits.later={questions: q.json, images: '{image_id}.png'}").out
    assert re.match(r".*world.h5: holds no split later, which data.splits names: trained without; `preproc", said)


def test_a_copied_model_is_evaluated_without_h5(done, trained, copied, tmp_path):
    expected = done("eval", "--run", trained, "--out", tmp_path / "h5").out
    ended = done("eval", "--run", copied, "--out", tmp_path / "raw", "data.h5=absent.h5")
    assert ended.out == expected
    for name in ("metrics_val.json", "results_val.json"):
        ours, theirs = (json.loads((tmp_path / place / name).read_text()) for place in ("raw", "h5"))
        assert ours == theirs


def test_the_results_of_another_model_are_not_overwritten(refused, done, trained, finished):
    assert f"{finished}: holds another model" in refused("eval", "--run", trained, "--out", finished)
    assert not (finished / "metrics_val.json").exists()
    done("eval", "--run", finished / "model", "--out", finished)  # its own


def test_scores_of_other_data_do_not_silently_replace_a_runs_own(done, tiny, finished, tmp_path):
    folder = Path(load_settings(tiny).data.folder)
    absent, said = "data.h5=absent.h5", f"{finished}/metrics_val.json: replaced by that of other data"
    assert said not in done("eval", "--run", finished, absent).out  # the first
    assert said not in done("eval", "--run", finished).out
    assert said not in done("eval", "--run", finished, f"data.folder={folder}/../{folder.name}").out
    assert said in done("eval", "--run", finished, absent).out
    for _ in range(2):
        assert said not in done("eval", "--run", finished, "--out", tmp_path / "elsewhere", absent).out
    done("eval", "--run", finished)
    metrics = finished / "metrics_val.json"  # as of a file of the same name below another folder
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"questions": 7}))
    assert said in done("eval", "--run", finished).out


def test_types_of_the_data_are_safe_on_a_terminal():
    scores = {"overall": 1.0, "per_answer_type": {"a\nb": 2.0}, "per_question_type": {"\x1b[31mred": 3.0}}
    assert scores_table(scores).splitlines()[1:] == [
        f"{'a' + chr(92) + 'nb':<13}    2.00 %",
        "  \\x1b[31mred    3.00 %",
    ]


def test_another_datasets_words_are_read_with_the_models_own(done, tiny, trained, tmp_path):
    expected = done("eval", "--run", trained, "--out", tmp_path / "a").out
    other = f"data.h5={tmp_path}/other.h5"
    done("preprocess", "--config", tiny, other, "data.min_word_count=20")
    assert done("eval", "--run", trained, "--out", tmp_path / "b", other).out == expected


def test_images_of_another_size_are_refused(refused, done, tiny, trained, tmp_path):
    other = f"data.h5={tmp_path}/other.h5"
    done("preprocess", "--config", tiny, other, "data.image_size=32", "scenes=null")
    told = refused("eval", "--run", trained, "--out", tmp_path / "out", other)
    assert "other.h5: holds images of 32 px, the model needs 64" in told


def test_a_split_that_was_trained_on_is_refused_unless_asked_for(done, refused, trained, tmp_path):
    assert "was trained on split 'train'" in refused("eval", "--run", trained, "--split", "train", "--out", tmp_path)
    assert not list(tmp_path.iterdir())
    done("eval", "--run", trained, "--split", "train", "--out", tmp_path, "--allow-trained")
    assert json.loads((tmp_path / "metrics_train.json").read_text())["seen_in_training"] is True
    files = "questions: train_questions.json, annotations: train_annotations.json, images: 'train/{image_id:012d}.png'"
    renamed = ["eval", "--run", trained, "--split", "again", "--out", tmp_path, f"data.splits.again={{{files}}}"]
    assert "was trained on split 'again'" in refused(*renamed)
    done(*renamed, "--allow-trained")
    assert json.loads((tmp_path / "metrics_again.json").read_text())["seen_in_training"] is True


@pytest.mark.parametrize("words", [["data.h5=absent.h5"], []], ids=["absent", "without the split"])
def test_a_split_without_annotations_that_the_h5_does_not_hold_gives_results_only(done, trained, tmp_path, words):
    split = "data.splits.test={questions: val_questions.json, images: 'val/{image_id:012d}.png'}"
    ended = done("eval", "--run", trained, "--split", "test", "--out", tmp_path, split, *words)
    assert "no annotations" in ended.out
    assert [path.name for path in tmp_path.iterdir()] == ["results_test.json"]
    results = json.loads((tmp_path / "results_test.json").read_text())
    assert len({result["question_id"] for result in results}) == len(results) == 24
    assert all(result["answer"] for result in results)


# ---- ask, inspect


def test_ask_lists_the_most_probable_answers_first(done, copied, image):
    ended = done("ask", "--run", copied, "--image", image, "--question", "what color is the circle?", "--top", "3")
    probabilities = [float(line.split("%")[0]) for line in ended.out.splitlines()]
    assert len(probabilities) == 3
    assert probabilities == sorted(probabilities, reverse=True)
    ended = done("ask", "--run", copied, "--image", image, "--question", "what zebra zebra?", "--json", "--top", "99")
    said = json.loads(ended.out)
    assert sum(entry["probability"] for entry in said["answers"]) == pytest.approx(1, abs=1e-4)
    assert said["question"] == "what zebra zebra?"
    assert "not in the vocabulary: zebra\n" in ended.err


def test_ask_answers_as_eval_does(done, copied, tiny, tmp_path):
    saved = load_model(copied)
    with torch.no_grad():  # the answers depend on the pixels then, and on how they are normalised
        saved.model.fusion.visual.weight.mul_(100)
    save_weights(copied, saved.model, saved.training)
    done("eval", "--run", copied, "--out", tmp_path)
    results = json.loads((tmp_path / "results_val.json").read_text())
    assert len({entry["answer"] for entry in results}) > 2
    asked = json.loads((tiny.parent / "world/val_questions.json").read_text())["questions"]
    answers = {entry["question_id"]: entry["answer"] for entry in results}
    for entry in asked:
        image = tiny.parent / f"world/val/{entry['image_id']:012d}.png"
        said = json.loads(done("ask", "--run", copied, "--image", image, "--question", entry["question"], "--json").out)
        assert said["answers"][0]["answer"] == answers[entry["question_id"]]


def test_inspect_writes_what_the_question_does_to_every_channel(done, copied, image, tmp_path):
    out = tmp_path / "seen"
    questions = ("--question", "what color is the circle?", "--versus", "how many circles are there?")
    ended = done("inspect", "--run", copied, "--image", image, *questions, "--out", out)
    assert {path.name for path in out.iterdir()} == {"modulation.json", "modulation.csv", "report.html"}
    seen = json.loads((out / "modulation.json").read_text())
    first, second = seen["readings"]
    assert [layer["name"] for layer in first["layers"]] == [f"layer{s}.0.bn{n}" for s in (1, 2, 3, 4) for n in (1, 2)]
    assert sum(layer["channels"] for layer in first["layers"]) == 480
    for layer in first["layers"]:
        lists = ("gamma", "beta", "delta_gamma", "delta_beta", "gain")
        assert {len(layer[key]) for key in lists} == {layer["channels"]}
    assert len(first["answers"]) == len(first["answers_without_modulation"]) == 5
    assert first["layers"][0]["delta_gamma"] != second["layers"][0]["delta_gamma"]
    assert first["layers"][0]["gamma"] == second["layers"][0]["gamma"]
    apart = {
        one["name"]: sum(
            abs(a - b) for part in ("delta_gamma", "delta_beta") for a, b in zip(one[part], other[part], strict=True)
        )
        / one["channels"]
        for one, other in zip(first["layers"], second["layers"], strict=True)
    }
    largest = max(apart, key=apart.get)
    assert f"difference of the two, mean |Δγ| + |Δβ|: {largest} {apart[largest]:.3f}, layer" in ended.out
    for glimpse in first["attention"]:
        assert sum(map(sum, glimpse)) == pytest.approx(1, abs=1e-5)
    with (out / "modulation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 480
    row, layer = rows[480 + 16], second["layers"][1]
    assert (row["question"], row["layer"], row["channel"]) == (second["question"], layer["name"], "0")
    assert float(row["delta_beta"]) == layer["delta_beta"][0]
    page = (out / "report.html").read_text()
    HTMLParser().feed(page)
    assert "layer4.0.bn2" in page
    assert {'href="modulation.json"', 'href="modulation.csv"'} <= set(re.findall(r'href="[^"]+"', page))


def test_the_numbers_are_the_networks_own(trained, image):
    saved = load_model(trained)
    layers = inspect(saved, image, ["is there a red circle?"])["readings"][0]["layers"]
    output = saved.run(image, "is there a red circle?")
    joined = [value for layer in layers for value in layer["delta_gamma"]]
    torch.testing.assert_close(torch.tensor(joined), output.modulation.gamma[0], rtol=1e-5, atol=1e-7)
    # written into the norms themselves, the deltas make the unmodulated network the modulated one
    pixels = torch.from_numpy(saved.preprocessing.decode(image).copy())[None]
    images = saved.preprocessing.normalise(pixels)
    with torch.inference_mode():
        expected = saved.model.resnet(images, Modulation(output.modulation.gamma, output.modulation.beta))
        for layer in layers:
            norm = saved.model.resnet.norm(layer["name"])
            norm.weight.data += torch.tensor(layer["delta_gamma"])
            norm.bias.data += torch.tensor(layer["delta_beta"])
        torch.testing.assert_close(saved.model.resnet(images), expected, rtol=1e-4, atol=1e-5)


def test_gain_flips_and_shut_channels():
    gamma = np.array([1.0, 2.0, -1.0, 0.5, 0.0], np.float32)
    delta = np.array([-0.95, -3.0, 0.5, 0.5, 1.0], np.float32)
    told = describe_channels(gamma, np.zeros(5, np.float32), delta, np.zeros(5, np.float32))
    assert told["gain"] == pytest.approx([0.05, -0.5, 0.5, 2.0, None])
    assert (told["sign_flips"], told["nearly_shut"]) == (1, 1)
    tiny = describe_channels(*(np.array([value], np.float32) for value in (1e-42, 0, 0.01, 0)))
    assert json.loads(json.dumps(tiny, allow_nan=False))["gain"] == pytest.approx([1e40], rel=0.01)


def test_a_model_without_conditioned_norms_can_be_inspected(done, tiny, image, here):
    done("train", "--config", tiny, "name=plain", "cbn.stages=[]")
    ended = done("inspect", "--run", "runs/plain", "--image", image, "--question", "what shape is the red object?")
    assert "conditions no norm" in ended.out
    assert (here / "runs/plain/inspect/report.html").exists()


@pytest.mark.parametrize(
    "question", ["这是什么？", "ما هذا؟", "🐈 or 🐕?", "?!", "what \x1b[2J\t?", "=1+1", "word " * 1_999]
)
def test_odd_questions_are_answered(done, copied, image, question):
    ended = done("ask", "--run", copied, "--image", image, "--question", question, "--json")
    said = json.loads(ended.out)
    assert said["question"] == question
    assert sum(entry["probability"] for entry in said["answers"]) <= 1 + 1e-4


# ---- bad input


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("answers.json", b"[", "answers.json: line 1"),
        ("tokenizer.json", b"{}", "tokenizer.json: cannot be read"),
        ("preprocessing.json", b"{}", "preprocessing.json"),
        ("config.yaml", b"a: [", "config.yaml: line"),
    ],
)
def test_a_broken_model_directory_is_named(refused, copied, image, file, content, message):
    (copied / file).write_bytes(content)
    assert message in refused("ask", "--run", copied, "--image", image, "--question", "what?")


def test_progress_is_lines_in_a_log(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress(range(6), 8, "images", done=2)) == list(range(6))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "images: 4/8, 0.1/s"
    assert lines[-1] == "images: 8/8, 0.1/s"
