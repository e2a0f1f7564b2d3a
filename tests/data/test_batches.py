"""Batches: their content, their order, and one handle a process."""

import itertools
import os
import pickle
import signal
from concurrent.futures import BrokenExecutor

import numpy as np
import pytest
import torch

from data.batches import EpochSampler, FileImages, QuestionDataset, batches_by_image
from data.h5_file import H5Images, Store
from data.loader import make_loader, readable
from data.sources import NeededImage
from vqa.io.errors import InputError, NotWrittenError
from vqa.text.tokenizer import PAD_ID

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def dataset(tiny):
    opened = Store(tiny.parent / "world.h5")
    return QuestionDataset(opened.table("train"), H5Images(opened.path))


def test_a_batch_is_its_questions(dataset):
    batch = dataset[[5, 4, 17]]  # four questions per image: the first two share theirs
    assert batch.images.shape == (2, 64, 64, 3)
    assert batch.places.tolist() == [0, 0, 1]
    assert batch.images.dtype == torch.uint8
    assert batch.labels.shape == (3, 10)
    for place, row in enumerate([5, 4, 17]):
        length = int(batch.lengths[place])
        assert batch.tokens[place, :length].tolist() == dataset.table.words(row).tolist()
        assert (batch.tokens[place, length:] == PAD_ID).all()
        assert np.array_equal(batch.images[batch.places[place]], dataset.images[dataset.table.images[row]])


def test_without_sharing_each_question_has_an_image_of_its_own(dataset):
    dataset.share = False
    batch = dataset[[5, 4, 17]]
    assert batch.places.tolist() == [0, 1, 2]
    assert torch.equal(batch.images[0], batch.images[1])


def test_parts_of_a_batch_are_its_questions_in_order(dataset):
    batch = dataset[[5, 4, 17, 6, 18]]._replace(extras={"category": torch.arange(5)})
    parts = batch.parts(2)
    assert [len(part.rows) for part in parts] == [3, 2]
    for name in ("tokens", "lengths", "labels", "rows"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.extras["category"] for part in parts]), batch.extras["category"])
    assert torch.equal(torch.cat([part.images[part.places] for part in parts]), batch.images[batch.places])
    assert len(parts[0].images) == 2


def test_questions_on_an_image_come_together_in_random_order():
    images = np.repeat(np.arange(40), 5)
    plain, grouped = (EpochSampler(images, 20, 1, 1, together=together) for together in (1, 3))
    assert sorted(grouped.order()) == sorted(plain.order())
    groups = [len(list(group)) for _, group in itertools.groupby(images[grouped.order()])]
    # of five questions three stay together and two, unless chance puts groups of an image beside each other
    assert len(groups) <= 80
    assert len(list(itertools.groupby(images[plain.order()]))) > 150
    assert set(groups) <= {2, 3, 5}
    others = EpochSampler(images, 20, 1, 2, together=3)
    assert others.order().tolist() != grouped.order().tolist()
    assert {frozenset(batch) for batch in others} & {frozenset(batch) for batch in grouped} == set()
    assert np.unique(images[grouped.order()[:20]]).size > 5  # the groups, too, are in random order


def test_the_order_is_a_formula_of_seed_and_epoch():
    fifty = np.arange(50)

    def order(**changed):
        return list(EpochSampler(**({"images": fifty, "batch_size": 8, "seed": 1, "epoch": 1} | changed)))

    assert order() == order()
    assert len({str(order(**changed)) for changed in ({}, {"seed": 2}, {"epoch": 2})}) == 3
    assert len(order()) == 6
    assert len({row for batch in order() for row in batch}) == 48
    late = EpochSampler(fifty, 8, 1, 1, start=4)
    assert list(late) == order()[4:]
    parts = [list(EpochSampler(fifty, 8, 1, 1, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in order()]
    assert len(list(EpochSampler(fifty[:5], 8, 1, 1))) == 1
    assert [len(*EpochSampler(fifty[:5], 8, 1, 1, rank, 2)) for rank in (0, 1)] == [2, 2]


def test_the_length_of_an_epoch_takes_no_permutation(monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", pytest.fail)
    assert EpochSampler(np.zeros(50, np.int64), 8, 1, 1).batches == 6


@pytest.mark.parametrize("together", [1, 4])
def test_with_fewer_questions_than_processes_each_has_one(together):
    for size, world in ((1, 2), (2, 5)):
        images = np.zeros(size, np.int64)
        samplers = [EpochSampler(images, world, 1, 1, rank, world, together=together) for rank in range(world)]
        rows = [batch for sampler in samplers for batch in sampler]
        assert [len(batch) for batch in rows] == [1] * world
        assert {row for batch in rows for row in batch} == set(range(size))


def test_evaluation_meets_every_question_once(dataset):
    for world in (1, 3):
        met = [r for rank in range(world) for batch in batches_by_image(dataset.table, 7, rank, world) for r in batch]
        assert sorted(met) == list(range(len(dataset)))
    table = dataset.table.select(np.random.default_rng(0).permutation(len(dataset)))
    met = [row for batch in batches_by_image(table, 7) for row in batch]
    assert table.images[met].tolist() == sorted(table.images)  # so that questions on an image share it


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_open_the_file_themselves(dataset, workers):
    dataset.images[0]  # the parent's handle is open when the workers start
    sampler = EpochSampler(dataset.table.images, 8, 0, 1)
    expected = [dataset[rows] for rows in EpochSampler(dataset.table.images, 8, 0, 1)]
    batches = readable(make_loader(dataset, sampler, workers, torch.device("cpu")))
    for batch, true in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:-1], true[:-1], strict=True))


