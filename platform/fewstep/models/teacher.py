"""Finding and loading teachers, their cards, and the check that a student gets the teacher it was distilled from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor

from fewstep.assets import bundled_folder, expanded
from fewstep.errors import UserError
from fewstep.files import save_weights
from fewstep.hub import HUB_ID, is_hub_id
from fewstep.models.family import Family, Transformer
from fewstep.models.pretrained import network_folder, scheduler_config
from fewstep.models.registry import get_family
from fewstep.models.teacher_folder import LoRAFile, folded_hash, teacher_folder
from fewstep.models.weights_hash import weights_hash

BUNDLED_TEACHERS = {
    "emoji": "emoji_teacher",
    "emoji-edit": "emoji_edit_teacher",
    "emoji64": "emoji64_teacher",
    "emoji-flux": "emoji_flux_teacher",
    "fashion": "fashion_teacher",
}
"""Names of the bundled teachers → their folders in the assets."""

CARD = "teacher.json"
"""Name of the file beside a teacher's weights that holds its card."""

CARD_SCHEMA_VERSION = 2


@dataclass(frozen=True)
class TeacherCard:
    """What is needed of a teacher beside its weights. Models from the hub have no card: recipes give these settings."""

    family: str
    """Name of its family."""
    text_encoder: str
    """Name of the encoder of its captions or classes (`load_encoder`)."""
    autoencoder: str
    """Name of the autoencoder of its latents (`load_autoencoder`)."""
    latent_shape: tuple[int, int, int]
    """(C, H, W) of the latents that it was trained on."""
    shift: float
    """Time shift of its training and of its own sampler."""
    guidance_scale: float
    """Classifier-free guidance scale with which it samples best."""
    schema_version: int = CARD_SCHEMA_VERSION
    """Version of the card's fields; in version 1 (before fewstep 0.2) the scale was called `guidance`."""


@dataclass(frozen=True)
class TeacherReference:
    """Identifies a teacher exactly, because an adapter works only with the base that it was trained on."""

    path: str
    """Bundled name, folder or hub id."""
    family: str
    """Name of its family."""
    sha256: str | None
    """Hash of the weights' files; None for hub ids."""
    code_sha256: str | None = None
    """Hash of the user's file that registers the family (`family_code.py`); None for fewstep's own families."""
    loras: tuple[LoRAFile, ...] = ()
    """LoRAs that are folded into the weights; the hash is then that of base and LoRAs together."""


def locate(path: str, field: str = "teacher.path") -> str:
    """The folder or file of a teacher given by its bundled name or path; a hub id is returned as it is.

    Args:
        path: a bundled name, a folder, a file of weights or a hub id.
        field: name of the setting, for error messages.

    Raises:
        UserError: it is none of these.
    """
    if path in BUNDLED_TEACHERS:
        return str(bundled_folder(path, BUNDLED_TEACHERS))
    place = expanded(path)
    if place.is_dir() or (place.is_file() and place.suffix == ".safetensors"):
        return str(place)
    if not is_hub_id(path):
        raise UserError(
            f"{field}: there is no folder {path!r}; give a diffusers folder, a *.safetensors file, a hub id "
            f"({HUB_ID}) or one of the bundled names: {', '.join(BUNDLED_TEACHERS)}."
        )
    return path


def load_teacher(
    path: str, family: str, embedded_guidance_scale: float | None = None
) -> tuple[Transformer, Family, TeacherReference]:
    """Load a teacher in float32.

    Args:
        path: a bundled name, a diffusers folder, or a hub id; of the network itself, or of its pipeline.
        family: name of its family.
        embedded_guidance_scale: input of a guidance-distilled network; None for others.

    Returns:
        The network, its family, and the reference that identifies it.

    Raises:
        UserError: there is no such model, or a guidance scale is missing, or given to a network that takes none.
    """
    # `get_family` raises a UserError of its own; what the loaders of diffusers and safetensors raise is translated.
    with _refusing(path, family):
        transformer = get_family(family).load(teacher_folder(locate(path), get_family(family)))
    known = told_guidance(get_family(family), transformer, embedded_guidance_scale, path)
    return transformer, known, reference_to(path, family)


def open_teacher(
    path: str,
    family: str,
    embedded_guidance_scale: float | None = None,
    loras: Sequence[LoRAFile] = (),
) -> tuple[Transformer, Family, Path | None]:
    """Like `load_teacher`, but with the parameters on the meta device, if the family can do that.

    Args:
        path, family, embedded_guidance_scale: as for `load_teacher`.
        loras: what is folded into the weights.

    Returns:
        The network, its family, and the folder that `read_weights` can fill it from; None if it has its values already.
    """
    with _refusing(path, family):
        folder = teacher_folder(locate(path), get_family(family), loras)
        transformer, weights = get_family(family).skeleton(folder)
    return transformer, told_guidance(get_family(family), transformer, embedded_guidance_scale, path), weights


@contextmanager
def checked_meanwhile(path: str, wanted: TeacherReference) -> Iterator[None]:
    """Compare a teacher's weights with those that are wanted while they are loaded in a `with` block.

    Hashing takes longer than reading: done at the same time, it costs little where there is another core.

    Raises:
        UserError: at the end of the block, as `check_reference`.
    """
    ended = Event()
    with ThreadPoolExecutor(1, "fewstep-hash") as thread:
        hashing = thread.submit(reference_to, path, wanted.family, wanted.loras, ended=ended.is_set)
        try:
            yield
        except BaseException:
            ended.set()  # what could not be loaded need not be hashed to its end
            raise
        found = hashing.result()
    if wanted.sha256 is not None and found.sha256 != wanted.sha256:
        # The hash may have been read from a cache that is wrong.
        found = reference_to(path, wanted.family, wanted.loras, remembered=False)
    check_reference(found, wanted)


