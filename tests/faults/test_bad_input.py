"""Wrong input on the command line: exit code 2, one line that names it, and nothing left that looks whole."""

import re

import pytest

from tests import bad_files
from tests.conftest import ROOT
from tests.processes import MainProcess

CASES = [
    # images
    *[
        (f"ask --run {{trained}} --image {{image:{name}}} --question what?", f"{name}: {says}")
        for name, says in {
            "empty.png": "cannot be read as an image",
            "text.jpg": "cannot be read as an image (none of JPEG",
            "truncated.png": "cannot be read as an image",
            "truncated.jpg": "cannot be read as an image",
            "float.tiff": "cannot be read as an image (32 bits",
            "bomb.png": "too large an image: 10000 x 10000",
            "folder.png": "not a regular file",
            "pipe.png": "not a regular file",
        }.items()
    ],
    ("inspect --run {trained} --image {image:truncated.jpg} --question what? --out out", "truncated.jpg: cannot be"),
    # questions
    ("ask --run {trained} --image {good} --question " + "x" * 10_001, "question: longer than 10000"),
    ("inspect --run {trained} --image {good} --question ... --versus \u3000 --out out", "holds no word"),
    ("ask --run {trained} --image {good} --question is there one", "there one; put the question in quotation marks"),
    ("ask --run {trained} --image {good} --question a --top 0", "a number from 1 to 1000000000"),
    ("ask --run {trained} --image {good} --question a --top 99999999999", "a number from 1 to 1000000000"),
    # recipes
    *[
        (f"train --config {{recipe:{name}}}", says)
        for name, says in {
            "empty": "empty.yaml: ",
            "list": "list.yaml: must hold",
            "laughs": "more than 10000 values",
            "upwards": "upwards.yaml: name: ",
            "absolute": "absolute.yaml: name: ",
            "split": "split.yaml: data.splits",
            "null": "null.yaml: data.h5: ",
            "base_null": "no file can have this name",
            "base_folder": "is a directory",
            "infinite": "train.learning_rate: ",
            "fork": "data.processes: ",
            "deep": "deep.yaml: malformed YAML",
            "bool": "bool.yaml: malformed YAML",
            "bracket": "bracket.yaml: line 3: expected ',' or ']'",
            "quote": "quote.yaml: line 4: found unexpected end of stream",
            "pipe": "pipe.yaml: not a regular file",
            "utf16": "utf16.yaml: not UTF-8 text (byte 0)",
            "gzip": "gzip.yaml: not UTF-8 text (byte 1)",
        }.items()
    ],
    (f"experiment {ROOT}/config/demo.yaml", "demo.yaml: a recipe, not a suite; `train --config"),
    ("experiment my_runs.yaml", "my_runs.yaml: a suite's name must not end like the files of its results, my_runs.csv"),
    ("demo --config {recipe:laughs}", "laughs.yaml: "),
    ("demo name=../../elsewhere", "command line: name: "),
    ("demo scenes.images={../x:1}", "command line: scenes.images.../x"),
    ("demo scenes.world=games", "command line: scenes.world: games belongs to the task guesswhat"),
    (f"demo --config {ROOT}/config/guesswhat/games.yaml", "scenes: the demo needs a VQA recipe with scenes"),
    ("preprocess --config {recipe:split}", "split.yaml: data.splits"),
    ("preprocess --config {tiny} data.h5=x.h5 data.splits.train.images=x/{image_id.__class__}", "must hold {image_id}"),
    # questions and annotations
    *[
        (f"preprocess --config {{data:{name}}}", says)
        for name, says in {
            "text_id": "Expected `int`, got `str` - at `$.questions[0].question_id`",
            "long_text": "holds a text that is longer than 10000 characters",
            "utf16": "train_q.json: not UTF-8 text",
            "gzip": "train_q.json: not UTF-8 text",
            "latin1": "train_q.json: not UTF-8 text (byte 32)",
            "empty": "train_q.json: line 1, column 1",
            "cut": "train_q.json: line 1, column",
            "trailing": "train_q.json: line 1, column",
            "deep": "train_q.json: nested too deeply",
            "nan": "train_q.json: line 1, column 32: JSON is malformed: invalid character",
            "digits": "Integer value out of range - at `$.questions[0].question_id`",
            "pipe": "train_q.json: no such file",
            "no_image": "1 image(s) missing or unreadable, by id: 1",
            "empty_image": "1 image(s) missing or unreadable, by id: 1",
        }.items()
    ],
    # h5 files and vectors
    ("train --config {tiny} name=new data.h5={h5:text}", "text.h5: cannot be read as an h5 file"),
    ("train --config {tiny} name=new data.h5={h5:cut}", "cut.h5: cannot be read as an h5 file"),
    ("train --config {tiny} name=new data.h5={h5:other}", "other.h5: made by another program"),
    ("train --config {tiny} name=new data.h5={h5:folder}", "folder.h5: not a file"),
    ("eval --run {trained} data.h5={h5:text}", "text.h5: cannot be read as an h5 file"),
    *[
        (f"train --config {{tiny}} name=new question.glove={{glove:{name}}}", f"{name}.zip: {says}")
        for name, says in {
            "two": "name one file of the archive",
            "nan": "line 1: expected a word and 300 numbers",
            "damaged": "cannot be read (Error -3",
            "encrypted": "cannot be read",
        }.items()
    ],
    # models
    *[
        (f"ask --run {{model:{name}}} --image {{good}} --question what?", says)
        for name, says in {
            "header": "model.safetensors: cannot be read as weights",
            "cut": "model.safetensors: cannot be read as weights",
            "boasting": "model.safetensors: its header",
            "enormous": "not the weights of this folder's config.yaml",
            "no_answers": "answers.json: must be a list",
            "blank_answer": "answers.json: answer 1 is empty",
            "half_pair": "answers.json: answer 0 is not UTF-8 text",
            "pipe": "answers.json: not a regular file",
            "infinite": "preprocessing.json: not an image preprocessing",
            "gap": "tokenizer.json: words must be numbered",
        }.items()
    ],
    ("eval --run {model:cut} --out out", "model.safetensors: cannot be read"),
    ("eval --run {trained} --split ../../x --out out", "no split '../../x'"),
    ("recalibrate --run {model:boasting} --out out", "model.safetensors: its header"),
    ("recalibrate --run {trained} --split ../x --out out", "no split '../x'"),
    ("recalibrate --run {trained} --config {recipe:laughs} --out out", "laughs.yaml: "),
    ("features --run {model:cut} --out out", "model.safetensors: cannot be read"),
    # suites
    *[
        (f"experiment {{suite:{name}}} --list", says)
        for name, says in {
            "title_list": "title_list.yaml: title: ",
            "formula": "formula.yaml: runs.=1",
            "line": "line.yaml: runs.a\\nb",
            "runless": "runless.yaml: runs: ",
            "many": "many.yaml: line",
            "upwards": "absent.yaml: no such file",
            "renamed": "renamed.yaml: a: name=../../x: a suite gives each run its seed and its name",
            "recalibrate": "recalibrate.yaml: tests.t.recalibrate: ",
        }.items()
    ],
    ("bench nonsense", "no part nonsense; parts are step, memory, sharing, cache, waiting, loading, scale"),
    ("bench step --tiny --device nonsense", "unknown device 'nonsense'; use auto, cpu, cuda"),
    ("bench step --tiny --device cuda:99", "device: cuda:99 is not available"),
    ("bench step --tiny --repeats 0", "a number from 1 to 1000000000"),
    ("bench step --tiny --out {h5:text}", "text.h5: must be a directory"),
]


