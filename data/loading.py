"""Batches of questions with their images, from an h5 file or from raw files, in an order that is a formula.

Legend: B questions a batch, T words, S image side, K answers a question.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.images import decode_image
from data.table import QuestionTable
from data.tokenizer import PAD_ID


class Batch(NamedTuple):
    """What a model trains on or answers; images stay bytes until they are on their device."""

    images: torch.Tensor  # uint8 [B, S, S, 3]
    tokens: torch.Tensor  # int64 [B, T], padded with PAD_ID
    lengths: torch.Tensor  # int64 [B], at least 1
    labels: torch.Tensor  # int64 [B, K], answer classes of the given answers, NO_ANSWER outside the vocabulary
    rows: torch.Tensor  # int64 [B], rows of the question table

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class Images(Protocol):
    """Where images come from: a row number to uint8 [S, S, 3]."""

    def __getitem__(self, row: int) -> np.ndarray: ...


class FileImages:
    """Images decoded from their files when asked for; the last few are kept, as questions come image by image."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, row: int) -> np.ndarray:
        """One image, uint8 [S, S, 3]. Raises InputError if its file is missing or no image."""
        return _decode_once(self.files[row], self.size)


_decode_once = lru_cache(maxsize=16)(decode_image)


class QuestionDataset(Dataset):
    """Questions with their images; asked for a list of rows at a time."""

    def __init__(self, table: QuestionTable, images: Images) -> None:
        self.table, self.images = table, images
        self.labels = table.labels().astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows."""
        lengths = self.table.lengths[rows].astype(np.int64)
        tokens = np.full((len(rows), lengths.max()), PAD_ID, np.int64)
        for place, row in enumerate(rows):
            tokens[place, : lengths[place]] = self.table.words(row)
        images = np.stack([self.images[self.table.images[row]] for row in rows])
        arrays = (images, tokens, lengths, self.labels[rows], np.array(rows, np.int64))
        return Batch(*map(torch.from_numpy, arrays))


class EpochSampler(Sampler[list[int]]):
    """Batches of one epoch for one process: a formula of (seed, epoch, rank, world size), so nothing is to be saved.

    Each batch of the whole run is cut into one part a process; the last, incomplete batch of an epoch is left out
    (the questions in it differ from epoch to epoch), unless it is the only one.
    """

    def __init__(self, size: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> None:
        """`batch_size` counts over all processes. Set `start` to begin at a later batch (after a resume)."""
        self.order = np.random.default_rng([seed, epoch]).permutation(size)
        self.batch_size = min(batch_size, size - size % world_size)
        self.batches = size // self.batch_size
        self.rank, self.world_size = rank, world_size
        self.start = 0

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.batches):
            rows = self.order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield rows[self.rank :: self.world_size].tolist()


class InOrderSampler(Sampler[list[int]]):
    """Every row once, in order of the images, this process's share of it: for evaluation."""

    def __init__(self, table: QuestionTable, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.rows = np.argsort(table.images, kind="stable")[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.rows[start : start + self.batch_size].tolist()


def make_loader(
    dataset: QuestionDataset, sampler: Sampler[list[int]], workers: int, device: torch.device
) -> DataLoader:
    """Batches of `dataset` in the sampler's order, prepared by `workers` processes (0: by this one)."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # forked workers would inherit the threads' locks of torch and h5py
        multiprocessing_context="spawn" if workers else None,
        # a generator of its own: making an iterator draws a number, which must not move the one of dropout
        generator=torch.Generator(),
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch
