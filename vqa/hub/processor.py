"""Images and questions to the model's inputs, by the project's own preprocessing and tokenizer.

The signatures name every option; any other, such as `do_resize` or `padding_side`, is a TypeError.
"""

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
        """`others` may be what `transformers` writes into its files.

        Raises:
            InputError: `size` does not name `height` and `width`, or they are not equal.
            TypeError: another option of image processors, such as `do_resize`.
        """
        if unknown := sorted(others.keys() & self.valid_kwargs.__annotations__.keys()):
            raise TypeError(f"{', '.join(unknown)}: not an option of this image processor")
        super().__init__(**others)
        self.size = size or {"height": 224, "width": 224}
        if not isinstance(self.size, dict) or self.size != dict.fromkeys(("height", "width"), self.size.get("height")):
            raise InputError(f"size: must name equal height and width, not {size}")
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(
        self, images: ImageSource | Sequence[ImageSource], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """An image or several (paths, bytes, PIL images, uint8 arrays) → `pixel_values`, float32 [B, 3, S, S].

        `return_tensors` is `pt` or `np`; None leaves `pixel_values` a tensor.

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
        *,
        padding: bool | str = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """As many images as questions, or one of each → `pixel_values`, `input_ids` and `attention_mask`.

        Args:
            images: as of the image processor.
            text: questions.
            padding, truncation, max_length, pad_to_multiple_of: as of the tokenizer; padding is on the right. By
                default questions are padded to the longest, and cut to `max_length` or to what a text encoder takes.
            return_tensors: `pt`, `np`, or None for lists of word ids.

        Raises:
            InputError: there are not as many, an image cannot be read, or a question holds no word.
        """
        if truncation is None:  # only a text encoder's tokenizer has a limit
            truncation = max_length is not None or self.tokenizer.model_max_length <= LONGEST
        questions = [text] if isinstance(text, str) else list(text)
        inputs = self.image_processor(images, return_tensors=return_tensors)
        if len(inputs["pixel_values"]) != len(questions):
            raise InputError(f"{len(inputs['pixel_values'])} images for {len(questions)} questions; give equal numbers")
        words = self.tokenizer(
            questions,
            padding=padding,
            padding_side="right",
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_token_type_ids=False,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
        for question, mask in zip(questions, words["attention_mask"], strict=True):
            if not sum(mask):
                raise InputError(f"question: {question!r} holds no word")
        return BatchFeature({**inputs, **words})
