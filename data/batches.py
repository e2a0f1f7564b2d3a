"""Batches of questions with their images, in an order that seed and epoch determine.

Shapes: B questions, I images, T words, K answers to a question, S side of an image.
"""

import math
import shutil
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from data.augmentation import Augmentation
from data.bad_images import settle_bad_images, stand_in
from data.question_table import QuestionTable
from data.sources import NeededImage, decode
from vqa.io.errors import InputError
from vqa.io.files import shown
from vqa.io.processes import SHARED_MEMORY, WorkerContext, calling, naming_worker_limits, require_files
from vqa.text.tokenizer import PAD_ID

_AHEAD = 2  # batches that a worker prepares in advance
_FILES_A_BATCH = 32  # at most open while a batch is handed from one process to another
_SECONDS_OF_WAITING = 5  # for a batch, between two checks for a signal


class Batch(NamedTuple):
    """Questions and their images, which stay uint8 until they are on the device."""

    images: torch.Tensor  # uint8 [I, S, S, 3], each image once
    places: torch.Tensor  # int64 [B] or [B, V], index into `images` of each question's image or images
    tokens: torch.Tensor  # int64 [B, T], padded with PAD_ID
    lengths: torch.Tensor  # int64 [B], at least 1
    labels: torch.Tensor  # int64 [B, K], classes of the given answers as `QuestionTable.labels`
    rows: torch.Tensor  # int64 [B], rows of the question table
    extras: dict[str, torch.Tensor]  # [B, …] each: what else the task's model takes, by name

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device."""
        *parts, extras = self
        there = {name: part.to(device, non_blocking=True) for name, part in extras.items()}
        return Batch(*(part.to(device, non_blocking=True) for part in parts), there)

    def parts(self, count: int) -> "list[Batch]":
        """Split the batch into at most `count` batches of about the same number of questions."""
        if count == 1:
            return [self]
        return [self.of(rows) for rows in torch.arange(len(self.rows), device=self.rows.device).chunk(count)]

    def of(self, rows: torch.Tensor) -> "Batch":
        """Return the batch of some of its questions, int64 indices."""
        kept, places = torch.unique(self.places[rows], return_inverse=True)
        of_questions = (part[rows] for part in (self.tokens, self.lengths, self.labels, self.rows))
        extras = {name: part[rows] for name, part in self.extras.items()}
        return Batch(self.images[kept], places, *of_questions, extras)


class Images(Protocol):
    """A source of images: row → uint8 [S, S, 3]."""

    def __getitem__(self, row: int) -> np.ndarray: ...


class FileImages:
    """Images that are decoded from their files when they are read.

    One that is missing or unreadable is replaced by a stand-in and marked in `bad`; call `settle` after reading.
    """

    def __init__(self, images: Sequence[NeededImage], size: int) -> None:
        self.images, self.size = images, size
        self.bad = torch.zeros(len(images), dtype=torch.bool)  # [N], a tensor because worker processes share its memory

    def __getitem__(self, row: int) -> np.ndarray:
        try:
            return self._decode(row)
        except InputError:
            self.bad[row] = True
            return stand_in(self.size)

    def settle(self, skip: bool) -> None:
        """List the bad images so far. Raises InputError if there are some and `skip` is False."""
        found: dict[tuple[int, str], None] = {}  # once for all crops of an image
        for row in self.bad.nonzero().flatten().tolist():
            try:
                self._decode(row)
            except InputError as error:
                found[self.images[row].id, str(error)] = None
        settle_bad_images(list(found), skip)

    def _decode(self, row: int) -> np.ndarray:
        image = self.images[row]
        return decode(Path(image.file), [image.crop], self.size)[0]


class NoImages:
    """In the place of images that the model does not take: nothing is read."""

    def __getitem__(self, row: int) -> np.ndarray:
        return np.zeros((1, 1, 3), np.uint8)


def padded_words(table: QuestionTable, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the word ids [B, T], padded with PAD_ID, and lengths [B] of some rows, int64."""
    words = [torch.from_numpy(table.words(row)) for row in rows]
    tokens = pad_sequence(words, batch_first=True, padding_value=PAD_ID)
    return tokens.long(), torch.from_numpy(table.lengths[rows]).long()


