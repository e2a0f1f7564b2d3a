"""The processor for `transformers`: its options, and what it makes of images and questions."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from tests.hub import QUESTIONS, logits
from vqa.io.errors import InputError


def test_questions_without_words_and_padding_on_the_left_are_refused(hub, images):
    model, processor = hub
    for text in ("", "  ", ["what?", ""]):
        with pytest.raises(InputError, match="holds no word"):
            processor(images=images[: 1 if isinstance(text, str) else 2], text=text)
    with pytest.raises(InputError, match="3 images for 1 questions"):
        processor(images=images, text="what?")
    inputs = processor(images=images[:2], text=QUESTIONS[:2])
    with pytest.raises(ValueError, match="padded on the right"):
        model(inputs["pixel_values"], inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1))
    del inputs["attention_mask"]
    expected = logits(hub, images[:2], QUESTIONS[:2])
    torch.testing.assert_close(model(**inputs).logits, expected)
    model.config.pad_token_id = 1  # as another tokenizer has it
    inputs["input_ids"][inputs["input_ids"] == 0] = 1
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_the_processor_does_what_an_option_says(hub, images):
    def made(**options):
        return hub[1](images=images, text=QUESTIONS, **options)

    whole = made()["input_ids"]
    padded = made(padding="max_length", max_length=20)
    assert padded["input_ids"].shape == (3, 20)
    torch.testing.assert_close(hub[0](**padded).logits, logits(hub, images))
    assert made(pad_to_multiple_of=16)["input_ids"].shape == (3, 16)
    for options in ({"max_length": 2}, {"max_length": 2, "truncation": True, "padding": False}):
        assert made(**options)["input_ids"].equal(whole[:, :2])
    with pytest.raises(ValueError, match="padding=True"):
        made(padding=False)
    assert {type(value) for value in made(return_tensors="np").values()} == {np.ndarray}
    assert [len(ids) for ids in made(return_tensors=None, padding=False)["input_ids"]] == whole.ne(0).sum(1).tolist()


def test_the_processor_refuses_every_other_option(hub, folder, images):
    for option in ("do_resize", "do_normalize", "size", "padding_side", "videos", "text_kwargs", "unknown"):
        with pytest.raises(TypeError, match=option):
            hub[1](images=images, text=QUESTIONS, **{option: None})
        with pytest.raises(TypeError, match=option):
            hub[1].image_processor(images, **{option: None})
    with pytest.raises(TypeError, match="do_resize"):
        AutoImageProcessor.from_pretrained(folder, do_resize=False)
    for size in ({"height": 64, "width": 32}, {"shortest_edge": 64}, 64):
        with pytest.raises(InputError, match="size: must name equal height and width"):
            AutoImageProcessor.from_pretrained(folder, size=size)


def test_images_are_prepared_as_everywhere(folder, saved, images):
    processor = AutoImageProcessor.from_pretrained(folder)
    forms = [images[0], images[0].read_bytes(), Image.open(images[0]), np.asarray(Image.open(images[0]).convert("RGB"))]
    expected = saved.preprocessing.normalise(torch.from_numpy(saved.preprocessing.decode(images[0]).copy())[None])
    for form in forms:
        assert processor(form)["pixel_values"].equal(expected)
    assert isinstance(processor(images, return_tensors="np")["pixel_values"], np.ndarray)
