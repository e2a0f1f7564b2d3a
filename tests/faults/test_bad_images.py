"""Missing and unreadable images: one policy in preprocessing and evaluation, and their number is always reported."""

import json
import pickle
import shutil

import pytest
import torch

from experiments.process_group import Processes
from experiments.tasks.vqa import VQATask
from experiments.training.stage_cache import choose_images
from experiments.training.train import train
from vqa.io.errors import InputError
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings


@pytest.fixture
def bad(tiny, tmp_path):
    """Scenes of which the first image of `val` is missing, and its second and the first of `train` are not images."""
    world = tmp_path / "world"
    shutil.copytree(tiny.parent / "world", world)
    missing, none, *_ = sorted((world / "val").iterdir())
    missing.unlink()
    none.write_bytes(b"no image")
    min((world / "train").iterdir()).write_bytes(b"")
    return world


@pytest.fixture
def skipped(tiny, bad, tmp_path, done):
    """The h5 file of that world."""
    h5 = tmp_path / "bad.h5"
    words = (f"data.folder={bad}", f"data.h5={h5}", "data.skip_bad_images=true")
    ended = done("preprocess", "--config", tiny, *words)
    assert "3 of its 18 images were missing or unreadable" in ended.out
    return h5


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_from_raw_files_lists_all_bad_images(command, trained, bad, tmp_path, workers):
    words = ("eval", "--run", trained, "--out", tmp_path / "out", "data.h5=absent.h5", f"data.folder={bad}")
    ended = command(*words, f"workers={workers}")
    assert ended.code == 2
    assert ended.err.startswith("error: 2 image(s) missing or unreadable, by id: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith("; repair them, or skip them with data.skip_bad_images=true\n")
    assert "no such file" in ended.out
    assert "cannot be read as an image" in ended.out
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_in_evaluation_they_are_what_they_are_in_the_h5(done, trained, bad, skipped, tmp_path, workers):
    said = {"raw": "2 image(s) missing or unreadable:", "h5": "2 image(s) of split 'val' were missing or unreadable"}
    for name, h5, count in (("raw", "absent.h5", workers), ("h5", skipped, 0)):
        words = (f"data.h5={h5}", f"data.folder={bad}", "data.skip_bad_images=true", f"workers={count}")
        ended = done("eval", "--run", trained, "--out", tmp_path / name, *words)
        assert said[name] in ended.out
    results = [json.loads((tmp_path / name / "results_val.json").read_text()) for name in ("raw", "h5")]
    assert results[0] == results[1]
    assert len(results[0]) == 24


def test_a_split_without_any_image_is_one_line_in_evaluation(refused, trained, bad, tmp_path):
    shutil.rmtree(bad / "val")
    words = ("data.h5=absent.h5", f"data.folder={bad}", "data.skip_bad_images=true")
    said = refused("eval", "--run", trained, "--out", tmp_path, *words)
    assert "no such file, nor any other image of split 'val'; see data.splits.val.images" in said


def test_training_reports_how_many_there_are_and_accepts_no_others(tiny, bad, skipped, tmp_path, done, capsys):
    settings = load_settings(tiny, ["name=some", f"data.folder={bad}", f"data.h5={skipped}", "data.cache_gib=0"])
    train(settings, runs=tmp_path)
    assert "bad.h5: 3 image(s) were missing or unreadable: their questions are not trained" in capsys.readouterr().out
    train(settings, resume=True, runs=tmp_path)
    task = VQATask(settings)
    images = choose_images(task, task.new_model(fresh=True, say=print).resnet, Processes()).images
    shutil.copytree(tiny.parent / "world", bad, dirs_exist_ok=True)  # all are mended
    done("preprocess", "--config", tiny, f"data.folder={bad}", f"data.h5={skipped}")
    with pytest.raises(InputError, match="bad.h5: not the data that"):
        train(settings, resume=True, runs=tmp_path)
    worker = pickle.loads(pickle.dumps(images))  # a run that is in progress reads on: it takes no mended image
    assert all(worker[row].any() for row in range(18))


def test_statistics_are_re_estimated_without_them(trained, bad, skipped, tmp_path, done):
    made = []
    for name, words in (("h5", [f"data.h5={skipped}"]), ("raw", ["data.h5=absent.h5", "data.skip_bad_images=true"])):
        out = ("--out", tmp_path / name, "--split", "val")
        ended = done("recalibrate", "--run", trained, *out, f"data.folder={bad}", "train.batch_size=24", *words)
        assert "statistics re-estimated on the images of 16 questions" in ended.out
        made.append(load_model(tmp_path / name).model.state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_a_batch_that_is_too_small_without_them_is_skipped(refused, trained, skipped, tmp_path, monkeypatch):
    monkeypatch.setattr("vqa.resnet.ModulatedResNet.least_batch", lambda *_: 17)  # 16 of 24 questions have an image
    words = ("--out", tmp_path / "out", "--split", "val", f"data.h5={skipped}", "train.batch_size=24")
    assert "split 'val': too few of its images can be read" in refused("recalibrate", "--run", trained, *words)
    assert not (tmp_path / "out").exists()
