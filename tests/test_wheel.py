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

NEEDS = [
    "jinja2",
    "numpy",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "tokenizers",
    "torch",
    "torchvision",
    "tqdm",
    "transformers",
]
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
        ROOT, source, ignore=shutil.ignore_patterns(".*", "results", "runs", "datasets", "build", "*.egg-info")
    )
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


def test_it_holds_one_name_and_everything_that_belongs_to_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(name for name in held if name.endswith("/METADATA"))).decode())
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"vqa"}
    tracked = subprocess.run(["git", "ls-files", "vqa"], cwd=ROOT, capture_output=True, text=True, check=False)
    ours = tracked.stdout.split() or [str(path.relative_to(ROOT)) for path in (ROOT / "vqa").rglob("*.py")]
    assert {"vqa/py.typed", "vqa/settings/base.yaml", *ours} <= set(held)
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(re.split("[<>=]", need)[0] for need in needs) == NEEDS


def test_a_copied_model_answers_from_it_beside_a_foreign_data_folder(wheel, trained, tiny, tmp_path):
    pip("install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    work = tmp_path / "work"
    shutil.copytree(trained / "model", work / "model")
    export(trained, work / "hub", "hub")
    shutil.copy(next((tiny.parent / "world" / "val").glob("*.png")), work / "image.png")
    for name in ("data", "experiments", "main"):
        (work / name).mkdir()
        (work / name / "__init__.py").write_text("raise SystemExit('not the library')")
    ended = subprocess.run(
        [sys.executable, "-c", USE.format(blocked=TRAINING_NEEDS)],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    file, answer, layers, from_hub = ended.stdout.splitlines()
    assert file.startswith(str(tmp_path / "site"))
    assert answer == from_hub
    assert int(layers) > 0
