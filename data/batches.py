"""Batches of questions with their images, in an order that seed and epoch determine.

Shapes: B questions, I images, T words, K answers to a question, S side of an image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from data.augmentation import Augmentation
from data.bad_images import settle_bad_images, stand_in
from data.question_table import QuestionTable
from data.sources import NeededImage, decode, defect_of
from vqa.io.errors import InputError
from vqa.text.tokenizer import PAD_ID


class Batch(NamedTuple):
    """Questions and their images, which stay uint8 until they are on the device."""

    images: torch.Tensor  # uint8 [I, S, S, 3], or stored feature maps, float16 [I, H, W, C]
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
    """A source of images: row → uint8 [S, S, 3], or a stored feature map, float16 [H, W, C]."""

    def __getitem__(self, row: int) -> np.ndarray: ...


class FileImages:
    """Images that are decoded from their files when they are read.

    One that is missing or unreadable is replaced by a stand-in and marked in `bad`; call `settle` after reading.
    """

    def __init__(self, images: Sequence[NeededImage], size: int) -> None:
        self.images, self.size = images, size
        self.bad = torch.zeros(len(images), dtype=torch.bool)  # [N], a tensor because worker processes share its memory

    def __getitem__(self, row: int) -> np.ndarray:
        image = self.images[row]
        try:
            return decode(Path(image.file), [image.crop], self.size)[0]
        except InputError:
            self.bad[row] = True
            return stand_in(self.size)

    def settle(self, skip: bool) -> None:
        """List the bad images so far. Raises InputError if there are some and `skip` is False."""
        bad = [self.images[row] for row in self.bad.nonzero().flatten().tolist()]
        once = "could be read only when it was tried again"  # of a disk that failed for a moment
        defects = ((image.id, defect_of(image, self.size) or f"{image.file}: {once}") for image in bad)
        settle_bad_images(defects, skip)


class NoImages:
    """A placeholder for images that the model does not use; nothing is read."""

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
        self.augmentation = augmentation
        self.labels = table.labels().astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        return self.batch(rows, epoch=0)

    def batch(self, rows: Sequence[int], epoch: int) -> Batch:
        """Return the batch of some rows, with the augmentation of an epoch."""
        wanted = self.table.images[rows]
        places = np.arange(wanted.size).reshape(wanted.shape)
        if self.share:
            wanted, places = np.unique(wanted, return_inverse=True)
        images = [self.images[image] for image in wanted.flat]
        if self.augmentation is not None:
            images = [self.augmentation.augment(image, epoch, row) for image, row in zip(images, rows, strict=True)]
        images, places = torch.from_numpy(np.stack(images)), torch.from_numpy(places)
        words, labels = padded_words(self.table, rows), torch.from_numpy(self.labels[rows])
        extras = {name: torch.from_numpy(values[rows]) for name, values in self.table.extras.items()}
        return Batch(images, places, *words, labels, torch.tensor(rows), extras)

    def image_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of the images in the batch of these rows."""
        images = self.table.images[rows]
        return (len(np.unique(images)) if self.share else images.size) * self.images[images.flat[0]].nbytes


class Planned(Dataset):
    """Batches of training and validation in one dataset, so that one loader reads both: (epoch, rows) → their batch.

    The epoch is that of the augmentation; None stands for the validation.
    """

    def __init__(self, training: QuestionDataset, validation: QuestionDataset | None) -> None:
        self.training, self.validation = training, validation

    def __getitem__(self, item: tuple[int | None, list[int]]) -> Batch:
        epoch, rows = item
        return self.validation[rows] if epoch is None else self.training.batch(rows, epoch)


@dataclass(eq=False)
class EpochSampler:
    """Batches of one epoch for one process, computed from (seed, epoch, rank, world size): there is no state to save.

    Each batch is divided among the processes. The last, incomplete batch of an epoch is skipped (other questions in
    each epoch) unless it is the only one, which skips what is left over from equal shares; with fewer questions than
    processes, some get the same question.
    """

    images: np.ndarray  # int64 [N], row of each question's image
    batch_size: int  # questions over all processes; reduced to what there are
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
