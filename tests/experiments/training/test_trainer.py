"""Runs: what a run directory holds, exact resume after a kill, several processes, early stopping, bad losses."""

import dataclasses
import json
import time

import h5py
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.h5_file import _digest_of
from experiments.process_group import Processes
from experiments.tasks.vqa import VQATask
from experiments.training import loop
from experiments.training.run_directory import RunDirectory
from experiments.training.trainer import prepare, train
from tests.processes import start_ranks
from vqa.io.errors import InputError
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same_weights(one, other) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(run, without=("seconds", "peak_memory_mib")):
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in read]


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


def test_frozen_weights_stay_bit_for_bit(tiny, tmp_path):
    settings = load_settings(tiny, ["name=frozen", "train.learning_rate=0.01"])
    torch.manual_seed(settings.seed)
    from vqa.build import build_model

    before = build_model(settings, 5, 5, pretrained=True).resnet.state_dict()
    # the backbone is drawn first, so it is the same whatever follows it
    after = weights(train(settings, runs=tmp_path).path)
    for name, value in before.items():
        assert torch.equal(after[f"resnet.{name}"], value), name


# within the first epoch, at the second's first step, within the second
@pytest.mark.parametrize(
    ("words", "stops"),
    [
        (["train.schedule=constant"], (2, 4, 6)),
        (["backbone.train=stage4", "cbn.stages=[4]"], (2,)),
        (["train.loss=bce", "train.optimiser=adamw", "train.weight_decay=0.1"], (2,)),
        (["train.optimiser=adamax", "train.schedule=cosine", "train.warm_up=0.6"], (3,)),
        (["train.schedule=steps", "train.warm_up=0.2", "train.decay_at=[0.4, 0.7]", "train.augment=crop_flip"], (5,)),
    ],
)
def test_every_step_can_be_the_last_before_a_resume(tiny, tmp_path, monkeypatch, words, stops):
    words = [*words, "train.epochs=2", "train.checkpoint_every=1", "answer.dropout=0.3", "train.batch_size=16"]
    whole = train(load_settings(tiny, ["name=whole", *words]), runs=tmp_path).path
    real = loop.nn.utils.clip_grad_norm_
    for stop in stops:
        steps = []

        def stopping(*arguments, steps=steps, stop=stop):
            steps.append(1)
            if len(steps) == stop:
                raise KeyboardInterrupt
            return real(*arguments)

        settings = load_settings(tiny, [f"name=stopped{stop}", *words])
        monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(settings, runs=tmp_path)
        monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", real)
        resumed = train(settings, resume=True, runs=tmp_path).path
        assert same_weights(whole, resumed), stop
        assert lines(whole) == lines(resumed), stop


