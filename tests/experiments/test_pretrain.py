"""`pretrain`, and the backbones of scenes: what is learnt, that it resumes bit for bit, and how it refuses."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments import pretrain
from experiments.training.checkpoint import load_checkpoint
from tests.photographs import COLOURS
from vqa.backbone import build_resnet
from vqa.io.errors import InputError
from vqa.io.locks import held

OPTIONS = ("--backbone", "resnet10", "--image-size", "32", "--device", "cpu")


def header_of(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["pretrained"])


def test_colours_are_learnt_and_the_file_is_a_backbone(command, photos, tmp_path):
    file = tmp_path / "new" / "b.safetensors"
    words = ("pretrain", "--images", photos, "--out", file, "--epochs", "12", *OPTIONS)
    ended = command(*words)
    header = header_of(file)
    assert ended.code == 0, ended.err
    assert header["classes"] == ["blue", "green", "red"]
    assert header["held_out_images"] == 6
    assert header["held_out_accuracy"] > 80
    said = f"{file}: accuracy on 6 held-out images: {header['held_out_accuracy']:.1f} % by class (3 classes)\n"
    assert ended.out == said
    assert build_resnet("resnet10", file).fc.out_features == 1000  # all but the classifier is loaded
    before = file.read_bytes()
    assert command(*words).out == f"{file}: complete, nothing to do\n{said}"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_a_probe_reads_what_is_in_held_out_images_and_nothing_else(done, photos, tmp_path):
    """In images of one colour there is no up, down, left or right."""
    for path in photos.rglob("*.png"):
        shade = tuple(int(part) // 2 + int(path.stem) for part in COLOURS[path.parent.name])
        Image.new("RGB", (32, 32), shade).save(path)
    (photos / "classes.csv").write_text("class,group\nred,warm\ngreen,cold\nblue,cold\n")
    file = tmp_path / "b.safetensors"
    words = ("pretrain", "--images", photos, "--out", file)
    done(*words, "--epochs", 1, *OPTIONS)
    before, report = file.read_bytes(), tmp_path / "b.safetensors.probe.json"
    ended = done(*words, "--probe", "--device", "cpu")
    assert file.read_bytes() == before
    written = json.loads(report.read_text())
    assert written["backbone"] == header_of(file)
    found = {(row["target"], row["stage"]): row for row in written["rows"]}
    targets = ["class", "group", "tint", "grey", "dark", "upside down", "mirrored"]
    assert list(found) == [(target, stage) for target in targets for stage in (1, 2, 3, 4)]
    assert {row["tested"] for row in written["rows"]} == {6, 12}
    for stage in (1, 2, 3, 4):
        assert [found[target, stage]["accuracy"] for target in ("upside down", "mirrored")] == [50, 50]
        assert [found[target, stage]["accuracy"] for target in ("class", "group", "grey")] == [100, 100, 100]
        assert found["class", stage]["chance"] == pytest.approx(100 / 3)
        assert found["group", stage]["chance"] == pytest.approx(200 / 3)
    lines = ended.out.splitlines()
    assert len(lines) == 6
    assert lines[1].split() == ["stage", "1", *(f"{found[target, 1]['accuracy']:.1f}" for target in targets)]
    again = report.read_bytes()
    assert done(*words, "--probe", "--device", "cpu").out == ended.out
    assert report.read_bytes() == again


def test_what_cannot_be_probed_is_refused(refused, photos, tmp_path):
    file = tmp_path / "b.safetensors"
    words = ("pretrain", "--images", photos, "--out", file, "--probe")
    assert "no such file; `pretrain` without --probe makes it" in refused(*words)
    save_file({"a": torch.zeros(1)}, file)
    assert "not a file that `pretrain` wrote" in refused(*words)
    save_file({"a": torch.zeros(1)}, file, {"pretrained": json.dumps({"held_out_accuracy": 1.0, "images": 100})})
    assert "pretrained on images 100, but" in refused(*words)
    assert not list(tmp_path.glob("*.json"))


def test_killed_it_resumes_bit_for_bit(photos, tmp_path, monkeypatch):
    made = {"seed": 3, "image_size": 32, "epochs": 2, "device": "cpu"}
    monkeypatch.setattr(pretrain, "BATCH", 27)  # two steps per epoch
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 1)
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    pretrain.pretrain_on_images(whole, "resnet10", photos, **made)
    save, steps = pretrain.save_checkpoint, []

    def save_and_die(file, saved):
        save(file, saved)
        steps.append(saved["step"])
        if saved["step"] in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save_checkpoint", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain_on_images(resumed, "resnet10", photos, **made)
    with pytest.raises(InputError, match=r"resumed.safetensors.checkpoint: pretrained with seed 3, not 4; remove it"):
        pretrain.pretrain_on_images(resumed, "resnet10", photos, **made | {"seed": 4})
    pretrain.pretrain_on_images(resumed, "resnet10", photos, **made)
    assert steps == [1, 2, 3, 4]  # none twice
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_checkpoint_of_another_program_is_one_line(photos, tmp_path, monkeypatch):
    made = {"seed": 3, "image_size": 32, "epochs": 1, "device": "cpu"}
    monkeypatch.setattr(pretrain, "save_checkpoint", lambda _, saved: parts.update(saved) or 1 / 0)
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 1)
    parts, file = {}, tmp_path / "b.safetensors.checkpoint"
    with pytest.raises(ZeroDivisionError):
        pretrain.pretrain_on_images(file.with_suffix(""), "resnet10", photos, **made)
    wrongs = [parts | {part: wrong} for part in parts for wrong in ([1], {"a": 1}, None)]
    for content in ([1], {"state_dict": {}}, *wrongs, parts | {"step": 100}):
        torch.save(content, file)
        with pytest.raises(InputError, match=r"checkpoint: (cannot be read as a checkpoint \(.|pretrained with)"):
            pretrain.pretrain_on_images(file.with_suffix(""), "resnet10", photos, **made)


@pytest.mark.usefixtures("listening")
def test_a_signal_ends_the_step_and_saves_it(done, command, photos, tmp_path, monkeypatch):
    words = ("pretrain", "--images", photos, "--out", tmp_path / "b.safetensors", "--epochs", "3", *OPTIONS)
    change = pretrain._shifted_and_mirrored

    def interrupted(pixels, rng):
        signal.raise_signal(signal.SIGTERM)
        return change(pixels, rng)

    monkeypatch.setattr(pretrain, "_shifted_and_mirrored", interrupted)
    ended = command(*words)
    assert ended.code == 143
    assert ended.err.startswith("interrupted; to resume: pretrain --images ")
    assert load_checkpoint(tmp_path / "b.safetensors.checkpoint")["step"] == 1
    monkeypatch.setattr(pretrain, "_shifted_and_mirrored", change)
    done(*words)
    assert [path.name for path in tmp_path.glob("b.*")] == ["b.safetensors"]


def test_the_accuracy_by_group_counts_any_class_of_it(photos, tmp_path):
    (photos / "classes.csv").write_text("class,group\nred,all\ngreen,all\nblue,all\n")
    made = pretrain.pretrain_on_images(
        tmp_path / "b.safetensors", "resnet10", photos, seed=0, image_size=32, epochs=1, device="cpu"
    )
    assert made["held_out_group_accuracy"] == 100
    assert header_of(tmp_path / "b.safetensors") == made


def test_another_change_of_the_images_is_another_backbone(photos, tmp_path):
    seen = []

    def inverted(pixels, rng):
        seen.append((pixels.shape, pixels.dtype, rng.random()))
        return 255 - pixels

    made = {"seed": 0, "image_size": 32, "epochs": 1, "device": "cpu", "change": inverted}
    file = tmp_path / "b.safetensors"
    assert pretrain.pretrain_on_images(file, "resnet10", photos, **made)["change"] == "inverted"
    assert [one[:2] for one in seen] == [((54, 32, 32, 3), np.uint8)]
    with pytest.raises(InputError, match="pretrained with change inverted, not None"):
        pretrain.pretrain_on_images(file, "resnet10", photos, **made | {"change": None})


def test_shifts_keep_the_border_and_half_are_mirrored():
    rng, size = np.random.default_rng(0), 32
    ramp = torch.arange(size, dtype=torch.uint8)[None, None, :, None].expand(400, size, size, 3)
    changed = pretrain._shifted_and_mirrored(ramp, rng).int()
    steps = changed[:, 0, 1:, 0] - changed[:, 0, :-1, 0]
    mirrored = (steps.sum(1) < 0).float().mean()
    assert 0.4 < mirrored < 0.6
    assert set(steps.abs().unique().tolist()) == {0, 1}
    assert (steps == 0).sum(1).max() == size // 8
    assert torch.equal(changed[..., 0], changed[:, :1, :, 0].expand(-1, size, -1))


def test_wrong_sources_are_one_line(refused, photos, tmp_path):
    out = tmp_path / "b.safetensors"

    def line(images, *words, file=out):
        return refused("pretrain", "--images", images, "--out", file, *OPTIONS, *words)

    assert line(tmp_path / "nowhere") == f"error: {tmp_path}/nowhere: no such file"
    assert "found 0 classes and 0 images" in line(photos / "red")
    assert "must be a .safetensors file" in line(photos, file=tmp_path / "one.pth")
    assert "must be readable text" in line(photos, file=tmp_path / b"\xe9.safetensors".decode(errors="surrogateescape"))
    vgg = ("pretrain", "--images", photos, "--out", out, "--backbone", "vgg16")
    assert "error: backbone: 'vgg16' is not a ResNet of torchvision" in refused(*vgg)
    small = ("pretrain", "--images", photos, "--out", out, "--image-size", "16")
    assert "the image size must be 32 to 2048, not 16" in refused(*small)
    text = tmp_path / "text.zip"
    text.write_text("no zip file")
    assert "text.zip: neither a folder nor a zip file" in line(text)
    (photos / "classes.csv").write_text("class,group\nred,warm\ngreen,cold\n")
    assert "classes.csv: has no group for class 'blue'" in line(photos)
    (photos / "classes.csv").write_text("name\nred\n")
    assert "classes.csv: must be a UTF-8 table with the columns class and group" in line(photos)
    (photos / "classes.csv").unlink()
    (photos / "val" / "violet").mkdir(parents=True)
    (photos / "red" / "00.png").rename(photos / "val" / "violet" / "00.png")
    assert "class 'violet' has images below val but none to train on" in line(photos)
    assert not out.exists()


def test_a_second_process_on_the_same_file_is_refused(refused, photos, tmp_path):
    out = tmp_path / "b.safetensors"
    with held(tmp_path / ".b.safetensors.lock", out):
        line = refused("pretrain", "--images", photos, "--out", out, *OPTIONS)
    assert line.startswith(f"error: {out}: locked by process ")


def test_a_backbone_of_scenes_that_two_processes_need_is_made_once(tmp_path, monkeypatch):
    trained, begun = [], threading.Event()

    def slow(*_, **__):
        trained.append(1)
        begun.set()
        time.sleep(0.2)
        return build_resnet("resnet10", classes=8), (np.array([1, 2]), np.array([1, 0]))

    monkeypatch.setattr(pretrain, "_train", slow)
    made = {"seed": 1, "image_size": 32, "images": 64, "epochs": 1}
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(pretrain.pretrain_backbone, tmp_path / "b.safetensors", "resnet10", **made)
        assert begun.wait(10)
        other = pool.submit(pretrain.pretrain_backbone, tmp_path / "b.safetensors", "resnet10", **made)
    assert one.result() == other.result() == 50
    assert trained == [1]


def test_a_users_weights_are_not_overwritten(tmp_path):
    made = {"seed": 1, "image_size": 64, "images": 64, "epochs": 1}
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    for name in ("mine.safetensors", "mine.pth", "none"):
        with pytest.raises(InputError, match=name):
            pretrain.pretrain_backbone(tmp_path / name, "resnet10", **made)
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"


def test_a_pretrained_backbone_is_kept_and_never_overwritten(tmp_path):
    made = {"seed": 1, "image_size": 64, "images": 64, "epochs": 1}
    file = tmp_path / "backbone.safetensors"
    accuracy = pretrain.pretrain_backbone(file, "resnet10", **made)
    before = file.read_bytes()
    assert pretrain.pretrain_backbone(file, "resnet10", **made) == accuracy
    assert file.read_bytes() == before
    for other in ({"seed": 2}, {"world": "large"}, {"precision": "bfloat16"}):
        with pytest.raises(InputError, match=f"pretrained with {next(iter(other))}"):
            pretrain.pretrain_backbone(file, "resnet10", **made | other)
        assert file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {file.name}


def test_a_backbone_names_its_worlds_shapes_and_does_not_depend_on_the_number_of_cores(tmp_path):
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            file = tmp_path / f"{count}.safetensors"
            pretrain.pretrain_backbone(file, "resnet10", world="large", seed=1, image_size=32, images=128, epochs=1)
            assert torch.get_num_threads() == count
            made.append(file.read_bytes())
            assert load_file(file)["fc.weight"].shape[0] == 8
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1]


def test_a_backbone_that_does_not_say_all_it_was_made_with_is_refused(tmp_path):
    file = tmp_path / "backbone.safetensors"
    said = {"name": "resnet10", "seed": 1, "image_size": 64, "images": 64, "epochs": 1, "batch_size": 64}
    save_file({"a": torch.zeros(1)}, file, {"pretrained": json.dumps(said | {"held_out_accuracy": 12.5})})
    with pytest.raises(InputError, match="pretrained with world None, not small; remove it or name another"):
        pretrain.pretrain_backbone(file, "resnet10", seed=1, image_size=64, images=64, epochs=1)
