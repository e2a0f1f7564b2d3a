"""Images: decoded, resized, normalised."""

import io
import json
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import normalize, to_dtype

from tests.bad_files import png, png_block
from vqa.io.errors import InputError
from vqa.io.images import decode_image, read_image
from vqa.io.weight_files import load_tensors
from vqa.preprocessing import Preprocessing


def test_images_are_plainly_resized_rgb(tmp_path):
    image = Image.effect_noise((90, 30), 50).convert("RGB")
    image.save(tmp_path / "wide.png")
    pixels = decode_image(tmp_path / "wide.png", 32)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))


def test_normalisation_is_torchvisions(tmp_path):
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


def corners(mode=None):
    """An image whose corners are red, green, blue and white, clockwise from the top left."""
    image = Image.new("RGB", (64, 48), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 32, 24))
    image.paste((255, 255, 255), (0, 24, 32, 48))
    image.paste((0, 0, 255), (32, 24, 64, 48))
    return image.convert(mode) if mode else image


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def seen(file) -> np.ndarray:
    """The four corners as they are decoded, clockwise, [4, 3]."""
    pixels = decode_image(file, 16).astype(int)
    return pixels[[2, 2, 13, 13], [2, 13, 13, 2]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_images_stand_upright(tmp_path, orientation, kind):
    """Stored turned, as cameras do, with the EXIF entry that says so."""
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose: what EXIF 2 to 8 take back
    image = corners()
    if orientation > 1:
        image = image.transpose(Image.Transpose(turned[orientation]))
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / f"a.{kind}", exif=exif)
    assert np.abs(seen(tmp_path / f"a.{kind}") - COLOURS).max() < 40


ODD_EXIF = b"Exif\0\0II*\0" + struct.pack(  # a width that is text, which Pillow cannot write again, and orientation 6
    "<IHHHI4sHHIHHI", 8, 2, 0x100, 2, 4, b"abc", 0x112, 3, 1, 6, 0, 0
)


@pytest.mark.parametrize("block", [{"exif": ODD_EXIF}, {"xmp": b"<tiff:Orientation>6\n</tiff:Orientation>"}], ids=str)
def test_an_image_that_was_read_is_not_turned_again(tmp_path, block):
    """`ask` reads the image, takes its views and prepares these as images; preprocessing reads the file once."""
    corners().save(tmp_path / "a.jpg", **block)
    image = read_image(tmp_path / "a.jpg")
    assert image.size == (48, 64)
    for again in (image, image.crop((0, 0, 48, 64))):
        assert np.array_equal(np.asarray(read_image(again)), np.asarray(image))


def test_an_image_of_sixteen_bits_stands_upright(tmp_path):
    pixels = np.zeros((20, 40), np.uint16)
    pixels[:, :20] = 60_000
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "deep.png", exif=exif)
    assert read_image(tmp_path / "deep.png").size == (20, 40)


@pytest.mark.parametrize(
    "block", [{"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}, {"exif": b"junk"}, {"icc_profile": b"junk"}], ids=str
)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_damaged_block_beside_the_image_says_nothing(tmp_path, kind, block):
    corners().save(tmp_path / f"a.{kind}", **block)
    with warnings.catch_warnings(action="error"):
        assert np.abs(seen(tmp_path / f"a.{kind}") - COLOURS).max() < 40


TURNED = b'<x:xmpmeta tiff:Orientation="6"/>'
EXIF = Image.Exif()
EXIF[0x112] = 6
RAW_PROFILE = b"\nexif\n%8d\n%s\n" % (len(EXIF.tobytes()), EXIF.tobytes().hex().encode())
UPRIGHT, SIDEWAYS = (64, 48), (48, 64)


def packed(text: bytes) -> bytes:
    return zlib.compress(text + b" " * 3_000_000)


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize(
    ("blocks", "size"),
    [
        ([(b"iCCP", b"profile\0\0" + packed(b""))], UPRIGHT),
        ([(b"iCCP", b"profile\0\5")], UPRIGHT),
        ([(b"gAMA", b"")], UPRIGHT),
        ([(b"zTXt", b"text\0\0" + packed(b""))], UPRIGHT),
        ([(b"tEXt", b"text\0" + b"x" * 2**20)] * 70, UPRIGHT),
        ([(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed(TURNED))], SIDEWAYS),
        ([(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + TURNED), (b"iCCP", b"p\0\0" + packed(b""))], SIDEWAYS),
        ([(b"zTXt", b"text\0\0" + packed(b"")), (b"eXIf", EXIF.tobytes()[6:])], SIDEWAYS),
        ([(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE))], SIDEWAYS),
        ([(b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE)], SIDEWAYS),
        ([(b"tEXt", b"exif\0" + EXIF.tobytes())], SIDEWAYS),
    ],
    ids=lambda value: value[0][0].decode() if isinstance(value, list) else "",
)
def test_blocks_beside_the_pixels_of_a_png_are_skipped(tmp_path, blocks, size, behind):
    corners().save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    place = len(whole) - 12 if behind else 33
    added = b"".join(png_block(name, content) for name, content in blocks)
    (tmp_path / "a.png").write_bytes(whole[:place] + added + whole[place:])
    with warnings.catch_warnings(action="error"):
        image = read_image(tmp_path / "a.png")
    assert image.size == size
    turned = corners() if size == UPRIGHT else corners().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(image), np.asarray(turned))


