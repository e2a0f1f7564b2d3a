"""The parts that all tasks share: a run's questions, their order and batches, the model's parts that come from data.

A trainer uses only the public members of `Task`; a task adds its loss and its score.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.augmentation import augmentation
from data.batches import EpochSampler, Images, QuestionDataset, padded_words
from data.glove import read_glove
from data.h5_file import H5Images, Store
from data.provenance import settings_of
from data.question_table import QuestionTable, joined
from experiments.process_group import Processes
from experiments.training.warm_start import take_weights
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.metrics import Scores, summary
from vqa.model import ConditionedModel
from vqa.preprocessing import Preprocessing
from vqa.question import KIND_WORDS
from vqa.saved_model import SavedModel
from vqa.saved_model.files import save_companions
from vqa.settings.schema import Settings, flat
from vqa.text.answers import NO_ANSWER
from vqa.text.encoder import empty_encoder, load_encoder, read_pretrained
from vqa.text.tokenizer import PAD_ID

MEAN_OF = 4096  # training questions whose mean embedding is the control `mean_question`
STATISTICS_OF = 1024  # training images on which statistics are estimated before training, in batches of up to
STATISTICS_BATCH = 32


class Task(ABC):
    """Answering questions with one of the classes of answers.

    Attributes:
        settings: of the run.
        store: the h5 file, with the images.
        tokenizer: of the questions: the h5 file's, or that of a text encoder.
        text_encoder: the configuration of a text encoder; None without one.
        identity: digest of what is learnt from; a checkpoint names it.
        training: the questions to train on.
        validation: those to validate on; None without a split for it.
        stand_ins: number of images that were missing or unreadable.
        preprocessing: of the images.
    """

    def __init__(self, settings: Settings) -> None:
        """Reads the questions.

        Raises:
            InputError: the h5 file is missing or made with other settings, a split is missing, without annotations
                or without a question that can be trained on, or there is no text encoder as the settings name it.
        """
        self.settings = settings
        self.store = store = Store(Path(settings.data.h5))
        asked = flat(settings)
        for name, made in settings_of(store.provenance).items():
            key = name if "." in name else f"data.{name}"
            if key in asked and made != asked[key]:
                raise InputError(f"{store.path}: made with {name} {made}, but {key} is {asked[key]}")
        self.tokenizer, self.text_encoder = store.tokenizer, None
        if settings.question.encoder == "transformers":
            self.tokenizer, self.text_encoder = read_pretrained(settings.question.text_encoder)
        splits, split = list(settings.train.splits), settings.train.validate_on
        self.training = self._trainable_questions(splits)
        if settings.train.loss == "bce" and (self.training.given != NO_ANSWER).sum(1).max() == 1:
            why = "train.loss: bce trains towards the official accuracy, which is 0 where one answer is given"
            raise InputError(f"{why}, as to every question of {', '.join(splits)}; use soft or hard")
        self.validation = None
        if split is not None:
            without = "train.validate_on=null trains without validation"
            if split not in store.splits:
                raise InputError(f"{store.path}: no split {split!r}; it holds {', '.join(store.splits)}; {without}")
            sources = store.provenance["sources"]
            asked_in = {name: source["files"][0]["sha256"] for name, source in sources.items()}  # whatever its name
            if asked_in[split] in [asked_in[name] for name in splits]:
                raise InputError(f"train.validate_on: split {split!r} has the questions that are trained on; {without}")
            if split in settings_of(store.provenance)["vocabulary_from"]:
                why = f"data.vocabulary_from: words and answers are taken from {split!r}, which is validated on"
                raise InputError(f"{why}; {without}")
            self.validation = self.table(store, settings, split)
            if not self.validation.given.size:
                raise InputError(f"train.validate_on: split {split!r} has no annotations; {without}")
            splits.append(split)
        self.stand_ins, self.identity = store.stand_ins(splits), store.identity(splits)
        if self.text_encoder is not None:  # the h5 file has words, which a text encoder does not use
            self.training = self.training.encoded_with(self.tokenizer)
            self.validation = self.validation and self.validation.encoded_with(self.tokenizer)
            of_questions = json.dumps([self.identity, self.tokenizer.to_str(), self.text_encoder])
            self.identity = hashlib.sha256(of_questions.encode()).hexdigest()
        self.preprocessing = Preprocessing(store.image_size)

    @classmethod
    def table(cls, store: Store, settings: Settings, split: str) -> QuestionTable:
        """Reads the questions of a split. Raises InputError if the h5 file is of another task, or damaged."""
        sections = {key.partition(".")[0] for key in settings_of(store.provenance) if "." in key}
        if settings.task not in (sections or {"vqa"}):
            made_for = ", ".join(sections) or "vqa"
            raise InputError(f"{store.path}: made for the task {made_for}, not {settings.task}; name another data.h5")
        return store.table(split)

    def _trainable_questions(self, splits: list[str]) -> QuestionTable:
        """The questions whose images are there and to which a given answer is a class."""
        store = self.store
        tables = [self.table(store, self.settings, split) for split in splits]
        for split, table in zip(splits, tables, strict=True):
            if not table.given.size:
                raise InputError(f"train.splits: split {split!r} has no annotations")
        table = joined(tables)
        kept = store.usable[table.images].reshape(len(table), -1).all(1) & (table.labels() >= 0).any(1)
        if not kept.any():
            raise InputError(f"{store.path}: no question of {', '.join(splits)} has both an image and a known answer")
        return table.select(np.flatnonzero(kept))

    def dataset(self, table: QuestionTable, images: Images, *, augmented: bool = False) -> QuestionDataset:
        """Makes the batches of a table's questions with their images, or with feature maps in their place."""
        kind = self.settings.train.augment if augmented else "none"
        chosen = augmentation(kind, self.settings.seed, table)
        return QuestionDataset(table, images, share=self.settings.speed.share_images, augmentation=chosen)

    def sampler(self, processes: Processes, epoch: int, start: int = 0) -> EpochSampler:
        """This process's part of the training batches of an epoch, from batch `start` on."""
        return EpochSampler(
            self.training.images.reshape(len(self.training), -1)[:, 0],
            self.settings.train.batch_size,
            self.settings.seed,
            epoch,
            processes.rank,
            processes.world_size,
            together=self.settings.train.together,
            start=start,
        )

    def new_model(
        self, *, fresh: bool, say: Callable[[str], None], init_from: SavedModel | None = None
    ) -> ConditionedModel:
        """Builds the model; a `fresh` one gets what it takes from the data and from the model `init_from`, if there is
        one; else a checkpoint sets all weights.
        """
        settings, store, vocabulary = self.settings, self.store, self.tokenizer.get_vocab()
        made: dict[str, Any] = {"answers": len(store.vocabulary), "categories": len(store.categories)}
        if self.text_encoder is not None:
            name = settings.question.text_encoder
            made["text_encoder"] = load_encoder(name) if fresh else empty_encoder(self.text_encoder, name)
        model = build_model(settings, len(vocabulary), pretrained=fresh, **made)
        if not fresh:
            return model
        if model.question is not None and settings.question.glove:
            file = Path(settings.question.glove)
            vectors, found = read_glove(file, vocabulary, settings.question.glove_size)
            say(f"{file}: vectors for {found} of {len(vocabulary)} words")
            model.question.set_fixed(torch.from_numpy(vectors))
        if model.kinds is not None:
            tokens, _ = padded_words(self.training, range(len(self.training)))
            model.kinds.set_from(F.pad(tokens, (0, KIND_WORDS), value=PAD_ID)[:, :KIND_WORDS])
        taken = set()
        if init_from is not None:
            taken = take_weights(model, init_from, vocabulary, store.vocabulary, store.categories, say)
        reestimated = settings.backbone.statistics == "reestimated"
        if reestimated:
            with torch.no_grad(), model.resnet.estimating_statistics():
                for images in self._some_images(model.resnet.least_batch(self.store.image_size)):
                    model.resnet(images)
        if model.condition == "mean_question" and model.question is not None and "mean_question" not in taken:
            model.set_mean_question(*padded_words(self.training, range(min(len(self.training), MEAN_OF))))
        if model.image is not None and (reestimated or "image.mean" not in taken):
            model.set_image_statistics(self._some_images())
        return model

    def _some_images(self, least: int = 1) -> Iterator[Tensor]:
        """Training images from all over the h5 file, normalised, in batches [I, 3, S, S]. Raises InputError if there
        are fewer than `least`.
        """
        rows, images = np.unique(self.training.images), H5Images(self.store.path)
        if len(rows) < least:
            raise InputError(
                f"backbone.statistics: {len(rows)} training image(s) are too few to re-estimate them; needs {least}"
            )
        rows = rows[:: -(-len(rows) // STATISTICS_OF)]
        for part in np.array_split(rows, -(-len(rows) // STATISTICS_BATCH)):
            yield self.preprocessing.normalise(torch.from_numpy(np.stack([images[row] for row in part])))

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The loss of a batch of logits [B, A] against the given answers [B, K]: `mean`, or [B] with `none`."""

    @staticmethod
    @abstractmethod
    def accuracies(predictions: Sequence[str], table: QuestionTable) -> list[float]:
        """The accuracy, 0 to 1, of one prediction for each question of the table, in its order."""

    @staticmethod
    def summary(accuracies: Sequence[float], table: QuestionTable, categories: Sequence[str]) -> Scores:  # noqa: ARG004
        """The scores of a table's questions from the accuracy of each; `categories` are those of objects, if any."""
        return summary(accuracies, table.answer_types, table.question_types)

    def score(self, classes: np.ndarray) -> Scores:
        """Scores one answer class for each question of the validation split, in its order."""
        predictions = [self.store.vocabulary[class_] for class_ in classes]
        return self.summary(self.accuracies(predictions, self.validation), self.validation, self.store.categories)

    def save_companions(self, folder: Path) -> None:
        """Writes what a model needs in addition to its weights."""
        of_texts = (self.tokenizer, self.store.vocabulary)
        save_companions(folder, self.settings, *of_texts, self.preprocessing, self.text_encoder, self.store.categories)
