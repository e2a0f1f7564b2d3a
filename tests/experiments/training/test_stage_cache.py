"""Stored maps of fixed stages: the network cut in two, the same training, a file that is not taken for another."""

import json
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from data.h5_file import _digest_of
from experiments.process_group import Processes
from experiments.tasks.vqa import VQATask
from experiments.training.stage_cache import _digest, cached_maps, choose_images
from experiments.training.train import train
from tests.conftest import ROOT
from vqa.io.errors import InputError
from vqa.norms import Modulation
from vqa.resnet import ModulatedResNet, StageMap
from vqa.settings.recipes import load_settings


@pytest.mark.parametrize(("name", "stage"), [*(("resnet10", stage) for stage in range(5)), ("resnet50", 2)])
def test_the_network_cut_in_two_is_the_network(name, stage):
    torch.manual_seed(0)
    net = ModulatedResNet(name, stages=tuple(range(stage + 1, 5))).eval()
    assert net.fixed_stage() == stage
    images, width = torch.randn(2, 3, 64, 64), sum(layer.channels for layer in net.layers)
    modulation = Modulation(0.1 * torch.randn(2, width), 0.1 * torch.randn(2, width)) if width else None
    cut = net.prefix(images, stage)
    assert cut.stage == stage
    assert torch.equal(net(cut, modulation), net(images, modulation))


def test_what_is_conditioned_or_trained_is_not_fixed():
    assert ModulatedResNet("resnet10", stages=(2, 4)).fixed_stage() == 1
    assert ModulatedResNet("resnet10", stages=(4,), stem=True).fixed_stage() is None
    assert ModulatedResNet("resnet10", stages=(), statistics="batch").fixed_stage() is None
    net = ModulatedResNet("resnet10", stages=())
    for what, fixed in (("stage4", 3), ("batchnorm", None)):
        for parameter in net.trainable(what):
            parameter.requires_grad_(True)
        assert net.fixed_stage() == fixed


def losses(run):
    return [json.loads(line)["train_loss"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        ["cbn.stages=[]"],
        ["cbn.stages=[4]"],
        ["cbn.stages=[]", "backbone.train=stage4"],
        [],
        ["cbn.condition=image", "cbn.stages=[3, 4]"],
    ],
)
def test_training_from_stored_maps_is_training_from_images(tiny, tmp_path, words):
    words = [*words, f"data.h5={tmp_path}/world.h5", "train.epochs=2"]
    shutil.copyfile(load_settings(tiny).data.h5, tmp_path / "world.h5")
    plain = train(load_settings(tiny, [*words, "name=plain", "data.cache_gib=0.0"]), runs=tmp_path)
    assert not list(tmp_path.glob("world_stage*.h5"))
    stored = train(load_settings(tiny, [*words, "name=stored"]), runs=tmp_path)
    assert len(list(tmp_path.glob("world_stage*.h5"))) == 1
    assert losses(stored) == pytest.approx(losses(plain), rel=1e-3)


def test_another_backbone_gets_another_file_and_other_images_are_refused(tiny, tmp_path):
    shutil.copyfile(load_settings(tiny).data.h5, tmp_path / "world.h5")
    for seed in (1, 2):  # of random weights
        words = [f"data.h5={tmp_path}/world.h5", f"seed={seed}", f"name=seed_{seed}", "cbn.stages=[]"]
        train(load_settings(tiny, words), runs=tmp_path)
    assert len(list(tmp_path.glob("world_stage4_*.h5"))) == 2
    shutil.copyfile(tmp_path / "world.h5", tmp_path / "world.hdf")  # another file of the same stem has maps of its own
    train(load_settings(tiny, [f"data.h5={tmp_path}/world.hdf", "cbn.stages=[]", "name=hdf"]), runs=tmp_path)
    assert len(list(tmp_path.glob("world.hdf_stage4_*.h5"))) == 1
    with h5py.File(tmp_path / "world.h5", "r+") as file:
        file["images/crc32"][3] ^= 1
        file.attrs["digest"] = np.bytes_(_digest_of(file))
    with pytest.raises(InputError, match=r"world_stage4_\w+.h5: made with another data; remove it"):
        train(load_settings(tiny, [*words, "name=again"]), runs=tmp_path)


def test_maps_are_stored_up_to_the_size_that_the_settings_name(tiny, tmp_path):
    shutil.copyfile(load_settings(tiny).data.h5, tmp_path / "world.h5")
    size = 18 * 2 * 2 * 128 * 2  # images, positions, channels, bytes
    for most, stage in ((size - 1, None), (size, 4)):
        words = [f"data.h5={tmp_path}/world.h5", "cbn.stages=[]", f"data.cache_gib={most / 2**30}"]
        task = VQATask(load_settings(tiny, words))
        assert choose_images(task, task.new_model(fresh=True, say=print).resnet, Processes()).stage == stage


def test_a_file_is_of_the_weights_and_statistics_of_all_its_stages():
    net = ModulatedResNet("resnet10", stages=())
    for part, is_of_stage_2 in (("bn1", True), ("layer1", True), ("layer2", True), ("layer3", False)):
        for change in (next(net.network[part].parameters()), next(net.network[part].buffers())):
            before = _digest(net, 2)
            change.data += 1
            assert (_digest(net, 2) != before) == is_of_stage_2, part


def encode(rows):
    return np.array(rows, np.float32)[:, None, None, None] * np.ones((2, 2, 3), np.float32)


KILLED = """
import sys
from pathlib import Path
import numpy as np
from experiments.training import stage_cache as maps
maps._BATCH, maps._SECONDS_A_FLUSH = 2, 0
calls = []
def dying(rows):
    calls.append(rows)
    if len(calls) == 5:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return np.array(rows, np.float32)[:, None, None, None] * np.ones((2, 2, 3), np.float32)
maps.cached_maps(Path(sys.argv[1]), {"data": "a"}, 20, dying)
"""


def test_killed_it_resumes_where_it_was_flushed(tmp_path):
    path = tmp_path / "maps.h5"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert not path.exists()
    encoded = []
    maps = cached_maps(path, {"data": "a"}, 20, lambda rows: encoded.extend(rows) or encode(rows))
    assert encoded == list(range(6, 20))  # the first, to see the shape, and three batches of two were kept
    assert all((maps[row] == row).all() for row in range(20))
    assert maps[3].dtype == np.float16
    again = cached_maps(path, {"data": "a"}, 20, pytest.fail)  # nothing is encoded again
    assert (again[19] == 19).all()


def test_a_file_of_other_data_is_refused(tmp_path):
    path = tmp_path / "maps.h5"
    cached_maps(path, {"data": "a", "network": "n"}, 3, encode)
    with pytest.raises(InputError, match=r"maps.h5: made with another network; remove it"):
        cached_maps(path, {"data": "a", "network": "m"}, 3, encode)


def test_what_does_not_fit_into_half_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match="not finite in half precision"):
        cached_maps(tmp_path / "maps.h5", {"data": "a"}, 3, lambda rows: 1e6 * encode(rows))
    assert not (tmp_path / "maps.h5").exists()


def test_a_map_stands_for_its_images_only_after_its_stage():
    net = ModulatedResNet("resnet10", stages=())
    map_ = torch.randn(1, 512, 2, 2)
    assert net(StageMap(4, map_)) is map_
