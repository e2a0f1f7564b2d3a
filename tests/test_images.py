"""Images: decoded, resized, normalised."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import InputError
from data.images import Preprocessing, decode_image


def test_images_are_plainly_resized_rgb(tmp_path):
    picture = Image.new("RGB", (90, 30))
    picture.paste((255, 0, 0), (0, 0, 45, 30))
    picture.paste((0, 0, 255), (45, 0, 90, 30))
    picture.save(tmp_path / "wide.png")
    pixels = decode_image(tmp_path / "wide.png", 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels[16, 4].tolist() == [255, 0, 0]
    assert pixels[16, 28].tolist() == [0, 0, 255]
    for mode in ("L", "CMYK", "P"):
        picture.convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
        assert decode_image(next(tmp_path.glob(f"{mode}.*")), 16).shape == (16, 16, 3)


def test_sixteen_bits_a_pixel_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = decode_image(tmp_path / "deep.png", 64)
    assert abs(pixels.mean() - 127.5) < 2


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_no_images_are_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(InputError, match="bad.jpg: cannot be read as an image"):
        decode_image(tmp_path / "bad.jpg", 16)


def test_normalisation_is_torchvisions(tmp_path):
    from torchvision.transforms.v2.functional import normalize, to_dtype

    preprocessing = Preprocessing(8)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = normalize(to_dtype(images.permute(0, 3, 1, 2), scale=True), preprocessing.mean, preprocessing.std)
    torch.testing.assert_close(preprocessing.normalise(images), expected, rtol=1e-5, atol=1e-5)
    preprocessing.save(tmp_path / "p.json")
    assert Preprocessing.load(tmp_path / "p.json") == preprocessing
    good = {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "resize": "bilinear"}
    for wrong in ({"size": "big"}, {"mean": [0, 0]}, {"std": [1, 0, 1]}, {"resize": "nearest"}, {"std": None}):
        (tmp_path / "p.json").write_text(json.dumps(good | wrong))
        with pytest.raises(InputError, match="p.json"):
            Preprocessing.load(tmp_path / "p.json")
