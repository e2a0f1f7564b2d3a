"""Malicious files: nothing in them is executed, and nothing is written outside its place."""

import ast
import csv
import io
import json
import pickle
import resource
import shutil
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.vqa_files import SplitFiles
from experiments.report.tables import markdown_table
from experiments.training.checkpoint import load_checkpoint
from tests.bad_files import laughs, png, png_block
from tests.conftest import ROOT
from tests.pages import Page, assert_self_contained, demo, inspection, photo, reading
from vqa.backbone import build_resnet
from vqa.io.errors import InputError, printable
from vqa.io.files import as_cell
from vqa.io.images import MOST_PIXELS, decode_image
from vqa.settings.recipes import load_settings, read_yaml

CODE = [
    ROOT / "main.py",
    *(path for folder in ("data", "vqa", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))),
]
SCRIPT = """<script>alert(1)</script></title>&"'<img src=x onerror=alert(2)>{{7*7}}"""


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_nothing_in_the_code_can_execute_a_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {name.name for name in node.names} & {"pickle", "marshal", "shelve", "dill", "joblib"}
        if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "joblib"}:
            assert {name.name for name in node.names} == {"UnpicklingError"}
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert called not in {
            "eval",
            "exec",
            "compile",
            "os.system",
            "__import__",
            "yaml.unsafe_load",
            "yaml.full_load",
        }
        assert given.get("shell", "False") == "False", called
        assert given.get("allow_pickle", "False") == "False", called
        if called == "Image.open":  # others ask `read_image`; one reads what it has just drawn
            assert path.name in {"images.py", "figure.py"}
        if called == "torch.load":
            assert given["weights_only"] == "True"
        if called in {"yaml.load", "yaml.load_all"}:
            assert ast.unparse(node.args[1]) == "_Loader"


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt"])
def test_weights_that_would_run_code_are_refused(tmp_path, refused, tiny, name):
    ran, file = tmp_path / "ran", tmp_path / name
    torch.save({"conv1.weight": torch.zeros(1), "more": Touch(ran)}, file)
    with pytest.raises(ValueError, match="not executed"):
        build_resnet("resnet10", file)
    line = refused("train", "--config", tiny, "name=new", f"backbone.weights={file}")
    assert name in line
    assert not ran.exists()
    file.write_bytes(pickle.dumps(Touch(ran)))  # without torch's archive around it
    with pytest.raises(ValueError, match=name):
        build_resnet("resnet10", file)
    assert not ran.exists()


