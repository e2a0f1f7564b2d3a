"""Every shipped recipe, and every command of the README and of `docs/`, is run on tiny data of the same format."""

import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import main
from experiments.bench.bench import PARTS
from experiments.command_line import build_parser
from experiments.prepare import split_files
from tests.conftest import ROOT
from tests.fabricated_games import write_games
from tests.kill.cases import CASES
from tests.raw_files import write_official
from vqa.io.errors import InputError
from vqa.resnet import Modulation
from vqa.settings.recipes import load_saved, load_settings

# base.yaml is no recipe: it names no data. test_vqa_v2.py runs the recipes of VQA v2 and their page on its own data.
RECIPES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "config").rglob("*.yaml")
    if path.stem != "base" and path.parent.name != "vqa_v2"
)
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
    "scenes.images={train: 8, val: 6, test: 4}",
    "scenes.pretrain_size=64",
    "scenes.pretrain_images=64",
    "scenes.pretrain_epochs=1",
]


def test_the_test_splits_of_vqa_v1_are_there_once_their_sign_is_removed(tmp_path):
    recipe = (ROOT / "config/vqa_v1/modern.yaml").read_text().replace("../base.yaml", "base.yaml")
    head, end = recipe.split("answers them:\n")
    (tmp_path / "modern.yaml").write_text(head + "answers them\n" + end.replace("#    ", "    ", 6))
    splits = load_settings(tmp_path / "modern.yaml").data.splits
    assert list(splits) == ["train", "val", "test-dev", "test"]
    assert splits["test-dev"].annotations is None


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder as a fresh checkout, beside a folder `shared`, with tiny raw files where the recipes look for them."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("config", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    own = Path("own.yaml")
    own.write_text(next(block for block in shown if "name: own\n" in block))
    for recipe in [*RECIPES, own]:
        settings = load_settings(recipe)
        if settings.task == "guesswhat":
            if settings.scenes is None and not Path(settings.data.folder).exists():
                write_games(Path(settings.data.folder))
        elif settings.scenes is None:
            for first, (name, files) in enumerate(split_files(settings).items()):
                write_split(files, range(10 * first, 10 * first + (6 if name == "train" else 3)))
        if settings.question.glove:
            folder.joinpath("datasets").mkdir(exist_ok=True)
            with zipfile.ZipFile(settings.question.glove, "w") as archive:
                archive.writestr("glove.txt", "cat " + " ".join(["0.1"] * 300))
    for number in range(6):
        file = folder / "photos" / ("cat", "dog", "car")[number % 3] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (number, 0, 0)).save(file)
    (tmp_path / "shared" / "photos").mkdir(parents=True, exist_ok=True)
    shutil.make_archive(str(tmp_path / "shared" / "photos" / "photos_32"), "zip", folder / "photos")
    return folder


def write_split(files, ids):
    entries = [(n, n, f"What is cat {n % 3}?", [str(n % 2)] * 10) for n in ids]
    write_official(files, entries, lambda n: ("yes/no", "number", "other")[n % 3], (64, 48))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains(done, project, recipe):
    settings = load_settings(recipe)
    drawn = settings.scenes is not None
    if drawn and settings.task == "vqa":
        done("demo", "--config", recipe, *SMALL_MODEL[:1], *SMALL_MODEL[2:], *SMALL_WORLD)
        return
    for words in (["preprocess"], ["train"]):
        done(*words, "--config", recipe, *SMALL_MODEL, *(SMALL_WORLD if drawn else ()))
    assert (project / "runs" / settings.name / "model" / "model.safetensors").exists()


PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
ON_TINY_DATA = {  # what is appended to a command, so that it takes seconds
    "demo": [*SMALL_MODEL[:1], *SMALL_MODEL[2:], *SMALL_WORLD],
    "preprocess": ["data.image_size=64"],
    "pretrain": ["--backbone=resnet10", "--image-size=32", "--epochs=1"],
    "train": SMALL_MODEL,
}
RUN_ELSEWHERE = ("bench", "gpu-check")  # by test_bench.py and test_gpu_check.py, every part and step of them


def commands_of(page):
    """The lines of a page's shell blocks, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


@pytest.mark.usefixtures("project")
def test_every_command_of_the_pages(done, monkeypatch):
    pages = [page for page in PAGES if page != "docs/vqa_v2.md"]
    lines = [("python", "main.py", "demo"), *(tuple(words) for page in pages for words in commands_of(page))]
    for words in dict.fromkeys(lines):
        if words[0] == "make":
            assert f"\n{words[1]}: .venv/installed\n" in (ROOT / "Makefile").read_text()
            continue
        if words[:2] == ("unzip", "-n"):
            shutil.unpack_archive(words[2], words[4])
            continue
        if words[0] in ("mkdir", "cd"):
            (Path.mkdir if words[0] == "mkdir" else monkeypatch.chdir)(Path(words[1]))
            continue
        if words[:3] == ("python", "-m", "tests.kill.harness"):
            assert words[3] in CASES  # test_kill.py runs them
            continue
        if words[:3] == ("python", "-m", "data.daquar"):
            shutil.copytree("../shared/daquar", words[4])  # data/test_daquar_files.py runs it
            continue
        assert words[:2] in (("python", "main.py"), ("python", "../main.py"))
        name, *options = words[2:]
        if name in RUN_ELSEWHERE:
            asked = build_parser(main.COMMANDS).parse_args([name, *options])
            assert set(getattr(asked, "parts", [])) <= set(PARTS)
            continue
        small = ON_TINY_DATA.get(name, [])
        if {"config/guesswhat/games.yaml", "name=batch"} & {*options}:  # of a recipe with scenes
            small = [*SMALL_MODEL, *SMALL_WORLD]
        if "--probe" in options:  # the backbone is there
            small = []
        if name == "experiment" and "--report" not in options:  # test_runner.py and test_suites.py run suites
            small = ["--list"]
        done(name, *options, *small)


def test_the_pages_have_the_commands():
    assert {words[1] for words in commands_of("README.md") if words[0] == "make"} == {"demo", "test"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w-]+)", readme, re.MULTILINE))
    assert named == set(main.COMMANDS)
    run = {words[2] for page in PAGES for words in commands_of(page) if words[:2] == ["python", "main.py"]}
    assert run >= named - {"demo"}  # `make demo` is it


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_named_on_a_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:config|data|experiments|tests|vqa)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_code_of_the_readme_and_of_the_page_on_inspection_runs(trained, image, here):
    shutil.copytree(trained, here / "runs" / "demo" / "modern")
    shutil.copy(image, here / "runs" / "demo" / "example.png")
    names = {}
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/inspect.md"))
    for block in re.findall(r"```python\n(.*?)```", pages, re.DOTALL):
        exec(block.replace('"IMAGENET1K_V1"', "None").replace("224, 224", "32, 32"), names)
    assert names["y"].shape == (2, 64, 7, 7)
    assert len(names["net"].layers) == 48
    assert 0 < names["common"] < 1
    images, zero = names["images"], Modulation(names["gamma"], names["beta"])
    torch.testing.assert_close(names["net"](images), names["net"](images, zero))


def test_code_of_the_page_on_the_layer_runs():
    torch.manual_seed(0)
    names = {}
    page = (ROOT / "docs" / "layer.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block.replace('"IMAGENET1K_V1"', "None"), names)
    assert names["y"].shape == (2, 64, 14, 14)
    assert names["map_"].shape == (2, 2048, 2, 2)
    assert names["modulated"].shape == names["map_"].shape
    assert not torch.equal(names["modulated"], names["map_"])
    assert torch.equal(names["recomputed"], names["logits"])


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
