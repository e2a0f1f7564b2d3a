"""What is VQA's own in training: questions and answers, what a model takes from them at the start, loss and score."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batches import padded_words
from data.glove import read_glove
from data.h5_file import Store
from data.question_table import QuestionTable, joined
from experiments.evaluate import score
from experiments.training.loop import answer_loss
from vqa import saved_model
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.metrics import Scores
from vqa.model import VQAModel
from vqa.preprocessing import Preprocessing
from vqa.question import KIND_WORDS
from vqa.settings.schema import Settings
from vqa.text.answers import NO_ANSWER
from vqa.text.tokenizer import PAD_ID

MEAN_OF = 4096  # training questions whose mean embedding is the control `mean_question`


class VQATask:
    """The task of a run: all that the trainer knows of it is public here; of a table, its length, images and ids."""

    def __init__(self, settings: Settings) -> None:
        """Reads the questions to train on and those to validate on (None without a split for it).

        Raises:
            InputError: the h5 file is missing or made with other settings, or a split is missing, without annotations
                or without a question that can be trained on.
        """
        self.settings = settings
        self.store = store = Store(Path(settings.data.h5))
        for key, made in store.provenance["settings"].items():
            if made != (asked := getattr(settings.data, key)):
                raise InputError(f"{store.path}: made with {key} {made}, but data.{key} is {asked}")
        self.training = _trainable_questions(store, settings.train.splits)
        self.validation = None
        if (split := settings.train.validate_on) is not None:
            without = "train.validate_on=null trains without validation"
            if split not in store.splits:
                raise InputError(f"{store.path}: no split {split!r}; it holds {', '.join(store.splits)}; {without}")
            self.validation = store.table(split)
            if not self.validation.given.size:
                raise InputError(f"train.validate_on: split {split!r} has no annotations; {without}")
        splits = [*settings.train.splits, *filter(None, [split])]
        self.stand_ins, self.identity = store.stand_ins(splits), store.identity(splits)
        self.preprocessing = Preprocessing(store.image_size)

    def is_same_data(self, identity: str) -> bool:
        """Whether a checkpoint that names the `identity` of its data was trained on these."""
        return identity in (self.identity, self.store.identity(self.store.splits))  # of all splits: as it was once

    def new_model(self, *, fresh: bool, say: Callable[[str], None]) -> VQAModel:
        """The model, with what it takes from the data where it is `fresh`; else a checkpoint sets all weights."""
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
            model.kinds.set_from(torch.from_numpy(first_words(self.training)))
        if model.condition == "mean_question":
            model.set_mean_question(*padded_words(self.training, range(min(len(self.training), MEAN_OF))))
        return model

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """As `answer_loss`, of the kind that the settings name."""
        return answer_loss(logits, labels, self.settings.train.loss, reduction)

    def score(self, classes: np.ndarray) -> Scores:
        """The score of one answer class for each question of the validation split, in its order."""
        return score([self.store.vocabulary[class_] for class_ in classes], self.validation)

    def save_companions(self, folder: Path) -> None:
        """Writes what a model needs beside its weights."""
        store = self.store
        saved_model.save_companions(folder, self.settings, store.tokenizer, store.vocabulary, self.preprocessing)


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
