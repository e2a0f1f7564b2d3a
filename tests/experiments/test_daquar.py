"""Real data in the VQA v1 format, where the folder of reference data lies beside the checkout."""

import json

import pytest

from data.h5_file import Store
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def small(shared):
    return [f"data.folder={shared / 'daquar'}", "data.image_size=32"]


def test_daquar_is_preprocessed_trained_evaluated_asked_and_inspected(command, shared, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "config" / "daquar.yaml"
    words = [*small, f"data.h5={tmp_path}/daquar.h5"]
    ended = command("preprocess", "--config", config, *words)
    assert ended.code == 0, ended.err
    assert "train: 6795 questions about 794 images" in ended.out
    assert "val: 5673 questions about 653 images" in ended.out
    store = Store(tmp_path / "daquar.h5")
    assert len(store.usable) == 794 + 653
    train = store.table("train")
    assert (len(train), len(store.table("val"))) == (6795, 5673)
    official = json.loads((shared / "daquar/mscoco_train2014_annotations.json").read_text())["annotations"]
    for row in range(0, 6795, 500):
        assert train.ids[row] == official[row]["question_id"]
        assert train.answers(row) == [given["answer"] for given in official[row]["answers"]]

    small = ["train.epochs=1", "train.validate_on=null"]
    small += ["cbn.stages=[4]", "cbn.hidden_size=32", "question.hidden_size=64"]
    ended = command("train", "--config", config, *words, *small)
    assert ended.code == 0, ended.err
    assert command("eval", "--run", "runs/daquar").code == 0
    metrics = json.loads((tmp_path / "runs/daquar/metrics_val.json").read_text())
    assert metrics["questions"] == 5673
    assert metrics["overall"] > 6  # always answering "2" gives 4.97
    image = next((shared / "daquar/images/val2014").glob("*.jpg"))
    question = ("--image", image, "--question", "what is on the table?")
    assert command("ask", "--run", "runs/daquar", *question).code == 0
    assert command("inspect", "--run", "runs/daquar", *question).code == 0