def test_bce_is_refused_where_every_questions_score_is_0(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(VQATask, "_trainable_questions", one_answer_each)
    with pytest.raises(InputError, match=r"train.loss: bce .* every question of train; use soft or hard"):
        train(load_settings(tiny, ["name=one", "train.loss=bce"]), runs=tmp_path)


def one_answer_each(task, splits):
    table = task.store.table(splits[0])
    return dataclasses.replace(table, given=table.given[:, :1])


def test_a_model_trained_with_bce_tells_the_expected_accuracy_of_each_answer(tiny, tmp_path):
    saved = load_model(train(load_settings(tiny, ["name=bce", "train.loss=bce"]), runs=tmp_path).path)
    image = np.zeros((64, 64, 3), np.uint8)
    logits = saved.run(image, "what color is it?").logits[0]
    told = saved.ask(image, "what color is it?", top=len(saved.answers))
    expected = dict(zip(saved.answers, logits.sigmoid().tolist(), strict=True))
    assert {entry["answer"]: entry["probability"] for entry in told} == pytest.approx(expected)


def test_augmentation_switches_off_what_it_makes_wrong_and_says_so(tiny, tmp_path, capsys):
    for kind, stage in (("none", 4), ("crop", None)):
        settings = load_settings(tiny, ["cbn.stages=[]", f"train.augment={kind}"])
        trainer = prepare(VQATask(settings), RunDirectory(tmp_path / kind), Processes())
        assert trainer.images.stage == stage
        assert trainer.training.share == (kind == "none")
        assert trainer.validation.share
        assert trainer.validation.augmentation is None
        told = capsys.readouterr().out
        assert ("train.augment: crop gives each question an image of its own" in told) == (kind == "crop")
    rows = next(iter(trainer.task.sampler(Processes(), 1)))
    first, again, second = (next(trainer.batches(epoch)) for epoch in (1, 1, 2))
    assert len(first.images) == len(rows)
    assert torch.equal(first.images, again.images)
    augment, images = trainer.training.augmentation.augment, trainer.images.images
    pairs = [(row, images[trainer.task.training.images[row]]) for row in second.rows.tolist()]
    expected = [augment(image, 2, row) for row, image in pairs]
    assert torch.equal(second.images, torch.from_numpy(np.stack(expected)))


def test_a_finished_run_is_left_alone(tiny, finished, tmp_path, capsys):
    before = (finished / "checkpoints/last.pt").read_bytes()
    train(load_settings(tiny, ["name=trained"]), resume=True, runs=tmp_path)
    assert "finished, nothing to do" in capsys.readouterr().out
    assert (finished / "checkpoints/last.pt").read_bytes() == before


def test_a_finished_run_can_be_trained_longer(tiny, tmp_path, capsys):
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
    train(longer, resume=True, runs=tmp_path)
    assert "finished, nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="another train.epochs"):
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
    with pytest.raises(InputError, match="another train.patience"):
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
    with pytest.raises(InputError, match="another train.learning_rate"):
        train(load_settings(tiny, ["name=trained", "train.learning_rate=0.5"]), resume=True, runs=tmp_path)


@pytest.fixture(scope="module")
def at_32_px(tiny, tmp_path_factory):
    """Words for the tiny world at 32 px, where stage 4 has one position."""
    from data.preprocess import preprocess
    from experiments.prepare import preprocessing_of

    words = [f"data.h5={tmp_path_factory.mktemp('small')}/32.h5", "data.image_size=32"]
    preprocess(**preprocessing_of(load_settings(tiny, words)))
    return words


def test_statistics_of_one_value_are_refused_and_block_nothing(tiny, tmp_path, at_32_px):
    words = ["name=mine", *at_32_px, "backbone.statistics=batch", "train.batch_size=16"]
    for parts in ("train.batch_size=1", "train.accumulate=16", "train.accumulate=6"):  # 6: the last has one question
        with pytest.raises(InputError, match=r"backbone.statistics: at 32 px a batch's statistics need 2 questions"):
            train(load_settings(tiny, [*words, parts]), runs=tmp_path)
        assert not (tmp_path / "mine").exists()
    train(load_settings(tiny, [*words, "train.batch_size=16", "train.accumulate=8"]), runs=tmp_path)


def test_statistics_of_one_value_are_not_re_estimated(tiny, tmp_path, at_32_px):
    from experiments.recalibrate import recalibrate

    run = train(load_settings(tiny, ["name=small", *at_32_px]), runs=tmp_path).path
    with pytest.raises(InputError, match="train.batch_size: statistics at 32 px need batches of 2 questions, not 1"):
        recalibrate(run, tmp_path / "new", "train", ["train.batch_size=1"])


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


def test_a_damaged_checkpoint_is_named(tiny, finished, tmp_path):
    (finished / "checkpoints/last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="last.pt: cannot be read"):
        train(load_settings(tiny, ["name=trained"]), resume=True, runs=tmp_path)


def test_a_run_is_not_resumed_on_other_data(tiny, finished, tmp_path):
    from data.preprocess import preprocess
    from data.scenes.write import write_world
    from experiments.prepare import split_files

    answers = (finished / "model" / "answers.json").read_bytes()
    other = load_settings(tiny, ["name=trained", f"data.folder={tmp_path}/world", f"data.h5={tmp_path}/other.h5"])
    write_world(tmp_path / "world", seed=8, images={"train": 9, "val": 3}, processes=1)
    made = {"image_size": 64, "min_word_count": 2, "answers": 20, "skip_bad_images": False, "threads": 1}
    preprocess(split_files(other), tmp_path / "other.h5", **made)
    with pytest.raises(InputError, match="not the data that"):
        train(other, resume=True, runs=tmp_path)
    assert (finished / "model" / "answers.json").read_bytes() == answers


def test_a_checkpoint_without_its_settings_is_not_overwritten(tiny, finished, tmp_path):
    (finished / "config.yaml").unlink()
    for resume in (False, True):
        with pytest.raises(InputError, match="trained"):
            train(load_settings(tiny, ["name=trained"]), resume=resume, runs=tmp_path)


def test_the_predicting_mlps_can_have_a_learning_rate_of_their_own(tiny):
    from experiments.training.optimiser import build_optimiser, trained_parameters
    from vqa.build import build_model

    settings = load_settings(tiny, ["train.learning_rate=0.5", "train.predictor_learning_rate=0.25"])
    model = build_model(settings, 20, 10, pretrained=False)
    optimiser = build_optimiser(settings.train, model)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {rates[key] for key in rates if names[key].startswith("predictor.")} == {0.25}
    assert {rates[key] for key in rates if not names[key].startswith("predictor.")} == {0.5}
    assert rates.keys() == {id(p) for p in trained_parameters(model)}


@pytest.mark.parametrize(
    ("name", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("adamax", torch.optim.Adamax)]
)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_optimisers_are_torchs_and_decay_no_biases_and_norms(tiny, name, reference, decay):
    from experiments.training.optimiser import build_optimiser, trained_parameters
    from vqa.build import build_model

    words = [f"train.optimiser={name}", f"train.weight_decay={decay}", "backbone.train=batchnorm"]
    settings = load_settings(tiny, [*words, "train.learning_rate=0.5", "train.predictor_learning_rate=0.25"])
    model = build_model(settings, 20, 10, pretrained=False)
    copy = build_model(settings, 20, 10, pretrained=False)
    copy.load_state_dict(model.state_dict())
    predicting = {id(parameter) for parameter in copy.predictor.parameters()}
    groups = [
        {"params": [parameter], "lr": 0.25 if id(parameter) in predicting else 0.5, "weight_decay": decay * (rank > 1)}
        for parameter in trained_parameters(copy)
        for rank in [parameter.dim()]
    ]
    optimisers = build_optimiser(settings.train, model), reference(groups)
    for step in range(3):
        for optimiser, of in zip(optimisers, (model, copy), strict=True):
            torch.manual_seed(step)
            for parameter in trained_parameters(of):
                parameter.grad = torch.randn(parameter.shape)
            optimiser.step()
    ours, theirs = model.state_dict(), copy.state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=key)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 11, 1000])
