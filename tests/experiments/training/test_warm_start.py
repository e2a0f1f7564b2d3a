"""Warm start: what is taken of another model's weights, by name, shape, word and answer; and that it is resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data.batches import padded_words
from data.preprocess import preprocess
from experiments.prepare import preprocessing_of
from experiments.process_group import Processes
from experiments.tasks.vqa import VQATask
from experiments.training.run_directory import RunDirectory
from experiments.training.train import prepare, train
from experiments.training.warm_start import splits_seen, take_weights
from tests.resnets import NarrowResNet
from vqa.io.errors import InputError
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings


def begun(settings, saved):
    """The new model's weights without and with another's, its task and the line that was printed."""
    task, told = VQATask(settings), []
    torch.manual_seed(1)
    plain = task.new_model(fresh=True, say=told.append)
    torch.manual_seed(1)
    warm = task.new_model(fresh=True, say=told.append, init_from=saved)
    return plain.state_dict(), warm.state_dict(), task, told[-1]


def test_a_model_of_the_same_recipe_is_taken_whole(tiny, trained):
    saved = load_model(trained)
    plain, warm, _, told = begun(load_settings(tiny), saved)
    theirs = saved.model.state_dict()
    assert f"{len(theirs)} of {len(theirs)} tensors taken" in told
    assert "not taken" not in told
    assert all(torch.equal(warm[name], value) for name, value in theirs.items())
    assert not torch.equal(plain["fusion.visual.weight"], warm["fusion.visual.weight"])


def test_words_and_answers_go_by_their_text(tiny, trained, tmp_path):
    settings = load_settings(tiny, [f"data.h5={tmp_path}/other.h5", "data.min_word_count=20", "data.answers=5"])
    preprocess(**preprocessing_of(settings))
    saved = load_model(trained)
    # the saved model's own answers in another order and spelling, and one missing
    spelt = saved.answers[::-1]
    lost = spelt[3]
    saved.answers[:] = ["something else" if answer == lost else f"The {answer}" for answer in spelt]
    plain, warm, task, told = begun(settings, saved)
    theirs, known = saved.model.state_dict(), saved.tokenizer.get_vocab()
    ours = task.store.tokenizer.get_vocab()
    assert ours != known
    for word, row in ours.items():
        assert torch.equal(warm["question.embedding.weight"][row], theirs["question.embedding.weight"][known[word]])
    for name in ("fusion.answer.4.weight", "fusion.answer.4.bias"):
        for row, answer in enumerate(task.store.vocabulary):
            of = (plain, row) if answer == lost else (theirs, spelt.index(answer))
            assert torch.equal(warm[name][row], of[0][name][of[1]]), answer
    common = len(set(task.store.vocabulary) - {lost})
    assert f"{len(ours)} of {len(ours)} words and {common} of 5 answers match" in told
    assert "not taken" not in told


def test_what_does_not_fit_is_named_and_a_resnet_is_taken_whole_or_not_at_all(tiny, trained, monkeypatch):
    monkeypatch.setattr("torchvision.models.resnet.ResNet", NarrowResNet)  # resnet18 has the channels of `trained`
    words = ["backbone.name=resnet18", "attention.units=4", "answer.hidden_size=0"]
    plain, warm, _, told = begun(load_settings(tiny, words), load_model(trained))
    left = told.partition("; not taken: ")[2].split(", ")
    assert {"resnet.*", "attention.feature.*", "attention.question.*"} <= set(left)
    norms = [f"layer{stage}_1_bn{norm}" for stage in (1, 2, 3, 4) for norm in (1, 2)]  # resnet18 has a block more
    assert {f"predictor.{part}.{norm}.*" for part in ("gamma", "beta") for norm in norms} <= set(left)
    assert left[-1] == "attention.score.weight and 1 more"  # fusion.answer.*
    kept = [name for name in plain if name.startswith(("resnet.", "fusion.answer."))]
    assert all(torch.equal(plain[name], warm[name]) for name in kept)
    assert not torch.equal(plain["fusion.visual.weight"], warm["fusion.visual.weight"])


@pytest.mark.parametrize("condition", ["mean_question", "kind", "image"])
def test_what_is_made_of_the_data_is_made_with_the_weights_that_were_taken(tiny, trained, tmp_path, condition):
    saved = load_model(trained)
    _, warm, task, _ = begun(settings := load_settings(tiny, [f"cbn.condition={condition}"]), saved)
    run = train(settings, runs=tmp_path).path
    _, again, _, told = begun(settings, load_model(run))
    theirs = load_model(run).model.state_dict()
    assert "not taken" not in told
    assert all(torch.equal(again[name], value) for name, value in theirs.items())
    if condition == "mean_question":
        model = task.new_model(fresh=True, say=print)
        model.load_state_dict(warm)
        model.set_mean_question(*padded_words(task.training, range(len(task.training))))
        torch.testing.assert_close(warm["mean_question"], model.mean_question)
    if condition == "kind":  # a pair of ids of words, which another vocabulary numbers otherwise
        words = {word.replace("circle", "zebra"): id_ for word, id_ in task.tokenizer.get_vocab().items()}
        model = task.new_model(fresh=True, say=print)
        taken = take_weights(model, load_model(run), words, task.store.vocabulary, [], print)
        assert {name.partition(".")[0] for name in taken} == {"resnet", "question", "attention", "fusion"}


def test_a_warm_run_is_resumed_bit_for_bit(tiny, trained, tmp_path, capsys):
    words = ["train.schedule=constant", "answer.dropout=0.3", "train.validate_on=null"]

    def run(name, epochs, **how):
        return train(load_settings(tiny, [f"name={name}", *words, f"train.epochs={epochs}"]), runs=tmp_path, **how).path

    whole = run("whole", 2, init_from=trained)
    run("parts", 1, init_from=trained)
    capsys.readouterr()
    parts = run("parts", 2, init_from=trained, resume=True)
    assert "is not read again: the checkpoint holds all weights" in capsys.readouterr().out
    cold = run("cold", 2)
    ours, theirs, others = (load_file(path / "model" / "model.safetensors") for path in (whole, parts, cold))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["fusion.visual.weight"], others["fusion.visual.weight"])
    digests = [json.loads((path / "environment.json").read_text())["init_from"] for path in (whole, parts, cold)]
    assert digests[0] == digests[1] is not None
    assert digests[2] is None


def test_a_warm_run_without_a_checkpoint_is_not_resumed_cold(tiny, trained, tmp_path):
    settings = load_settings(tiny, ["name=killed"])
    prepare(VQATask(settings), RunDirectory(tmp_path / "killed"), Processes(), init_from=trained)
    with pytest.raises(InputError, match="killed: has no checkpoint yet; start it again with its --init-from"):
        train(settings, resume=True, runs=tmp_path)
    for how in ({"resume": True, "init_from": trained}, {"resume": False}):
        RunDirectory(tmp_path / "killed").check(settings, **how)


def test_statistics_are_reestimated_whatever_weights_are_taken(tiny, trained):
    words = ["backbone.statistics=reestimated", "cbn.condition=image"]
    plain, warm, *_ = begun(load_settings(tiny, words), load_model(trained))
    made = [name for name in plain if "running_" in name or name in ("image.mean", "image.var")]
    assert all(torch.equal(plain[name], warm[name]) for name in made)
    assert not torch.equal(plain["fusion.visual.weight"], warm["fusion.visual.weight"])


def test_splits_that_the_first_model_saw_are_not_validated_on_and_stay_named(tiny, tmp_path):
    both = ["name=both", "train.splits=[train, val]", "train.validate_on=null"]
    run = train(load_settings(tiny, both), runs=tmp_path).path
    with pytest.raises(InputError, match=r"validate_on: .*/model was trained on the questions of split 'val'; use"):
        train(load_settings(tiny, ["name=warm"]), runs=tmp_path, init_from=run)
    assert not (tmp_path / "warm").exists()
    swapped = ["data.splits.train.questions=val_questions.json", "data.splits.val.questions=train_questions.json"]
    of_train = load_model(train(load_settings(tiny, ["name=plain"]), runs=tmp_path).path)
    assert splits_seen(of_train, load_settings(tiny)) == ["train"]
    with pytest.raises(InputError, match=r"train.validate_on: .* was trained on the questions of split 'val'; use"):
        splits_seen(of_train, load_settings(tiny, swapped))
    assert splits_seen(of_train, load_settings(tiny, ["data.splits={train: null, val: null}"])) == []
    warm = train(load_settings(tiny, ["name=warm", "train.validate_on=null"]), runs=tmp_path, init_from=run).path
    assert load_model(warm).training["trained_on"] == ["train", "val"]
