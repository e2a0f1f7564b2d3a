"""A folder for `transformers`, and what it was made of."""

import pytest
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

import vqa


@pytest.fixture(scope="module")
def saved(trained):
    return vqa.load(trained)


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    from vqa.hub.folder import save_hub_folder

    made = tmp_path_factory.mktemp("hub") / "folder"
    made.mkdir()
    save_hub_folder(saved, made, [])
    return made


@pytest.fixture(scope="module")
def images(tiny):
    return sorted((tiny.parent / "world" / "val").glob("*.png"))[:3]


@pytest.fixture
def hub(folder):
    return AutoModelForVisualQuestionAnswering.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
