"""Imports run one way: main → experiments → vqa → data; the model knows neither files nor settings."""

import ast

import pytest

from tests.conftest import ROOT

BELOW = {"data": {"data"}, "vqa": {"data", "vqa"}, "experiments": {"data", "vqa", "experiments"}}
MODEL = (
    "backbone",
    "verified",
    "norms",
    "modulate",
    "modulate_cpu",
    "modulate_eager",
    "convolution",
    "cbn",
    "resnet",
    "question",
    "attention",
    "model",
)


def imported(path) -> set[str]:
    """Full names of what a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("folder", BELOW)
def test_imports_run_one_way(folder):
    ours = {"main", "data", "vqa", "experiments", "tests"}
    for path in (ROOT / folder).glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert tops & ours <= BELOW[folder], path.name


@pytest.mark.parametrize("module", MODEL)
def test_the_model_knows_neither_files_nor_settings(module):
    known = {f"vqa.{name}" for name in MODEL}
    for name in imported(ROOT / "vqa" / f"{module}.py"):
        if name.startswith(("vqa.", "data.")):
            assert name.startswith(tuple(known)), name


def test_decoding_processes_do_without_torch():
    import subprocess
    import sys

    code = "import sys, data.preprocess, data.world; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
    assert "torch" not in imported(ROOT / "data" / "images.py")  # not even within a function
