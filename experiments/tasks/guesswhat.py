"""The GuessWhat?! oracle: one answer to each question about an object, right or wrong."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from data.h5_file import Store
from data.provenance import settings_of
from data.question_table import QuestionTable
from experiments.tasks.task import Task
from vqa.io.errors import InputError
from vqa.metrics import Scores, by_kind
from vqa.settings.schema import Settings
from vqa.tasks.objects import ANSWERS


class GuessWhatTask(Task):
    """Questions about one object of an image, each with one answer."""

    @classmethod
    def table(cls, store: Store, settings: Settings, split: str) -> QuestionTable:
        """As `Task`, with the images that are among the inputs; raises InputError if the h5 file holds others."""
        table, made = super().table(store, settings, split), settings_of(store.provenance)
        if (factor := made["guesswhat.crop_factor"]) != (asked := settings.guesswhat.crop_factor):
            raise InputError(f"{store.path}: made with crop_factor {factor}, but guesswhat.crop_factor is {asked}")
        stored, views = made["guesswhat.images"], settings.views
        if missing := sorted(set(views) - set(stored)):
            raise InputError(
                f"{store.path}: holds no {missing[0]}, as it was made for other `inputs`; name another data.h5"
            )
        if len(stored) == 1 or not views:
            return table
        columns = [stored.index(view) for view in views]
        return replace(table, images=table.images[:, columns if len(columns) > 1 else columns[0]])

    def loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """Cross-entropy with the given answer; takes logits: its own softmax is the only one."""
        return F.cross_entropy(logits, labels[:, 0], reduction=reduction)

    @staticmethod
    def accuracies(predictions: Sequence[str], table: QuestionTable) -> list[float]:
        """1 where the prediction is the given answer, else 0."""
        given = table.labels()[:, 0].tolist()
        return [float(ANSWERS[class_] == prediction) for class_, prediction in zip(given, predictions, strict=True)]

    @staticmethod
    def summary(accuracies: Sequence[float], table: QuestionTable, categories: Sequence[str]) -> Scores:
        """Adds the `error` (100 % less the accuracy) and the accuracy for each category of objects."""
        scores = Task.summary(accuracies, table, categories)
        of_questions = [categories[number] for number in table.extras["category"]]
        by_category = by_kind(of_questions, accuracies)
        return {**scores, "error": round(100 - scores["overall"], 6), "per_category": by_category}
