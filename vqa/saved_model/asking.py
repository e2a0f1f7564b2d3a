"""A trained model that is loaded: answer questions about images, and show what a question does to the network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from tokenizers import Tokenizer

from vqa.io.errors import InputError
from vqa.io.images import ImageSource, read_image
from vqa.model import ConditionedModel, Output
from vqa.preprocessing import Preprocessing
from vqa.settings.schema import Settings
from vqa.tasks.asked import inputs_of
from vqa.tasks.objects import Box
from vqa.text.tokenizer import encode, special_ids, unusable, words


@dataclass(frozen=True, eq=False)  # two are equal if they are the same: a model can be a key of a cache
class SavedModel:
    """A trained model with everything needed to ask it; `vqa.load` returns one."""

    folder: Path
    model: ConditionedModel = field(repr=False)
    settings: Settings = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    answers: list[str] = field(repr=False)
    preprocessing: Preprocessing
    training: dict[str, Any]  # entries of `Training`
    text_encoder: dict[str, Any] | None = None  # the configuration of a text encoder of `transformers`
    categories: list[str] = field(default_factory=list, repr=False)  # of objects

    @overload
    def ask(
        self, image: ImageSource, question: str, top: int = 5, *, box: Box | None = None, category: str | None = None
    ) -> list[dict[str, Any]]: ...

    @overload
    def ask(
        self,
        image: ImageSource | Sequence[ImageSource],
        question: str | Sequence[str],
        top: int = 5,
        *,
        box: Box | None = None,
        category: str | None = None,
    ) -> list[list[dict[str, Any]]]: ...

    def ask(
        self, image: Any, question: Any, top: int = 5, *, box: Box | None = None, category: str | None = None
    ) -> list[Any]:
        """Answer a question about an image, or about an object of it.

        Args:
            image: a path, the bytes of an image file, a PIL image, an array (uint8, height x width x 3 or height x
                width), or a list of these.
            question: a question or a list of questions. Of two lists each image has its own question; one image or
                question is combined with every entry of a list. The questions of a list are answered one by one.
            top: number of answers.
            box: (x, y, width, height) of the object that the question is about, in pixels from the top left, for a
                model that takes one; all questions of a list share it.
            category: of that object, for a model that takes one.

        Returns:
            The most probable answers first, each with `answer` and `probability` (0 to 1); for a list, a list of these.

        Raises:
            InputError: an image cannot be read, a question holds no word, box or category are missing, superfluous or
                wrong, or the model's scores are not finite.
        """

        def answer(image: ImageSource, question: str) -> list[dict[str, Any]]:
            return self.top_answers(self.run(image, question, box=box, category=category), top)

        return _for_each(answer, image, question)

    @overload
    def inspect(
        self, image: ImageSource, question: str, *, box: Box | None = None, category: str | None = None
    ) -> dict[str, Any]: ...

    @overload
    def inspect(
        self,
        image: ImageSource | Sequence[ImageSource],
        question: str | Sequence[str],
        *,
        box: Box | None = None,
        category: str | None = None,
    ) -> list[dict[str, Any]]: ...

    def inspect(self, image: Any, question: Any, *, box: Box | None = None, category: str | None = None) -> Any:
        """Show what a question does to the network; arguments and errors as for `ask`.

        Returns:
            `question`, `words`, `unknown_words`, `answers`, `answers_without_modulation`, `attention` [G, H, W] (where
            the model has attention), and `layers`: the conditioned norms in order of depth, with values for each
            channel (`describe_channels`).
        """
        from vqa.inspect.inspection import read

        return _for_each(lambda image, question: read(self, image, question, box, category), image, question)

    @torch.inference_mode()
    def run(
        self,
        image: ImageSource,
        question: str,
        *,
        modulate: bool = True,
        box: Box | None = None,
        category: str | None = None,
    ) -> Output:
        """The model's output for one question (B = 1). Raises InputError as `ask`."""
        if not isinstance(question, str):
            raise InputError(f"question: must be a text, not {type(question).__name__}")
        if reason := unusable(question):
            raise InputError(f"question: {reason}")
        if not words(self.tokenizer, question):
            raise InputError(f"question: {question!r} holds no word")
        device = next(self.model.parameters()).device
        tokens, lengths = (torch.from_numpy(part).long().to(device) for part in encode(self.tokenizer, [question]))
        views, others = inputs_of(self.settings, self.categories, read_image(image), box, category)
        pixels = np.array([self.preprocessing.decode(view) for view in views], np.uint8)  # [V, S, S, 3]
        extras = {name: torch.from_numpy(value).to(device) for name, value in others.items()}
        images = self.preprocessing.normalise(torch.from_numpy(pixels).to(device)) if views else None
        output = self.model(images, tokens[None], lengths, modulate=modulate, **extras)
        if not output.logits.isfinite().all():
            damaged = "the model's scores of the answers are not finite; its weights are damaged"
            raise InputError(f"{self.folder}: {damaged}")
        return output

    def top_answers(self, output: Output, top: int = 5) -> list[dict[str, Any]]:
        """The most probable answers of an output for one question; of a model trained with `bce` the probabilities are
        the expected accuracies, which do not sum to 1. Raises InputError if `top` is below 1.
        """
        if top < 1:
            raise InputError(f"top: must be at least 1, not {top}")
        logits = output.logits[0].float()
        probabilities = logits.sigmoid() if self.settings.train.loss == "bce" else logits.softmax(0)
        best = probabilities.topk(min(top, len(self.answers)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"answer": self.answers[place], "probability": value} for place, value in pairs]

    def unknown_words(self, question: str) -> list[str]:
        """The words of a question that are not in the vocabulary, nor made of parts that are; each once."""
        tokenizer, special = self.tokenizer, set(special_ids(self.tokenizer))
        asked = dict.fromkeys(words(tokenizer, question))
        return [word for word in asked if special & set(tokenizer.encode(word, add_special_tokens=False).ids)]


def _for_each(function: Callable[[ImageSource, str], Any], image: Any, question: Any) -> Any:
    """`function(image, question)`, or the list of its results where one of the two is a list, or both are."""
    several = [isinstance(given, list | tuple) for given in (image, question)]
    if not any(several):
        return function(image, question)
    images = image if several[0] else [read_image(image)] * len(question)
    questions = question if several[1] else [question] * len(image)
    if len(images) != len(questions):
        raise InputError(f"{len(images)} images for {len(questions)} questions; give equal numbers, or one of either")
    return [function(*pair) for pair in zip(images, questions, strict=True)]
