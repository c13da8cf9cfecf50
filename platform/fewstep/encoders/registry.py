"""Loading encoders of conditions by name."""

from __future__ import annotations

import torch

from fewstep.config import MAX_TOKENS, Offload, Precision
from fewstep.encoders.base import LABELS, MINILM, ConditionEncoder, of_pipeline
from fewstep.encoders.labels import LabelEncoder
from fewstep.encoders.memory import should_offload
from fewstep.encoders.pipelines import load_pipeline_encoder, pipeline_widths
from fewstep.encoders.text import TextEncoder, text_width
from fewstep.models.devices import free_bytes
from fewstep.models.precision import check_precision


def load_encoder(
    name: str = MINILM,
    *,
    max_tokens: int = MAX_TOKENS,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    offload: Offload = False,
) -> ConditionEncoder:
    """Load an encoder of texts or classes.

    Args:
        name: "minilm", "labels:…", "flux:…" and the like for a pipeline's own (`PIPELINES`), or the folder or hub id of
            a transformers model.
        max_tokens: longest caption in tokens, of encoders that do not pad to a length of their own.
        device: where it runs.
        precision: how its weights are held. None for the usual one: float32, and bfloat16 for pipelines' large language
            models on a GPU. Encoders of classes have no weights, and ignore it.
        offload: whether its weights wait on the host, and visit the device for each batch; "auto" where less memory is
            free beside it than it takes. On a CPU they stay where they are. Load first what shares the device with it.

    Raises:
        UserError: nothing loads under that name, it does not fit the device, or there is no such precision.
    """
    if name.startswith(LABELS):
        return LabelEncoder(name)
    if precision is not None:
        check_precision(precision)
    encoder = (
        load_pipeline_encoder(name, max_tokens, device, precision)
        if of_pipeline(name)
        else TextEncoder.load(name, max_tokens=max_tokens, device=device, precision=precision)
    )
    if should_offload(offload, encoder.nbytes, free_bytes(device)):
        encoder.offload()
    return encoder


def encoder_widths(name: str) -> tuple[int, int | None]:
    """D of the token states (0 for classes), and P of the vectors of whole captions or None; without loading weights.

    Raises:
        UserError: as `load_encoder`.
    """
    if name.startswith(LABELS):
        LabelEncoder(name)  # raises an error if the name stands for no classes
        return 0, None
    if of_pipeline(name):
        return pipeline_widths(name)
    return text_width(name), None
