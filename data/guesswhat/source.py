"""GuessWhat?! as `preprocess` and evaluation read it: the questions of its games, crops of objects, whole images."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
import numpy as np
from tokenizers import Tokenizer

from data.guesswhat.files import Game, read_games
from data.question_table import QuestionTable, question_table
from data.sources import Crop, NeededImage, Source
from data.vqa_files import Question, SplitFiles
from vqa.io.errors import InputError
from vqa.tasks.objects import ANSWERS, crop_region, spatial_features

_WORD = re.compile(r"\w+(?:['’]\w+)*")


class _Target(msgspec.Struct, frozen=True):
    """The object of a game; all questions of the game share it."""

    category: str
    spatial: np.ndarray  # float32 [8]
    images: tuple[NeededImage, ...]


class _GameQuestion(Question, frozen=True, kw_only=True):
    target: _Target


class GuessWhatSource(Source):
    """The questions of all games of some status; split files name no annotations, since games hold their answers.

    A question's type is its first word and its answer type the answer. Its images are the `views`: the crop of its
    object, the whole image, or both; the table's `images` are [N], or [N, 2] in the order of the views. The table's
    `extras` are `spatial`, float32 [N, 8], and `category`, int64 [N], indices into `categories`.
    """

    def __init__(
        self,
        status: Sequence[str],
        crop_factor: float,
        views: Sequence[Literal["crop", "image"]],
        categories: Sequence[str] | None = None,
    ) -> None:
        """`categories` are those of a model that is given; None: those of the files."""
        self.settings: dict[str, Any] = {
            "guesswhat.status": list(status),
            "guesswhat.crop_factor": crop_factor,
            "guesswhat.images": list(views),
        }
        self._status, self._factor, self._views = tuple(status), crop_factor, tuple(views)
        self._given = categories
        self._names: dict[int, str] = {}  # of categories, by id
        self._ids: dict[str, int] = {}

    @property
    def categories(self) -> list[str]:
        """The categories of all objects that were read, in the order of their ids, or those that were given."""
        return [self._names[id_] for id_ in sorted(self._names)] if self._given is None else list(self._given)

    def has_answers(self, _: SplitFiles) -> bool:
        """Every question of a game has one."""
        return True

    def read(self, files: SplitFiles) -> list[Question]:
        """The questions of a split, in the file's order; a game without one is skipped.

        Raises:
            InputError: as `read_games`, or there is no question, an id of one occurs twice, or a category has two names
                or ids.
        """
        if files.annotations is not None:
            raise InputError(f"{files.annotations}: a game's answers are in its own file: name no annotations")
        questions: list[Question] = []
        seen: set[int] = set()
        words: dict[str, str] = {}  # equal texts are kept once
        for place, game in read_games(files.questions, self._status):
            self._number_categories(place, game)
            target = self._target(files, game)
            for asked in game.qas:
                if asked.id in seen:
                    raise InputError(f"{place}: question id {asked.id} occurs twice in the file")
                seen.add(asked.id)
                first = _WORD.search(asked.q.lower())
                kept = (first.group() if first else "", asked.a.lower())
                word, answer = (words.setdefault(text, text) for text in kept)
                questions.append(
                    _GameQuestion(
                        question_id=asked.id,
                        image_id=game.picture_id,
                        text=asked.q,
                        question_type=word,
                        answer_type=answer,
                        answers=(answer,),
                        target=target,
                    )
                )
        if not questions:
            raise InputError(f"{files.questions}: no question in a game of status {' or '.join(self._status)}")
        return questions

    def images(self, _: SplitFiles, asked: Sequence[Question]) -> list[tuple[NeededImage, ...]]:
        """The views of each question."""
        return [question.target.images for question in asked]

    def vocabulary(self, _: Iterable[str]) -> list[str]:
        """Yes, no and n.a., whatever was given."""
        return list(ANSWERS)

    def remarks(self, _: Sequence[Question]) -> Iterable[str]:
        """None."""
        return ()

    def table(
        self, asked: Sequence[Question], rows: np.ndarray, tokenizer: Tokenizer, vocabulary: Sequence[str]
    ) -> QuestionTable:
        """The table, with its `extras`. Raises InputError if an object's category is not among those given."""
        number = {name: place for place, name in enumerate(self.categories)}
        if unknown := next((one for one in asked if one.target.category not in number), None):
            raise InputError(f"question {unknown.question_id}: the model has no category {unknown.target.category!r}")
        extras = {
            "spatial": np.stack([question.target.spatial for question in asked]),
            "category": np.array([number[question.target.category] for question in asked], np.int64),
        }
        return replace(question_table(asked, rows, tokenizer, vocabulary), extras=extras)

    def _number_categories(self, place: str, game: Game) -> None:
        for found in game.objects.values():
            name, id_ = found.category, found.category_id
            if self._names.setdefault(id_, name) != name or self._ids.setdefault(name, id_) != id_:
                other = self._names[id_] if self._names[id_] != name else self._ids[name]
                raise InputError(f"{place}: category_id {id_} is {name!r} here, and {other!r} before")

    def _target(self, files: SplitFiles, game: Game) -> _Target:
        found, width, height = game.objects[game.object_id], game.picture.width, game.picture.height
        file = str(files.image(game.picture_id, game.picture.file_name))
        regions = {"crop": crop_region(found.bbox, width, height, self._factor), "image": (0, 0, width, height)}
        crops = (Crop(*regions[view], width, height) for view in self._views)
        images = tuple(NeededImage(file, game.picture_id, crop) for crop in crops)
        spatial = spatial_features(found.bbox, width, height)
        return _Target(self._names[found.category_id], spatial, images)