def test_one_cycle_rises_then_falls_to_zero(tiny, steps):
    from experiments.training.optimiser import rate_factor

    settings = load_settings(tiny, ["train.schedule=one_cycle"]).train
    factors = [rate_factor(settings, step, steps) for step in range(steps)]
    assert max(factors) == 1.0
    peak = factors.index(1.0)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 <= rate_factor(settings, steps, steps) < 1e-9 or steps == 1


@pytest.mark.parametrize("warm_up", [0.0, 0.25])
@pytest.mark.parametrize("name", ["cosine", "steps"])
def test_schedules_are_torchs(tiny, name, warm_up):
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

    from experiments.training.optimiser import build_schedule

    words = [f"train.schedule={name}", f"train.warm_up={warm_up}"]
    words += ["train.decay_at=[0.5, 0.8]", "train.decay_by=0.2"] if name == "steps" else []
    steps, warm = 20, int(20 * warm_up)
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3) for _ in range(2))
    schedule = build_schedule(load_settings(tiny, words).train, ours, steps)
    if name == "cosine":
        reference = CosineAnnealingLR(theirs, steps - warm)
    else:
        reference = MultiStepLR(theirs, [10 - warm, 16 - warm], gamma=0.2)
    if warm:
        rise = LinearLR(theirs, start_factor=1 / warm, total_iters=warm - 1)
        reference = SequentialLR(theirs, [rise, reference], [warm])
    for step in range(steps):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"]), step
        for optimiser, following in ((ours, schedule), (theirs, reference)):
            optimiser.step()
            following.step()


