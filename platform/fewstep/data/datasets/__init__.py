"""The datasets that fewstep knows how to make: emoji with captions, edits of emoji, and Fashion-MNIST with classes."""

# The folders are told here, because recipes and their help pages need them without what reads data (pyarrow).
EMOJI_DATA = "data/emoji16"
"""Folder in which the bundled emoji set of 16 pixels is prepared, with pixels as latents."""

EMOJI64_DATA = "data/emoji64"
"""Folder in which the bundled emoji set of 64 pixels is prepared, as latents of the bundled autoencoder."""

EMOJI_EDITS_DATA = "data/emoji16-edits"
"""Folder in which the bundled set of edits of emoji is prepared, with pixels as latents."""

FASHION_DATA = "data/fashion28"
"""Folder in which Fashion-MNIST is prepared."""

SHIPPED_DATA = (EMOJI_DATA, EMOJI64_DATA, EMOJI_EDITS_DATA, FASHION_DATA)


def streamed(path: str) -> str:
    """Folder of one of these datasets' raw rows, which are encoded in the stream."""
    return f"{path}-stream"
