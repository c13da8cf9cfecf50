"""Pixels to files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from serve.schema import OutputFormat

if TYPE_CHECKING:
    import numpy as np


def encode_image(pixels: np.ndarray, output_format: OutputFormat = "png", quality: int = 100) -> bytes:
    """(H, W, 3) uint8 → a file. png always, and webp at quality 100, keep every pixel exactly."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if output_format == "png":
        image.save(file, "PNG")
    elif output_format == "webp":
        image.save(file, "WEBP", lossless=quality == 100, quality=quality)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()