@pytest.mark.parametrize(
    ("kind", "given"),
    [(kind, given) for kind in ("webp", "tiff", "avif") for given in ("icc_profile", "xmp")]
    + [("jpg", "icc_profile"), ("gif", "comment")],
)
def test_large_blocks_beside_the_pixels_do_not_matter(tmp_path, kind, given):
    corners().save(tmp_path / f"a.{kind}", **{given: b"x" * 3_000_000})
    assert read_image(tmp_path / f"a.{kind}").size == UPRIGHT


@pytest.mark.parametrize(
    ("mode", "name", "given"),
    [
        ("L", "a.png", {}),
        ("LA", "a.png", {}),
        ("RGBA", "a.png", {}),
        ("P", "a.png", {}),
        ("P", "a.png", {"transparency": 0}),
        ("P", "a.png", {"transparency": bytes(range(200))}),
        ("P", "a.gif", {}),
        ("CMYK", "a.jpg", {}),
        ("CMYK", "a.tiff", {}),
        ("RGB", "a.ppm", {}),
        ("RGB", "a.bmp", {}),
        ("RGB", "no_ending", {"format": "PNG"}),
        ("RGB", "another_ending.jpg", {"format": "PNG"}),
    ],
)
def test_every_kind_of_image_has_its_colours(tmp_path, mode, name, given):
    corners(mode).save(tmp_path / name, **given)
    colours = COLOURS if not mode.startswith("L") else [(76,) * 3, (150,) * 3, (29,) * 3, (255,) * 3]
    with warnings.catch_warnings(action="error"):
        assert np.abs(seen(tmp_path / name) - colours).max() < 40


def test_what_lies_under_transparency_is_seen(tmp_path):
    image = corners("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    assert np.abs(seen(tmp_path / "a.png") - COLOURS).max() < 10


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff"])
def test_of_several_images_the_first_is_seen(tmp_path, kind):
    corners().save(tmp_path / f"a.{kind}", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert np.abs(seen(tmp_path / f"a.{kind}") - COLOURS).max() < 40


@pytest.mark.parametrize("colour", [0, 2, 4])
def test_sixteen_bits_a_channel(tmp_path, colour):
    channels = {0: 1, 2: 3, 4: 2}[colour]
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32, 1).repeat(channels, 2).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(32, 32, 16, colour, b"".join(b"\0" + row.tobytes() for row in ramp)))
    pixels = decode_image(tmp_path / "a.png", 32).astype(int)
    assert np.abs(pixels - ramp[..., :1].astype(int) // 256).max() <= 1


def tiff(values, bits, photometric):
    """A grey TIFF of one strip, uncompressed; of 12 bits each two pixels are three bytes."""
    data = values.astype("<u2").tobytes()
    if bits == 12:
        one, other = values.reshape(-1, 2).T
        data = np.stack([one >> 4, (one & 15) << 4 | other >> 8, other & 255], 1).astype(np.uint8).tobytes()
    height, width = values.shape
    size = {256: width, 257: height, 278: height, 279: len(data)}
    tags = size | {258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("bits", "photometric"), [(16, 1), (16, 0), (12, 1)])
def test_the_bits_and_the_white_of_a_tiff(bits, photometric):
    brightness = np.linspace(0, 255, 32 * 32).reshape(32, 32)
    values = (brightness / 255 * (2**bits - 1)).astype(np.uint16)
    file = tiff(2**bits - 1 - values if photometric == 0 else values, bits, photometric)
    for source in (file, Image.open(io.BytesIO(file))):
        assert np.abs(np.asarray(read_image(source), float) - brightness[..., None]).max() < 1.5


def test_a_dark_image_of_sixteen_bits_is_dark():
    file = b"P5 32 32 65535\n" + np.full(32 * 32, 200, ">u2").tobytes()
    assert not np.asarray(read_image(file)).any()


@pytest.mark.parametrize("size", [(1, 1), (30_000, 2), (2, 30_000), (3, 1)])
def test_odd_shapes(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png", 32)
    assert pixels.shape == (32, 32, 3)
    assert (pixels == (10, 200, 30)).all()


def test_threads_that_read_images_and_weights_leave_the_filters_of_warnings(monkeypatch):
    image_begun, weights_begun, image_ended = (threading.Event() for _ in range(3))

    def slow_image(image):
        image_begun.set()
        assert weights_begun.wait(30)
        return image

    def slow_weights(*_, **__):
        weights_begun.set()
        assert image_ended.wait(30)

    monkeypatch.setattr("vqa.io.images._upright_rgb", slow_image)
    monkeypatch.setattr("torch.load", slow_weights)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        image = pool.submit(read_image, png(1, 1, 8, 0, bytes(2)))
        assert image_begun.wait(30)
        weights = pool.submit(load_tensors, Path(__file__))
        image.result()
        image_ended.set()
        weights.result()
    assert warnings.filters == before


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I"])
def test_an_image_without_pixels_is_not_a_black_one(mode):
    with pytest.raises(InputError, match=r"image: cannot be read as an image \(it has no pixels\)"):
        decode_image(Image.new(mode, (0, 5)), 32)
