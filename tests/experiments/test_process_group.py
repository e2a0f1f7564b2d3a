"""Training in several processes: equal to one process, resumed after a kill, refused by all."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from experiments import process_group
from experiments.process_group import Processes, joined_group, this_process
from experiments.tasks.vqa import VQATask
from experiments.training.run_directory import RunDirectory
from experiments.training.train import prepare, train
from tests.processes import free_port, start_ranks, start_two, wait_until
from tests.runs import lines, same_weights, weights
from vqa.io.errors import InputError
from vqa.settings.recipes import load_settings


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
    wait_until(checkpoint.exists)
    for rank in killed:
        rank.kill()
        rank.wait()
    assert epochs_in(checkpoint) < 2, "too fast to be killed in time"
    asked = start("--resume", "name=killed")
    before = checkpoint.stat().st_mtime_ns
    wait_until(lambda: checkpoint.stat().st_mtime_ns != before)
    asked[1].terminate()  # one of them alone: both save the same step and end
    check_ended(asked, 143)
    assert epochs_in(checkpoint) < 2, "too fast to be ended in time"
    check_ended(start("--resume", "name=killed"), 0)
    assert same_weights(tmp_path / "runs/whole", tmp_path / "runs/killed")
    assert lines(tmp_path / "runs/whole") == lines(tmp_path / "runs/killed")


def _wait_for_the_main_one(rank, port):
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # of older versions of torch
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["LOCAL_RANK"] = str(rank)
    processes = this_process()
    with joined_group(processes, torch.device("cpu")):
        set_timeout(timedelta(seconds=0.5), dist.group.WORLD)
        assert processes.on_main(lambda: time.sleep(1.5) or "made") == "made"


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"WORLD_SIZE": "two"}, "must be whole numbers, as torchrun sets them"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE is 2, but there is no LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start it",
        ),
    ],
)
def test_what_a_launcher_must_set(told, why, monkeypatch, tiny, refused):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert why in refused("train", "--config", tiny)


def test_the_others_wait_for_the_main_process_as_long_as_it_works():
    start_two(_wait_for_the_main_one, free_port())


@pytest.fixture
def group(monkeypatch):
    """What is done to process groups, of which none is made."""
    done = []
    monkeypatch.setattr(dist, "init_process_group", done.append)
    monkeypatch.setattr(dist, "new_group", lambda backend=None, **_: done.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    return done


def test_objects_are_exchanged_on_the_host_and_tensors_on_the_gpu(group):
    with joined_group(Processes(0, 0, 2), torch.device("cuda", 0)):
        assert group == ["nccl", "gloo"]
    assert group[2:] == ["destroyed"]


@pytest.mark.parametrize(("device", "after"), [("cuda", []), ("cpu", ["destroyed"])])
def test_a_process_that_failed_does_not_wait_for_the_others_on_a_gpu(group, device, after):
    with pytest.raises(torch.OutOfMemoryError), joined_group(Processes(0, 0, 2), torch.device(device)):
        raise torch.OutOfMemoryError
    assert group[2:] == after


def test_processes_that_may_not_train_all_say_so(tiny, trained):
    for rank in start_ranks("train", "--config", tiny, "name=trained", "device=cpu", folder=trained.parent.parent):
        ended = rank.end()
        assert ended.code == 2
        assert ended.err.splitlines()[-1].startswith("error: runs/trained: already holds a run")


@pytest.mark.parametrize(
    "choices",
    [
        ["backbone.statistics=population", "train.schedule=constant"],
        ["backbone.statistics=batch", "train.schedule=constant"],
        [
            *("train.loss=bce", "train.optimiser=adamw", "train.weight_decay=0.1", "train.augment=crop_flip"),
            *("train.schedule=cosine", "train.warm_up=0.2"),
        ],
    ],
    ids=["population", "batch", "beyond the paper"],
)
def test_two_processes_train_as_one(tiny, tmp_path, choices):
    words = ["train.epochs=2", "train.checkpoint_every=1", "device=cpu", *choices]
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


def test_processes_begin_with_the_same_weights_and_dropout_masks_of_their_own(tiny, tmp_path):
    task, states, masks = VQATask(load_settings(tiny, ["data.cache_gib=0"])), [], []
    for rank in range(2):
        states.append(prepare(task, RunDirectory(tmp_path / str(rank)), Processes(rank, rank, 2)).model.state_dict())
        masks.append(torch.rand(9))
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert not torch.equal(*masks)


def test_buffers_are_not_broadcast_on_older_versions_of_torch_either(monkeypatch):
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
