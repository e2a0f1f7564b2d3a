"""VQA v2 to the challenge server: the commands of docs/vqa_v2.md alone, on official files in miniature."""

import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from data.h5_file import H5Images, Store
from tests.conftest import ROOT
from tests.raw_files import COCO_IMAGES, COLOURS, write_vqa_v2
from tests.test_recipes import ON_TINY_DATA, commands_of

PAGE = "docs/vqa_v2.md"


@pytest.fixture
def folder(here):
    """A folder as a fresh checkout into which the downloads were put; it is the working directory."""
    (here / "config").symlink_to(ROOT / "config")
    write_vqa_v2(here / "datasets" / "vqa_v2")
    with zipfile.ZipFile("datasets/glove.42B.300d.zip", "w") as archive:
        archive.writestr("glove.42B.300d.txt", "cat " + " ".join(["0.1"] * 300))
    return here


def questions_of(folder, name):
    file = folder / "datasets" / "vqa_v2" / f"v2_OpenEnded_mscoco_{name}2015_questions.json"
    return [question["question_id"] for question in json.loads(file.read_text())["questions"]]


def test_the_page_leads_from_the_downloads_to_the_files_for_the_server(done, refused, folder):
    for line in commands_of(PAGE):
        assert line[:2] == ["python", "main.py"]
        name, *options = line[2:]
        done(name, *options, *ON_TINY_DATA.get(name, []))

    plain, both = (Store(folder / "datasets" / f"vqa_v2_{name}224.h5") for name in ("", "trainval_"))
    kinds = [kind for images in COCO_IMAGES.values() for kind in images.values()]
    images = H5Images(plain.path)
    for row, (mode, _) in enumerate(kinds):  # those of test-dev are stored once, with those of test
        colour = Image.new(mode, (1, 1), COLOURS[mode]).convert("RGB").getpixel((0, 0))
        assert np.abs(images[row] - np.array(colour)).max() <= 8
    for store in (plain, both):
        assert set(store.splits) == {"train", "val", "test-dev", "test"}
        assert len(store.usable) == len(kinds)
        assert not store.table("test-dev").given.size
        assert not store.table("test").given.size
    assert "zebra" not in plain.tokenizer.get_vocab()
    assert "lilac" not in plain.vocabulary
    assert "zebra" in both.tokenizer.get_vocab()
    assert "lilac" in both.vocabulary

    runs = folder / "runs" / "vqa_v2"
    recipes = {path.stem for path in (ROOT / "config" / "vqa_v2").iterdir()}
    assert {path.parent.parent.name for path in runs.glob("*/model/model.safetensors")} == recipes
    for run in ("modern", "baseline", "finetune_bn"):
        metrics = json.loads((runs / run / "metrics_val.json").read_text())
        assert (metrics["trained_on"], metrics["questions"]) == (["train"], 4)
    trained = "was trained on split 'val'"
    assert trained in refused("eval", "--run", runs / "modern_trainval", "--out", folder / "out")
    for run in ("modern", "modern_trainval"):
        given = {}
        for name in ("test-dev", "test"):
            results = json.loads((runs / run / f"results_{name}.json").read_text())
            assert all(set(entry) == {"question_id", "answer"} and entry["answer"] for entry in results)
            assert [entry["question_id"] for entry in results] == questions_of(folder, name)
            given[name] = {(entry["question_id"], entry["answer"]) for entry in results}
            assert not (runs / run / f"metrics_{name}.json").exists()
        assert given["test-dev"] < given["test"]


def test_the_test_splits_can_be_added_later(done, command, folder):
    hidden = (folder / "datasets" / "vqa_v2" / "test2015").rename(folder / "test2015")
    asked = ("preprocess", "--config", "config/vqa_v2/modern.yaml", "data.image_size=64")
    assert command(*asked).code == 2
    done(*asked, "data.splits.test-dev=null", "data.splits.test=null")
    assert len(Store(folder / "datasets" / "vqa_v2_224.h5").usable) == 5
    hidden.rename(folder / "datasets" / "vqa_v2" / "test2015")
    ended = done(*asked)
    assert "its 5 images are kept" in ended.out


def test_the_page_names_the_files_and_settings_as_they_are(folder):
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    files = {file.name for file in (folder / "datasets" / "vqa_v2").glob("*.json")}
    assert len(files) == 6
    assert set(re.findall(r"`(v2_[\w-]+\.json)`", text)) == files
    for name, image in re.findall(r"`(\w+2014|test2015)/(COCO_\w+_\d{12}\.jpg)`", text):
        assert (folder / "datasets" / "vqa_v2" / name / image).exists()
    results = set(re.findall(r"`(results_[\w-]+\.json)`", text))
    assert results == {"results_test-dev.json", "results_test.json"}
