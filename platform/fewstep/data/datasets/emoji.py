"""The captioned emoji set: three open emoji fonts (styles), one image per pair of a concept and a style.

Images come from pinned npm packages (fetched with `npm pack`, checked against the hashes below), and captions from
`emojibase-data`; they are joined by an emoji's code points without the variation selector `fe0f`. An image is
composited on white and resampled to a square of `size` pixels. Within a style, near-duplicates are dropped *before* the
split, so that no held-out image has a duplicate among the training images. The held-out split consists of pairs: its
concepts may occur in training in another style.

Edits are made of the same images: a concept in one style as the reference, "in noto style" as the instruction, and the
concept in that style as the image. No held-out image has a part in a training edit.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fewstep.assets import asset
from fewstep.data.prepare import PreparationConfig
from fewstep.data.rows import Source, index_table
from fewstep.errors import UserError
from fewstep.home import cache_folder
from fewstep.images import Size

LICENCES = asset("EMOJI_LICENCES.md")
BUNDLES = {16: asset("emoji16.parquet"), 64: asset("emoji64.parquet")}
"""Pixels per side of the sets that ship with fewstep → their files."""

PREPARATION = PreparationConfig(sizes=(Size(16, 16),))
"""Settings with which the set of 16 pixels is prepared; the defaults for folders of images and for prompts."""

PREPARATION_64 = PreparationConfig(sizes=(Size(64, 64),), autoencoder="emoji64")
"""Settings with which the set of 64 pixels is prepared: as latents (4, 16, 16) of the bundled autoencoder."""

LARGEST_PNG = 32
"""Pixels per side up to which bundled images are PNG, which loses nothing; larger ones are AVIF, a third of that."""

AVIF_QUALITY = 90
"""Of 100: errors of 0.0065 of the pixels' range (root mean square), with colours at full resolution."""

GROUPS = (
    "smileys", "people", "components", "animals", "food",
    "places", "activities", "objects", "symbols", "flags",
)  # fmt: skip
"""Names of emojibase's groups, by their numbers 0 to 9."""

HELD_OUT_PAIRS = 512
"""Number of pairs of a concept and a style in the held-out split."""

DUPLICATE_RMS = 0.02
"""Two images of one style are duplicates if their root mean square difference, in pixels from 0 to 1, is below this."""


@dataclass(frozen=True)
class EmojiPackage:
    """An npm package of images or captions, pinned by version and hash of its archive."""

    name: str
    version: str
    sha256: str
    licence: str
    attribution: str
    style: str = ""
    folder: str = ""

    @property
    def archive(self) -> str:
        """Name that `npm pack` gives the package's archive."""
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
    """An image of the set: `pixels` is (size, size, 3) uint8, `key` is `style/concept`."""

    key: str
    concept: str
    style: str
    group: str
    caption: str
    split: str
    pixels: np.ndarray


def fetch(package: EmojiPackage, cache: Path) -> Path:
    """The package's archive in the folder `cache`; fetched with `npm pack` if it is not there.

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
                "sets of 16 and 64 pixels that ship with fewstep (--source emoji --size 64)."
            ) from None
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"`{' '.join(command)}` failed ({error.stderr.strip()[-300:]}): npm needs its registry once; "
                "check the network, or use a set that ships with fewstep (--source emoji --size 64)."
            ) from None
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{archive} has SHA-256 {digest}, expected {package.sha256}: delete it and run again; "
            "if it comes back the same, the package was changed after it was pinned."
        )
    return archive


def join_key(hexcode: str) -> str:
    """The key by which images and captions are joined: an emoji's code points, lower case, without `fe0f`."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def build(size: int, cache: Path) -> list[EmojiImage]:
    """Build the whole set at `size` pixels, without duplicates and split, ordered by style, then concept."""
    concepts = _concepts(fetch(CAPTIONS, cache))
    kept: list[tuple[EmojiPackage, str, np.ndarray]] = []
    for package in STYLES:
        images = {
            key: pixels for key, pixels in _images(fetch(package, cache), package, size) if key in concepts
        }
        keys = sorted(images)
        for index in _without_duplicates(np.stack([images[key] for key in keys])):
            kept.append((package, keys[index], images[keys[index]]))
    # By a hash, after duplicates are out, so that the split does not depend on the order of the packages.
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


def preparation(sizes: Sequence[Size] | None) -> PreparationConfig:
    """Settings with which the set is prepared where no others are given: pixels as latents but for 64 pixels."""
    return PREPARATION_64 if sizes and tuple(sizes) == PREPARATION_64.sizes else PREPARATION


