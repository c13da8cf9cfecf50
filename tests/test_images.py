"""Pictures come out as a person sees them, whatever their mode; what can't is rejected with the reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from fewstep.errors import UserError
from fewstep.images import Size, bucket_sizes, fit, measure, open_image

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
        with pytest.raises(ValueError, match="40x30 pixels, and at most 1199 are allowed"):
            function(content, 1199)


@pytest.mark.parametrize("limit", [None, 500])
def test_the_limit_is_named_whether_or_not_pillow_has_one_of_its_own(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in (open_image, measure):
        with pytest.raises(ValueError, match="at most 1100 are allowed"):
            read(encoded(Image.new("L", (40, 30))), max_pixels=1100)


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


COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)


def close(content: bytes, wanted: np.ndarray, most: float) -> bool:
    """Whether a picture's pixels differ from the wanted ones by little, on average."""
    return float(np.abs(np.asarray(open_image(content)).astype(int) - wanted).mean()) <= most


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_shown(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    assert np.asarray(open_image(content))[2, 2].tolist() == [255, 0, 0]
    assert measure(content) == (8, 6)


def test_cmyk_of_printers_is_not_inverted() -> None:
    image = Image.fromarray(COLOURS).resize((64, 64))
    wanted = np.asarray(image).astype(int)
    assert close(encoded(image.convert("CMYK"), "JPEG", quality=95), wanted, 6)
    assert close(encoded(image.convert("CMYK"), "TIFF"), wanted, 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_of_every_depth_and_mode_lies_on_white(kind: str) -> None:
    shown = COLOURS * (RAMP[..., None] / 255) + 255 * (1 - RAMP[..., None] / 255)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert close(encoded(Image.fromarray(np.dstack([COLOURS, RAMP])), kind, **options), shown, 1)
    if kind == "WEBP":
        return
    grey_and_alpha = Image.fromarray(np.dstack([RAMP, 255 - RAMP]))
    assert grey_and_alpha.mode == "LA"
    wanted = RAMP * (1 - RAMP / 255) + RAMP
    assert close(encoded(grey_and_alpha, kind), np.repeat(wanted[..., None], 3, -1), 1)


def test_a_palette_with_an_alpha_for_each_entry_lies_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 100, 0, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    content = encoded(image, transparency=bytes([0, 128, 255]))
    pixels = np.asarray(open_image(content))[0]
    assert pixels[0].tolist() == [255, 255, 255]
    assert np.abs(pixels[1].astype(int) - [177, 127, 127]).max() <= 1
    assert pixels[2].tolist() == [0, 0, 200]


def test_colours_of_16_bits_are_scaled_and_not_clipped() -> None:
    # A PNG file by hand, as Pillow writes none of 16 bits in colour.
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    wide = (COLOURS.astype(">u2") * 257).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
    assert np.array_equal(np.asarray(open_image(content)), COLOURS)


def swapped_profile() -> bytes:
    """A colour profile like sRGB's, in which the first number of a pixel means green and the second one red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132])
    tags = {bytes(profile[at : at + 4]): at + 4 for at in range(132, 132 + 12 * count, 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    return bytes(profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_are_those_of_the_profile_in_the_file(kind: str) -> None:
    image = Image.new("RGB", (16, 16), (250, 20, 20))
    content = encoded(image, kind, icc_profile=swapped_profile())
    assert close(content, np.array([20, 250, 20]), 4)
    for harmless in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert close(encoded(image, kind, icc_profile=harmless), np.array([250, 20, 20]), 4)
    if kind != "JPEG":
        half = encoded(Image.new("RGBA", (16, 16), (250, 20, 20, 128)), kind, icc_profile=swapped_profile())
        assert close(half, np.array([137, 252, 137]), 4)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "P", "I;16"])
def test_a_profile_of_other_colours_than_the_picture_has_is_none(mode: str) -> None:
    image = Image.new("L", (8, 8), 255).convert(mode) if mode != "I;16" else Image.new("I;16", (8, 8), 65535)
    content = encoded(image, "TIFF", icc_profile=swapped_profile())
    assert np.asarray(open_image(content)).min() >= 250


def test_lab_pictures_show_their_colours() -> None:
    profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 30, 60)), *profiles, outputMode="LAB")
    assert close(encoded(lab, "TIFF"), np.array([200, 30, 60]), 2)


def test_standard_sizes_keep_the_area_and_reach_from_tall_to_wide() -> None:
    for side, multiple in ((1024, 16), (512, 32), (256, 16), (96, 2), (16, 2)):
        sizes = bucket_sizes(side, multiple)
        assert sizes[0] == Size(side, side)
        assert len(set(sizes)) == len(sizes) >= 5
        assert {Size(size.height, size.width) for size in sizes} == set(sizes)
        for size in sizes:
            assert size.width % multiple == size.height % multiple == 0
            assert 0.94 < size.width * size.height / side**2 < 1.06
            assert 0.5 <= size.width / size.height <= 2
        assert max(size.width / size.height for size in sizes) > 1.7
    with pytest.raises(UserError, match=r"--buckets 500 is no multiple of 16, .*: take 496"):
        bucket_sizes(500, 16)