class QuestionDataset(Dataset):
    """Questions with their images: a list of rows → their batch."""

    def __init__(
        self, table: QuestionTable, images: Images, *, share: bool = True, augmentation: Augmentation | None = None
    ) -> None:
        """If `share` is False, or with an augmentation, a batch holds an image once for each question about it."""
        self.table, self.images, self.share = table, images, share and augmentation is None
        self.augmentation, self.epoch = augmentation, 0
        self.labels = table.labels().astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def in_epoch(self, epoch: int) -> "QuestionDataset":
        """Return the dataset with the augmentation of an epoch."""
        of_epoch = copy(self)
        of_epoch.epoch = epoch
        return of_epoch

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        wanted = self.table.images[rows]
        places = np.arange(wanted.size).reshape(wanted.shape)
        if self.share:
            wanted, places = np.unique(wanted, return_inverse=True)
        images = [self.images[image] for image in wanted.flat]
        if self.augmentation is not None:
            images = [
                self.augmentation.augment(image, self.epoch, row) for image, row in zip(images, rows, strict=True)
            ]
        images = np.stack(images)
        images, places = torch.from_numpy(images), torch.from_numpy(places)
        words, labels = padded_words(self.table, rows), torch.from_numpy(self.labels[rows])
        extras = {name: torch.from_numpy(values[rows]) for name, values in self.table.extras.items()}
        return Batch(images, places, *words, labels, torch.tensor(rows), extras)

    def image_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of the images in the batch of these rows."""
        images = self.table.images[rows]
        return (len(np.unique(images)) if self.share else images.size) * self.images[images.flat[0]].nbytes


@dataclass(eq=False)
class EpochSampler(Sampler[list[int]]):
    """Batches of one epoch for one process, computed from (seed, epoch, rank, world size): there is no state to save.

    Each batch is divided among the processes. The last, incomplete batch of an epoch is skipped (other questions in
    each epoch) unless it is the only one; with fewer questions than processes, some processes get the same question.
    """

    images: np.ndarray  # int64 [N], row of each question's image
    batch_size: int  # questions over all processes
    seed: int
    epoch: int
    rank: int = 0
    world_size: int = 1
    together: int = 1  # group up to so many questions on the same image, at random; 1 disables grouping
    start: int = 0  # index of the first batch, after a resume

    def __post_init__(self) -> None:
        count = max(len(self.images), self.world_size)
        self.batch_size = min(self.batch_size, count - count % self.world_size)
        self.batches = count // self.batch_size

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for batch in range(self.start, self.batches):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            # contiguous parts: neighbours may share an image
            yield np.array_split(rows, self.world_size)[self.rank].tolist()

    def order(self) -> np.ndarray:
        """Return the questions of the epoch for all processes, int64 [N]."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.images))
        if self.together > 1:
            order = _grouped(order, self.images, self.together, random)
        return np.resize(order, max(len(order), self.world_size))


def _grouped(order: np.ndarray, images: np.ndarray, together: int, random: np.random.Generator) -> np.ndarray:
    """Group up to `together` questions on the same image; the groups are in random order."""
    by_image = order[np.argsort(images[order], kind="stable")]
    begins = np.r_[True, np.diff(images[by_image]) != 0]
    indices = np.arange(len(order))
    within = indices - np.maximum.accumulate(np.where(begins, indices, 0))
    groups = np.cumsum(within % together == 0) - 1
    return by_image[np.argsort(random.permutation(groups[-1] + 1)[groups], kind="stable")]