def emoji_set(sizes: Sequence[Size], cache: Path | None = None) -> Source:
    """The emoji set as a source: at 16 and 64 pixels from the bundled files, at other sizes rebuilt from its packages.

    Args:
        sizes: a single square.
        cache: folder of the npm archives; None is ~/.cache/fewstep/emoji.

    Raises:
        UserError: another choice of sizes; or see `fetch`.
    """
    table = _of_size(sizes, cache)
    columns = {name: table[name] for name in ("key", "caption", "split", "image")} | {"where": table["key"]}
    return Source("emoji", index_table(columns, len(table)), attribution=attributions())


def emoji_edits(sizes: Sequence[Size], cache: Path | None = None) -> Source:
    """Changes of style as a source: every pair of images of one concept in two styles.

    An edit is held out if its target is; references of training edits are training images, too.

    Args:
        sizes, cache: as for `emoji_set`.

    Raises:
        UserError: as `emoji_set`.
    """
    concepts: dict[str, list[dict[str, Any]]] = {}
    for image in _of_size(sizes, cache).to_pylist():
        concepts.setdefault(image["concept"], []).append(image)
    edits = [
        {
            "key": f"{reference['key']}-{target['style']}",
            "caption": f"in {target['style']} style",
            "split": target["split"],
            "image": target["image"],
            "where": target["key"],
            "references": [{"image": reference["image"]}],
        }
        for images in concepts.values()
        for reference, target in itertools.permutations(images, 2)
        if target["split"] == "held_out" or reference["split"] == "train"
    ]
    columns = {name: [edit[name] for edit in edits] for name in edits[0]}
    return Source("emoji-edits", index_table(columns, len(edits)), attribution=attributions())


def read_bundle(size: int) -> pa.Table:
    """A bundled emoji set, of so many pixels per side: key, concept, style, group, caption, split, image (a file)."""
    import pyarrow.parquet as pq

    return pq.read_table(BUNDLES[size])


def write_bundle(size: int, cache: Path, target: Path) -> int:
    """Rebuild a bundled emoji set from its packages; returns the number of images.

    Args:
        size: pixels per side.
        cache: folder of the npm archives.
        target: file to write.
    """
    import pyarrow.parquet as pq

    table = _table(build(size, cache))
    metadata = {b"attribution": attributions().encode()}
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), target, compression="zstd", compression_level=19)
    return len(table)


def default_cache() -> Path:
    """The folder in which npm's archives are kept.

    Raises:
        UserError: the user has no home folder.
    """
    if (folder := cache_folder("emoji")) is None:
        raise UserError("there is no home folder to keep the emoji packages in: set HOME, or give --cache.")
    return folder


def attributions() -> str:
    """Licences and attributions of the packages, as a text to be stored with the data."""
    lines = [f"{p.name} {p.version}: {p.attribution}. Licence: {p.licence}." for p in (*STYLES, CAPTIONS)]
    return "\n".join(lines) + "\nChanged: composited on white and resampled.\n"


def _of_size(sizes: Sequence[Size], cache: Path | None) -> pa.Table:
    """The set as `read_bundle` gives it; arguments and errors are those of `emoji_set`."""
    if len(sizes) != 1 or sizes[0].width != sizes[0].height:
        raise UserError(
            f"the emoji set is square, not {', '.join(map(str, sizes))}: give one --size such as 32."
        )
    size = sizes[0].width
    return read_bundle(size) if size in BUNDLES else _table(build(size, cache or default_cache()))


def _table(images: Sequence[EmojiImage]) -> pa.Table:
    names = ("key", "concept", "style", "group", "caption", "split")
    columns: dict[str, Any] = {name: [getattr(image, name) for image in images] for name in names}
    columns["image"] = pa.array([_file(image.pixels) for image in images], pa.large_binary())
    return pa.table(columns)


def _file(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    if max(image.size) <= LARGEST_PNG:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "AVIF", quality=AVIF_QUALITY, subsampling="4:4:4")
    return buffer.getvalue()


def _stable_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _concepts(archive: Path) -> dict[str, tuple[str, str]]:
    """Join key → (label, group) of every emoji without a skin tone."""
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
    """Join key and pixels, (size, size, 3) uint8, of every image in a package's archive."""
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
    """Composite a PIL image on white and resample it to (size, size, 3) uint8."""
    from PIL import Image

    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    # On white before resampling: the colour of transparent pixels is arbitrary, and would bleed into the edges.
    flat = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)


def _without_duplicates(images: np.ndarray) -> list[int]:
    """Indices of those of the images, (N, H, W, 3) uint8, that have no near-duplicate before them."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    norms = (flat**2).sum(1)
    # All mean squared differences in one matrix product: |a − b|² = |a|² + |b|² − 2·a·b, (N, N)
    squared = (norms[:, None] + norms[None] - 2 * flat @ flat.T) / flat.shape[1]
    close = squared < DUPLICATE_RMS**2
    return [i for i in range(len(images)) if not close[i, :i].any()]
