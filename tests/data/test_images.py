"""Pictures come out as a person sees them, whatever their mode; what can't is rejected with the reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from fewstep.data.images import Size, fit, measure, open_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(content: bytes) -> np.ndarray:
    pixels = np.asarray(open_image(content)).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (RAMP, "PNG"),
        (RAMP.astype(np.uint16) * 257, "PNG"),
        (RAMP.astype(np.uint16) * 257, "TIFF"),
        (RAMP.astype(np.uint16) * 257, "PPM"),
        (RAMP.astype(np.int32) * 257, "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32) / 255, "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32) * 257, "TIFF"),
    ],
)
def test_grey_of_every_depth_looks_like_its_copy_of_8_bits(pixels: np.ndarray, kind: str) -> None:
    assert np.array_equal(grey(encoded(Image.fromarray(pixels), kind)), RAMP)


@pytest.mark.parametrize(
    ("pixels", "brightest"),
    [
        (RAMP.astype(np.uint16) * 16, 254),  # 12 bits in 16, as microscopes and raw converters write
        (RAMP.astype(np.uint16) * 4, 254),  # 10 bits
        (RAMP.astype(np.uint16), 255),
        (RAMP.astype(np.uint16) * 64, 63),  # a dark scan of 16 bits stays dark
        (RAMP.astype(np.int32) + 45, 75),
        (RAMP.astype(np.float32) / 254, 255),  # an overshoot of resampling
        (np.zeros((4, 4), np.uint16), 0),
        (np.full((4, 4), 0.01, np.float32), 3),
    ],
)
def test_pixels_in_a_part_of_their_range_are_not_nearly_black(pixels: np.ndarray, brightest: int) -> None:
    assert abs(grey(encoded(Image.fromarray(pixels), "TIFF")).max() - brightest) <= 1


def test_a_tiff_file_says_its_bits_its_sign_and_whether_white_is_zero() -> None:
    sixteen = RAMP.astype(np.uint16) * 257
    inverted = encoded(Image.fromarray(65535 - sixteen), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(grey(inverted), RAMP)
    signed = encoded(Image.fromarray(RAMP.astype(np.uint16) * 128), "TIFF", tiffinfo={339: 2})
    assert abs(grey(signed).max() - 255) <= 1


@pytest.mark.parametrize(
    "pixels",
    [
        RAMP.astype(np.int32) * 65537,
        RAMP.astype(np.int32) - 1,
        RAMP.astype(np.float32) * 1e6,
        RAMP.astype(np.float32) - 128,
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), np.inf, np.float32),
    ],
)
def test_pixels_that_do_not_say_what_is_white_are_rejected(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"grey pixels from .* which don't say what is white"):
        open_image(encoded(Image.fromarray(pixels), "TIFF"))


def test_a_float_map_of_netpbm_is_no_file_of_16_bits() -> None:
    image = Image.fromarray(RAMP.astype(np.float32) / 255)
    assert np.array_equal(grey(encoded(image, "PPM")), RAMP)
    with pytest.raises(ValueError, match="grey pixels"):
        open_image(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "PPM"))


def test_every_other_mode_is_read() -> None:
    colours = np.stack([RAMP, RAMP.T, np.full_like(RAMP, 7)], -1)
    rgb = Image.fromarray(colours)
    assert np.array_equal(np.asarray(open_image(encoded(rgb))), colours)
    for mode in ("RGBA", "RGBX"):
        assert np.array_equal(np.asarray(open_image(encoded(rgb.convert(mode), "TIFF"))), colours)
    assert (
        np.abs(np.asarray(open_image(encoded(rgb.convert("CMYK"), "TIFF"))).astype(int) - colours).max() <= 2
    )
    assert (
        np.abs(np.asarray(open_image(encoded(rgb.convert("YCbCr"), "TIFF"))).astype(int) - colours).max() <= 4
    )
    black_and_white = Image.fromarray(RAMP > 127)
    assert np.array_equal(grey(encoded(black_and_white)), np.where(RAMP > 127, 255, 0))
    assert np.array_equal(grey(encoded(Image.fromarray(RAMP).convert("LA"))), RAMP)
    palette = rgb.quantize(16)
    assert np.array_equal(np.asarray(open_image(encoded(palette))), np.asarray(palette.convert("RGB")))


def test_transparent_parts_are_white() -> None:
    assert np.asarray(open_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))))).min() == 255
    # One grey value that stands for nothing, of 8 and of 16 bits; and one entry of a palette
    assert grey(encoded(Image.fromarray(RAMP), transparency=7))[0, 6:9].tolist() == [6, 255, 8]
    sixteen = encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), transparency=7 * 257)
    assert grey(sixteen)[0, 6:9].tolist() == [6, 255, 8]
    clear = Image.new("P", (2, 2), 1)
    clear.putpalette([0, 0, 0, 9, 9, 9])
    assert grey(encoded(clear, transparency=1)).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_and_measured_alike(kind: str, orientation: int) -> None:
    corner = np.zeros((16, 48), np.uint8)
    corner[:8, :24] = 255  # upper left
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    content = encoded(Image.fromarray(corner).convert("RGB"), kind, **options)
    shown = np.asarray(open_image(content))[..., 0] > 127
    assert measure(content) == (shown.shape[1], shown.shape[0])
    assert shown.shape == ((48, 16) if orientation >= 5 else (16, 48))
    half = shown[: shown.shape[0] // 2].mean(), shown[:, : shown.shape[1] // 2].mean()
    upper, left = half[0] > 0.25, half[1] > 0.25
    # Where the stored upper left corner is seen: EXIF 2.32, tag 0x0112
    assert (upper, left) == {
        1: (True, True), 2: (True, False), 3: (False, False), 4: (False, True),
        5: (True, True), 6: (True, False), 7: (False, False), 8: (False, True),
    }[orientation]  # fmt: skip


@pytest.mark.parametrize("value", ["6", b"6", 6.5, 0, 9, 65535, (6, 6)])
def test_orientations_of_odd_types_break_nothing(value: object) -> None:
    for data in (exif_of(value), b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        content = encoded(Image.new("RGB", (6, 2)), "JPEG", exif=data)
        assert open_image(content).size == measure(content)


def exif_of(value: object) -> bytes:
    """EXIF data whose orientation has another type than it should."""
    ifd = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    ifd.tagtype[0x0112] = {str: 2, bytes: 7, float: 12}.get(type(value), 3)
    ifd._tags_v2[0x0112] = value if isinstance(value, (tuple, str, bytes)) else (value,)
    return b"Exif\0\0II*\0\x08\0\0\0" + ifd.tobytes(8)


def test_large_pictures_have_a_limit_that_can_be_set() -> None:
    content = encoded(Image.new("L", (40, 30)))
    assert open_image(content, 1200).size == (40, 30)
    for function in (open_image, measure):
        with pytest.raises(ValueError, match="40x30 pixels, and --max-pixels is 1199"):
            function(content, 1199)


def test_what_is_no_picture_is_said_without_addresses_in_memory() -> None:
    for function in (open_image, measure):
        with pytest.raises(ValueError, match=r"^not an image that Pillow reads$"):
            function(b"this is no image")
    whole = encoded(Image.fromarray(RAMP))
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        open_image(whole[:-30])


def test_pictures_are_cut_in_the_middle() -> None:
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, 4:8] = 200
    assert (fit(Image.fromarray(stripes), Size(4, 4)) == 200).all()
