"""Training: what a run directory holds, what is trained and kept, and what is refused before the first step."""

import dataclasses
import json
import shutil
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml

import data.loader
from data.batches import EpochSampler
from data.h5_file import H5Images, _digest_of
from data.preprocess import preprocess
from experiments.prepare import preprocessing_of
from experiments.process_group import Processes
from experiments.recalibrate import recalibrate
from experiments.tasks.vqa import VQATask
from experiments.training.nonfinite import NotFiniteError
from experiments.training.optimiser import rate_factor
from experiments.training.run_directory import RunDirectory
from experiments.training.train import _check_batch_statistics, prepare, train
from experiments.training.trainer import Trainer
from tests.runs import lines, same_weights, weights
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings


def test_a_run_directory_explains_itself(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "model"}
    assert {path.name for path in (trained / "model").iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "answers.json",
        "preprocessing.json",
    }
    line = json.loads((trained / "metrics.jsonl").read_text())
    assert {"epoch", "train_loss", "val_overall"} <= line.keys()
    assert 0 <= line["val_overall"] <= 100
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert {"git_commit", "device", "seed"} <= environment.keys()
    assert yaml.safe_load((trained / "config.yaml").read_text())["train"]["epochs"] == 1


def test_the_same_seed_gives_the_same_weights(tiny, trained, tmp_path):
    same, other = (
        train(load_settings(tiny, [f"name={name}", *words]), runs=tmp_path).path
        for name, words in (("same", []), ("other", ["seed=7"]))
    )
    assert same_weights(trained, same)
    assert lines(trained) == lines(same)
    assert not same_weights(trained, other)


@pytest.mark.usefixtures("forked_workers")
def test_workers_start_once_for_all_epochs_and_validations_and_change_nothing(tiny, tmp_path, monkeypatch):
    started, start = [], data.loader._start_workers
    monkeypatch.setattr(data.loader, "_start_workers", lambda loader: started.append(loader) or start(loader))
    words = ["train.epochs=3", "train.augment=crop", "data.cache_gib=0"]
    alone, helped = (
        train(load_settings(tiny, [*words, f"name={name}", f"workers={workers}"]), runs=tmp_path).path
        for name, workers in (("alone", 0), ("helped", 2))
    )
    assert len(started) == 1
    assert lines(alone) == lines(helped)
    assert same_weights(alone, helped)


