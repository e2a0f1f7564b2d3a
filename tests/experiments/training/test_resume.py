"""Resume: exact after any step, what may change, and what is refused; checkpoints are written whole."""

import errno
import itertools
import json
import shutil

import pytest
import torch
import yaml

from data.preprocess import preprocess
from data.scenes.write import WORLD, write_world
from data.sources import Source
from experiments.prepare import split_files
from experiments.tasks.vqa import VQATask
from experiments.training import loop
from experiments.training.checkpoint import load_checkpoint, save_checkpoint
from experiments.training.run_directory import RunDirectory
from experiments.training.train import train
from tests.calls import calling, failing, interrupt
from tests.runs import lines, same_weights, weights
from vqa.io.errors import InputError
from vqa.settings.recipes import load_settings


# within the first epoch, at the second's first step, within the second
@pytest.mark.parametrize(
    ("words", "stops"),
    [
        (["train.schedule=constant"], (2, 4, 6)),
        (["backbone.train=stage4", "cbn.stages=[4]"], (2,)),
        (["train.loss=bce", "train.optimiser=adamw", "train.weight_decay=0.1"], (2,)),
        (["train.optimiser=adamax", "train.schedule=cosine", "train.warm_up=0.6"], (3,)),
        (["train.schedule=steps", "train.warm_up=0.2", "train.decay_at=[0.4, 0.7]", "train.augment=crop_flip"], (5,)),
        (["cbn.condition=image", "cbn.normaliser=adaptive", "backbone.statistics=reestimated"], (2,)),
    ],
)
def test_every_step_can_be_the_last_before_a_resume(tiny, tmp_path, monkeypatch, words, stops):
    words = [*words, "train.epochs=2", "train.checkpoint_every=1", "answer.dropout=0.3", "train.batch_size=16"]
    whole = train(load_settings(tiny, ["name=whole", *words]), runs=tmp_path).path
    for stop in stops:
        settings = load_settings(tiny, [f"name=stopped{stop}", *words])
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            stopping = calling(loop.nn.utils.clip_grad_norm_, stop, interrupt)
            patched.setattr(loop.nn.utils, "clip_grad_norm_", stopping)
            train(settings, runs=tmp_path)
        resumed = train(settings, resume=True, runs=tmp_path).path
        assert same_weights(whole, resumed), stop
        assert lines(whole) == lines(resumed), stop


