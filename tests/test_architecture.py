"""Imports run one way: main → experiments → data → vqa. The model uses neither files nor settings."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import printed_by

BELOW = {"vqa": {"vqa"}, "data": {"vqa", "data"}, "experiments": {"vqa", "data", "experiments"}}
# The model, and what it may import of the library.
MODEL = (
    *("attention", "blocks", "cbn", "foreign", "model", "norm_family", "norms", "predictor", "question", "resnet"),
    "tasks.guesswhat",
)
OF_MODEL = (*(f"vqa.{name}" for name in MODEL), "vqa.backbone", "vqa.kernels")
ROOMS = {"io": ("vqa.io",), "kernels": ("vqa.io", "vqa.kernels"), "text": ("vqa.io", "vqa.text")}
# A room is entered by these modules (or what its `__init__` holds) only; the others are its own.
DOORS = {
    "vqa.kernels": ("vqa.kernels.modulate", "vqa.kernels.frozen_conv"),
    "vqa.hub": ("vqa.hub.folder", "vqa.hub.onnx"),
    "vqa.inspect": ("vqa.inspect.inspection", "vqa.inspect.html"),
    "vqa.saved_model": ("vqa.saved_model.SavedModel", "vqa.saved_model.load_model", "vqa.saved_model.files"),
    "vqa.tasks": ("vqa.tasks.asked", "vqa.tasks.guesswhat", "vqa.tasks.objects"),
    "experiments.tasks": ("experiments.tasks.TASKS", "experiments.tasks.Task", "experiments.tasks.vqa"),
}


def imported(path: Path) -> set[str]:
    """Full names of the modules and of what a file imports from them, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("folder", BELOW)
def test_imports_run_one_way(folder):
    ours = {"main", "tests", *BELOW}
    for path in files(folder):
        assert {name.split(".")[0] for name in imported(path)} & ours <= BELOW[folder], path


def test_the_model_knows_neither_files_nor_settings():
    for module in MODEL:
        for name in imported(ROOT / "vqa" / f"{module.replace('.', '/')}.py"):
            assert not name.startswith("vqa.") or within(name, OF_MODEL), (module, name)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_small_things_know_no_other(room):
    for path in files(f"vqa/{room}"):
        for name in imported(path):
            assert not name.startswith("vqa.") or within(name, ROOMS[room]), (path, name)


@pytest.mark.parametrize("room", DOORS)
def test_a_room_is_entered_by_its_door(room):
    for path in files(*BELOW):
        if not path.is_relative_to(ROOT / room.replace(".", "/")):
            for name in imported(path):
                assert not name.startswith(f"{room}.") or within(name, DOORS[room]), (path, name)


def test_transformers_is_behind_two_doors():
    inside = {ROOT / "vqa/text/encoder.py", *files("vqa/hub")}
    for path in set(files(*BELOW)) - inside:
        assert not any(within(name, ("transformers",)) for name in imported(path)), path


def test_decoding_processes_and_small_tools_do_without_torch():
    assert "torch" not in imported(ROOT / "vqa/io/images.py")  # not even within a function
    light = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files("vqa/io", "vqa/text")]
    code = f"import sys, vqa, data.preprocess, data.scenes.write, {', '.join(light)}; print('torch' in sys.modules)"
    assert printed_by(code) == "False"
