"""What a run learns from and is scored on, as the model takes it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError, NotWrittenError
from data.loading import EpochSampler, QuestionDataset
from data.store import H5Images, Store
from data.table import NO_ANSWER, QuestionTable, joined
from data.tokenizer import PAD_ID
from vqa.distributed import Processes
from vqa.prefix import as_stage_map, prefix_maps
from vqa.preprocessing import Preprocessing
from vqa.question import KIND_WORDS
from vqa.resnet import ModulatedResNet, StageMap
from vqa.settings import Settings


class TrainingData:
    """The questions to train on, those to validate on (None without a split for it), and what is done to images."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            InputError: the h5 file is missing or made with other settings, or a split is missing, without annotations
                or without a question that can be trained on.
        """
        self.settings = settings
        self.store = store = Store(Path(settings.data.h5))
        for key, made in store.provenance["settings"].items():
            if made != (asked := getattr(settings.data, key)):
                raise InputError(f"{store.path}: made with {key} {made}, but data.{key} is {asked}")
        images, share = H5Images(store.path), settings.speed.share_images
        self.training = QuestionDataset(_trainable_questions(store, settings.train.splits), images, share=share)
        self.validation = None
        if (split := settings.train.validate_on) is not None:
            without = "train.validate_on=null trains without validation"
            if split not in store.splits:
                raise InputError(f"{store.path}: no split {split!r}; it holds {', '.join(store.splits)}; {without}")
            self.validation = QuestionDataset(store.table(split), images, share=share)
            if not self.validation.labels.size:
                raise InputError(f"train.validate_on: split {split!r} has no annotations; {without}")
        splits = [*settings.train.splits, *filter(None, [split])]
        self.stand_ins, self.identity = store.stand_ins(splits), store.identity(splits)
        self.preprocessing = Preprocessing(store.image_size)
        self._see: Callable[[Tensor], Tensor | StageMap] = self.preprocessing.normalise

    def read_stored_maps(self, resnet: ModulatedResNet, device: torch.device, processes: Processes) -> None:
        """Where the first stages are fixed, their maps are read instead of pictures; one process makes the file.

        Where it cannot be written, pictures are read, and this is said.

        Raises:
            InputError: as `prefix_maps`.
        """
        find = partial(prefix_maps, resnet, self.store, self.preprocessing, device, self.settings.data.cache_gib)
        found = None
        if processes.is_main:
            try:
                found = find()
            except NotWrittenError as error:
                print(f"{error}; training goes on without stored maps", flush=True)
        if processes.gather(found is not None)[0] and not processes.is_main:
            found = find()
        if found is None:
            return
        stage, maps = found
        self._see = partial(as_stage_map, stage)
        for data in (self.training, self.validation):
            if data is not None:
                data.images = maps

    def seen(self, images: Tensor) -> Tensor | StageMap:
        """What the model takes of a batch's images, in the layout that the settings name."""
        seen = self._see(images)
        if self.settings.speed.channels_last:
            return seen
        return seen._replace(map=seen.map.contiguous()) if isinstance(seen, StageMap) else seen.contiguous()

    def sampler(self, epoch: int, start: int, processes: Processes) -> EpochSampler:
        """The batches of an epoch from `start` on, as far as they are this process's."""
        train = self.settings.train
        return EpochSampler(
            len(self.training),
            train.batch_size,
            self.settings.seed,
            epoch,
            processes.rank,
            processes.world_size,
            images=self.training.table.images,
            together=train.together,
            start=start,
        )


def first_words(table: QuestionTable) -> np.ndarray:
    """The first two word ids of every question, int64 [N, 2], PAD_ID where there is no second."""
    first = np.full((len(table), KIND_WORDS), PAD_ID, np.int64)
    for place in range(KIND_WORDS):
        rows = np.flatnonzero(table.lengths > place)
        first[rows, place] = table.tokens[table.offsets[rows] + place]
    return first


def _trainable_questions(store: Store, splits: list[str]) -> QuestionTable:
    """The questions that can teach something: their image is there, and an answer to them is a class."""
    tables = [store.table(split) for split in splits]
    for split, table in zip(splits, tables, strict=True):
        if not table.given.size:
            raise InputError(f"train.splits: split {split!r} has no annotations")
    table = joined(tables)
    kept = store.usable[table.images] & (table.labels() != NO_ANSWER).any(1)
    if not kept.any():
        raise InputError(f"{store.path}: no question of {', '.join(splits)} has both an image and a known answer")
    return table.select(np.flatnonzero(kept))
