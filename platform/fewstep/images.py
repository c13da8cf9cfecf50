"""Decoding of image files to RGB pixels as a person sees them, and fitting them to the sizes of a dataset."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ExifTags, ImageCms, ImageOps
from PIL.Image import Image, Resampling, Transpose

from fewstep.errors import UserError

MAX_PIXELS = 178_956_970
"""Default of the most pixels of an image; Pillow's own limit, 512 MiB of RGB."""


@dataclass(frozen=True)
class Size:
    """Size of an image bucket in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read a size written as `512` (a square) or `640x384` (width x height).

        Raises:
            UserError: it is written otherwise.
        """
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
        if not match:
            raise UserError(
                f"the size {text!r} is not a number of pixels: write 512, or 640x384 (width x height)."
            )
        return cls(int(match[1]), int(match[2] or match[1]))

    @staticmethod
    def nearest(sizes: Sequence[Size], width: int, height: int) -> Size:
        """The size with the aspect ratio nearest to width / height, on a logarithmic scale; the first of equals."""
        return min(sizes, key=lambda size: abs(np.log(size.width * height / (size.height * width))))


def bucket_sizes(side: int, multiple: int) -> tuple[Size, ...]:
    """Sizes of about side × side pixels, from twice as high as wide to twice as wide as high.

    Sides are multiples of `multiple`, and of about a sixteenth of `side` where that is more: at 1024, of 64.

    Args:
        side: of the square among them, in pixels.
        multiple: that the model's sides must be of.

    Raises:
        UserError: `side` is no multiple of it.
    """
    if side % multiple:
        raise UserError(
            f"--buckets {side} is no multiple of {multiple}, of which both sides have to be: take "
            f"{max(side // multiple, 1) * multiple}."
        )
    step = max(multiple, side // 16 // multiple * multiple)
    wide = []
    for height in range(side - step, 0, -step):
        width = round(side * side / height / step) * step
        if width > 2 * height:
            break
        wide.append(Size(width, height))
    return (Size(side, side), *wide, *(Size(size.height, size.width) for size in wide))


def open_image(content: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None) -> Image:
    """Decode an image's bytes to sRGB, turned upright, with transparent parts on white.

    Grey pixels of more than 8 bits are scaled so that white is white. An image of several pages or moments gives its
    first.

    Args:
        content: of a file.
        max_pixels: images of more are refused before they are decoded.
        formats: names of those that are read, as Pillow has them; None for all.

    Raises:
        ValueError: the bytes are no image that Pillow reads, a broken one, one of more than `max_pixels` pixels, or of
            pixels that don't say what is white.
    """
    with _opened(content, max_pixels, formats) as image:
        turn = _TURNS.get(_orientation(image))
        image.load()
        shown = _eight_bits(image)
        if (
            turn is not None and image.format != "TIFF"
        ):  # Pillow turns TIFF files by itself while it loads them
            shown = shown.transpose(turn)
        if not shown.has_transparency_data:
            return _in_srgb(shown, image)
        shown = shown.convert("RGBA")
        colours = _in_srgb(shown.convert("RGB"), image)
        colours.putalpha(shown.getchannel("A"))
        return PIL.Image.alpha_composite(
            PIL.Image.new("RGBA", shown.size, (255, 255, 255, 255)), colours
        ).convert("RGB")


def read_image(file: Path, name: str) -> Image:
    """The image of a file, as `open_image` decodes it.

    Args:
        file: local.
        name: of the setting that names it, for the message.

    Raises:
        UserError: it can't be read, or is no image.
    """
    try:
        return open_image(file.read_bytes())
    except OSError as error:
        raise UserError(f"{name}: {file} can't be read ({error.strerror}): check the path.") from error
    except ValueError as error:
        raise UserError(f"{name}: {file} is no image that can be used: {error}.") from error


def measure(
    content: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> tuple[int, int]:
    """Width and height of the image that `open_image` gives, from the file's header.

    Args:
        content, max_pixels, formats: as for `open_image`.

    Raises:
        ValueError: the bytes are no image that Pillow reads, or one of more than `max_pixels` pixels.
    """
    with _opened(content, max_pixels, formats) as image:
        quarter_turned = _orientation(image) in _QUARTER_TURNS
        if image.format == "TIFF" and image.tag_v2.get(ExifTags.Base.Orientation) in _QUARTER_TURNS:  # type: ignore[attr-defined]
            quarter_turned = False  # Pillow has swapped the sides already
        return (image.height, image.width) if quarter_turned else image.size


def fit(image: Image, size: Size) -> np.ndarray:
    """Scale an image to cover `size` and cut out its centre, (height, width, 3) uint8."""
    return np.asarray(ImageOps.fit(image, (size.width, size.height), Resampling.LANCZOS), dtype=np.uint8)


def lift_limit() -> None:
    """Let Pillow open images of any size in this process, since `open_image` and `measure` have their own limit."""
    PIL.Image.MAX_IMAGE_PIXELS = None


# Numbers of the tags of TIFF files that say how pixels are meant (TIFF 6.0)
TAGS = {"BitsPerSample": 258, "PhotometricInterpretation": 262, "SampleFormat": 339}

# What EXIF's orientations ask for
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)


def _orientation(image: Image) -> int:
    """EXIF's orientation of an image; 1, upright, where the tag is missing, of another type, or unreadable."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except (
        Exception
    ):  # of many kinds; cameras and editors write broken EXIF, and the picture is fine without it
        return 1
    return value if isinstance(value, int) else 1


def _in_srgb(shown: Image, file: Image) -> Image:
    """An image of 8 bits in sRGB, by the colour profile in its file; as it is where there is none that can be used."""
    content = file.info.get("icc_profile")
    plain = shown if shown.mode in _PROFILED else shown.convert("RGB")
    if content:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
            space = str(profile.profile.xcolor_space).strip()
            if space == "GRAY" and plain.mode == "RGB" and file.mode not in ("RGB", "RGBA", "P", "PA"):
                plain = plain.getchannel(0)
            # Most profiles are sRGB's; converting from one edition of it to another only costs time.
            usual = str(profile.profile.profile_description or "").startswith("sRGB")
            if _PROFILED.get(plain.mode) == space and not usual:
                converted = ImageCms.profileToProfile(
                    plain, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
                )
                assert converted is not None, "not in place"
                return converted
        except (
            ImageCms.PyCMSError,
            OSError,
            ValueError,
            TypeError,
        ):  # as browsers do: a broken profile is none
            pass
    return plain.convert("RGB")


_PROFILED = {"RGB": "RGB", "CMYK": "CMYK", "L": "GRAY"}
"""Modes of images that are converted by profiles, and what the profiles call their colours."""


def _eight_bits(image: Image) -> Image:
    """An image whose channels have 8 bits: grey pixels of more bits are scaled, others stay as they are.

    Raises:
        ValueError: pixels of 32 bits are outside of every usual range, so that white is unknown.
    """
    if image.mode == "RGB" and isinstance(key := image.info.get("transparency"), tuple) and max(key) > 255:
        # Pillow keeps the upper 8 of 16 bits of each channel, and all of the colour that stands for nothing.
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    pixels = np.asarray(image)
    shown = np.rint(np.clip(pixels * (255 / _white(image, pixels)), 0, 255)).astype(np.uint8)
    if _tag(image, TAGS["PhotometricInterpretation"]) == 0:  # white is zero
        shown = 255 - shown
    grey = PIL.Image.fromarray(shown)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = PIL.Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8))
        grey = PIL.Image.merge("LA", (grey, alpha))
    return grey


def _white(image: Image, pixels: np.ndarray) -> float:
    """The value of white in grey pixels of more than 8 bits.

    Files hardly ever say it: scanners and cameras put 10 or 12 bits into 16, and programs any range into 32. So it is
    the end of the first usual range that holds all pixels.

    Raises:
        ValueError: none does.
    """
    bits = _tag(image, TAGS["BitsPerSample"])
    if isinstance(bits, tuple) and 8 < bits[0] < 16:
        return 2.0 ** bits[0] - 1
    lowest, highest = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind == "f":
        # Resampling overshoots a little; what is nearly black in a range is of none.
        fits = [
            end
            for end in (1.0, 255.0, 65535.0)
            if -0.05 * end <= lowest and end / 16 <= highest <= 1.05 * end
        ]
        fits += [1.0] * (lowest >= 0 and highest <= 1)
    else:
        signed = _tag(image, TAGS["SampleFormat"]) == (2,) and bits == (16,)
        fits = [
            end
            for end in (255.0, 1023.0, 4095.0, 32767.0 if signed else 65535.0)
            if lowest >= 0 and highest <= end
        ]
    if not fits:  # so for NaN, too
        raise ValueError(
            f"grey pixels from {lowest:g} to {highest:g}, which don't say what is white: save it with 8 bits"
        )
    return fits[0]


def _tag(image: Image, tag: int) -> object:
    """A tag of a TIFF file; None of other files."""
    tags = getattr(image, "tag_v2", None)
    return None if tags is None else tags.get(tag)


@contextmanager
def _opened(content: bytes, max_pixels: int, formats: tuple[str, ...] | None = None) -> Iterator[Image]:
    """A context with an image whose header is read, in which whatever Pillow raises becomes a ValueError of one line.

    Raises:
        ValueError: as `open_image`.
    """
    try:
        with PIL.Image.open(io.BytesIO(content), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width}x{image.height} pixels, and at most {max_pixels} are allowed")
            yield image
    except PIL.Image.DecompressionBombError as error:
        # Where `lift_limit` was not called. Pillow's own text names a limit that is not the one that was set.
        raise ValueError(f"more pixels than Pillow opens, and at most {max_pixels} are allowed") from error
    except PIL.UnidentifiedImageError as error:
        # Pillow's own text has a memory address in it, and shards store the text: the same input must make the same
        # bytes.
        raise ValueError("not an image that Pillow reads") from error
    except Exception as error:  # Pillow's plug-ins raise errors of many kinds
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
