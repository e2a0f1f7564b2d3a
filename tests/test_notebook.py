"""The notebook: its code runs in order, on a tiny trained model in the place of the demo's."""

import json
import shutil

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from tests.conftest import ROOT


def test_the_notebook_runs_and_holds_no_output(trained, image, tmp_path, monkeypatch):
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    demo = tmp_path / "runs" / "demo"
    shutil.copytree(trained, demo / "modern")
    shutil.copy(image, demo / "example.png")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")  # where Jupyter runs it
    mpl.use("Agg")
    names = {}
    with torch.random.fork_rng():
        for cell in code:
            exec("".join(cell["source"]), names)
    assert names["right"] > 0.95
    assert names["wrong"] < 0.7
    assert len(plt.get_fignums()) == 4
    plt.close("all")
