"""Augmentation: a square of the image, flipped where nothing has a side, by seed, epoch and question alone."""

import numpy as np
import pytest
import torch

from data.augmentation import augmentation
from data.batches import Planned, QuestionDataset
from data.loader import make_loader
from data.question_table import question_table
from data.vqa_files import Question
from vqa.text.tokenizer import train_tokenizer

SIZE = 64
ASKED = [
    ("what is it?", "dog"),
    ("what is left of it?", "dog"),
    ("is it the rightmost one?", "yes"),
    ("where is it?", "on the Left"),
    ("where is it?", "outright"),
    ("is it upright?", "yes"),
]


@pytest.fixture(scope="module")
def table():
    questions = [Question(row, 1, text, "", "", (answer,) * (row + 1)) for row, (text, answer) in enumerate(ASKED)]
    return question_table(
        questions, np.zeros(len(ASKED), np.int64), train_tokenizer([text for text, _ in ASKED], 3), ["dog"]
    )  # rare: "left"


@pytest.fixture(scope="module")
def image():
    """Red rises by 3 a pixel to the right, green by 3 a pixel downwards."""
    steps = 3 * np.arange(SIZE, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(steps, steps[:, None], np.uint8(7)), 2)


def made(kind, table, seed=5):
    return augmentation(kind, seed, table)


def slope_and_start(ramp):
    """Of the inner pixels, in pixels of the image: the size of a step, and the left edge of the first pixel."""
    inner = np.arange(4, SIZE - 4)
    slope, start = np.polyfit(inner, ramp[4:-4].astype(float) / 3, 1)
    return slope, start + 0.5 - slope / 2


def test_a_crop_is_a_square_of_80_to_100_percent_of_the_area_inside_the_image(table, image):
    crops = made("crop", table)
    areas, starts = [], []
    for epoch in range(200):
        pixels = crops.augment(image, epoch, 0)
        assert (pixels.shape, pixels.dtype) == (image.shape, np.uint8)
        assert (pixels[..., 2] == 7).all()
        (across, left), (down, top) = slope_and_start(pixels[SIZE // 2, :, 0]), slope_and_start(pixels[:, 5, 1])
        assert across == pytest.approx(down, abs=0.01)
        side = across * SIZE
        for start in (left, top):
            assert -0.5 < start < SIZE - side + 0.5
            starts.append(start / SIZE)
        areas.append(across**2)
    assert 0.79 < min(areas) < 0.81
    assert 0.99 < max(areas) < 1.01
    assert np.mean(areas) == pytest.approx(0.9, abs=0.02)
    assert np.mean(starts) == pytest.approx((1 - 0.9**0.5) / 2, abs=0.005)


def test_half_of_the_images_are_flipped_but_not_where_question_or_answer_says_left_or_right(table, image):
    both, crops = made("crop_flip", table), made("crop", table)
    for row, (text, answer) in enumerate(ASKED):
        flipped = 0
        for epoch in range(100):
            pixels, straight = both.augment(image, epoch, row), crops.augment(image, epoch, row)
            if not np.array_equal(pixels, straight):
                assert np.array_equal(pixels, straight[:, ::-1])
                flipped += 1
        sided = row in (1, 2, 3)
        assert flipped == 0 if sided else 35 < flipped < 65, (text, answer)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [0, 1])
def test_each_question_has_its_own_image_in_each_epoch_whatever_else_is_in_the_batch(table, image, workers):
    chosen = made("crop_flip", table)
    data = Planned(QuestionDataset(table, [image], augmentation=chosen), None)
    plan = [(epoch, rows) for epoch in (1, 2) for rows in ([0, 4, 5], [3, 0], [1])]
    seen = {}
    for (epoch, _), batch in zip(plan, make_loader(data, plan, workers, torch.device("cpu")), strict=True):
        assert batch.places.tolist() == list(range(len(batch.rows)))
        for row, pixels in zip(batch.rows.tolist(), batch.images, strict=True):
            expected = chosen.augment(image, epoch, row)
            assert np.array_equal(pixels.numpy(), expected)
            seen[epoch, row] = expected.tobytes()
    assert len(set(seen.values())) == len(seen) == 10
    assert made("crop", table, seed=6).augment(image, 1, 1).tobytes() != seen[1, 1]


def test_without_it_images_are_as_they_are(table, image):
    assert made("none", table) is None
    batch = QuestionDataset(table, [image])[[0, 1]]
    assert batch.images.shape == (1, SIZE, SIZE, 3)
    assert np.array_equal(batch.images[0].numpy(), image)