def test_a_failed_write_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    settings = load_settings(tiny, ["name=mine", "train.epochs=2"])
    real, saves = torch.save, []

    def failing(value, file):
        saves.append(file)
        if len(saves) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(value, file)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(InputError, match=r"last.pt: cannot be written \(no space left on device\); free some space"):
        train(settings, runs=tmp_path)
    saved = torch.load(tmp_path / "mine/checkpoints/last.pt", weights_only=True)
    assert saved["progress"]["epoch"] == 2
    assert [path.name for path in (tmp_path / "mine/checkpoints").iterdir()] == ["last.pt"]


def test_the_best_epochs_model_is_kept_and_training_stops_early(tiny, tmp_path, monkeypatch):
    scores = iter([30.0, 50.0, 40.0, 45.0, 99.0])
    real = VQATask.score
    monkeypatch.setattr(VQATask, "score", lambda *given: real(*given) | {"overall": next(scores)})
    settings = load_settings(tiny, ["name=early", "train.epochs=5", "train.patience=2"])
    run = train(settings, runs=tmp_path).path
    assert [line["val_overall"] for line in lines(run)] == [30.0, 50.0, 40.0, 45.0]
    assert load_model(run).training == {"trained_on": ["train"], "epoch": 2, "val_overall": 50.0}


def test_training_on_train_and_val_keeps_the_last_model(tiny, tmp_path):
    words = ["name=both", "train.splits=[train, val]", "train.validate_on=null", "train.epochs=2"]
    run = train(load_settings(tiny, words), runs=tmp_path).path
    assert [line["val_overall"] for line in lines(run)] == [None, None]
    assert load_model(run).training == {"trained_on": ["train", "val"], "epoch": 2, "val_overall": None}


