"""The datasets that fewstep knows how to make: emoji with captions, and Fashion-MNIST with classes."""

# The folders are told here, because recipes and their help pages need them without what reads data (pyarrow).
EMOJI_DATA = "data/emoji16"
"""Folder in which the bundled emoji set is prepared."""

FASHION_DATA = "data/fashion28"
"""Folder in which Fashion-MNIST is prepared."""

SHIPPED_DATA = (EMOJI_DATA, FASHION_DATA)


def streamed(path: str) -> str:
    """Folder of one of these datasets' raw rows, which are encoded in the stream."""
    return f"{path}-stream"
