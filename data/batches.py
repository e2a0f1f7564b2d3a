"""Batches of questions with their images, from an h5 file or from raw files, in an order that is a formula.

Legend: B questions a batch, T words, S image side, K answers a question.
"""

import math
import shutil
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.bad_images import settle_bad_images, stand_in
from data.question_table import QuestionTable
from vqa.io.errors import InputError
from vqa.io.files import shown
from vqa.io.images import decode_image
from vqa.io.processes import SHARED_MEMORY, WorkerContext, calling, naming_worker_limits, require_files
from vqa.text.tokenizer import PAD_ID

_AHEAD = 2  # batches that a worker prepares before they are asked for
_FILES_A_BATCH = 32  # that may be open while a batch goes from one process to another, and some more
_SECONDS_OF_WAITING = 5  # for a batch, from one look at signals to the next


class Batch(NamedTuple):
    """What a model trains on or answers; images stay bytes until they are on their device."""

    images: torch.Tensor  # uint8 [I, S, S, 3], each image once
    places: torch.Tensor  # int64 [B], which of the images a question is about
    tokens: torch.Tensor  # int64 [B, T], padded with PAD_ID
    lengths: torch.Tensor  # int64 [B], at least 1
    labels: torch.Tensor  # int64 [B, K], answer classes of the given answers, NO_ANSWER outside the vocabulary
    rows: torch.Tensor  # int64 [B], rows of the question table

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    def parts(self, count: int) -> "list[Batch]":
        """The batch in (at most) so many batches of about the same number of questions."""
        return (
            [self.of(rows) for rows in torch.arange(len(self.rows), device=self.rows.device).chunk(count)]
            if count > 1
            else [self]
        )

    def of(self, rows: torch.Tensor) -> "Batch":
        """The batch of some of its questions, int64."""
        kept, places = torch.unique(self.places[rows], return_inverse=True)
        of_questions = (part[rows] for part in (self.tokens, self.lengths, self.labels, self.rows))
        return Batch(self.images[kept], places, *of_questions)


class Images(Protocol):
    """Where images come from: a row number to uint8 [S, S, 3]."""

    def __getitem__(self, row: int) -> np.ndarray: ...


class FileImages:
    """Images decoded from their files when asked for; the last few are kept, as questions come image by image.

    A stand-in takes the place of one that is missing or unreadable, and `bad` remembers it: whoever reads the images
    has to `settle` that in the end.
    """

    def __init__(self, files: Sequence[Path], ids: Sequence[int], size: int) -> None:
        self.files, self.ids, self.size = files, ids, size
        # bool [N]; a tensor, since worker processes share its memory
        self.bad = torch.zeros(len(files), dtype=torch.bool)

    def __getitem__(self, row: int) -> np.ndarray:
        """One image, uint8 [S, S, 3]."""
        try:
            return _decode_once(self.files[row], self.size)
        except InputError:
            self.bad[row] = True
            return stand_in(self.size)

    def settle(self, skip: bool) -> None:
        """Lists the bad images so far. Raises InputError if there are some, and `skip` is False."""
        found: list[tuple[int, str]] = []
        for row in self.bad.nonzero().flatten().tolist():
            try:
                decode_image(self.files[row], self.size)
            except InputError as error:
                found.append((self.ids[row], str(error)))
        settle_bad_images(found, skip)


_decode_once = lru_cache(maxsize=16)(decode_image)


