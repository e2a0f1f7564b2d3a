"""The wheel holds the library alone, and the library works from it, away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

from experiments.export import export
from tests.conftest import ROOT

NEEDS = "huggingface-hub jinja2 numpy pillow pydantic pyyaml safetensors tokenizers torch torchvision tqdm transformers"
TRAINING_NEEDS = ("h5py", "matplotlib", "msgspec", "psutil", "scipy", "sklearn", "tensorboard", "threadpoolctl")
USE = """
import sys
sys.modules.update(dict.fromkeys({blocked}))  # importing one of them is an error
import vqa
model = vqa.load("model")
print(vqa.__file__)
print(model.ask("image.png", "what color is the circle?", top=2)[0]["answer"])
print(len(model.inspect("image.png", "what color is the circle?")["layers"]))
import vqa.hub
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor
hub, processor = (auto.from_pretrained("hub") for auto in (AutoModelForVisualQuestionAnswering, AutoProcessor))
logits = hub(**processor(images="image.png", text="what color is the circle?")).logits
print(hub.config.id2label[logits.argmax().item()])
"""


def pip(*words):
    ended = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files beside the source
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "__pycache__", "results", "runs", "datasets", "build", "*.egg-info"),
    )
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


def test_it_holds_one_name_and_everything_that_belongs_to_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(name for name in held if name.endswith("/METADATA"))).decode())
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"vqa"}
    git = [shutil.which("git") or "false", "ls-files", "vqa"]
    tracked = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    ours = tracked.stdout.split() or [str(path.relative_to(ROOT)) for path in (ROOT / "vqa").rglob("*.py")]
    assert {"vqa/py.typed", "vqa/settings/base.yaml", *ours} <= set(held)
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(re.split("[<>=]", need)[0] for need in needs) == NEEDS.split()


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the installed wheel alone."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def run(site, *words, folder):
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(site), "MYPY_FORCE_COLOR": "0"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_copied_model_answers_from_it_beside_a_foreign_data_folder(site, trained_wide, tiny, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained_wide / "model", work / "model")
    export(trained_wide, work / "hub", "hub")
    shutil.copy(next((tiny.parent / "world" / "val").glob("*.png")), work / "image.png")
    for name in ("data", "experiments", "main"):
        (work / name).mkdir()
        (work / name / "__init__.py").write_text("raise SystemExit('not the library')")
    ended = run(site, "-c", USE.format(blocked=TRAINING_NEEDS), folder=work)
    assert ended.returncode == 0, ended.stderr
    file, answer, layers, from_hub = ended.stdout.splitlines()
    assert file.startswith(str(site))
    assert answer == from_hub
    assert int(layers) > 0


FOREIGN = """
from pathlib import Path
from typing import Any, assert_type
import vqa
from vqa.cbn import ConditionalBatchNorm2d
from vqa.saved_model import SavedModel
model = vqa.load("model")
assert_type(model, SavedModel)
assert_type(model.ask(Path("image.png"), "what?", top=2), list[dict[str, Any]])
assert_type(model.ask(["image.png", b""], "what?"), list[list[dict[str, Any]]])
assert_type(model.inspect("image.png", "what?"), dict[str, Any])
assert_type(model.inspect("image.png", ["what?"]), list[dict[str, Any]])
norm = ConditionalBatchNorm2d(num_features=64, condition_size=256, hidden_size=128, beta=False)
assert_type(ConditionalBatchNorm2d.from_batch_norm(norm, 256, 128), ConditionalBatchNorm2d)
"""
MISUSES = {
    "vqa.load(3)": 'Argument 1 to "load" has incompatible type "int"',
    'model.ask("image.png", 3)': "No overload variant",
    'model.ask("image.png", "what?").answer': 'has no attribute "answer"',
    "ConditionalBatchNorm2d(64, 256)": 'Missing positional argument "hidden_size"',
    'ConditionalBatchNorm2d("64", 256, 128)': 'incompatible type "str"; expected "int"',
}


def test_a_type_checker_finds_its_types_in_a_foreign_project(site, tmp_path):
    (tmp_path / "foreign.py").write_text(FOREIGN + "\n".join(MISUSES))
    others = ("pydantic", "safetensors", "tokenizers", "torch", "torchvision", "transformers", "yaml")
    skipped = (f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in others)  # reading torch takes a minute
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n" + "".join(skipped))
    ended = run(site, "-m", "mypy", "foreign.py", folder=tmp_path)
    errors = [line for line in ended.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(MISUSES), ended
    first = FOREIGN.count("\n") + 1
    for line, (error, says) in enumerate(zip(errors, MISUSES.values(), strict=True), start=first):
        assert error.startswith(f"foreign.py:{line}: error: "), error
        assert says in error
