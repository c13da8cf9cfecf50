"""The captioned emoji set: three open emoji fonts, one image per (concept, style) pair.

Images come from pinned npm packages (fetched with the ordinary `npm pack`, checked against the hashes
below) and captions from `emojibase-data`; the two are joined on the code points without the variation
selector `fe0f`. An image is composited on white and resampled to a square of `size` pixels. Within a
style, near-duplicates are dropped *before* the split, so that no held-out image has a twin among the
training images. The held-out split consists of (concept, style) pairs: the concept may be known from
another style, the pair is not.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.errors import UserError

GROUPS = (
    "smileys", "people", "components", "animals", "food",
    "places", "activities", "objects", "symbols", "flags",
)  # fmt: skip
"""Names of emojibase's group numbers 0–9."""

HELD_OUT_PAIRS = 512
"""Size of the held-out split, (concept, style) pairs."""

DUPLICATE_RMS = 0.02
"""Two images of one style closer than this (root mean square of [0, 1] pixels) count as duplicates."""


@dataclass(frozen=True)
class EmojiPackage:
    """One npm package that carries images or captions, pinned by version and archive hash."""

    name: str
    version: str
    sha256: str
    licence: str
    attribution: str
    style: str = ""
    folder: str = ""

    @property
    def archive(self) -> str:
        """File name that `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


CAPTIONS = EmojiPackage(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT", "emojibase-data, Miles Johnson",
)  # fmt: skip
STYLES = (
    EmojiPackage(
        "emoji-datasource-google", "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "Apache-2.0", "Noto Emoji, Google", "noto", "package/img/google/64/",
    ),
    EmojiPackage(
        "emoji-datasource-twitter", "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "CC-BY-4.0", "Twemoji, Copyright Twitter, Inc and other contributors", "twemoji",
        "package/img/twitter/64/",
    ),
    EmojiPackage(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT", "Fluent Emoji, Microsoft, packaged by LobeHub", "fluent", "package/assets/",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class EmojiImage:
    """One prepared image: `pixels` is (size, size, 3) uint8, `key` is `style/concept`."""

    key: str
    concept: str
    style: str
    group: str
    caption: str
    split: str
    pixels: np.ndarray


def fetch(package: EmojiPackage, cache: Path) -> Path:
    """Return the package's archive in `cache`, fetched with `npm pack` unless it is there already.

    Raises:
        UserError: npm is missing or fails, or the archive's SHA-256 is not the pinned one.
    """
    archive = cache / package.archive
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(
                "npm is needed to rebuild the emoji set from its packages: install Node.js, or use the "
                "prepared 16x16 set that ships with fewstep (--source emoji --size 16)."
            ) from None
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"`{' '.join(command)}` failed ({error.stderr.strip()[-300:]}): npm needs its registry once; "
                "check the network, or use the prepared 16x16 set (--source emoji --size 16)."
            ) from None
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{archive} has SHA-256 {digest}, expected {package.sha256}: delete it and run again; "
            "if it comes back the same, the package was changed after it was pinned."
        )
    return archive


def join_key(hexcode: str) -> str:
    """Code points of an emoji as the join key: lower case, without variation selectors."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def build(size: int, cache: Path) -> list[EmojiImage]:
    """Build the whole deduplicated, split set at `size` pixels, in a fixed order (style, then concept)."""
    concepts = _concepts(fetch(CAPTIONS, cache))
    kept: list[tuple[EmojiPackage, str, np.ndarray]] = []
    for package in STYLES:
        images = {
            key: pixels for key, pixels in _images(fetch(package, cache), package, size) if key in concepts
        }
        keys = sorted(images)
        for index in _without_duplicates(np.stack([images[key] for key in keys])):
            kept.append((package, keys[index], images[keys[index]]))
    held_out = set(sorted((f"{p.style}/{key}" for p, key, _ in kept), key=_stable_hash)[:HELD_OUT_PAIRS])
    return [
        EmojiImage(
            key=(name := f"{package.style}/{key}"),
            concept=key,
            style=package.style,
            group=concepts[key][1],
            caption=f"{concepts[key][0]}, {package.style} style",
            split="held_out" if name in held_out else "train",
            pixels=pixels,
        )
        for package, key, pixels in kept
    ]


def attributions() -> str:
    """Licences and attributions of the packages, as text to ship beside the data."""
    lines = [f"{p.name} {p.version}: {p.attribution}. Licence: {p.licence}." for p in (*STYLES, CAPTIONS)]
    return "\n".join(lines) + "\nChanged: composited on white and resampled.\n"


def _stable_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _concepts(archive: Path) -> dict[str, tuple[str, str]]:
    """Join key → (label, group) for every emoji without a skin tone."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/en/data.json")
        assert member is not None, "the hash was checked: the archive holds this file"
        entries = json.load(member)
    return {
        join_key(entry["hexcode"]): (entry["label"].lower(), GROUPS[entry["group"]])
        for entry in entries
        if entry.get("group") is not None
    }


def _images(archive: Path, package: EmojiPackage, size: int) -> Iterator[tuple[str, np.ndarray]]:
    from PIL import Image

    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.name.startswith(package.folder) and member.name.endswith((".png", ".webp"))):
                continue
            handle = tar.extractfile(member)
            if handle is None:
                continue
            image = Image.open(io.BytesIO(handle.read())).convert("RGBA")
            yield join_key(Path(member.name).stem), composite_on_white(image, size)


def composite_on_white(image, size: int) -> np.ndarray:  # noqa: ANN001 — PIL is imported lazily
    """Composite an RGBA PIL image on white and resample it to (size, size, 3) uint8."""
    from PIL import Image

    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)


def _without_duplicates(images: np.ndarray) -> list[int]:
    """Indices of the images (N, H, W, 3) that have no near-duplicate before them."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    norms = (flat**2).sum(1)
    squared = (norms[:, None] + norms[None] - 2 * flat @ flat.T) / flat.shape[1]
    close = squared < DUPLICATE_RMS**2
    return [i for i in range(len(images)) if not close[i, :i].any()]
