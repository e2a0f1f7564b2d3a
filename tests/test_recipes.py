"""Every shipped recipe, and every command of the README, is run on tiny data of the same format."""

import json
import re
import shlex
import zipfile

import pytest
import yaml
from PIL import Image

from data.errors import InputError
from tests.conftest import ROOT
from vqa.recipes import load_saved, load_settings
from vqa.settings import split_files

# base.yaml is no recipe: it names no data
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "config").rglob("*.yaml") if path.stem != "base")
SMALL_MODEL = [
    "backbone.name=resnet10",
    "backbone.weights=none",
    "cbn.hidden_size=8",
    "question.hidden_size=16",
    "attention.units=8",
    "answer.fusion_size=16",
    "answer.hidden_size=8",
    "train.epochs=1",
    "train.batch_size=4",
    "data.image_size=64",
    "workers=0",
]
SMALL_WORLD = [
    "scenes.images={train: 8, val: 4, test: 4}",
    "scenes.pretrain_size=64",
    "scenes.pretrain_images=64",
    "scenes.pretrain_epochs=1",
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder as a fresh checkout, beside a folder `shared`, with tiny raw files where the recipes look for them."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("config", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    for recipe in RECIPES:
        settings = load_settings(recipe)
        if settings.scenes is None:
            for first, (name, files) in enumerate(split_files(settings).items()):
                write_split(files, range(10 * first, 10 * first + (6 if name == "train" else 3)))
        if settings.question.glove:
            folder.joinpath("datasets").mkdir(exist_ok=True)
            with zipfile.ZipFile(settings.question.glove, "w") as archive:
                archive.writestr("glove.txt", "cat " + " ".join(["0.1"] * 300))
    return folder


def write_split(files, ids):
    ids = list(ids)
    files.questions.parent.mkdir(parents=True, exist_ok=True)
    asked = [{"question_id": n, "image_id": n, "question": f"What is cat {n % 3}?"} for n in ids]
    kinds = ("yes/no", "number", "other")
    given = [
        {
            "question_id": n,
            "image_id": n,
            "question_type": "what is",
            "answer_type": kinds[n % 3],
            "answers": [{"answer": str(n % 2), "answer_id": k, "answer_confidence": "yes"} for k in range(1, 11)],
        }
        for n in ids
    ]
    files.questions.write_text(json.dumps({"questions": asked}))
    files.annotations.write_text(json.dumps({"annotations": given}))
    for n in ids:
        files.image(n).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (n, 0, 0)).save(files.image(n))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains(command, project, recipe):
    settings = load_settings(recipe)
    if settings.scenes is not None:
        ended = command("demo", "--config", recipe, *SMALL_MODEL[:1], *SMALL_MODEL[2:], *SMALL_WORLD)
        assert ended.code == 0, ended.err
        return
    for words in (["preprocess"], ["train"]):
        ended = command(*words, "--config", recipe, *SMALL_MODEL)
        assert ended.code == 0, ended.err
    assert (project / "runs" / settings.name / "model" / "model.safetensors").exists()


@pytest.mark.usefixtures("project")
def test_every_command_of_the_readme(command):
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert [line.split("#")[0].strip() for line in lines if line.startswith("make")] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo: .venv/installed" in makefile
    assert "main.py demo" in makefile
    assert "\ntest: .venv/installed" in makefile
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("python main.py")]
    assert len(commands) >= 8
    for words in [["demo"], *commands]:
        small = {
            "demo": [*SMALL_MODEL[:1], *SMALL_MODEL[2:], *SMALL_WORLD],
            "preprocess": ["data.image_size=64"],
            "train": SMALL_MODEL,
            # running a suite is what test_runner and test_suites do
            "experiment": [] if "--report" in words else ["--list"],
        }
        ended = command(*words, *small.get(words[0], []))
        assert ended.code == 0, (words, ended.err)
    named = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))
    assert named >= {"experiment", "recalibrate", "demo", "preprocess", "train", "eval", "ask", "inspect", "features"}


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)h#]+)\)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^\| `(vqa_v1/\w+)` ", text, re.MULTILINE):
        assert (ROOT / "config" / f"{name}.yaml").exists(), name


def test_a_saved_recipe_gets_keys_that_came_after_it(tmp_path):
    whole = load_settings(ROOT / "config" / "demo.yaml", ["train.epochs=7"])
    file = tmp_path / "config.yaml"
    whole.save(file)
    content = yaml.safe_load(file.read_text())
    del content["speed"], content["train"]["together"]
    file.write_text(yaml.safe_dump(content))
    assert load_saved(file) == whole
    with pytest.raises(InputError, match=r"train.together is missing"):
        load_settings(file)