@pytest.fixture
def words(tiny, trained, image, tmp_path):
    """The words of a command, the files they name in braces made in their own folder."""
    folder = tmp_path / "given"
    folder.mkdir()
    named = re.compile(r"\{((?:image|recipe|suite|data|model|h5|glove):[\w.]+|tiny|trained|good)\}")

    def made(match: re.Match) -> str:
        kind, _, name = match[1].partition(":")
        if not name:
            return str({"tiny": tiny, "trained": trained, "good": image}[kind])
        return str(getattr(bad_files, kind)(folder, name, *([trained] if kind == "model" else [])))

    return lambda text: [named.sub(made, word) for word in text.split(" ")]


def _named(text: str) -> str:
    return re.sub(r"\W+", "-", text)[:60]


@pytest.mark.parametrize(("text", "says"), CASES, ids=[_named(text) for text, _ in CASES])
def test_one_line_names_what_is_wrong_and_nothing_whole_is_left(refused, words, tmp_path, monkeypatch, text, says):
    arguments = words(text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert says in refused(*arguments)
    left = {path.suffix for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert not left & {".h5", ".safetensors", ".json", ".html", ".csv", ".png", ".jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {"given", "here"}


@pytest.mark.parametrize(
    "text", ["preprocess --config {data:deep}", "experiment {recipe:pipe}", "train --config {h5:text}"]
)
def test_as_a_process_of_its_own(words, tmp_path, text):
    ended = MainProcess(*words(text), folder=tmp_path).end()
    assert ended.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", ended.err)
