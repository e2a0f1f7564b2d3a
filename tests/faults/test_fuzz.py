"""Every reader, on mutated files: a result, or one InputError of one line; nothing else, and never a hang."""

import json
import zipfile

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from data.glove import read_glove
from data.vqa_files import read_questions
from experiments.suite import load_suite
from tests.conftest import ROOT, fuzzed
from tests.raw_files import TRAIN, write_split
from vqa.io.errors import InputError, printable
from vqa.io.files import read_json
from vqa.io.images import FORMATS, decode_image
from vqa.metrics import question_accuracy
from vqa.preprocessing import Preprocessing
from vqa.saved_model.files import WEIGHTS, load_model
from vqa.settings.recipes import load_settings
from vqa.text.answers import normalise_answer
from vqa.text.tokenizer import encode, load_tokenizer

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -1, "\0", "\ud800", "../x", "=1", "{image_id}", 10**400])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def result_or_refusal(read, *arguments):
    """What a reader returns, or None where it refuses as it should."""
    try:
        return read(*arguments)
    except InputError as error:
        assert str(error)
        assert str(error) == printable(str(error))
        return None


@st.composite
def damage(draw, content: bytes) -> bytes:
    """Bytes with some cut out, changed, doubled or put in."""
    whole = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(whole)))
        end = min(start + draw(st.sampled_from([0, 1, 2, 8, len(content)])), len(whole))
        whole[start:end] = draw(st.binary(max_size=8)) * draw(st.sampled_from([0, 1, 1, 3]))
    return bytes(whole)