def padded_words(table: QuestionTable, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Word ids [B, T], padded with PAD_ID, and lengths [B] of some rows, int64."""
    lengths = table.lengths[rows].astype(np.int64)
    tokens = np.full((len(rows), lengths.max()), PAD_ID, np.int64)
    for place, row in enumerate(rows):
        tokens[place, : lengths[place]] = table.words(row)
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


class QuestionDataset(Dataset):
    """Questions with their images; asked for a list of rows at a time."""

    def __init__(self, table: QuestionTable, images: Images, *, share: bool = True) -> None:
        """With `share` False a batch holds an image once for each of its questions."""
        self.table, self.images, self.share = table, images, share
        self.labels = table.labels().astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows."""
        wanted, places = self.table.images[rows], np.arange(len(rows))
        if self.share:
            wanted, places = np.unique(wanted, return_inverse=True)
        images = np.stack([self.images[image] for image in wanted])
        images, places = torch.from_numpy(images), torch.from_numpy(places)
        words, labels = padded_words(self.table, rows), torch.from_numpy(self.labels[rows])
        return Batch(images, places, *words, labels, torch.tensor(rows))

    def image_bytes(self, rows: Sequence[int]) -> int:
        """The size of the images in the batch of these rows."""
        images = self.table.images[rows]
        return (len(np.unique(images)) if self.share else len(images)) * self.images[images[0]].nbytes


class EpochSampler(Sampler[list[int]]):
    """Batches of one epoch for one process: a formula of (seed, epoch, rank, world size), so nothing is to be saved.

    Each batch of the whole run is cut into one part a process; the last, incomplete batch of an epoch is left out
    (the questions in it differ from epoch to epoch), unless it is the only one. Where there are fewer questions than
    processes, some processes get the same one.
    """

    def __init__(
        self,
        images: np.ndarray,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        together: int = 1,
        start: int = 0,
    ) -> None:
        """`images` are those of the questions, int64 [N]; `batch_size` counts over all processes; `start` is the first
        batch, from 0 (after a resume).

        Where `together` is above 1, up to so many questions on the same image stand beside each other; which, and in
        which order, is random all the same.
        """
        self.images, self.seed, self.epoch, self.together = images, seed, epoch, together
        self.rank, self.world_size, self.start = rank, world_size, start
        shared = max(len(images), world_size)
        self.batch_size = min(batch_size, shared - shared % world_size)
        self.batches = shared // self.batch_size

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for batch in range(self.start, self.batches):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            # neighbours stay together: they may share an image
            yield np.array_split(rows, self.world_size)[self.rank].tolist()

    def order(self) -> np.ndarray:
        """The questions of the epoch for all processes, int64 [N]."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.images))
        if self.together > 1:
            order = _grouped(order, self.images, self.together, random)
        return np.resize(order, max(len(order), self.world_size))


def _grouped(order: np.ndarray, images: np.ndarray, together: int, random: np.random.Generator) -> np.ndarray:
    """The order with questions on the same image in groups of up to `together`, the groups in random order."""
    by_image = order[np.argsort(images[order], kind="stable")]
    begins = np.r_[True, np.diff(images[by_image]) != 0]
    places = np.arange(len(order))
    within = places - np.maximum.accumulate(np.where(begins, places, 0))
    groups = np.cumsum(within % together == 0) - 1
    return by_image[np.argsort(random.permutation(groups[-1] + 1)[groups], kind="stable")]


def batches_by_image(table: QuestionTable, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Every row once, in order of the images, for evaluation; several processes share the batches of one."""
    rows = np.argsort(table.images, kind="stable").tolist()
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)][rank::world_size]


def make_loader(
    dataset: QuestionDataset, sampler: Collection[list[int]], workers: int, device: torch.device
) -> DataLoader:
    """Batches of `dataset` in the sampler's order, prepared by `workers` processes (0: by this one)."""
    return DataLoader(
        _InWorker(dataset) if workers else dataset,
        batch_sampler=sampler,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context=WorkerContext() if workers else None,
        # a generator of its own: making an iterator draws a number, which must not move the one of dropout
        generator=torch.Generator(),
    )


