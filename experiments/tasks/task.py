"""What the tasks share: the questions of a run, their order and batches, and the model's parts that come from data.

A trainer uses only the public members of `Task`; a task adds its loss and its score.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.augmentation import augmentation
from data.batches import EpochSampler, Images, QuestionDataset, padded_words
from data.glove import read_glove
from data.h5_file import Store
from data.provenance import settings_of
from data.question_table import QuestionTable, joined
from experiments.process_group import Processes
from experiments.training.warm_start import take_weights
from vqa import saved_model
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.metrics import Scores, summary
from vqa.model import VQAModel
from vqa.preprocessing import Preprocessing
from vqa.question import KIND_WORDS
from vqa.saved_model import SavedModel
from vqa.settings.schema import Settings
from vqa.text.answers import NO_ANSWER
from vqa.text.tokenizer import PAD_ID

MEAN_OF = 4096  # training questions whose mean embedding is the control `mean_question`


class Task(ABC):
    """Answering questions with one of the classes of answers.

    Attributes:
        settings: of the run.
        store: the h5 file, with the images.
        identity: digest of what is learnt from; a checkpoint names it.
        training: the questions to train on.
        validation: those to validate on; None without a split for it.
        stand_ins: number of images that were missing or unreadable.
        preprocessing: of the images.
    """

    def __init__(self, settings: Settings) -> None:
        """Reads the questions.

        Raises:
            InputError: the h5 file is missing or made with other settings, or a split is missing, without annotations
                or without a question that can be trained on.
        """
        self.settings = settings
        self.store = store = Store(Path(settings.data.h5))
        for key, made in settings_of(store.provenance).items():
            if made != (asked := getattr(settings.data, key)):
                raise InputError(f"{store.path}: made with {key} {made}, but data.{key} is {asked}")
        splits, split = list(settings.train.splits), settings.train.validate_on
        self.training = _trainable_questions(store, splits)
        if settings.train.loss == "bce" and (self.training.given != NO_ANSWER).sum(1).max() == 1:
            why = "train.loss: bce trains towards the official accuracy, which is 0 where one answer is given"
            raise InputError(f"{why}, as to every question of {', '.join(splits)}; use soft or hard")
        self.validation = None
        if split is not None:
            without = "train.validate_on=null trains without validation"
            if split not in store.splits:
                raise InputError(f"{store.path}: no split {split!r}; it holds {', '.join(store.splits)}; {without}")
            self.validation = store.table(split)
            if not self.validation.given.size:
                raise InputError(f"train.validate_on: split {split!r} has no annotations; {without}")
            splits.append(split)
        self.stand_ins, self.identity = store.stand_ins(splits), store.identity(splits)
        self.preprocessing = Preprocessing(store.image_size)

    def dataset(self, table: QuestionTable, images: Images, *, augmented: bool = False) -> QuestionDataset:
        """Makes the batches of a table's questions with their images, or with feature maps in their place."""
        kind = self.settings.train.augment if augmented else "none"
        chosen = augmentation(kind, self.settings.seed, table, self.store.tokenizer.get_vocab())
        return QuestionDataset(table, images, share=self.settings.speed.share_images, augmentation=chosen)

    def sampler(self, processes: Processes, epoch: int, start: int = 0) -> EpochSampler:
        """This process's part of the training batches of an epoch, from batch `start` on."""
        return EpochSampler(
            self.training.images,
            self.settings.train.batch_size,
            self.settings.seed,
            epoch,
            processes.rank,
            processes.world_size,
            together=self.settings.train.together,
            start=start,
        )

    def new_model(self, *, fresh: bool, say: Callable[[str], None], init_from: SavedModel | None = None) -> VQAModel:
        """Builds the model; a `fresh` one gets what it takes from the data and from the model `init_from`, if there is
        one; else a checkpoint sets all weights.
        """
        settings, vocabulary = self.settings, self.store.tokenizer.get_vocab()
        model = build_model(settings, len(vocabulary), len(self.store.vocabulary), pretrained=fresh)
        if not fresh:
            return model
        if model.question is not None and model.question.fixed is not None:
            file = Path(settings.question.glove)
            vectors, found = read_glove(file, vocabulary, settings.question.glove_size)
            say(f"{file}: vectors for {found} of {len(vocabulary)} words")
            model.question.set_fixed(torch.from_numpy(vectors))
        if model.kinds is not None:
            tokens, _ = padded_words(self.training, range(len(self.training)))
            model.kinds.set_from(F.pad(tokens, (0, KIND_WORDS), value=PAD_ID)[:, :KIND_WORDS])
        taken = set()
        if init_from is not None:
            taken = take_weights(model, init_from, vocabulary, self.store.vocabulary, say)
        if model.condition == "mean_question" and "mean_question" not in taken:
            model.set_mean_question(*padded_words(self.training, range(min(len(self.training), MEAN_OF))))
        return model

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The loss of a batch of logits [B, A] against the given answers [B, K]: `mean`, or [B] with `none`."""

    @staticmethod
    @abstractmethod
    def accuracies(predictions: Sequence[str], table: QuestionTable) -> list[float]:
        """The accuracy, 0 to 1, of one prediction for each question of the table, in its order."""

    @staticmethod
    def summary(accuracies: Sequence[float], table: QuestionTable) -> Scores:
        """The scores of a table's questions from the accuracy of each."""
        return summary(accuracies, table.answer_types, table.question_types)

    def score(self, classes: np.ndarray) -> Scores:
        """Scores one answer class for each question of the validation split, in its order."""
        predictions = [self.store.vocabulary[class_] for class_ in classes]
        return self.summary(self.accuracies(predictions, self.validation), self.validation)

    def save_companions(self, folder: Path) -> None:
        """Writes what a model needs in addition to its weights."""
        store = self.store
        saved_model.save_companions(folder, self.settings, store.tokenizer, store.vocabulary, self.preprocessing)


def _trainable_questions(store: Store, splits: list[str]) -> QuestionTable:
    """The questions whose images are there and to which a given answer is a class."""
    tables = [store.table(split) for split in splits]
    for split, table in zip(splits, tables, strict=True):
        if not table.given.size:
            raise InputError(f"train.splits: split {split!r} has no annotations")
    table = joined(tables)
    kept = store.usable[table.images].reshape(len(table), -1).all(1) & (table.labels() >= 0).any(1)
    if not kept.any():
        raise InputError(f"{store.path}: no question of {', '.join(splits)} has both an image and a known answer")
    return table.select(np.flatnonzero(kept))
