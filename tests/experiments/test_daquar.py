"""Real data in the VQA v1 format, where the folder of reference data lies beside the checkout."""

import json

import pytest

from data.h5_file import Store
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def small(shared):
    return [f"data.folder={shared / 'daquar'}", "data.image_size=32"]


def test_daquar_is_preprocessed_trained_evaluated_asked_and_inspected(done, shared, small, here):
    config = ROOT / "config" / "daquar.yaml"
    words = [*small, f"data.h5={here}/daquar.h5"]
    ended = done("preprocess", "--config", config, *words)
    assert "train: 6795 questions about 794 images" in ended.out
    assert "val: 5673 questions about 653 images" in ended.out
    store = Store(here / "daquar.h5")
    assert len(store.usable) == 794 + 653
    train = store.table("train")
    assert (len(train), len(store.table("val"))) == (6795, 5673)
    official = json.loads((shared / "daquar/mscoco_train2014_annotations.json").read_text())["annotations"]
    for row in range(0, 6795, 500):
        assert train.ids[row] == official[row]["question_id"]
        assert train.answers(row) == [given["answer"] for given in official[row]["answers"]]

    small = ["train.epochs=1", "train.validate_on=null"]
    small += ["cbn.stages=[4]", "cbn.hidden_size=32", "question.hidden_size=64"]
    done("train", "--config", config, *words, *small)
    done("eval", "--run", "runs/daquar")
    metrics = json.loads((here / "runs/daquar/metrics_val.json").read_text())
    assert metrics["questions"] == 5673
    assert metrics["overall"] > 6  # always answering "2" gives 4.97
    image = next((shared / "daquar/images/val2014").glob("*.jpg"))
    question = ("--image", image, "--question", "what is on the table?")
    done("ask", "--run", "runs/daquar", *question)
    done("inspect", "--run", "runs/daquar", *question)
