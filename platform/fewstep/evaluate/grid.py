"""Pictures of many images: the comparison that a job ends with, and the samples of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 96
"""Least side of an enlarged tile, in pixels."""
GAP = 8
MARGIN = 28
LABEL_WIDTH = 168
CAPTION_LINES = 4
TITLE_SIZE, DETAIL_SIZE, CAPTION_SIZE = 18, 13, 13
PAPER, TILE_EDGE = "#ffffff", "#e5e7eb"
INK, FAINT_INK, ACCENT, ACCENT_WASH = "#1f2933", "#6b7785", "#0b6bcb", "#eaf3fc"


@dataclass(frozen=True)
class GridRow:
    """One row of a comparison, of one method's images."""

    title: str
    detail: str
    """Smaller text below the title, of one or several lines."""
    images: np.ndarray
    """(N, H, W, 3) uint8."""
    highlighted: bool = False
    """Whether a tinted box sets it off from the other rows."""


def comparison_grid(rows: Sequence[GridRow], captions: Sequence[str], tile: int = TILE) -> Image.Image:
    """A picture of rows, labelled on the left, with one column per caption and its text above.

    Args:
        rows: at least one; all with images of one size.
        captions: of the columns.
        tile: pixels are enlarged, without smoothing, by the least whole factor that makes an image at least this wide.
    """
    factor = _factor(rows[0].images, tile)
    height, width = (side * factor for side in rows[0].images.shape[1:3])
    text = [_wrap(caption, width, CAPTION_LINES) for caption in captions]
    line = CAPTION_SIZE + 3
    head = line * max(map(len, text)) + GAP
    canvas = Image.new(
        "RGB",
        (
            2 * MARGIN + LABEL_WIDTH + len(captions) * (width + GAP) - GAP,
            2 * MARGIN + head + len(rows) * (height + GAP) - GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    # Captions of fewer lines end where the longest one does, just above the images.
    for column, lines in enumerate(text):
        x, y = MARGIN + LABEL_WIDTH + column * (width + GAP), MARGIN + head - GAP - line * len(lines)
        for index, words in enumerate(lines):
            draw.text((x, y + index * line), words, INK, _font(CAPTION_SIZE))
    for index, row in enumerate(rows):
        y = MARGIN + head + index * (height + GAP)
        if row.highlighted:
            box = (GAP, y - GAP // 2, canvas.width - GAP, y + height + GAP // 2 - 1)
            draw.rounded_rectangle(box, radius=GAP, fill=ACCENT_WASH)
        _label(draw, row, y + height // 2)
        for column, pixels in enumerate(row.images[: len(captions)]):
            x = MARGIN + LABEL_WIDTH + column * (width + GAP)
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=TILE_EDGE)
            canvas.paste(_enlarged(pixels, factor), (x, y))
    return canvas


def sample_grid(images: np.ndarray, columns: int, tile: int = TILE // 2) -> Image.Image:
    """A picture of images in reading order.

    Args:
        images: (N, H, W, 3) uint8.
        columns: how many stand in a row.
        tile: as for `comparison_grid`.
    """
    factor = _factor(images, tile)
    height, width = (side * factor for side in images.shape[1:3])
    gap = GAP // 2
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for index, pixels in enumerate(images):
        row, column = divmod(index, columns)
        canvas.paste(_enlarged(pixels, factor), (gap + column * (width + gap), gap + row * (height + gap)))
    return canvas


def _label(draw: ImageDraw.ImageDraw, row: GridRow, middle: int) -> None:
    """Title and detail of a row, centred as one block on the height `middle`."""
    details = row.detail.splitlines()
    line = DETAIL_SIZE + 4
    y = middle - (TITLE_SIZE + 6 + line * len(details)) // 2
    draw.text((MARGIN, y), row.title, ACCENT if row.highlighted else INK, _font(TITLE_SIZE))
    for index, words in enumerate(details):
        draw.text((MARGIN, y + TITLE_SIZE + 6 + index * line), words, FAINT_INK, _font(DETAIL_SIZE))


def _factor(images: np.ndarray, tile: int) -> int:
    return max(1, -(-tile // images.shape[2]))  # rounded up


def _enlarged(pixels: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(text: str, width: int, most_lines: int) -> list[str]:
    """Lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    font = _font(CAPTION_SIZE)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], f"{lines[most_lines - 1]} …"]
    return [_shortened(line, width, font) for line in lines] or [""]


def _shortened(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    stem = line.removesuffix(" …")
    while stem and font.getlength(stem + "…") > width:
        stem = stem[:-1]
    return stem + "…"
