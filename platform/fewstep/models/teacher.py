"""Teachers: where they come from, and how a student's reference to its teacher is kept honest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.assets import asset
from fewstep.errors import UserError
from fewstep.models.family import Family
from fewstep.models.registry import get_family

BUNDLED = {
    "emoji": "emoji_teacher", "emoji-flux": "emoji_flux_teacher", "emoji-student": "emoji_student",
    "fashion": "fashion_teacher", "fashion-student": "fashion_student",
}  # fmt: skip
"""Names of models that ship with fewstep → their folders among the assets."""

CARD = "teacher.json"
"""Beside a teacher's weights: the settings that it was trained with."""


@dataclass(frozen=True)
class TeacherCard:
    """What a user of a teacher must know beside its weights; hub models have none, recipes say it instead."""

    family: str
    text_encoder: str
    autoencoder: str
    latent_shape: tuple[int, int, int]
    """(C, H, W) it was trained on."""
    shift: float
    """Time shift of its training and of its own sampler."""
    guidance: float
    """Guidance scale that it is best sampled with."""


@dataclass(frozen=True)
class TeacherReference:
    """Names a teacher exactly: an adapter fits the base that it was trained on, and no other."""

    path: str
    family: str
    sha256: str | None
    """Of the weights' files; None for hub ids, whose revision names them."""
    code_sha256: str | None = None
    """Of the user's file that registers the family (`family_code.py`); None for families of fewstep."""


def locate(path: str, field: str = "teacher.path") -> str:
    """Turn a bundled name into its folder; other paths and hub ids come back as they are.

    Args:
        path: a bundled name, a folder or a hub id.
        field: what a refusal calls it.

    Raises:
        UserError: nothing is there.
    """
    if path in BUNDLED:
        folder = asset(BUNDLED[path])
        if not folder.exists():
            raise UserError(
                f"the bundled model {path!r} is missing from this installation: reinstall fewstep."
            )
        return str(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise UserError(
            f"{field}: there is no folder {path!r}; give a diffusers folder, a hub id (owner/name) or one of "
            f"the bundled names: {', '.join(BUNDLED)}."
        )
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


def load_teacher(
    path: str, family: str, embedded_guidance: float | None = None
) -> tuple[nn.Module, Family, TeacherReference]:
    """Load a frozen teacher in float32 and say exactly which one it is.

    Args:
        path: a bundled name, a diffusers folder, or a hub id; of the network itself, or of its pipeline.
        family: name of its family.
        embedded_guidance: the guidance scale that a guidance-distilled network is told; None for others.

    Raises:
        UserError: the folder or hub id holds no such model, or one that wants a guidance scale and has none, or
            the other way round.
    """
    with _refusing(path, family):
        transformer = get_family(family).load(locate(path))
    known = told_guidance(get_family(family), transformer, embedded_guidance, path)
    return transformer, known, reference_to(path, family)


def open_teacher(
    path: str, family: str, embedded_guidance: float | None = None
) -> tuple[nn.Module, Family, Path | None]:
    """Like `load_teacher`, but with the parameters on the meta device, where the family can.

    Returns:
        the network, its family, and the folder that `read_weights` fills it from; None if it is filled already.
    """
    with _refusing(path, family):
        transformer, weights = get_family(family).skeleton(locate(path))
    return transformer, told_guidance(get_family(family), transformer, embedded_guidance, path), weights


def reference_to(path: str, family: str) -> TeacherReference:
    """The exact name of a teacher's weights as they are now."""
    return TeacherReference(path, family, _weights_hash(locate(path)))


@contextmanager
def _refusing(path: str, family: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"teacher.path: {path!r} holds no {family} model that can be loaded ({first})."
        ) from error


def read_card(path: str) -> TeacherCard | None:
    """The card beside a local or bundled teacher's weights, if it has one."""
    file = Path(locate(path)) / CARD
    if not file.exists():
        return None
    fields = json.loads(file.read_text())
    return TeacherCard(**{**fields, "latent_shape": tuple(fields["latent_shape"])})


def save_teacher(
    transformer: nn.Module, card: TeacherCard, folder: Path, weights: Mapping[str, Tensor]
) -> None:
    """Write a teacher as a diffusers folder with its card.

    Args:
        transformer: whose configuration is written.
        card: its settings.
        folder: made if it does not exist.
        weights: the whole state dict under the network's own names; rounded to float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    transformer.register_to_config(_name_or_path="")  # where it once was loaded from is nobody's business
    transformer.save_config(folder)
    published = get_family(card.family).published(transformer, weights)
    halves = {name: tensor.half().contiguous() for name, tensor in published.items()}
    save_file(halves, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")


def check_reference(reference: TeacherReference, wanted: dict[str, Any]) -> None:
    """Refuse a base other than the one that a student names.

    Raises:
        UserError: the weights differ.
    """
    if wanted["sha256"] and reference.sha256 and wanted["sha256"] != reference.sha256:
        raise UserError(
            f"this student was distilled from the teacher {wanted['path']!r} with weights {wanted['sha256'][:12]}…, "
            f"but the one found has {reference.sha256[:12]}…: give the original teacher."
        )


def told_guidance(family: Family, transformer: nn.Module, scale: float | None, path: str) -> Family:
    """The family that tells a guidance-distilled network the scale to imitate; any other as it is.

    Raises:
        UserError: the network wants a scale and there is none, or the other way round.
    """
    wanted = family.takes_guidance(transformer)
    if wanted and scale is None:
        raise UserError(
            f"teacher.embedded_guidance: {path!r} is guidance-distilled and takes the scale as an input: name one "
            "(for FLUX.1 dev 3.5)."
        )
    if scale is not None and not wanted:
        raise UserError(
            f"teacher.embedded_guidance: {path!r} takes no guidance scale as an input: leave it null, and set "
            "teacher.guidance for classifier-free guidance."
        )
    return replace(family, embedded_guidance=scale) if wanted else family


def check_guidance(family: Family, transformer: nn.Module, scale: float, field: str) -> None:
    """Refuse classifier-free guidance where no condition can be left out: it would cost a pass and change nothing.

    Args:
        family, transformer: of the teacher.
        scale: of the guidance.
        field: what the scale is called where it was given.

    Raises:
        UserError: the network takes no condition.
    """
    if scale != 1 and family.condition_width(transformer) == 0:
        raise UserError(
            f"{field}: a {family.name} teacher without a condition has none to leave out, and can't be guided: set it "
            "to 1."
        )


def _weights_hash(location: str) -> str | None:
    folder = Path(location)
    places = ("*.safetensors", "transformer/*.safetensors", "unet/*.safetensors")
    files = next((found for place in places if (found := sorted(folder.glob(place)))), None)
    if files is None:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