def check_shared_memory(dataset: QuestionDataset, sampler: Iterable[list[int]], workers: int) -> None:
    """Refuses workers whose first batches do not fit into shared memory together.

    Raises:
        InputError: they do not.
    """
    if not workers or not Path(SHARED_MEMORY).is_dir():
        return
    together = islice(sampler, workers * _AHEAD + 1)  # those that are ready, and the one in use
    needed, free = sum(map(dataset.image_bytes, together)), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"{SHARED_MEMORY}: batches of {workers} workers need {shown(needed)}, but it has {shown(free)} left; "
            f"enlarge it (docker: --shm-size={math.ceil(needed / 2**29)}g), or set fewer `workers` (0 needs none)"
        )


def readable(loader: DataLoader, on_wait: Callable[[], None] | None = None) -> Iterator[Batch]:
    """The batches of a loader. `on_wait` is called every few seconds without a batch, and may raise to end the wait.

    Raises:
        InputError: an image is missing, damaged or cannot be read, or the workers cannot share memory.
        BrokenExecutor: a worker process was killed.
    """
    with naming_worker_limits("workers=0"):
        if loader.num_workers:  # tried out before, since torch prints a traceback of its own where it cannot begin
            require_files(_FILES_A_BATCH + 8 * loader.num_workers)
            loader.multiprocessing_context.Lock()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            with _naming_killed_workers(loader):
                batches = iter(loader)
        finally:
            if signal.getsignal(signal.SIGCHLD) is not handler:  # torch's would raise in the middle of anything
                signal.signal(signal.SIGCHLD, handler)
    while (batch := _next_batch(loader, batches, on_wait)) is not None:
        yield batch


def _next_batch(
    loader: DataLoader, batches: Iterator[Batch | InputError], on_wait: Callable[[], None] | None
) -> Batch | None:
    with _naming_killed_workers(loader):
        with calling(on_wait, _SECONDS_OF_WAITING) if on_wait else nullcontext():
            batch = next(batches, None)
        if isinstance(batch, InputError):
            raise InputError(*batch.args)  # a new one, that its traceback does not keep the loader alive
    return batch


@contextmanager
def _naming_killed_workers(loader: DataLoader) -> Iterator[None]:
    """Raises BrokenExecutor in the place of what the loader raises when one of its workers was killed."""
    try:
        yield
    except (InputError, RuntimeError):
        if loader.num_workers and loader.multiprocessing_context.any_was_killed():
            raise BrokenExecutor("a worker process was killed") from None
        raise


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, Batch]]:
    """Each batch with its copy on a device; on a GPU the next one is copied while this one is computed with."""
    if device.type != "cuda":
        yield from ((batch, batch.to(device)) for batch in batches)
        return
    copying, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = batch.to(device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        for part in copied:
            part.record_stream(torch.cuda.current_stream(device))
        ahead = batch, copied
    if ahead is not None:
        yield ahead


def _unchanged(batch: Any) -> Any:
    return batch


class _InWorker(Dataset):
    """A dataset in a worker process. It hands errors of the user's input over as values: torch would make texts of
    them.
    """

    def __init__(self, dataset: QuestionDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, rows: Sequence[int]) -> "_Packed | InputError":
        try:
            return _Packed(self.dataset.__getitems__(rows))
        except InputError as error:
            return error


class _Packed:
    """A batch on its way to another process, pickled, its tensors in shared memory.

    A queue pickles in a thread of its own, which would print an error and lose the batch, and the training process
    would wait for it for ever. Here an error is handed over.
    """

    def __init__(self, batch: Batch) -> None:
        with naming_worker_limits("workers=0"):
            require_files(_FILES_A_BATCH)
            self.pickled = bytes(ForkingPickler.dumps(batch))

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        return _unpacked, (self.pickled,)


def _unpacked(pickled: bytes) -> Batch | InputError:
    """The batch, or why it cannot be received: an error that is raised here would end the thread that pins memory."""
    try:
        return ForkingPickler.loads(pickled)
    except (OSError, EOFError, RuntimeError) as error:
        why = str(error) or "the connection is closed"
        return InputError(
            f"a batch cannot be received ({why}): its worker was killed, or too many files are open; "
            "raise `ulimit -n` or set fewer `workers`"
        )