def test_two_processes_share_each_epoch_and_each_validation(tiny, tmp_path):
    task = VQATask(load_settings(tiny, ["train.epochs=2", "train.batch_size=8"]))
    alone = prepare(task, RunDirectory(tmp_path), Processes())
    given = [Trainer(task, alone.run, Processes(rank, rank, 2), alone.state, alone.images) for rank in (0, 1)]
    parts = [[batch.rows.tolist() for batch in trainer.batches()] for trainer in given]
    steps, rows = alone.steps_per_epoch, len(task.validation)
    for rank, part in enumerate(parts):
        expected = [list(task.sampler(Processes(rank, rank, 2), epoch)) for epoch in (1, 2)]
        assert part[:steps] == expected[0]
        second = len(part) // 2
        assert part[second : second + steps] == expected[1]
        assert part[steps:second] == part[second + steps :]
    shared = [row for part in parts for batch in part[steps : len(part) // 2] for row in batch]
    assert sorted(shared) == list(range(rows))


def test_the_order_of_the_questions_is_that_of_the_settings(tiny):
    task = VQATask(load_settings(tiny, ["seed=5", "train.together=3", "train.batch_size=8"]))
    expected = EpochSampler(task.training.images, 8, 5, epoch=2, rank=1, world_size=2, together=3, start=1)
    assert list(task.sampler(Processes(1, 1, 2), 2, 1)) == list(expected)


def test_kinds_are_the_most_common_first_words_of_training_questions(tiny):
    task = VQATask(load_settings(tiny, ["cbn.condition=kind"]))
    counts = Counter(tuple(task.training.words(row)[:2].tolist()) for row in range(len(task.training)))
    expected = sorted(counts, key=lambda pair: (-counts[pair], pair))
    found = task.new_model(fresh=True, say=print).kinds.first_words[: len(expected)]
    assert found.tolist() == [list(pair) for pair in expected]


def test_frozen_weights_stay_bit_for_bit(tiny, tmp_path):
    settings = load_settings(tiny, ["name=frozen", "train.learning_rate=0.01"])
    torch.manual_seed(settings.seed)
    before = build_model(settings, 5, 5, pretrained=True).resnet.state_dict()
    # the backbone is drawn first, so it is the same whatever follows it
    after = weights(train(settings, runs=tmp_path).path)
    for name, value in before.items():
        assert torch.equal(after[f"resnet.{name}"], value), name


def test_statistics_are_re_estimated_on_training_images_before_training(tiny, tmp_path):
    settings = load_settings(tiny, ["name=new", "backbone.statistics=reestimated", "train.learning_rate=0.01"])
    run = train(settings, runs=tmp_path).path
    task = VQATask(settings)
    pixels = np.stack([H5Images(task.store.path)[row] for row in np.unique(task.training.images)])
    network = task.new_model(fresh=False, say=print).resnet.network
    network.load_state_dict(
        {key.removeprefix("resnet.network."): value for key, value in weights(run).items() if "resnet" in key}
    )
    values = network.conv1(task.preprocessing.normalise(torch.from_numpy(pixels))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(network.bn1.running_mean, values.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network.bn1.running_var, values.var(1), rtol=1e-3, atol=1e-4)
    assert not load_model(run).model.resnet.norm("bn1").training  # the statistics stay as they are
    assert torch.equal(load_model(run).model.resnet.norm("bn1").running_mean, network.bn1.running_mean)


def test_bce_is_refused_where_every_questions_score_is_0(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(VQATask, "_trainable_questions", one_answer_each)
    with pytest.raises(InputError, match=r"train.loss: bce .* every question of train; use soft or hard"):
        train(load_settings(tiny, ["name=one", "train.loss=bce"]), runs=tmp_path)


def one_answer_each(task, splits):
    table = task.store.table(splits[0])
    return dataclasses.replace(table, given=table.given[:, :1])


def test_a_model_trained_with_bce_returns_the_expected_accuracy_of_each_answer(tiny, tmp_path):
    saved = load_model(train(load_settings(tiny, ["name=bce", "train.loss=bce"]), runs=tmp_path).path)
    image = np.zeros((64, 64, 3), np.uint8)
    logits = saved.run(image, "what color is it?").logits[0]
    told = saved.ask(image, "what color is it?", top=len(saved.answers))
    expected = dict(zip(saved.answers, logits.sigmoid().tolist(), strict=True))
    assert {entry["answer"]: entry["probability"] for entry in told} == pytest.approx(expected)


def test_augmentation_switches_off_what_it_makes_wrong_and_says_so(tiny, tmp_path, capsys):
    for kind, stage in (("none", 4), ("crop", None)):
        settings = load_settings(tiny, ["cbn.stages=[]", "train.epochs=2", f"train.augment={kind}"])
        trainer = prepare(VQATask(settings), RunDirectory(tmp_path / kind), Processes())
        assert trainer.images.stage == stage
        assert trainer.training.share == (kind == "none")
        assert trainer.validation.share
        assert trainer.validation.augmentation is None
        told = capsys.readouterr().out
        assert ("train.augment: crop changes each question's image in every epoch" in told) == (kind == "crop")
    rows = next(iter(trainer.task.sampler(Processes(), 1)))
    first, again = next(trainer.batches()), next(trainer.batches())
    trainer.progress.epoch = 2
    second = next(trainer.batches())
    assert len(first.images) == len(rows)
    assert torch.equal(first.images, again.images)
    augment, images = trainer.training.augmentation.augment, trainer.images.images
    pairs = [(row, images[trainer.task.training.images[row]]) for row in second.rows.tolist()]
    expected = [augment(image, 2, row) for row, image in pairs]
    assert torch.equal(second.images, torch.from_numpy(np.stack(expected)))


@pytest.fixture(scope="module")
def at_32_px(tiny, tmp_path_factory):
    """Words for the tiny world at 32 px, where stage 4 has one position."""
    words = [f"data.h5={tmp_path_factory.mktemp('small')}/32.h5", "data.image_size=32", "scenes=null"]
    preprocess(**preprocessing_of(load_settings(tiny, words)))
    return words


def test_statistics_of_one_value_are_refused_and_block_nothing(tiny, tmp_path, at_32_px):
    words = ["name=mine", *at_32_px, "backbone.statistics=batch", "train.batch_size=16"]
    for parts in ("train.batch_size=1", "train.accumulate=16", "train.accumulate=6"):  # 6: the last has one question
        with pytest.raises(InputError, match=r"backbone.statistics: at 32 px a batch's statistics need 2 questions"):
            train(load_settings(tiny, [*words, parts]), runs=tmp_path)
        assert not (tmp_path / "mine").exists()
    train(load_settings(tiny, [*words, "train.batch_size=16", "train.accumulate=8"]), runs=tmp_path)


@pytest.mark.parametrize(("size", "parts", "taken"), [(1, 16, False), (2, 16, True), (1, 8, True)])
def test_the_processes_have_a_parts_statistics_in_common(tiny, at_32_px, size, parts, taken):
    words = [*at_32_px, "backbone.statistics=batch", "train.batch_size=16", f"train.accumulate={parts}"]
    settings, resnet = load_settings(tiny, words), SimpleNamespace(statistics="batch", least_batch=lambda _: 2)
    with nullcontext() if taken else pytest.raises(InputError, match="give"):
        _check_batch_statistics(settings, resnet, EpochSampler(np.arange(64), 16, 0, 1, world_size=size))


class Apart(Processes):
    """One of two processes, on disks of their own: the other one sees the opposite."""

    def gather(self, value):
        return [value, not value]


@pytest.mark.parametrize("sees", [True, False])
def test_a_checkpoint_that_one_process_does_not_see_is_refused(tiny, tmp_path, monkeypatch, sees):
    if sees:
        train(load_settings(tiny, ["name=run"]), runs=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("experiments.training.train.this_process", Apart)
    with pytest.raises(InputError, match=r"last.pt: not visible to every process; runs/ must be on a disk that all"):
        train(load_settings(tiny, ["name=run"]), resume=sees, runs=tmp_path)
    assert [file for file in sorted(tmp_path.rglob("*")) if file.name != ".lock"] == before


def test_statistics_of_one_value_are_not_re_estimated(tiny, tmp_path, at_32_px):
    run = train(load_settings(tiny, ["name=small", *at_32_px]), runs=tmp_path).path
    with pytest.raises(InputError, match="train.batch_size: statistics at 32 px need batches of 2 questions, not 1"):
        recalibrate(run, tmp_path / "new", "train", ["train.batch_size=1"])


def test_the_best_epochs_model_is_kept_training_stops_early_and_tensorboard_has_it(tiny, tmp_path, monkeypatch):
    scores = iter([30.0, 50.0, 50.0, 45.0, 99.0])  # of equal ones the first
    real = VQATask.score
    monkeypatch.setattr(VQATask, "score", lambda *given: real(*given) | {"overall": next(scores)})
    settings = load_settings(tiny, ["name=early", "train.epochs=5", "train.patience=2", "train.tensorboard=true"])
    run = train(settings, runs=tmp_path).path
    assert [line["val_overall"] for line in lines(run)] == [30.0, 50.0, 50.0, 45.0]
    assert load_model(run).training == {"trained_on": ["train"], "epoch": 2, "val_overall": 50.0}
    assert list((run / "tensorboard").glob("events.*"))


def test_a_line_of_the_metrics_is_of_its_epoch_alone(tiny, tmp_path, monkeypatch):
    """The mean loss of the steps that were taken, the learning rate in the whole run, the time since its beginning."""
    outcomes = iter([1.0, NotFiniteError("lost", [0]), 5.0, 2.0, 4.0, 6.0])

    def steps(self, _model, batches):
        for _ in batches:
            self.state.optimiser.step()
            self.state.schedule.step()
            yield next(outcomes)

    monkeypatch.setattr(Trainer, "steps", steps)
    words = ["train.epochs=2", "train.skip_not_finite=1", "train.validate_on=null"]
    trainer = prepare(VQATask(load_settings(tiny, words)), RunDirectory(tmp_path), Processes())
    trainer.progress.seconds = 1000.0  # before a resume
    trainer.run_epochs()
    first, second = lines(tmp_path, without=())
    assert (first["steps_left_out"], second["steps_left_out"]) == (1, 0)
    assert [first["train_loss"], second["train_loss"]] == [3.0, 4.0]
    assert first["seconds"] >= 1000 > second["seconds"]
    train = trainer.settings.train
    rates = [train.learning_rate * rate_factor(train, step, 6) for step in (3, 6)]
    assert [first["learning_rate"], second["learning_rate"]] == pytest.approx(rates)


def test_training_on_train_and_val_keeps_the_last_model(tiny, tmp_path):
    words = ["name=both", "train.splits=[train, val]", "train.validate_on=null", "train.epochs=2"]
    run = train(load_settings(tiny, words), runs=tmp_path).path
    assert [line["val_overall"] for line in lines(run)] == [None, None]
    assert load_model(run).training == {"trained_on": ["train", "val"], "epoch": 2, "val_overall": None}


def test_questions_without_image_or_known_answer_are_not_trained_on(tiny, tmp_path, capsys):
    copy = tmp_path / "copy.h5"
    shutil.copy(tiny.parent / "world.h5", copy)
    with h5py.File(copy, "r+") as file:
        file["images/usable"][0] = False
        file.attrs["digest"] = np.bytes_(_digest_of(file))
        lost = int((file["splits/train/images"][:] == 0).sum())
        count = len(file["splits/train/ids"])
    train(load_settings(tiny, ["name=fewer", f"data.h5={copy}", "data.splits.val.questions=v.json"]), runs=tmp_path)
    told = capsys.readouterr().out
    assert f"{count - lost} questions" in told
    assert "copy.h5: split 'val' was made from val_questions.json, but the recipe names v.json\n" in told
    assert "split 'train' was made" not in told
    few = load_settings(tiny, [f"data.h5={tmp_path}/few.h5", "data.answers=2"])
    preprocess(**preprocessing_of(few))
    task = VQATask(few)
    table, classes = task.store.table("train"), set(task.store.vocabulary)
    known = [id_ for row, id_ in enumerate(table.ids) if classes & set(table.answers(row))]
    assert 0 < len(known) < len(table)
    assert task.training.ids.tolist() == known


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.h5=nowhere.h5"], "nowhere.h5: no such file; run `preprocess` to make it"),
        (["data.image_size=128", "scenes=null"], "made with image_size 64, but data.image_size is 128"),
        (["data.answers=3"], "made with answers 20, but data.answers is 3"),
        (["data.vocabulary_from=[train, val]"], r"made with vocabulary_from \['train'\], but data.vocabulary_from is"),
        (["data.min_word_count=5"], "made with min_word_count 2, but data.min_word_count is 5"),
        (["train.splits=[dev]"], "no split 'dev'"),
        (["train.validate_on=dev"], "no split 'dev'; it holds train, val; train.validate_on=null trains without"),
        (["backbone.name=resnet19"], "backbone: 'resnet19' is not a ResNet"),
        (["backbone.weights=nowhere.pth"], "backbone: nowhere.pth: no such file"),
        (["question.glove=nowhere.txt"], "nowhere.txt: no such file"),
        (["device=cuda:7"], "device: cuda:7 is not available"),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(tiny, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        train(load_settings(tiny, ["name=bad", *words]), runs=tmp_path)


@pytest.mark.parametrize(
    ("copied", "words", "says"),
    [
        (True, [], "train.validate_on: split 'val' has the questions that are trained on; train.validate_on=null"),
        (False, ["data.vocabulary_from=[train,val]"], "words and answers are taken from 'val', which is validated on"),
    ],
)
def test_a_split_that_the_training_has_seen_is_not_validated_on(tiny, tmp_path, copied, words, says):
    world = shutil.copytree(tiny.parent / "world", tmp_path / "world")
    if copied:
        shutil.copytree(world / "train", world / "val", dirs_exist_ok=True)
        for file in ("questions", "annotations"):
            shutil.copy(world / f"train_{file}.json", world / f"val_{file}.json")
    there = [f"data.folder={world}", f"data.h5={tmp_path}/seen.h5", "scenes=null"]
    settings = load_settings(tiny, ["name=bad", *there, *words])
    preprocess(**preprocessing_of(settings))
    with pytest.raises(InputError, match=says):
        train(settings, runs=tmp_path)
    train(load_settings(tiny, ["name=good", *there, *words, "train.validate_on=null"]), runs=tmp_path)


def test_glove_vectors_are_used_and_stored_with_the_model(tiny, tmp_path):
    glove = tmp_path / "glove.txt"
    glove.write_text("circle 1 2 3\nred 4 5 6\n")
    words = ["name=glove", f"question.glove={glove}", "question.glove_size=3"]
    run = train(load_settings(tiny, words), runs=tmp_path).path
    glove.unlink()
    loaded = load_model(run)
    row = loaded.tokenizer.token_to_id("red")
    assert loaded.model.question.fixed.weight[row].tolist() == [4, 5, 6]
