"""The object that a question is about: the vector of its position, its crop, and boxes that are refused."""

import math

import numpy as np
import pytest

from vqa.tasks.objects import check_box, crop_region, spatial_features


def authors_features(box, width, height):
    """GuessWhat?!'s own code (`Bbox` and `get_spatial_feat`), written down again from its definition."""
    x, y, w, h = box
    upper = height - y
    lower = upper - h
    across = [2 * value / width - 1 for value in (x, x + w, x + 0.5 * w)]
    upwards = [2 * value / height - 1 for value in (lower, upper, lower + 0.5 * h)]
    return [across[0], upwards[0], across[1], upwards[1], across[2], upwards[2], 2 * w / width, 2 * h / height]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 200, 100), [-1, -1, 1, 1, 0, 0, 2, 2]),  # the whole image
        ((0, 0, 100, 50), [-1, 0, 0, 1, -0.5, 0.5, 1, 1]),  # its upper left quarter
        ((150, 75, 50, 25), [0.5, -1, 1, -0.5, 0.75, -0.75, 0.5, 0.5]),  # its lower right corner
        ((99, 49, 2, 2), [-0.01, -0.02, 0.01, 0.02, 0, 0, 0.02, 0.04]),
    ],
)
def test_the_vector_is_the_paper_s_on_hand_made_boxes(box, expected):
    made = spatial_features(box, 200, 100)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_the_vector_is_that_of_the_authors_code():
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, height = (int(side) for side in rng.integers(20, 640, 2))
        x, y = rng.uniform(0, width - 2), rng.uniform(0, height - 2)
        box = (x, y, rng.uniform(0.5, width - x), rng.uniform(0.5, height - y))
        made = spatial_features(box, width, height)
        np.testing.assert_allclose(made, authors_features(box, width, height), atol=1e-5)
        assert (np.abs(made[:6]) <= 1 + 1e-6).all()
        assert (made[6:] > 0).all()


@pytest.mark.parametrize(
    ("box", "factor", "expected"),
    [
        ((100, 50, 20, 10), 1.0, (100, 50, 120, 60)),
        ((100, 50, 20, 10), 2.0, (90, 45, 130, 65)),  # about the centre
        ((100, 40, 40, 20), 1.1, (98, 39, 142, 61)),
        ((0, 0, 20, 10), 1.5, (0, 0, 25, 12)),  # clipped at the border
        ((180, 90, 20, 10), 3.0, (160, 80, 200, 100)),
        ((50, 50, 0.2, 0.2), 1.0, (50, 50, 51, 51)),  # never less than a pixel
        ((199.9, 99.9, 0.1, 0.1), 1.0, (199, 99, 200, 100)),
        ((-1, -1, 202, 102), 1.1, (0, 0, 200, 100)),
    ],
)
def test_the_crop_is_enlarged_about_its_centre_and_cut_at_the_border(box, factor, expected):
    check_box(box, 200, 100)
    assert crop_region(box, 200, 100, factor) == expected


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((10, 10, 0, 5), "empty"),
        ((10, 10, 5, -1), "empty"),
        ((math.nan, 10, 5, 5), "not finite"),
        ((10, 10, math.inf, 5), "not finite"),
        ((195, 10, 10, 5), "not within its image of 200 x 100"),
        ((-2, 10, 10, 5), "not within"),
        ((200, 10, 0.5, 5), "not within"),
        ((-0.5, 10, 0.25, 5), "not within"),
        ((10, 96, 5, 6), "not within"),
        ((10, -2, 5, 5), "not within"),
        ((10, 100, 5, 0.5), "not within"),
        ((10, -0.5, 5, 0.5), "not within"),
    ],
)
def test_degenerate_boxes_are_refused(box, said):
    with pytest.raises(ValueError, match=said):
        check_box(box, 200, 100)