def batches_by_image(table: QuestionTable, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Return batches of all rows in order of their images, for evaluation; processes take turns."""
    first = table.images.reshape(len(table), -1)[:, 0]
    rows = np.argsort(first, kind="stable").tolist()
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)][rank::world_size]


def make_loader(
    dataset: QuestionDataset, sampler: Collection[list[int]], workers: int, device: torch.device
) -> DataLoader:
    """Load batches of `dataset` in the sampler's order in `workers` processes (0: in this one)."""
    return DataLoader(
        _InWorker(dataset) if workers else dataset,
        batch_size=None,  # the sampler's items are whole batches
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context=WorkerContext() if workers else None,
        generator=torch.Generator(),  # starting the loader draws a number, which must not come from dropout's generator
    )


def check_shared_memory(dataset: QuestionDataset, sampler: Iterable[list[int]], workers: int) -> None:
    """Raise InputError if the batches that workers prepare in advance do not fit into shared memory."""
    if not workers or not Path(SHARED_MEMORY).is_dir():
        return
    batches = islice(sampler, workers * _AHEAD + 1)  # those that are ready, and the one in use
    needed, free = sum(map(dataset.image_bytes, batches)), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"{SHARED_MEMORY}: batches of {workers} workers need {shown(needed)}, but it has {shown(free)} left; "
            f"enlarge it (docker: --shm-size={math.ceil(needed / 2**29)}g), or set fewer `workers` (0 needs none)"
        )


def readable(loader: DataLoader, on_wait: Callable[[], None] | None = None) -> Iterator[Batch]:
    """Yield the batches of a loader. `on_wait` is called every few seconds without a batch; it may raise.

    Raises:
        InputError: an image is missing, damaged or cannot be read, or the workers cannot share memory.
        BrokenExecutor: a worker process was killed.
    """
    try:
        batches = iter(loader) if loader.num_workers == 0 else _start_workers(loader)
        while True:
            with calling(on_wait, _SECONDS_OF_WAITING) if on_wait else nullcontext():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, InputError):
                raise InputError(*batch.args)  # a new one: the traceback of this one would keep the loader alive
            yield batch
    except (InputError, RuntimeError):
        if loader.num_workers and loader.multiprocessing_context.any_was_killed():
            raise BrokenExecutor("a worker process was killed") from None
        raise


def _start_workers(loader: DataLoader) -> Iterator[Batch | InputError]:
    with naming_worker_limits("workers=0"):
        # tried first, because torch prints a traceback where a worker cannot start
        require_files(_FILES_A_BATCH + 8 * loader.num_workers)
        loader.multiprocessing_context.Lock()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(loader)
        finally:
            signal.signal(signal.SIGCHLD, handler)  # torch's raises wherever the main process is


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch to a device; a GPU copies the next batch while it computes with this one."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = batch.to(device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        for part in (*copied[:-1], *copied.extras.values()):
            part.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead


class _InWorker(Dataset):
    """A dataset in a worker process. It returns InputErrors as values: torch would make text of one that is raised."""

    def __init__(self, dataset: QuestionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: Sequence[int]) -> "_Packed | InputError":
        try:
            batch = self.dataset[rows]
            with naming_worker_limits("workers=0"):
                require_files(_FILES_A_BATCH)
                return _Packed(bytes(ForkingPickler.dumps(batch)))
        except InputError as error:
            return error


@dataclass(frozen=True)
class _Packed:
    """A pickled batch whose tensors are in shared memory; it arrives in the main process as a batch.

    The queue between the processes pickles in a thread, which would print an error and lose the batch, and the main
    process would wait forever: so it is pickled before.
    """

    pickled: bytes

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        return _unpacked, (self.pickled,)


def _unpacked(pickled: bytes) -> Batch | InputError:
    """Return the batch, or why it cannot be received: an exception would end the thread that pins memory."""
    try:
        return ForkingPickler.loads(pickled)
    except (OSError, EOFError, RuntimeError) as error:
        why = str(error) or "the connection is closed"
        return InputError(
            f"a batch cannot be received ({why}): its worker was killed, or too many files are open; "
            "raise `ulimit -n` or set fewer `workers`"
        )
