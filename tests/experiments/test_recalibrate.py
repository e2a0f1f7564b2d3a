"""Re-estimated statistics: a new model that differs in them alone, on a command line that refuses what is wrong."""

import shutil

import pytest
import torch

from experiments.training.train import train
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings


def test_only_the_running_statistics_change(done, trained, tmp_path):
    ended = done("recalibrate", "--run", trained, "--out", tmp_path / "new", "--split", "val", "--batches", 1)
    assert "statistics re-estimated on the images of 16 questions" in ended.out
    old, new = load_model(trained), load_model(tmp_path / "new")
    assert new.training["recalibrated_on"] == "val"
    changed = 0
    for name, value in new.model.state_dict().items():
        same = torch.equal(value, old.model.state_dict()[name])
        if "running" in name:
            changed += not same
        elif "num_batches_tracked" not in name:
            assert same, name
    assert changed > 20
    done("eval", "--run", tmp_path / "new")


def test_the_same_images_give_the_same_statistics_again(done, trained, tiny, tmp_path):
    for name in ("one", "two", "two"):  # its own model may be replaced
        done("recalibrate", "--run", trained, "--config", tiny, "--out", tmp_path / name)
    one, two = (load_model(tmp_path / name).model.state_dict() for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_files_of_a_recipe_are_found_whatever_their_names(done, trained, tiny, tmp_path):
    shutil.copy(load_settings(tiny).data.h5, tmp_path / "world #2.h5")  # as a word, ` #2.h5` would be a comment
    recipe = tmp_path / "named.yaml"
    recipe.write_text(f"base: {tiny}\ndata: {{folder: nowhere, h5: '{tmp_path}/world #2.h5'}}\n")
    words = ["--config", recipe, "--out", tmp_path / "out", "--batches", 1]
    done("recalibrate", "--run", trained, *words)


def test_without_an_h5_file_the_raw_files_of_the_recipe_are_read(refused, trained, tiny, tmp_path):
    recipe = tmp_path / "named.yaml"
    recipe.write_text(f"base: {tiny}\ndata: {{h5: nowhere.h5, splits: {{train: {{questions: other.json}}}}}}\n")
    said = refused("recalibrate", "--run", trained, "--config", recipe, "--out", tmp_path / "out")
    assert "world/other.json: no such file, and no nowhere.h5" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cbn.stages=[]"], "cbn.stages=[]: a trained model cannot be changed"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--batches", "0"], "'0' is not a number from 1 to 1000000000"),
    ],
)
def test_wrong_input_is_one_line(refused, trained, tmp_path, words, says):
    assert says in refused("recalibrate", "--run", trained, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_model_that_new_statistics_may_harm_is_named(done, trained, tiny, tmp_path):
    said = "backbone.statistics=population, whose statistics stay as they were"
    assert said in done("recalibrate", "--run", trained, "--out", tmp_path / "one").out
    run = train(load_settings(tiny, ["name=batch", "backbone.statistics=batch"]), runs=tmp_path).path
    assert "whose statistics stay" not in done("recalibrate", "--run", run, "--out", tmp_path / "other").out


def test_a_condition_on_the_image_is_refused(refused, tiny, tmp_path):
    run = train(load_settings(tiny, ["name=image", "cbn.condition=image"]), runs=tmp_path).path
    assert "cbn.condition=image passes each image" in refused("recalibrate", "--run", run, "--out", tmp_path / "out")


def test_no_trained_model_is_overwritten(refused, trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "copied" / "model")
    for out in (trained, tmp_path / "copied"):
        assert "must name another directory" in refused("recalibrate", "--run", trained, "--out", out)
