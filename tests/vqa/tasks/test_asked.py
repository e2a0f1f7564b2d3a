"""A question about an object: what a model is given of image, box and category, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from vqa.io.errors import InputError
from vqa.settings.recipes import load_settings
from vqa.tasks.asked import inputs_of

BOX = (10, 20, 30, 8)
NAMES = ["person", "traffic light", "toothbrush"]


def settings(inputs="[crop, spatial, category, question]", *words):
    return load_settings(ROOT / "config" / "guesswhat" / "cbn.yaml", [f"inputs={inputs}", *words])


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))


def test_views_and_numbers_of_an_object(image):
    views, extras = inputs_of(settings("[question, image, crop, spatial, category]"), NAMES, image, BOX, "toothbrush")
    # 1.1 times as wide and high about (25, 24)
    assert np.array_equal(np.asarray(views[0]), np.asarray(image)[20:28, 8:42])
    assert views[1] is image
    assert extras["category"].tolist() == [2]
    # y upwards: its lower edge is 20 of 48 above the border
    corners_and_centre = 2 * np.array([10, 20, 40, 28, 25, 24]) / ([64, 48] * 3) - 1
    expected = [*corners_and_centre, 2 * 30 / 64, 2 * 8 / 48]
    np.testing.assert_allclose(extras["spatial"], [expected], rtol=1e-6)


def test_only_what_the_inputs_need_has_to_be_given(image):
    assert inputs_of(settings("[question]", "cbn.stages=[]"), NAMES, image) == ([], {})
    views, extras = inputs_of(settings("[image, question]"), NAMES, image)
    assert (views, extras) == ([image], {})
    assert len(inputs_of(settings("[crop, question]"), NAMES, image, np.array(BOX))[0]) == 1
    assert inputs_of(settings("[category, question]", "cbn.stages=[]"), NAMES, image, category="person")[0] == []
    for given, says in (({"box": (1, 2, 0, 3)}, "is empty"), ({"category": "xyz"}, "unknown category")):
        with pytest.raises(InputError, match=says):  # nor is it passed over
            inputs_of(settings("[image, question]"), NAMES, image, **given)


@pytest.mark.parametrize(
    ("box", "category", "says"),
    [
        (None, "person", "box: this model needs the object's box: --box X,Y,W,H, in pixels from the top left"),
        ((1, 2, 3), "person", r"box: must be four numbers \(x, y, width, height\), not \(1, 2, 3\)"),
        ("1,2,3,4", "person", "box: must be four numbers"),
        ((1, 2, None, 3), "person", "box: must be four numbers"),
        (np.array(3.0), "person", "box: must be four numbers"),
        (np.ones((4, 4)), "person", "box: must be four numbers"),
        ((0, 0, 1, 10**400), "person", "box: a number is too large"),
        ((1, 2, 0, 3), "person", r"^box \[1, 2, 0, 3\] is empty"),
        ((1, 2, float("nan"), 3), "person", "is not finite"),
        ((60, 2, 30, 3), "person", r"is not within its image of 64 x 48 pixels"),
        (BOX, None, "category: this model needs the object's category: --category NAME; one of person, traffic light"),
        (BOX, "Tootbrush", "category: unknown category 'Tootbrush'; did you mean toothbrush"),
        (BOX, "xyz", "category: unknown category 'xyz'; one of person, traffic light, toothbrush"),
    ],
)
def test_a_missing_or_wrong_object_is_refused(image, box, category, says):
    with pytest.raises(InputError, match=says) as refused:
        inputs_of(settings(), NAMES, image, box, category)
    assert "\n" not in str(refused.value)


def test_many_categories_are_not_listed(image):
    with pytest.raises(InputError, match=r"unknown category 'xyz'; categories.json of the model lists them$"):
        inputs_of(settings(), [f"{number}" for number in range(90)], image, BOX, "xyz")


def test_a_model_of_whole_images_is_asked_about_no_object(image, tiny):
    for given in ({"box": BOX}, {"category": "person"}):
        with pytest.raises(InputError, match=f"{next(iter(given))}: a model of the task vqa answers about the whole"):
            inputs_of(load_settings(tiny), [], image, **given)
