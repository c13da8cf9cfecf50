"""What the programs beside this one share. It needs Python alone, as they run in environments of their own."""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import urllib.request
import zlib
from typing import Any

ADDRESS = os.environ.get("FEWSTEP_ADDRESS", "")
"""Of the service's API, with its /v1; the service itself, which has none yet, takes the names below from here."""
KEY, WRONG_KEY = "sesame", "a key that nobody has"
STUDENT, EDITOR = "emoji-student", "editor"
"""What the service offers; the first is the default."""
PROMPT = "red heart, noto style"
SEED = 7

_failed: list[str] = []


def check(what: str, holds: bool, seen: object = "") -> None:
    """Print whether something holds, and remember where it does not."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}" + ("" if holds else f": {seen}"), flush=True)
    if not holds:
        _failed.append(what)


def finish() -> None:
    """End the program, with an error if anything did not hold."""
    sys.exit(1 if _failed else 0)


def raised(call: Any, *arguments: Any, **options: Any) -> Any:
    """The error that a call ends with; None where it succeeds."""
    try:
        call(*arguments, **options)
    except Exception as error:  # which one it is, is what the caller checks
        return error
    return None


def png(height: int = 16, width: int = 16, *, transparent: bool = False) -> bytes:
    """A picture with a red ramp; where transparent, its left half is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b""
    for _ in range(height):
        rows += b"\0"
        for x in range(width):
            rows += bytes([255 * x // width, 40, 40]) + (
                bytes([0 if 2 * x < width else 255]) if transparent else b""
            )
    header = struct.pack(">IIBBBBB", width, height, 8, 6 if transparent else 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def size_of(file: bytes) -> tuple[int, int]:
    """(width, height) of a png file."""
    assert file.startswith(b"\x89PNG"), file[:16]
    width, height = struct.unpack(">II", file[16:24])
    return width, height


def drawn(**fields: Any) -> list[bytes]:
    """The files that the service answers a plain request with: what every client must get for the same seed."""
    body = json.dumps({"prompt": PROMPT, "seed": SEED, **fields}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{ADDRESS}/images/generations", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return [base64.b64decode(image["b64_json"]) for image in json.load(answer)["data"]]


def fetched(address: str) -> tuple[bytes, str]:
    """The file at an address, and its media type; asked for without a key."""
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read(), answer.headers["content-type"]