@st.composite
def replaced(draw, content):
    """A JSON value with a part that replaces another value, or is removed."""
    place = draw(st.integers(0, 6))
    if place and isinstance(content, list) and content:
        at = draw(st.integers(0, len(content) - 1))
        return [*content[:at], draw(replaced(content[at])), *content[at + 1 :]]
    if place and isinstance(content, dict) and content:
        key = draw(st.sampled_from(sorted(content)))
        return content | {key: draw(replaced(content[key]))}
    return draw(values)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of each kind that is read."""
    folder = tmp_path_factory.mktemp("good")
    split = write_split(folder, "train", TRAIN)
    ramp = Image.linear_gradient("L").resize((24, 16))
    image = Image.merge("RGB", (ramp, ramp.rotate(180), ramp))
    exif = Image.Exif()
    exif[0x112] = 6
    for kind in FORMATS:
        image.save(folder / f"image.{kind}", kind, **({"exif": exif} if kind not in ("GIF", "BMP", "PPM") else {}))
    (folder / "glove.txt").write_text("the 1 2 3\ncat 4 5 6\n")
    with zipfile.ZipFile(folder / "glove.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("glove.txt", "the 1 2 3\ncat 4 5 6\n")
    return folder, split


@fuzzed(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("of", ["questions", "annotations"])
def test_question_files(files, tmp_path, of, data):
    good = getattr(files[1], of)
    bad = tmp_path / "bad.json"
    if data.draw(st.booleans()):
        content = data.draw(replaced(json.loads(good.read_text())))
        bad.write_text(json.dumps(content))
    else:
        bad.write_bytes(data.draw(damage(good.read_bytes())))
    read = result_or_refusal(read_questions, *((bad, good) if of == "questions" else (files[1].questions, bad)))
    for question in read or []:
        assert isinstance(question.question_id, int)
        assert question.text.encode()
        assert question.answers


@fuzzed(max_examples=30)
@given(content=values.map(json.dumps) | st.binary(max_size=30).map(lambda some: some.decode("latin1")))
def test_preprocessing_files(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    assert result_or_refusal(Preprocessing.load, tmp_path / "p.json") is None


@pytest.mark.parametrize("kind", FORMATS)
@fuzzed(max_examples=20)
@given(data=st.data())
def test_images(files, tmp_path, kind, data):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(data.draw(damage((files[0] / f"image.{kind}").read_bytes())))
    pixels = result_or_refusal(decode_image, bad, 8)
    assert pixels is None or (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)


@fuzzed(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("recipe", ["config/demo.yaml", "experiments/suites/domain_shift.yaml"])
def test_recipes_and_suites(tmp_path, recipe, data):
    text = (ROOT / recipe).read_text().replace("base: base.yaml", f"base: {ROOT}/config/base.yaml")
    text = text.replace("../../config/demo.yaml", f"{ROOT}/config/demo.yaml")
    if data.draw(st.booleans()):
        content = data.draw(replaced(yaml.safe_load(text)))
        text = yaml.dump(content, allow_unicode=True)
        bad = text.encode("utf-8", "backslashreplace")
    else:
        bad = data.draw(damage(text.encode()))
    (tmp_path / "bad.yaml").write_bytes(bad)
    result_or_refusal(load_suite if "suites" in recipe else load_settings, tmp_path / "bad.yaml")


YAML_SIGNS = st.text(st.sampled_from("[]{}:,&*!|>'\"%@`#-? ab1.e<=\n\t\0\ud800"), max_size=24)


@fuzzed(max_examples=80)
@given(
    key=st.sampled_from(["name", "seed", "cbn.stages", "data.splits", "data.h5", "train", "", "a.b"]) | YAML_SIGNS,
    value=YAML_SIGNS
    | st.sampled_from(["!!bool x", "!!int ''", "!!timestamp x", "!!float x", "!!binary x", "!!set {a}"]),
)
@example("cbn.stages", "!!int ''")
def test_overriding_words(key, value):
    result_or_refusal(load_settings, ROOT / "config" / "demo.yaml", [f"{key}={value}"])


@fuzzed(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("name", ["glove.txt", "glove.zip"])
def test_glove_files(files, tmp_path, name, data):
    bad = tmp_path / name
    bad.write_bytes(data.draw(damage((files[0] / name).read_bytes())))
    read = result_or_refusal(read_glove, bad, {"<pad>": 0, "cat": 1}, 3)
    assert read is None or np.isfinite(read[0]).all()


@fuzzed(max_examples=200)
@given(prediction=st.text(), answers=st.lists(st.text(), min_size=1, max_size=12))
@example("1,2" * 50, ["."])
def test_answers(prediction, answers):
    assert 0 <= question_accuracy(prediction, answers) <= 1
    assert isinstance(normalise_answer(prediction), str)


@fuzzed(max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "answers.json", "preprocessing.json", WEIGHTS])
def test_model_directories(trained, tmp_path, name, data):
    model = trained / "model"
    for file in model.iterdir():
        if file.name != name and not (tmp_path / file.name).exists():
            (tmp_path / file.name).symlink_to(file)
    content = (model / name).read_bytes()
    if name.endswith("json") and data.draw(st.booleans()):
        bad = json.dumps(data.draw(replaced(json.loads(content)))).encode()
    elif name == WEIGHTS:  # the numbers may be any; the header is what is read
        length = 8 + int.from_bytes(content[:8], "little")
        bad = data.draw(damage(content[:length])) + content[length:]
    else:
        bad = data.draw(damage(content))
    (tmp_path / name).write_bytes(bad)
    saved = result_or_refusal(load_model, tmp_path)
    if saved is not None:
        assert saved.answers
        assert saved.training.keys() <= {"trained_on", "epoch", "val_overall", "recalibrated_on"}


@fuzzed(max_examples=60)
@given(question=st.text())
def test_questions_become_known_words(trained, question):
    tokenizer = load_tokenizer(trained / "model")
    tokens, lengths = encode(tokenizer, [question])
    assert len(tokens) == lengths.sum() >= 1
    assert tokens.max() < tokenizer.get_vocab_size()


@fuzzed(max_examples=60)
@given(content=st.binary(max_size=40))
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b"1" * 5_000)
def test_json_files(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    result_or_refusal(read_json, tmp_path / "x.json")
