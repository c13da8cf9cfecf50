"""Encoders of texts and classes to conditions, and autoencoders between images and latents."""

from fewstep.config import MAX_TOKENS, Offload, Shape
from fewstep.encoders.autoencoders import GREY, PIXEL, Autoencoder, encode_each, load_autoencoder
from fewstep.encoders.base import LABELS, MINILM, ConditionEncoder, as_stored
from fewstep.encoders.registry import encoder_widths, load_encoder

__all__ = [
    "GREY",
    "LABELS",
    "MAX_TOKENS",
    "MINILM",
    "PIXEL",
    "Autoencoder",
    "ConditionEncoder",
    "Offload",
    "Shape",
    "as_stored",
    "encode_each",
    "encoder_widths",
    "load_autoencoder",
    "load_encoder",
]