def test_the_steps_of_an_epoch_are_kept_before_its_validation(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(VQATask, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(load_settings(tiny, ["name=mine", "train.checkpoint_every=2"]), runs=tmp_path)
    progress = load_checkpoint(tmp_path / "mine/checkpoints/last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 3)


def test_a_finished_run_is_left_alone_or_trained_longer(tiny, tmp_path, capsys):
    words = ["train.schedule=constant", "answer.dropout=0.3", "train.validate_on=null"]
    whole = train(load_settings(tiny, ["name=whole", *words, "train.epochs=2"]), runs=tmp_path).path
    train(load_settings(tiny, ["name=longer", *words]), runs=tmp_path)
    longer = load_settings(tiny, ["name=longer", *words, "train.epochs=2"])
    run = train(longer, resume=True, runs=tmp_path).path
    assert same_weights(whole, run)
    assert lines(whole) == lines(run)
    for folder in (run, run / "model"):
        assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["epochs"] == 2
    capsys.readouterr()
    before = (run / "checkpoints/last.pt").read_bytes()
    train(longer, resume=True, runs=tmp_path)
    assert "finished, nothing to do" in capsys.readouterr().out
    assert (run / "checkpoints/last.pt").read_bytes() == before
    with pytest.raises(InputError, match="started with train.epochs 2, not 1"):
        train(load_settings(tiny, ["name=longer", *words]), resume=True, runs=tmp_path)


@pytest.mark.usefixtures("finished")
def test_a_run_on_one_cycle_cannot_be_trained_longer(tiny, tmp_path):
    for words in (["train.epochs=2"], ["train.epochs=2", "train.schedule=constant"]):
        with pytest.raises(InputError, match=r"train.epochs cannot grow from 1 to 2: one_cycle lowers"):
            train(load_settings(tiny, ["name=trained", *words]), resume=True, runs=tmp_path)


def test_a_run_that_stopped_early_is_trained_on_with_more_patience(tiny, tmp_path, monkeypatch, capsys):
    given, real = [30.0, 20.0, 10.0, 40.0], VQATask.score
    scores = iter([*given, *given])
    monkeypatch.setattr(VQATask, "score", lambda *of: real(*of) | {"overall": next(scores)})
    words = ["train.epochs=4", "train.patience=3"]
    whole = train(load_settings(tiny, ["name=whole", *words]), runs=tmp_path).path
    impatient = ["name=early", words[0], "train.patience=1"]
    run = train(load_settings(tiny, impatient), runs=tmp_path).path
    assert len(lines(run)) == 2
    train(load_settings(tiny, impatient), resume=True, runs=tmp_path)
    assert "finished, stopped early by train.patience" in capsys.readouterr().out
    scores = iter(given[2:])
    train(load_settings(tiny, ["name=early", *words]), resume=True, runs=tmp_path)
    assert lines(whole) == lines(run)
    assert same_weights(whole, run)
    with pytest.raises(InputError, match="started with train.patience 3, not 1"):
        train(load_settings(tiny, impatient), resume=True, runs=tmp_path)


def test_what_makes_training_faster_can_change_on_resume(tiny, tmp_path):
    words = ["train.epochs=2", "train.schedule=constant", "train.learning_rate=1e-4", "backbone.train=stage4"]
    words += ["cbn.stages=[4]", "device=cpu", "train.validate_on=null"]
    whole = train(load_settings(tiny, ["name=whole", *words]), runs=tmp_path).path
    begun = weights(train(load_settings(tiny, ["name=other", *words, "train.epochs=1"]), runs=tmp_path).path)
    slow = ["speed.fused=false", "speed.share_images=false", "speed.channels_last=false", "speed.recompute=[4]"]
    run = train(load_settings(tiny, ["name=other", *words, *slow, "data.cache_gib=0"]), resume=True, runs=tmp_path).path
    ours, theirs = weights(whole), weights(run)
    for name in ("resnet.network.layer4.0.conv1.weight", "fusion.visual.weight"):
        apart, way = (ours[name] - theirs[name]).norm(), (ours[name] - begun[name]).norm()
        assert apart < 0.2 * way, (name, apart, way)


@pytest.mark.usefixtures("finished")
def test_a_run_is_not_overwritten_nor_mixed(tiny, tmp_path):
    with pytest.raises(InputError, match="--resume"):
        train(load_settings(tiny, ["name=trained"]), runs=tmp_path)
    for changed in ("train.learning_rate=0.5", "train.patience=3"):
        with pytest.raises(InputError, match=f"started with {changed.partition('=')[0]} "):
            train(load_settings(tiny, ["name=trained", changed]), resume=True, runs=tmp_path)


def test_each_resume_is_written_down_after_the_environment_that_the_run_began_in(tiny, tmp_path):
    run = RunDirectory(tmp_path)
    for processes in (1, 2, 3):
        run.start(load_settings(tiny), torch.device("cpu"), processes, trained_parameters=7)
        run.checkpoint.parent.mkdir(exist_ok=True)
        run.checkpoint.touch()
    begun = json.loads((tmp_path / "environment.json").read_text())
    assert [begun["processes"], *(resumed["processes"] for resumed in begun["resumed"])] == [1, 2, 3]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ended_before_its_first_checkpoint_does_not_block_its_name(tiny, tmp_path, monkeypatch, resume):
    with monkeypatch.context() as patched:
        patched.setattr(loop.nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(load_settings(tiny, ["name=mine"]), runs=tmp_path)
    run = train(load_settings(tiny, ["name=mine", "cbn.stages=[4]"]), resume=resume, runs=tmp_path).path
    assert yaml.safe_load((run / "config.yaml").read_text())["cbn"]["stages"] == [4]
    assert "resumed" not in json.loads((run / "environment.json").read_text())
    with pytest.raises(InputError, match="already holds a run"):
        train(load_settings(tiny, ["name=mine"]), runs=tmp_path)


def test_a_run_whose_best_weights_are_gone_or_damaged_is_not_resumed(tiny, finished, tmp_path):
    weights = finished / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for _ in range(2):
        with pytest.raises(InputError, match="model.safetensors: cannot be read as weights .*; choose another `name`"):
            train(load_settings(tiny, ["name=trained"]), resume=True, runs=tmp_path)
        weights.unlink(missing_ok=True)


def test_a_run_whose_checkpoint_is_gone_is_not_trained_over(tiny, finished, tmp_path):
    (finished / "checkpoints/last.pt").unlink()
    metrics, model = finished / "metrics.jsonl", finished / "model/model.safetensors"
    (finished / "environment.json").write_text('{"git_commit": "of the lost one"}')
    metrics.write_text(2 * metrics.read_text())
    before = model.stat().st_mtime_ns
    with pytest.raises(InputError, match="last.pt: missing, so that the run cannot be resumed"):
        train(load_settings(tiny, ["name=trained"]), resume=True, runs=tmp_path)
    assert model.stat().st_mtime_ns == before
    # killed after its first epoch, before its checkpoint
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    train(load_settings(tiny, ["name=trained"]), resume=True, runs=tmp_path)
    assert model.stat().st_mtime_ns > before
    assert "of the lost one" not in (finished / "environment.json").read_text()


def test_a_checkpoint_of_another_program_is_one_line(tiny, finished, tmp_path):
    file = finished / "checkpoints/last.pt"
    saved = torch.load(file, weights_only=True)
    saved["progress"] |= {"epoch": 1, "step": 3, "history": []}  # not finished
    contents = [
        [saved],
        {"state_dict": saved["model"], "epoch": 3},
        saved | {"progress": {"epoch": "first"}},
        saved | {"schedule": {}},
    ]
    contents += [saved | {part: wrong} for part in saved for wrong in ([1], {"a": 1}, None)]
    contents.append(saved | {"processes": 2 * saved["processes"]})
    contents += [saved | {"processes": [{"loss_sum": 0.0, "random": wrong}]} for wrong in ({}, {"cpu": [1]})]
    for content in contents:
        torch.save(content, file)
        with pytest.raises(
            InputError, match=r"last.pt: (cannot be read as a checkpoint \(.|made by)|not the data that"
        ):
            train(load_settings(tiny, ["name=trained"]), resume=True, runs=tmp_path)


def test_a_run_is_not_resumed_on_other_data(tiny, finished, tmp_path):
    answers = (finished / "model" / "answers.json").read_bytes()
    other = load_settings(tiny, ["name=trained", f"data.folder={tmp_path}/world", f"data.h5={tmp_path}/other.h5"])
    write_world(tmp_path / "world", seed=8, images={"train": 9, "val": 3}, processes=1)
    (tmp_path / "world" / WORLD).unlink()  # as files of a user's own
    made = {"image_size": 64, "min_word_count": 2, "source": Source(20), "skip_bad_images": False, "threads": 1}
    preprocess(split_files(other), tmp_path / "other.h5", **made)
    with pytest.raises(InputError, match="not the data that"):
        train(other, resume=True, runs=tmp_path)
    assert (finished / "model" / "answers.json").read_bytes() == answers


def test_a_checkpoint_without_its_settings_is_not_overwritten(tiny, finished, tmp_path):
    (finished / "config.yaml").unlink()
    for resume in (False, True):
        with pytest.raises(InputError, match="trained"):
            train(load_settings(tiny, ["name=trained"]), resume=resume, runs=tmp_path)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("copy", ["copy/model", "copy"])
def test_a_copied_model_is_not_trained_over(tiny, trained, tmp_path, copy, resume):
    shutil.copytree(trained / "model", tmp_path / copy)
    with pytest.raises(InputError, match="copy: holds a model that was not trained here; choose another"):
        train(load_settings(tiny, ["name=copy", "cbn.stages=[]"]), resume=resume, runs=tmp_path)
    assert {file.name for file in (tmp_path / copy).iterdir()} == {file.name for file in (trained / "model").iterdir()}


@pytest.mark.parametrize(("work", "steps"), [("epoch 1", 2), ("validation 1", 3)])
def test_steps_are_kept_where_their_progress_cannot_be_shown(tiny, tmp_path, monkeypatch, work, steps):
    def gone(batches, _total, what, _done):
        yield from itertools.islice(batches, 2)
        if what.endswith(work):
            raise OSError(errno.EIO, "terminal")
        yield from batches

    monkeypatch.setattr("experiments.training.trainer.shown", gone)
    with pytest.raises(OSError, match="terminal"):
        train(load_settings(tiny, ["name=mine", "train.checkpoint_every=0"]), runs=tmp_path)
    saved = torch.load(tmp_path / "mine/checkpoints/last.pt", weights_only=True)
    assert (saved["progress"]["step"], saved["schedule"]["last_epoch"]) == (steps, steps)


def test_an_epoch_is_kept_where_its_line_cannot_be_printed(tiny, tmp_path, monkeypatch):
    def closed(text, **_):
        if text.startswith("epoch "):
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        train(load_settings(tiny, ["name=mine", "train.epochs=2", "train.checkpoint_every=0"]), runs=tmp_path)
    saved = torch.load(tmp_path / "mine/checkpoints/last.pt", weights_only=True)
    assert (saved["progress"]["epoch"], len(lines(tmp_path / "mine"))) == (2, 1)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"step": 1})
    monkeypatch.setattr(torch, "save", lambda _, opened: opened.write(b"half") and failing(errno.ENOSPC)())
    with pytest.raises(InputError, match=r"last.pt: cannot be written \(no space left on device\); free some space"):
        save_checkpoint(file, {"step": 2})
    assert load_checkpoint(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
