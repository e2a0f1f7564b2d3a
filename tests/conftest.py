"""What several tests share: tiny synthetic scenes, preprocessed, and a MODERN trained on it for three steps."""

import functools
import math
import os
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)

# Examples depend on the code alone: on its constants, too, of the modules that are imported by then.
fuzzed = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _seed():
    """Random numbers are the same for a test, whichever tests its process ran before."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def _light():
    """`resnet10` has a quarter of its channels, and files reach the disk when the system likes.

    What a network computes is tested on other ResNets too; that files are synchronised, where a test looks for it.
    """
    from tests.resnets import NarrowResNet

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vqa.backbone.ResNet", NarrowResNet)
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name} beside the checkout: its reference data are not tested")
    return SHARED


class Command(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def onnxruntime():
    """The runtime of ONNX files; skips the test where `make` cannot have installed it."""
    pytest.importorskip("torch", minversion="2.15", reason="the extra onnx needs torch 2.15")
    return pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The test's own folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `python main.py …` in this process."""
    import main

    monkeypatch.setattr("vqa.io.progress.SECONDS", math.inf)  # no such lines, however slow the machine is

    def run(*arguments: object) -> Command:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = main.main()
        except SystemExit as stopped:  # argparse's --help
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return Command(code, out, err)

    return run


@pytest.fixture
def done(command):
    """Runs a command that must end with exit code 0; returns how it ended."""

    def run(*arguments: object) -> Command:
        ended = command(*arguments)
        assert ended.code == 0, (arguments, ended)
        return ended

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must end with exit code 2 and one line on standard error; returns the line."""

    def run(*arguments: object) -> str:
        ended = command(*arguments)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        assert ended.err.endswith("\n")
        return ended.err.strip()

    return run


TINY = """\
base: {root}/config/demo.yaml
name: tiny
data: {{folder: {folder}/world, h5: {folder}/world.h5, processes: 1}}
backbone: {{weights: none}}
cbn: {{hidden_size: 8}}
question: {{embedding_size: 8, hidden_size: 16}}
attention: {{units: 8}}
answer: {{fusion_size: 16, hidden_size: 8}}
train: {{epochs: 1, batch_size: 16}}
scenes: {{seed: 7, images: {{train: 12, val: 6}}, pretrain_images: 64, pretrain_epochs: 1}}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A recipe over a world of 12 + 6 images with 48 + 24 questions, its h5 file made."""
    from data.preprocess import preprocess
    from data.scenes.write import write_world
    from experiments.prepare import preprocessing_of
    from vqa.settings.recipes import load_settings

    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(root=ROOT, folder=folder))
    settings = load_settings(config)
    write_world(folder / "world", seed=settings.scenes.seed, images=settings.scenes.images, processes=1)
    preprocess(**preprocessing_of(settings))
    return config


@pytest.fixture(scope="session")
def trained(tiny) -> Path:
    """The run directory of a MODERN trained for one tiny epoch."""
    from experiments.training.train import train
    from vqa.settings.recipes import load_settings

    return train(load_settings(tiny, ["name=trained"]), runs=tiny.parent / "runs").path


@pytest.fixture
def wide(monkeypatch):
    """`resnet10` as it is, as in processes that are not forked; not for `trained`."""
    from torchvision.models import ResNet

    monkeypatch.setattr("vqa.backbone.ResNet", ResNet)


@pytest.fixture
def trained_wide(tiny, wide, tmp_path) -> Path:  # noqa: ARG001
    """As `trained`, with `resnet10` as it is."""
    from experiments.training.train import train
    from vqa.settings.recipes import load_settings

    return train(load_settings(tiny, ["name=trained"]), runs=tmp_path / "wide").path


@pytest.fixture
def forked_workers(monkeypatch):
    """Worker processes begin at once, as `tests.processes.fork_workers` says."""
    from tests.processes import fork_workers

    fork_workers(monkeypatch)


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A copy of that run directory, `tmp_path/trained`, for tests that change it."""
    return Path(shutil.copytree(trained, tmp_path / "trained"))


@pytest.fixture(scope="session")
def image(tiny) -> Path:
    """An image of the validation split."""
    return next((tiny.parent / "world" / "val").glob("*.png"))


@pytest.fixture(scope="session")
def games(tmp_path_factory) -> Path:
    """GuessWhat?! in miniature: `guesswhat.{train,valid,test}.jsonl.gz` and `images/`, in the official format."""
    from tests.fabricated_games import write_games

    return write_games(tmp_path_factory.mktemp("games") / "official")


@pytest.fixture
def raw(tmp_path):
    """Raw files of a split `train` (3 questions, 2 images) and a split `val` (2 questions, 1 image)."""
    from tests.raw_files import TRAIN, VAL, write_split

    return {"train": write_split(tmp_path, "train", TRAIN), "val": write_split(tmp_path, "val", VAL)}


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of labelled images: three classes, each of its colour."""
    from tests.photographs import coloured

    return coloured(tmp_path / "photos")


@pytest.fixture
def left(monkeypatch):
    """Sets how much the disk has left; returns the folders that were asked about."""
    asked = []

    def set_to(size):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda folder: (asked.append(folder), usage(10**15, 0, size))[1])
        return asked

    return set_to


@pytest.fixture
def listening():
    """The handlers of the tests' own process are put back."""
    from vqa.io.processes import SIGNALS, listen

    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}  # ignored in a background job
    listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def suite(here):
    """The suite of `tests.tiny_suite`, loaded in its own working directory."""
    from experiments.suite import load_suite
    from tests.tiny_suite import SUITE, TINY

    (here / "two.yaml").write_text(SUITE)
    return load_suite(here / "two.yaml", TINY)
