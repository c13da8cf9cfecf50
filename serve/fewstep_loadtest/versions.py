"""Variants of a student as versions of a registered model, for the soak test and for our tests."""

from __future__ import annotations

from pathlib import Path

from fewstep.files import save_weights
from fewstep.student import PYFUNC_MODEL, resolve_student


def write_variant(folder: Path, factor: float, base: str = "emoji-student") -> Path:
    """Write a copy of a student with the head's weights scaled by `factor`: its images are visibly different."""
    from safetensors import safe_open

    folder.mkdir(parents=True, exist_ok=True)
    for file in resolve_student(base).folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 — not a dict
            metadata = weights.metadata()
        # The means of the head's mixtures: scaling them changes every image, and leaves all of them plausible.
        tensors = {n: t * factor if n.startswith("proj_out_means") else t for n, t in tensors.items()}
        save_weights(tensors, folder / file.name, metadata=metadata)
    return folder


def register_variants(
    name: str, tracking_uri: str, folder: Path, factors: tuple[float, ...], artifacts: str | None = None
) -> list[Path]:
    """Register one version per factor, in order, without an alias.

    Args:
        name: of the registered model.
        tracking_uri: of the registry.
        folder: for the variants.
        factors: see `write_variant`.
        artifacts: where the versions' files lie; in `folder` by default.

    Returns:
        The variants' folders.
    """
    from fewstep.tracking.address import connect
    from fewstep.tracking.registry import register

    client = connect(tracking_uri)
    experiment = client.create_experiment(
        f"{name}-variants", artifact_location=artifacts or str(folder / "artifacts")
    )
    run = client.create_run(experiment).info.run_id
    folders = [write_variant(folder / f"variant-{factor:g}", factor) for factor in factors]
    for variant in folders:
        register(variant, name, tracking_uri, run, alias=None, script=PYFUNC_MODEL)
    return folders