def test_questions_without_image_or_known_answer_are_not_trained_on(tiny, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy.h5"
    shutil.copy(tiny.parent / "world.h5", copy)
    with h5py.File(copy, "r+") as file:
        file["images/usable"][0] = False
        file.attrs["digest"] = np.bytes_(_digest_of(file))
        lost = int((file["splits/train/images"][:] == 0).sum())
        count = len(file["splits/train/ids"])
    train(load_settings(tiny, ["name=fewer", f"data.h5={copy}"]), runs=tmp_path)
    assert f"{count - lost} questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.h5=nowhere.h5"], "nowhere.h5: no such file; `preprocess` makes it"),
        (["data.image_size=128"], "made with image_size 64, but data.image_size is 128"),
        (["data.answers=3"], "made with answers 20, but data.answers is 3"),
        (["data.vocabulary_from=[train, val]"], r"made with vocabulary_from \['train'\], but data.vocabulary_from is"),
        (["data.min_word_count=5"], "made with min_word_count 2, but data.min_word_count is 5"),
        (["train.splits=[dev]"], "no split 'dev'"),
        (["train.validate_on=dev"], "no split 'dev'; it holds train, val; train.validate_on=null trains without"),
        (["backbone.name=resnet19"], "backbone: 'resnet19' is no ResNet"),
        (["backbone.weights=nowhere.pth"], "backbone: nowhere.pth: no such file"),
        (["question.glove=nowhere.txt"], "nowhere.txt: no such file"),
        (["device=cuda:7"], "device: cuda:7 is not there"),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(tiny, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        train(load_settings(tiny, ["name=bad", *words]), runs=tmp_path)


def test_glove_vectors_are_used_and_stored_with_the_model(tiny, tmp_path):
    glove = tmp_path / "glove.txt"
    glove.write_text("circle 1 2 3\nred 4 5 6\n")
    words = ["name=glove", f"question.glove={glove}", "question.glove_size=3"]
    run = train(load_settings(tiny, words), runs=tmp_path).path
    glove.unlink()
    loaded = load_model(run)
    row = loaded.tokenizer.token_to_id("red")
    assert loaded.model.question.fixed.weight[row].tolist() == [4, 5, 6]


def test_tensorboard_files_are_written(tiny, tmp_path):
    run = train(load_settings(tiny, ["name=board", "train.tensorboard=true"]), runs=tmp_path).path
    assert list((run / "tensorboard").glob("events.*"))


def epochs_in(checkpoint):
    return len(torch.load(checkpoint, weights_only=True)["progress"]["history"])


def test_two_processes_killed_ended_and_resumed_end_as_undisturbed_ones(tiny, tmp_path):
    words = ["train.epochs=2", "train.checkpoint_every=1", "train.batch_size=4", "answer.dropout=0.3", "device=cpu"]

    def start(*more):
        return start_ranks("train", "--config", tiny, *more, *words, folder=tmp_path)

    def check_ended(ranks, code):
        for rank in ranks:
            ended = rank.end()
            assert ended.code == code, ended.err[-3000:]

    check_ended(start("name=whole"), 0)
    killed = start("name=killed")
    checkpoint = tmp_path / "runs/killed/checkpoints/last.pt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not checkpoint.exists():
        time.sleep(0.005)
    for rank in killed:
        rank.kill()
        rank.wait()
    assert epochs_in(checkpoint) < 2, "too fast to be killed in time"
    asked = start("--resume", "name=killed")
    before = checkpoint.stat().st_mtime_ns
    while time.monotonic() < deadline and checkpoint.stat().st_mtime_ns == before:
        time.sleep(0.005)
    asked[1].terminate()  # one of them alone: both save the same step and end
    check_ended(asked, 143)
    assert epochs_in(checkpoint) < 2, "too fast to be ended in time"
    check_ended(start("--resume", "name=killed"), 0)
    assert same_weights(tmp_path / "runs/whole", tmp_path / "runs/killed")
    assert lines(tmp_path / "runs/whole") == lines(tmp_path / "runs/killed")


def test_processes_that_may_not_train_all_say_so(tiny, trained):
    for rank in start_ranks("train", "--config", tiny, "name=trained", "device=cpu", folder=trained.parent.parent):
        ended = rank.end()
        assert ended.code == 2
        assert ended.err.splitlines()[-1].startswith("error: runs/trained: already holds a run")


@pytest.mark.parametrize("statistics", ["population", "batch"])
def test_two_processes_train_as_one(tiny, tmp_path, statistics):
    words = ["train.epochs=2", "train.checkpoint_every=1", "train.schedule=constant", "device=cpu"]
    words.append(f"backbone.statistics={statistics}")
    for rank in start_ranks("train", "--config", tiny, "name=two", *words, folder=tmp_path):
        ended = rank.end()
        assert ended.code == 0, ended.err[-3000:]
        assert "FutureWarning" not in ended.err
    one = train(load_settings(tiny, ["name=one", *words]), runs=tmp_path / "runs").path
    ours, theirs = weights(one), weights(tmp_path / "runs/two")
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=2e-4, msg=name)
    for a, b in zip(lines(one), lines(tmp_path / "runs/two"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_buffers_are_not_broadcast_on_older_versions_of_torch_either(monkeypatch):
    from experiments import process_group

    def before_2_13(module, broadcast_buffers=True):
        return module, broadcast_buffers

    def since_2_13(module, broadcast_buffers=None, forward_sync_buffers=None):
        assert broadcast_buffers is None
        return module, forward_sync_buffers

    for wrapper in (before_2_13, since_2_13):
        monkeypatch.setattr(process_group, "DistributedDataParallel", wrapper)
        assert process_group.averaging_gradients("the model") == ("the model", False)


def test_a_batch_that_cannot_be_shared_equally_is_refused(tiny, tmp_path):
    settings = load_settings(tiny)
    with pytest.raises(InputError, match="cannot be shared equally by 3 processes"):
        prepare(VQATask(settings), RunDirectory(tmp_path), Processes(0, 0, 3))
