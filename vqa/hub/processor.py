"""Images and questions to the model's inputs, by the project's own preprocessing and tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from vqa.io.errors import InputError
from vqa.io.images import IMAGENET_MEAN, IMAGENET_STD, ImageSource
from vqa.preprocessing import Preprocessing
from vqa.text.encoder import LONGEST


class ModernImageProcessor(BaseImageProcessor):
    """`Preprocessing` as an image processor."""

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **others: Any,
    ) -> None:
        """`size` names `height` and `width`, which are equal."""
        super().__init__(**others)
        self.size = size or {"height": 224, "width": 224}
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(
        self, images: ImageSource | Sequence[ImageSource], return_tensors: str | None = "pt", **_: Any
    ) -> BatchFeature:
        """An image or several (paths, bytes, PIL images, uint8 arrays) → `pixel_values`, float32 [B, 3, S, S].

        Raises:
            InputError: an image cannot be read.
        """
        preprocessing = Preprocessing(self.size["height"], tuple(self.image_mean), tuple(self.image_std))
        several = images if isinstance(images, list | tuple) else [images]
        pixels = torch.from_numpy(np.stack([preprocessing.decode(image) for image in several]))
        return BatchFeature({"pixel_values": preprocessing.normalise(pixels)}, tensor_type=return_tensors)


class ModernProcessor(ProcessorMixin):
    """The image processor and the tokenizer together."""

    def __init__(self, image_processor: ModernImageProcessor, tokenizer: Any) -> None:
        """`tokenizer` is what `AutoTokenizer` reads."""
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        text: str | Sequence[str],
        return_tensors: str | None = "pt",
        **_: Any,
    ) -> BatchFeature:
        """As many images as questions, or one of each → `pixel_values`, `input_ids` and `attention_mask`.

        Raises:
            InputError: there are not as many, an image cannot be read, or a question holds no word.
        """
        questions = [text] if isinstance(text, str) else list(text)
        inputs = self.image_processor(images, return_tensors=return_tensors)
        if len(inputs["pixel_values"]) != len(questions):
            raise InputError(f"{len(inputs['pixel_values'])} images for {len(questions)} questions; give equal numbers")
        words = self.tokenizer(
            questions,
            padding=True,
            padding_side="right",
            truncation=self.tokenizer.model_max_length <= LONGEST,  # only a text encoder's has a limit
            return_token_type_ids=False,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
        for question, mask in zip(questions, words["attention_mask"], strict=True):
            if not sum(mask):
                raise InputError(f"question: {question!r} holds no word")
        return BatchFeature({**inputs, **words})
