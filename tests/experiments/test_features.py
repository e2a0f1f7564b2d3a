"""Features after each stage: what is captured, the numbers on features made up for it, and the command's files."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.batches import QuestionDataset
from data.scenes.write import write_world
from experiments.features.figure import COLOURS, class_colours, write_scatter
from experiments.features.neighbours import is_colour, neighbour_accuracy, project
from experiments.features.networks import RAW, networks_of, open_runs, select_pairs, shown_names, stage_features
from experiments.training.train import train
from tests.resnets import pair, random_modulation
from vqa.cbn import Modulation
from vqa.settings.recipes import load_settings
from vqa.text.answers import normalise_answer

FILES = {"answer_type.png", "question_type.png", "colour.png", "points.csv", "neighbours.csv", "neighbours.json"}


@pytest.fixture(scope="module")
def runs(tiny, trained):
    """Run directories of one ResNet: MODERN, the baseline, and one whose stage 4 was trained."""

    def run(*words):
        return train(load_settings(tiny, ["cbn.stages=[]", *words]), runs=tiny.parent / "runs").path

    return [trained, run("name=baseline"), run("name=tuned", "backbone.train=stage4", "train.learning_rate=0.01")]


def networks(folders, pairs=24, seed=0):
    return {one.name: one for one in networks_of(select_pairs(open_runs(folders, "val", []), "val", pairs, seed))}


# ---- the maps


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
@torch.inference_mode()
def test_stage_maps_are_those_of_torchvisions_stages(name):
    plain, net = pair(name)
    x = torch.randn(2, 3, 64, 64)
    zero = torch.zeros(2, sum(layer.channels for layer in net.layers))
    still, zeroed = net.stage_maps(x), net.stage_maps(x, Modulation(zero, zero))
    assert len(still) == len(zeroed) == 4
    expected = plain.maxpool(plain.relu(plain.bn1(plain.conv1(x))))
    for stage, ours, ours_zeroed in zip((1, 2, 3, 4), still, zeroed, strict=True):
        expected = plain.get_submodule(f"layer{stage}")(expected)
        assert ours.shape[-1] == 64 // 2 ** (stage + 1)
        assert torch.equal(ours, expected)
        torch.testing.assert_close(ours_zeroed, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@torch.inference_mode()
def test_the_fourth_map_is_the_networks_and_deltas_move_only_what_follows():
    _, net = pair("resnet18", (3, 4))
    x, modulation = torch.randn(2, 3, 64, 64), random_modulation(net, 2)
    still, moved = net.stage_maps(x), net.stage_maps(x, modulation)
    assert torch.equal(moved[3], net(x, modulation))
    assert [torch.equal(*maps) for maps in zip(still, moved, strict=True)] == [True, True, False, False]


def test_features_are_the_averaged_maps_of_each_pair(trained):
    found = networks([trained])
    assert list(found) == [RAW, "trained"]
    for network in found.values():
        _, saved, _, data = network.run
        data = QuestionDataset(data.table.select(np.arange(24)[::-1]), data.images)  # images are read in another order
        features = stage_features(network._replace(run=network.run._replace(data=data)))
        assert [of_stage.shape for of_stage in features] == [(24, width) for width in (16, 32, 64, 128)]
        for row in (0, 17):
            batch = data[[row]]
            images = saved.preprocessing.normalise(batch.images)
            output = saved.model(images, batch.tokens, batch.lengths, modulate=network.modulate)
            expected = saved.model.resnet(images, output.modulation).mean((2, 3))[0]
            torch.testing.assert_close(torch.from_numpy(features[3][row]), expected, rtol=1e-3, atol=1e-4)


# ---- which networks, by which names


def test_a_frozen_run_lends_the_raw_resnet_and_a_baseline_is_it(runs):
    modern, baseline, tuned = runs
    assert [(one.name, one.modulate) for one in networks(runs).values()] == [
        (RAW, False),
        ("trained", True),
        ("tuned", False),
    ]
    assert list(networks([tuned, baseline])) == [RAW, "tuned"]
    assert list(networks([tuned])) == ["tuned"]
    lent, own = (stage_features(networks([run])[RAW]) for run in (modern, baseline))
    assert all(np.array_equal(*both) for both in zip(lent, own, strict=True))
    raw, fine = (stage_features(one) for one in networks([baseline, tuned]).values())
    assert [np.array_equal(*both) for both in zip(raw, fine, strict=True)] == [True, True, True, False]


def test_re_estimated_statistics_make_another_resnet(done, trained, tmp_path):
    done("recalibrate", "--run", trained, "--out", tmp_path / "moved")
    assert list(networks([tmp_path / "moved"])) == ["moved"]
    assert list(networks([tmp_path / "moved", trained])) == [RAW, "moved", "trained"]


def test_other_statistics_or_norms_are_no_raw_resnet(trained):
    (run,) = open_runs([trained], "val", [])
    for part, changed in (("backbone", {"statistics": "batch"}), ("cbn", {"normaliser": "group"})):
        section = getattr(run.settings, part).model_copy(update=changed)
        other = run._replace(settings=run.settings.model_copy(update={part: section}))
        assert [network.name for network in networks_of([other])] == ["trained"], part


def test_runs_of_different_resnets_are_refused(refused, tiny, trained, here, done):
    done("train", "--config", tiny, "name=other", "seed=5")
    line = refused("features", "--run", trained, "--run", here / "runs/other")
    assert "other: its frozen ResNet differs from that of trained" in line


def test_names_are_as_long_as_they_must_be(trained, tmp_path):
    folders = [tmp_path / name for name in ("a/seed_1", "b/seed_1", "c")]
    for folder in folders:
        shutil.copytree(trained / "model", folder / "model")
    assert shown_names(folders[1:]) == ["seed_1", "c"]
    assert shown_names([folders[0] / "model", folders[1]]) == ["a/seed_1", "b/seed_1"]


# ---- the numbers


def test_neighbours_find_what_is_apart():
    rng = np.random.default_rng(0)
    images = np.arange(300)
    labels = np.array(["a", "b", "c"])[images % 3]
    apart = rng.normal(size=(300, 5)) + 100.0 * (images % 3)[:, None]
    found = neighbour_accuracy(apart, labels, images, seed=0)
    assert found == {"accuracy": 100.0, "chance": 33.33, "classes": 3, "pairs": 300, "neighbours": 15}
    labels[:30] = np.roll(labels[:30], 1)  # a tenth is labelled as what it is not
    assert neighbour_accuracy(apart, labels, images, seed=0)["accuracy"] == 90


def test_neighbours_are_at_chance_on_noise():
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b"], 2000)
    found = neighbour_accuracy(rng.normal(size=(2000, 8)), labels, np.arange(2000), seed=0)
    assert abs(found["accuracy"] - 50) < 4
    assert found["chance"] == pytest.approx(100 * max((labels == "a").mean(), (labels == "b").mean()))


def test_a_pair_is_not_predicted_by_the_other_pairs_of_its_image():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(100), 20)
    of_image, labels = rng.normal(size=(100, 4)), rng.choice(["a", "b"], 100)
    found = neighbour_accuracy(of_image[images], labels[images], images, seed=0)
    assert abs(found["accuracy"] - 50) < 20
    crops = np.stack([np.arange(2000), images], axis=1)  # each of the image in the second column
    assert neighbour_accuracy(of_image[images], labels[images], crops, seed=0) == found


def test_channels_count_alike_whatever_their_scale():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"])[np.arange(200) % 2]
    features = np.stack([10.0 * (np.arange(200) % 2) + rng.normal(size=200), 1e4 * rng.normal(size=200)], axis=1)
    assert neighbour_accuracy(features, labels, np.arange(200), seed=0)["accuracy"] > 95


def test_classes_of_too_few_images_are_skipped():
    features, images = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40)
    labels = ["a"] * 31 + ["five"] * 5 + ["rare"] * 4
    found = neighbour_accuracy(features, labels, images, seed=0)
    assert (found["classes"], found["pairs"], found["chance"]) == (2, 36, 86.11)
    assert neighbour_accuracy(features, ["a"] * 36 + ["rare"] * 4, images, seed=0) is None
    assert neighbour_accuracy(features, labels, np.arange(40) % 4, seed=0) is None


def test_points_are_the_same_for_the_same_seed():
    features = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    points = project(features, seed=1)
    assert points.shape == (50, 2)
    assert np.isfinite(points).all()
    assert np.array_equal(project(features, seed=1), points)
    assert not project(np.ones((50, 8), np.float32), seed=1).any()


def test_colours():
    assert all(map(is_colour, ["red", "Black and white", "gray.", "red, white and blue"]))
    assert not any(map(is_colour, ["", "and", "red car", "2", "yes", "colour"]))


# ---- the figure


def test_the_most_common_classes_have_a_colour_each():
    colours = class_colours(["b", "b", "a", *map(str, range(10))])
    assert list(colours)[:3] == ["b", "0", "1"]
    assert len(set(colours.values())) == len(colours) == len(COLOURS)


def test_an_image_of_many_classes_and_any_name(tmp_path):
    points = {("a $ b $", stage): np.random.rand(30, 2) for stage in (1, 2)}
    points |= {("c", stage): np.zeros((30, 2)) for stage in (1, 2)}
    notes = {("c", 2): "9 %"}
    write_scatter(tmp_path / "a.png", points, [f"kind {n % 12}" for n in range(30)], "title", notes)
    with Image.open(tmp_path / "a.png") as figure:
        assert figure.format == "PNG"
        assert figure.width > 700


# ---- the command


def test_the_command_writes_everything(done, tiny, runs, tmp_path):
    given = [word for run in runs for word in ("--run", run)]
    ended = done("features", *given, "--seed", 1, "--out", tmp_path / "a")
    assert "split 'val' has only 24 pairs" in ended.out
    assert "question type (4 classes, chance" in ended.out
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES

    with (tmp_path / "a/points.csv").open(newline="", encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    shown = {(point["network"], point["stage"], point["question_id"]) for point in points}
    assert len(shown) == len(points) == 3 * 4 * 24
    assert {point["network"] for point in points} == {RAW, "trained", "tuned"}
    world = json.loads((tiny.parent / "world/val_annotations.json").read_text())["annotations"]
    for entry in world:
        of_question = [point for point in points if point["question_id"] == str(entry["question_id"])]
        assert len(of_question) == 12
        for point in of_question:
            assert point["answer_type"] == entry["answer_type"]
            assert point["question_type"] == entry["question_type"]
            assert normalise_answer(point["answer"]) == normalise_answer(entry["answers"][0]["answer"])
            assert np.isfinite([float(point["x"]), float(point["y"])]).all()

    numbers = json.loads((tmp_path / "a/neighbours.json").read_text())
    assert (numbers["split"], numbers["pairs"], numbers["seed"]) == ("val", 24, 1)
    with (tmp_path / "a/neighbours.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: str(value) for key, value in entry.items()} for entry in numbers["accuracies"]]
    for entry in numbers["accuracies"]:
        assert 0 <= entry["accuracy"] <= 100
        assert f"{entry['accuracy']:.1f}" in ended.out


def test_the_same_seed_gives_the_same_files_from_raw_files_and_a_copied_model_too(done, trained, tmp_path):
    def run(folder, out, *words):
        done("features", "--run", folder, "--pairs", 20, "--out", tmp_path / out, *words)
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}

    shutil.copytree(trained / "model", tmp_path / "trained")
    assert run(trained, "h5") == run(tmp_path / "trained", "raw", "data.h5=absent.h5")


def test_another_seed_shows_other_pairs(trained):
    first, other = (select_pairs(open_runs([trained], "val", []), "val", 20, seed) for seed in (0, 1))
    assert first[0].data.table.ids.tolist() != other[0].data.table.ids.tolist()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "vall"], "no split 'vall'; it holds train, val"),
        (["--pairs", "19"], "at least 20 are needed"),
        (["--pairs", "0"], "not a number from 1 to 1000000000"),
        (["--seed", "-1"], "not a number from 0"),
        (["--seed", "4294967296"], "not a number from 0"),
        (["--run", "nowhere"], "nowhere: no model here"),
        (["cbn.stages=[4]"], "a trained model cannot be changed"),
    ],
)
def test_wrong_input_is_refused(refused, trained, tmp_path, words, said):
    assert said in refused("features", "--run", trained, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_more_wrong_input_is_refused(refused, trained, tmp_path):
    given = ("features", "--run", trained)
    assert "given twice" in refused(*given, "--run", trained / "model", "--out", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "must be a directory" in refused(*given, "--out", tmp_path / "file")
    assert "--run" in refused("features")
    split = "{questions: val_questions.json, images: 'val/{image_id:012d}.png'}"
    words = (f"data.splits.test={split}", "data.h5=absent.h5")
    assert "has no annotations" in refused(*given, "--split", "test", "--out", tmp_path / "out", *words)


def test_runs_of_other_questions_are_refused(refused, done, tiny, trained, here):
    write_world(here / "world", seed=8, images={"train": 12, "val": 6}, processes=1)
    words = (f"data.folder={here}/world", f"data.h5={here}/world.h5", "scenes.seed=8")
    done("preprocess", "--config", tiny, *words)
    done("train", "--config", tiny, "name=elsewhere", *words)
    line = refused("features", "--run", trained, "--run", "runs/elsewhere", "--out", here / "out")
    assert "elsewhere: its split 'val' holds other questions than that of trained" in line
