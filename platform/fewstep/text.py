"""Bytes of text files as text: encodings, lines, and what is no text."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import UserError

# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNDECODABLE = "\udcff"
"""Stands for bytes that can't be decoded. Half a surrogate pair, so that it is in no text that was decoded well."""

_MARKING = "fewstep.marking"
"""Name of the error handler of codecs that puts `_UNDECODABLE` in."""


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs: continue behind the bytes that can't be decoded."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _UNDECODABLE, error.end


codecs.register_error(_MARKING, _mark)


def decode(content: bytes) -> str:
    """Decode a text file by its byte-order mark, without one as UTF-8.

    Never fails and never guesses: `trouble` finds the parts of the result that hold bytes which can't be decoded.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, _MARKING)
    return decode_utf8(content)


def read_settings(file: Path, option: str) -> str:
    """Read a file of settings, decoded by its byte-order mark and without one as UTF-8.

    PowerShell's `>` writes UTF-16.

    Args:
        file: which one.
        option: that named it, for the message.

    Raises:
        UserError: it can't be read, or is not text.
    """
    try:
        text = decode(file.read_bytes())
    except OSError as error:
        raise UserError(f"{option}: {file} can't be read: {error.strerror}.") from None
    if wrong := trouble(text):
        raise UserError(f"{option}: {file} {wrong}.")
    return text


def decode_utf8(content: bytes) -> str:
    """Decode UTF-8 in the same way, where a byte-order mark has no place."""
    return content.decode("utf-8", _MARKING)


def lines_of(text: str) -> list[str]:
    r"""The lines of a text, which end with \n, \r\n or \r; without their ends.

    `str.splitlines` would also split at characters that may stand inside a JSON string or a caption, such as U+2028.
    """
    return _unified(text).split("\n")


def each_line(text: str) -> Iterator[str]:
    """`lines_of`, one after the other: a list of them takes several times as much memory as the text."""
    text, start = _unified(text), 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _unified(text: str) -> str:
    r"""A text whose lines end with \n alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def trouble(text: str) -> str | None:
    """What makes a text unusable as a caption or a name; None if nothing does."""
    if "\0" in text:
        return "holds a NUL byte, which is no text (UTF-16 needs a byte-order mark to be recognised)"
    if text.isascii():
        return None
    if _UNDECODABLE in text:
        return "holds bytes that can't be decoded: save the file as UTF-8"
    return half_surrogate(text)


def half_surrogate(text: str) -> str | None:
    """What is wrong with a text that can't be written in UTF-8, which tokenizers need; None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, an emoji that was cut in two"
    return None
