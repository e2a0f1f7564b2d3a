"""The oracle from official files to answers: preprocess, train, eval, ask, inspect, and what is refused on the way."""

from pathlib import Path

import pytest

from data.preprocess import preprocess
from experiments.prepare import preprocessing_of
from experiments.training.trainer import train
from tests.conftest import ROOT
from vqa.settings.recipes import load_settings

RECIPE = """\
base: {root}/config/guesswhat/cbn.yaml
name: oracle
device: cpu
workers: 0
data: {{folder: {games}, h5: {folder}/games.h5, image_size: 32, min_word_count: 1, processes: 1, cache_gib: 0}}
backbone: {{name: resnet10, weights: none}}
cbn: {{hidden_size: 4}}
question: {{embedding_size: 8, hidden_size: 12}}
answer: {{hidden_size: 16}}
guesswhat: {{category_size: 6}}
train: {{epochs: 2, batch_size: 8, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def recipe(games, tmp_path_factory) -> Path:
    """A recipe over the fabricated games, its h5 file made with whole images, which serves all inputs."""
    folder = tmp_path_factory.mktemp("oracle")
    config = folder / "oracle.yaml"
    config.write_text(RECIPE.format(root=ROOT, games=games, folder=folder))
    preprocess(**preprocessing_of(load_settings(config, ["inputs=[crop, image, spatial, category, question]"])))
    return config


@pytest.fixture(scope="module")
def oracle(recipe) -> Path:
    """The run directory of MODERN on crop, box and category."""
    return train(load_settings(recipe), runs=recipe.parent / "runs").path


def test_x(oracle, command):
    print((oracle / "metrics.jsonl").read_text())
    print(command("eval", "--run", oracle))
    print((oracle / "metrics_val.json").read_text())
