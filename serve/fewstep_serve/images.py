"""Pixels to image files."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from fewstep_serve.schema import OutputFormat

if TYPE_CHECKING:
    import numpy as np

IMAGE_DESCRIPTION = 0x010E
"""EXIF's tag."""


def encode_image(
    pixels: np.ndarray, output_format: OutputFormat = "png", quality: int = 100, facts: str | None = None
) -> str:
    """(H, W, 3) uint8 → an image file in base64.

    png always, and webp at quality 100, keep every pixel exactly.

    Args:
        pixels: of the image.
        output_format: of the file.
        quality: of jpeg, and of webp below 100.
        facts: a text to be written into the file, see `EngineConfig.metadata`.
    """
    from PIL import Image  # only generators encode: the ingress imports this module without needing Pillow
    from PIL.PngImagePlugin import PngInfo

    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if output_format == "png":
        text = PngInfo()
        if facts is not None:
            text.add_text("fewstep", facts)
        image.save(file, "PNG", pnginfo=text)
        return base64.b64encode(file.getvalue()).decode("ascii")
    exif = Image.Exif()
    if facts is not None:
        exif[IMAGE_DESCRIPTION] = facts
    if output_format == "webp":
        image.save(file, "WEBP", lossless=quality == 100, quality=quality, exif=exif)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0, exif=exif)  # colour at full resolution
    return base64.b64encode(file.getvalue()).decode("ascii")


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 → (height, width, 3) uint8, by Lanczos' filter; the image itself if it has that size."""
    import numpy as np
    from PIL import Image

    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