class Failing(QuestionDataset):
    """Its worker returns one batch and fails at the second."""

    def __init__(self, dataset, fail):
        self.__dict__ = dataset.__dict__ | {"asked": itertools.count(), "fail": fail}

    def __getitem__(self, rows):
        if next(self.asked):
            self.fail()
        return super().__getitem__(rows)


def raise_error():
    raise NotWrittenError("disk.h5: full")


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("fail", "error"), [(raise_error, InputError), (be_killed, BrokenExecutor)])
def test_what_ends_a_worker_is_known_by_its_type(dataset, fail, error):
    loader = make_loader(Failing(dataset, fail), batches_by_image(dataset.table, 8), 1, torch.device("cpu"))
    with pytest.raises(error) as raised:
        list(readable(loader))
    assert str(raised.value) == ("disk.h5: full" if error is InputError else "a worker process was killed")


def test_the_end_of_a_worker_interrupts_nothing(dataset, monkeypatch):
    """Torch's handler of SIGCHLD raised while a queue held its lock, and the main process waited for it forever."""
    handled, install = [], signal.signal
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number) or install(number, handler))
    batches = readable(make_loader(dataset, batches_by_image(dataset.table, 8), 1, torch.device("cpu")))
    assert list(batches)
    assert signal.SIGCHLD not in handled


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the loader that never began
def test_a_worker_that_is_killed_while_the_loader_starts_is_known_too(dataset, monkeypatch):
    def kill_the_worker(self, *_args, **_options):
        os.kill(self._workers[0].pid, signal.SIGKILL)
        self._workers[0].join()
        raise RuntimeError("as torch's signal handler does")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._reset", kill_the_worker)
    loader = make_loader(dataset, batches_by_image(dataset.table, 8), 1, torch.device("cpu"))
    with pytest.raises(BrokenExecutor, match="a worker process was killed"):
        list(readable(loader))


def test_a_dataset_holds_no_pixels(dataset):
    dataset[[0, 1, 2]]
    assert Store(dataset.images.path).usable.size * 64 * 64 * 3 > 200_000
    assert len(pickle.dumps(dataset)) < 30_000


def test_a_handle_is_not_handed_to_another_process(dataset):
    images = dataset.images
    images[0]
    copy = pickle.loads(pickle.dumps(images))
    assert copy._file is None
    assert np.array_equal(copy[0], images[0])


def test_images_from_files_equal_those_of_the_h5(tiny, dataset):
    files = [
        tiny.parent / "world" / "train" / name.name for name in sorted((tiny.parent / "world/train").glob("*.png"))
    ]
    assert np.array_equal(FileImages([NeededImage(str(file), 0) for file in files], 64)[3], dataset.images[3])


def test_an_image_that_could_be_read_only_later_is_reported_too(tiny, monkeypatch, capsys):
    file = min((tiny.parent / "world/train").glob("*.png"))
    images = FileImages([NeededImage(str(file), 7)], 64)
    with monkeypatch.context() as patch:
        patch.setattr("data.batches.decode", lambda *_: (_ for _ in ()).throw(InputError("stale file handle")))
        images[0]  # a stand-in, and it would be that of the results
    with pytest.raises(InputError, match=r"1 image\(s\) missing or unreadable, by id: 7; repair them, or skip them"):
        images.settle(skip=False)
    assert f"7: {file}: could be read only when it was tried again" in capsys.readouterr().out