@pytest.mark.parametrize("content", [[1], torch.zeros(2), {"state_dict": {}}, {1: torch.zeros(1)}], ids=str)
def test_weights_of_another_form_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth"):
        build_resnet("resnet10", tmp_path / "w.pth")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": Touch(tmp_path / "ran")}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"last.pt: cannot be read as a checkpoint") as caught:
        load_checkpoint(tmp_path / "last.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_accuracies_that_would_run_code_are_refused(tmp_path):
    from experiments.report.results import _answered

    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("ids", "accuracies"):
            stored = io.BytesIO()
            np.save(stored, np.array([Touch(tmp_path / "ran")], object), allow_pickle=True)
            archive.writestr(f"{name}.npy", stored.getvalue())
    with pytest.raises(InputError, match=r"a.npz: missing or damaged"):
        _answered(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!!python/module:os", "!x y"]
)
def test_a_tag_executes_nothing(here, value):
    (here / "a.yaml").write_text(f"name: {value}\n")
    for read in (read_yaml, load_settings):
        with pytest.raises(InputError, match=r"a.yaml: line 1"):
            read(here / "a.yaml")
    with pytest.raises(InputError, match=r"command line: name"):
        load_settings(ROOT / "config" / "demo.yaml", [f"name={value}"])
    assert not (here / "ran").exists()


def test_aliases_serve_as_meant_and_do_not_unfold_without_end(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("one: &one {a: 1}\ntwo: {<<: *one, b: 2}\n")
    assert read_yaml(file)["two"] == {"a": 1, "b": 2}
    for text in (laughs(), "a: &a [*a]"):
        file.write_text(text)
        with pytest.raises(InputError, match="more than 10000 values, with aliases expanded"):
            read_yaml(file)


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (13_000, 13_000), (2**30, 2**30)])
def test_a_decompression_bomb_costs_no_memory(tmp_path, width, height):
    row = b"\0" * (1 + 3 * min(width, 20_000))
    (tmp_path / "bomb.png").write_bytes(png(width, height, 8, 2, row * 200))
    assert width * height > MOST_PIXELS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"bomb.png: (too large an image|cannot be read)"):
        decode_image(tmp_path / "bomb.png", 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("keyword", [b"text", b"XML:com.adobe.xmp"])
def test_a_compressed_text_beside_the_pixels_costs_no_memory(tmp_path, keyword):
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png")
    whole = (tmp_path / "bomb.png").read_bytes()
    bomb = png_block(b"zTXt", keyword + b"\0\0" + zlib.compress(b" " * 200_000_000))
    (tmp_path / "bomb.png").write_bytes(whole[:33] + bomb + whole[33:])
    tracemalloc.start()
    assert decode_image(tmp_path / "bomb.png", 8).shape == (8, 8, 3)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**26


def test_an_image_id_cannot_leave_its_folder():
    files = SplitFiles(Path("q"), None, "images/{image_id}.jpg")
    for image_id in (-1, 2**62, 0):
        assert files.image(image_id).parent == Path("images")
    for pattern in (
        "{image_id.real}",
        "{image_id!r:>9}",
        "{image_id:0999999999d}",
        "{image_id:{image_id}}",
        "{0}{image_id}",
    ):
        with pytest.raises(InputError, match="image_id"):
            SplitFiles(Path("q"), None, pattern).image(3)


def assert_harmless(page: str) -> None:
    assert_self_contained(page)
    read = Page(page)
    assert sum(tag == "script" for tag, _ in read.tags) == 2  # our own
    assert "alert(" not in "".join(read.scripts)
    assert SCRIPT in "".join(read.text)


def with_answers(model, text):
    """The model, its answers now `text` and a number."""
    answers = json.loads((model / "answers.json").read_text())
    (model / "answers.json").write_text(json.dumps([f"{text} {place}" for place in range(len(answers))]))
    return model


def test_questions_answers_and_names_stay_text_in_the_inspection(done, finished, image, tmp_path):
    hostile = Path(shutil.copy(image, tmp_path / "<script>alert(3)<'\">.png"))
    model = with_answers(finished / "model", SCRIPT)
    asked = ("--question", f"={SCRIPT}", "--versus", SCRIPT)
    done("inspect", "--run", model, "--image", hostile, *asked, "--out", tmp_path / "out")
    assert_harmless((tmp_path / "out" / "report.html").read_text())
    with (tmp_path / "out" / "modulation.csv").open(newline="") as file:
        assert {row["question"] for row in csv.DictReader(file)} == {f"'={SCRIPT}", SCRIPT}


def test_questions_and_answers_stay_text_in_the_demos_report(tmp_path):
    from experiments.demo import write_demo

    seen = reading(SCRIPT, [("layer1.0.bn1", 1, 8)])
    seen |= {"words": [SCRIPT], "unknown_words": [SCRIPT], "answers": [{"answer": SCRIPT, "probability": 1.0}]}
    seen["layers"][0]["name"] = seen["answers_without_modulation"][0]["answer"] = SCRIPT
    told = demo()
    example = {"image": photo(), "question": SCRIPT, "truth": SCRIPT, "baseline": SCRIPT, "modern": SCRIPT}
    told |= {"examples": [example], "commands": [SCRIPT]}
    write_demo(tmp_path / "report.html", told, inspection(seen), photo())
    assert_harmless((tmp_path / "report.html").read_text())


def test_names_stay_in_their_cells_of_markdown():
    names = ("row", "baseline", "overall_mean", "overall_std", "seeds", "difference", "ci_low", "ci_high", "compared")
    names += ("difference_std", "seconds", "peak_memory_mib", "trained_parameters", "order_above")
    names += tuple(f"{column}_{kind}" for column in ("yes/no", "number", "other") for kind in ("mean", "std"))
    names += tuple(f"paper_{column}" for column in ("overall", "yes/no", "number", "other"))
    line = dict.fromkeys(names) | {"row": "a|b\n# <script>", "paper_overall": 1.0}
    last = markdown_table([line]).splitlines()[-1]
    assert last.startswith(r"| a\|b\n# &lt;script> |")


def test_a_terminal_shows_texts_and_obeys_none():
    assert printable("多少 κόσμος مرحبا 👩‍👧") == "多少 κόσμος مرحبا 👩‍👧"
    assert printable("a\x1b[2J\r\nb\u202ec\ud83d") == r"a\x1b[2J\r\nb\u202ec\ud83d"
    assert str(InputError("a\nb")) == r"a\nb"


def test_a_models_answers_do_not_steer_the_terminal(done, finished, image):
    model = with_answers(finished / "model", "\x1b[2J\n")
    ended = done("ask", "--run", model, "--image", image, "--question", "what \x1b?", "--top", 2)
    assert len(ended.out.splitlines()) == 2
    assert "\x1b" not in ended.out + ended.err


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\t=1"])
def test_no_text_is_a_formula_in_a_spreadsheet(text):
    assert as_cell(text) == f"'{text}"
    assert as_cell(f"what {text}") == f"what {text}"


def test_evidence_holds_names_below_its_folder(here):
    from experiments.runner import jobs_of
    from experiments.suite import load_suite

    runs = "{'a/../../b': {}, c: {settings: \"data.h5=../../../x.h5 data.folder=/etc\"}}"
    (here / "s.yaml").write_text(
        f"title: t\nrecipe: {ROOT}/config/demo.yaml\nseeds: [1]\nbaseline: 'c, ../t'\nruns: {runs}\n"
        "tests: {../t: {settings: 'data.h5=../../../y.h5'}}\n"
    )
    suite = load_suite(here / "s.yaml")
    for job in jobs_of(suite):
        assert job.folder(Path("runs")).resolve().is_relative_to(here / "runs")
        for test in suite.tests:
            assert "/" not in test.label
            assert ".." not in Path(test.label).parts


def test_an_image_is_read_and_not_run(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(InputError, match=r"a.eps: cannot be read as an image \(none of JPEG"):
        decode_image(tmp_path / "a.eps", 8)