def reference_to(
    path: str,
    family: str,
    loras: Sequence[LoRAFile] = (),
    *,
    remembered: bool = True,
    ended: Callable[[], bool] = lambda: False,
) -> TeacherReference:
    """The reference to a teacher, with a hash of its weights as they are now.

    Args:
        path: a bundled name, a diffusers folder, a single file or a hub id.
        family: name of its family.
        loras: what is folded into its weights.
        remembered, ended: as for `weights_hash`.
    """
    digest = folded_hash(weights_hash(locate(path), remembered=remembered, ended=ended), loras)
    return TeacherReference(path, family, digest, loras=tuple(loras))


@contextmanager
def _refusing(path: str, family: str) -> Iterator[None]:
    """Turn the errors of loading a teacher into a UserError."""
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"teacher.path: {path!r} holds no {family} model that can be loaded ({first})."
        ) from error


def read_card(path: str) -> TeacherCard | None:
    """The card beside a local or bundled teacher's weights; None if it has none."""
    file = Path(locate(path)) / CARD
    if not file.exists():
        return None
    fields = json.loads(file.read_text())
    if fields.pop("schema_version", 1) == 1:
        fields["guidance_scale"] = fields.pop("guidance")  # cards from before fewstep 0.2
    return TeacherCard(**{**fields, "latent_shape": tuple(fields["latent_shape"])})


def own_scheduler(path: str) -> dict[str, Any] | None:
    """Configuration of the scheduler beside a teacher's weights; None if there is none."""
    location = locate(path)
    try:
        return scheduler_config(network_folder(location))
    except OSError:  # not in diffusers' format
        return None


def save_teacher(
    transformer: Transformer, card: TeacherCard, folder: Path, weights: Mapping[str, Tensor]
) -> None:
    """Write a teacher as a diffusers folder with its card.

    Args:
        transformer: the network, whose configuration is written.
        card: what is needed of it beside the weights.
        folder: made if it does not exist.
        weights: all parameters under the network's own names; written in float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    transformer.register_to_config(_name_or_path="")  # don't publish the path that it was loaded from
    transformer.save_config(folder)
    published = get_family(card.family).published(transformer, weights)
    halves = {name: tensor.half().contiguous() for name, tensor in published.items()}
    # Such as SD3's table of positions: diffusers reads it from the file, too.
    state = transformer.state_dict()
    halves |= {
        name: tensor.cpu().contiguous()
        for name, tensor in transformer.named_buffers()
        if name in state and name not in halves
    }
    save_weights(halves, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")


def check_reference(found: TeacherReference, wanted: TeacherReference) -> None:
    """Refuse a teacher whose weights are not those that the student was distilled from.

    Args:
        found: the teacher that was loaded.
        wanted: the one that the student's card names.

    Raises:
        UserError: the weights differ.
    """
    # Hub ids have no hash: there is nothing to compare. What lies here is none, whatever its form.
    if wanted.sha256 and found.sha256 is None and Path(locate(found.path)).exists():
        raise UserError(
            f"{found.path} has no *.safetensors, by which it could be told whether this student was distilled from it: "
            "give the original teacher."
        )
    if wanted.sha256 and found.sha256 and wanted.sha256 != found.sha256:
        raise UserError(
            f"this student was distilled from the teacher {wanted.path!r} with weights {wanted.sha256[:12]}…, "
            f"but the one found has {found.sha256[:12]}…: give the original teacher."
        )


def told_guidance(family: Family, transformer: Transformer, scale: float | None, path: str) -> Family:
    """The family, with `scale` as its embedded guidance scale if the network takes one.

    Args:
        family, transformer: of the teacher.
        scale: input of a guidance-distilled network; None for others.
        path: what error messages call the network.

    Raises:
        UserError: the scale is missing, or given to a network that takes none.
    """
    wanted = family.takes_guidance(transformer)
    if wanted and scale is None:
        raise UserError(
            f"teacher.embedded_guidance_scale: {path!r} is guidance-distilled and takes the scale as an input: name "
            "one (for FLUX.1 dev 3.5)."
        )
    if scale is not None and not wanted:
        raise UserError(
            f"teacher.embedded_guidance_scale: {path!r} takes no guidance scale as an input: leave it null, and set "
            "teacher.guidance_scale for classifier-free guidance."
        )
    # Families whose networks take a scale are dataclasses with this field.
    return replace(cast(Any, family), embedded_guidance_scale=scale) if wanted else family


def check_guidance(family: Family, transformer: Transformer, scale: float, field: str) -> None:
    """Refuse classifier-free guidance of a network without a condition: it would take a pass and change nothing.

    Args:
        family, transformer: of the teacher.
        scale: of the guidance.
        field: name of the setting, for the error message.

    Raises:
        UserError: the network takes no condition.
    """
    if scale != 1 and not family.is_conditional(transformer):
        raise UserError(
            f"{field}: a {family.name} teacher that takes no condition has none to leave out for guidance: set it to 1."
        )
