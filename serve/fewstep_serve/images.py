"""Pixels to image files."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from fewstep_serve.schema import OutputFormat

if TYPE_CHECKING:
    import numpy as np


def encode_image(pixels: np.ndarray, output_format: OutputFormat = "png", quality: int = 100) -> str:
    """(H, W, 3) uint8 → an image file in base64.

    png always, and webp at quality 100, keep every pixel exactly.
    """
    from PIL import Image  # only generators encode: the ingress imports this module without needing Pillow

    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if output_format == "png":
        image.save(file, "PNG")
    elif output_format == "webp":
        image.save(file, "WEBP", lossless=quality == 100, quality=quality)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0)  # colour at full resolution
    return base64.b64encode(file.getvalue()).decode("ascii")
