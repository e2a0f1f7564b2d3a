"""The oracle from official files to answers: preprocess, train, eval, ask, inspect, and what is refused on the way."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vqa
from data.preprocess import preprocess
from experiments.evaluate import evaluate, split_data
from experiments.features.networks import networks_of, open_runs, stage_features
from experiments.prepare import preprocessing_of
from experiments.process_group import Processes
from experiments.tasks import TASKS
from experiments.training import loop
from experiments.training.run_directory import RunDirectory
from experiments.training.train import prepare, train
from experiments.training.trainer import Trainer
from tests.calls import calling, interrupt
from tests.conftest import ROOT
from tests.fabricated_games import RECIPE, read_lines
from tests.runs import lines, same_weights
from vqa.io.errors import InputError
from vqa.saved_model.files import load_model, save_weights
from vqa.settings.recipes import load_settings
from vqa.tasks.objects import crop_region

ALL = "inputs=[crop, image, spatial, category, question]"


@pytest.fixture(scope="module")
def recipe(games, tmp_path_factory) -> Path:
    """A recipe over the fabricated games, its h5 file made with whole images, which serves all inputs."""
    folder = tmp_path_factory.mktemp("oracle")
    config = folder / "oracle.yaml"
    config.write_text(RECIPE.format(root=ROOT, games=games, folder=folder))
    preprocess(**preprocessing_of(load_settings(config, [ALL])))
    return config


def begun(recipe: Path, run: Path, *words: str) -> Trainer:
    """A training that has done no step; the model that it begins with is in `run/model`."""
    task = TASKS["guesswhat"](load_settings(recipe, words))
    trainer = prepare(task, RunDirectory(run), Processes())
    save_weights(run / "model", trainer.model, {"trained_on": ["train"]})
    return trainer


@pytest.fixture(scope="module")
def oracle(recipe) -> Path:
    """The run directory of an untrained MODERN on crop, box and category."""
    run = recipe.parent / "oracle"
    begun(recipe, run)
    return run


@pytest.fixture(scope="module")
def asked(games) -> dict:
    """A game of the validation split that was successful: its image, its object and a question."""
    game = next(game for game in read_lines(games / "guesswhat.valid.jsonl.gz") if game["status"] == "success")
    it = game["objects"][str(game["object_id"])]
    image = games / "images" / game["picture"]["file_name"]
    return {"image": image, "box": it["bbox"], "category": it["category"], "qas": game["qas"]}


def words_of(asked):
    box = ",".join(map(str, asked["box"]))
    question = asked["qas"][0]["q"]
    return ["--image", asked["image"], "--question", question, "--box", box, "--category", asked["category"]]


def test_a_folder_of_official_files_becomes_an_oracle(games, asked, done, command, here, monkeypatch):
    """Preprocess, a training that is stopped and resumed, eval, ask and inspect, by the commands."""
    config = here / "oracle.yaml"
    config.write_text(RECIPE.format(root=ROOT, games=games, folder=here))
    done("preprocess", "--config", config)
    settings = ["--config", config, "train.checkpoint_every=1", "answer.dropout=0.3", "train.batch_size=8"]
    done("train", *settings, "name=whole")
    with monkeypatch.context() as patched:
        stopping = calling(loop.nn.utils.clip_grad_norm_, 3, interrupt)
        patched.setattr(loop.nn.utils, "clip_grad_norm_", stopping)
        assert command("train", *settings, "name=stopped").code == 130
    resumed = done("train", *settings, "name=stopped", "--resume")
    assert "resumes at epoch 1, step 2" in resumed.out
    assert same_weights(Path("runs/whole"), Path("runs/stopped"))
    assert lines(Path("runs/whole")) == lines(Path("runs/stopped"))

    run = Path("runs/stopped")
    ended = done("eval", "--run", run)
    scores = json.loads((run / "metrics_val.json").read_text())
    assert f"error    {100 - scores['overall']:6.2f} %" in ended.out.replace("error      ", "error    ")
    said = json.loads(done("ask", "--run", run, *words_of(asked), "--json").out)["answers"]
    assert {answer["answer"] for answer in said} == {"yes", "no", "n/a"}
    assert sum(answer["probability"] for answer in said) == pytest.approx(1)
    done("inspect", "--run", run / "model", *words_of(asked), "--out", "seen")
    seen = json.loads(Path("seen/modulation.json").read_text())
    assert (seen["box"], seen["category"]) == (asked["box"], asked["category"])
    assert tuple(seen["crop"]) == crop_region(asked["box"], *Image.open(asked["image"]).size, 1.1)
    assert seen["readings"][0]["answers"] == said
    assert "attention" not in seen["readings"][0]
    assert len(seen["readings"][0]["layers"]) == 8
    page = Path("seen/report.html").read_text()
    assert page.count("<figcaption>The crop") == 1
    assert asked["category"] in page


def test_scores_are_exact_matches_by_answer_category_and_first_word(oracle, games, done, tmp_path):
    done("eval", "--run", oracle, "--split", "test", "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics_test.json").read_text())
    said = {one["question_id"]: one["answer"] for one in json.loads((tmp_path / "results_test.json").read_text())}
    right: dict[tuple[str, str], list[bool]] = {}
    for game in read_lines(games / "guesswhat.test.jsonl.gz"):
        for one in game["qas"] if game["status"] == "success" else []:
            category = game["objects"][str(game["object_id"])]["category"]
            for key in (("all", ""), ("answer", one["a"].lower()), ("category", category)):
                right.setdefault(key, []).append(said[one["id"]] == one["a"].lower())
    percent = {key: 100 * sum(values) / len(values) for key, values in right.items()}
    assert metrics["questions"] == len(right["all", ""]) == len(said)
    assert metrics["overall"] == pytest.approx(percent["all", ""])
    assert metrics["error"] == pytest.approx(100 - metrics["overall"])
    for part, name in (("answer", "per_answer_type"), ("category", "per_category")):
        expected = {key: value for (kind, key), value in percent.items() if kind == part}
        assert metrics[name] == pytest.approx(expected)
    assert metrics["per_question_type"].keys() <= {"is", "does"}


@pytest.mark.parametrize("inputs", [ALL, "inputs=[crop, question]", "inputs=[image, category, question]"])
def test_ask_sees_what_evaluation_sees(recipe, tmp_path, games, inputs):
    """The pixels, box and category of every question, as the h5 file has them."""
    begun(recipe, tmp_path, inputs)
    saved = load_model(tmp_path)
    data = split_data(saved, saved.settings, "val")
    batch = data[list(range(len(data)))]
    logits = loop.answer_logits(saved.model, batch, saved.preprocessing.normalise, "float32")
    row = {id_: place for place, id_ in enumerate(data.table.ids.tolist())}
    games = [game for game in read_lines(games / "guesswhat.valid.jsonl.gz") if game["status"] == "success"]
    for game in games[:3]:
        it, image = game["objects"][str(game["object_id"])], game["picture"]["file_name"]
        one = game["qas"][0]
        image = Path(saved.settings.data.folder) / "images" / image
        output = saved.run(image, one["q"], box=it["bbox"], category=it["category"])
        torch.testing.assert_close(output.logits[0], logits[row[one["id"]]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "inputs", [ALL, "inputs=[image, question]", "inputs=[crop, question]", "inputs=[spatial, question]"]
)
def test_evaluation_from_the_official_files_is_that_of_the_h5(recipe, tmp_path, inputs):
    begun(recipe, tmp_path, inputs, "cbn.stages=[]")
    saved = load_model(tmp_path)
    logits = []
    for settings in (saved.settings, load_settings(recipe, [inputs, f"data.h5={tmp_path}/absent.h5"])):
        data = split_data(saved, settings, "val")
        batch = data[list(range(len(data)))]
        logits.append(loop.answer_logits(saved.model, batch, saved.preprocessing.normalise, "float32"))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6)


def test_a_copied_model_is_enough(oracle, asked, tmp_path):
    (tmp_path / "model").symlink_to(oracle / "model")
    model = vqa.load(tmp_path / "model")
    assert model.categories == ["person", "car", "cat", "chair", "toothbrush"]
    known = {"box": asked["box"], "category": asked["category"]}
    questions = [one["q"] for one in asked["qas"]]
    each = [model.ask(asked["image"], question, **known) for question in questions]
    assert model.ask(asked["image"], questions, **known) == each
    reading = model.inspect(Image.open(asked["image"]), questions[0], **known)
    assert reading["answers"] == each[0]
    assert json.loads(json.dumps(reading)) == reading


@pytest.mark.parametrize("words", [[ALL, "cbn.stages=[4]"], ["inputs=[image, question]", "cbn.stages=[]"]])
def test_shared_images_and_stored_maps_give_the_same_scores(recipe, tmp_path, words):
    scores = []
    for name, speed in (("alone", "speed.share_images=false"), ("shared", "seed=0"), ("stored", "data.cache_gib=1")):
        trainer = begun(recipe, tmp_path / name, *words, speed)
        batch = trainer.training[[0, 1, 2, 3, 4, 5, 6, 7]]
        scores.append(loop.answer_logits(trainer.model.eval(), batch, trainer.images.prepare, "float32"))
    assert trainer.images.stage == (3 if words[0] == ALL else 4)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-2, atol=1e-3)


def test_processes_share_the_questions(recipe):
    task = TASKS["guesswhat"](load_settings(recipe, [ALL]))
    assert task.training.images.shape == (len(task.training), 2)
    whole = list(task.sampler(Processes(), 1))
    parts = [list(task.sampler(Processes(rank, rank, 2), 1)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole


def test_images_that_no_input_names_are_not_read(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("data.h5_file.H5Images.__getitem__", lambda *_: pytest.fail("an image was read"))
    trainer = begun(recipe, tmp_path, "inputs=[spatial, category, question]", "cbn.stages=[]", "data.cache_gib=1")
    outcomes = list(trainer.steps(trainer.model, islice(trainer.batches(), trainer.steps_per_epoch)))
    assert len(outcomes) == trainer.steps_per_epoch
    saved = load_model(tmp_path)
    assert len(split_data(saved, saved.settings, "val")[[0, 1]].rows) == 2


@pytest.mark.parametrize("condition", ["kind", "image", "constant", "mean_question", "shuffled"])
def test_a_condition_of_nothing_needs_no_question(recipe, tmp_path, condition):
    trainer = begun(recipe, tmp_path, "inputs=[spatial, category]", "cbn.stages=[]", f"cbn.condition={condition}")
    assert next(iter(trainer.steps(trainer.model, trainer.batches()))) > 0


def test_a_new_oracle_takes_weights_of_another_and_of_a_vqa_model(recipe, oracle, trained):
    task, told = TASKS["guesswhat"](load_settings(recipe)), []
    mine = load_model(oracle)
    mine.categories.reverse()
    model = task.new_model(fresh=True, say=told.append, init_from=mine)
    total = len(model.state_dict())
    assert f"{total} of {total} tensors taken" in told[-1]
    assert torch.equal(model.category.weight, mine.model.category.weight.flip(0))
    task.new_model(fresh=True, say=told.append, init_from=load_model(trained))
    assert "resnet." not in told[-1].partition("not taken: ")[2]
    assert "2 of 3 answers match" in told[-1]


def test_statistics_features_and_export(oracle, done, refused, tmp_path):
    done("recalibrate", "--run", oracle, "--out", tmp_path / "re")
    assert load_model(tmp_path / "re").categories == load_model(oracle).categories
    raw, modulated = networks_of(open_runs([oracle], "val", []))
    for before, after in zip(stage_features(raw), stage_features(modulated), strict=True):
        assert before.shape == after.shape
        assert not np.allclose(before, after)
    for form in ("hub", "onnx"):
        says = refused("export", "--run", oracle, "--to", tmp_path / form, "--format", form)
        assert "a model of the task guesswhat cannot be exported" in says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["guesswhat.crop_factor=1.5"], "made with guesswhat.crop_factor 1.1, but guesswhat.crop_factor is 1.5"),
        (["guesswhat.status=[failure]"], "made with guesswhat.status"),
        (["train.augment=crop"], "train.augment: the task guesswhat supports no augmentation"),
        (["train.loss=bce"], "train.loss: bce"),
    ],
)
def test_what_cannot_be_trained_is_refused(recipe, tmp_path, words, says):
    with pytest.raises(InputError, match=says):
        train(load_settings(recipe, words), runs=tmp_path)
    assert not list(tmp_path.iterdir()) or not list(tmp_path.glob("*/config.yaml"))


def test_data_of_another_task_or_other_categories_are_refused(recipe, oracle, tiny, trained, tmp_path):
    games, scenes = load_settings(recipe).data.h5, load_settings(tiny).data.h5
    with pytest.raises(InputError, match="games.h5: made for the task guesswhat, not vqa; name another data.h5"):
        evaluate(trained, "val", tmp_path, [f"data.h5={games}"])
    with pytest.raises(InputError, match="world.h5: made for the task vqa, not guesswhat"):
        evaluate(oracle, "val", tmp_path, [f"data.h5={scenes}"])
    with pytest.raises(InputError, match="world.h5: made with image_size 64"):
        train(load_settings(recipe, [f"data.h5={scenes}"]), runs=tmp_path)
    saved = load_model(oracle)
    saved.categories.reverse()
    with pytest.raises(InputError, match=r"games.h5: its categories of objects are not those of the model"):
        split_data(saved, saved.settings, "val")
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "categories.json: no such file"),
        ("[]", "categories.json: must be a list of texts"),
        ('["a", "", "c", "d", "e"]', "categories.json: category 1 is empty"),
        ('["a", "b"]', "category.weight is (5, 6), not (2, 6)"),
    ],
)
def test_a_model_without_its_categories_is_named(oracle, tmp_path, refused, asked, content, says):
    for file in (oracle / "model").iterdir():
        if file.name != "categories.json":
            (tmp_path / file.name).symlink_to(file)
    if content is not None:
        (tmp_path / "categories.json").write_text(content)
    assert says in refused("ask", "--run", tmp_path, *words_of(asked))


def test_a_box_on_the_command_line_is_four_numbers(oracle, trained, refused, asked):
    words = words_of(asked)[:4]
    for box in ("1,2,3", "1,2,3,nan", "1 2 3 4", "a", "1,2,3,4,5", "1e9,2,3,4"):
        assert "is not a box; write X,Y,W,H" in refused("ask", "--run", oracle, *words, f"--box={box}")
    exact = ("--box", f"{1 / 3},0.1000000000000001,30,40")  # as a program writes them
    assert "box: a model of the task vqa" in refused("ask", "--run", trained, *words, *exact)
    for command in ("ask", "inspect"):
        assert "box: this model needs" in refused(command, "--run", oracle, *words)
        assert "box: a model of the task vqa" in refused(command, "--run", trained, *words, "--box", "1,2,3,4")
