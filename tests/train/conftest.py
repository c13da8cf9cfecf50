"""A guidance-distilled teacher small enough to train on in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.models.registry import get_family
from fewstep.models.teacher import TeacherCard, save_teacher
from tiny import SHAPE


@pytest.fixture(scope="session")
def tiny_flux_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guidance-distilled FLUX network in shape, with random weights; texts are summarised by their tokens."""
    torch.manual_seed(0)
    transformer = get_family("flux").build(
        {"in_channels": 12, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 384, "pooled_projection_dim": 384,
         "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-flux")
    card = TeacherCard("flux", "minilm", "pixel", SHAPE, shift=2.0, guidance_scale=1.0)
    save_teacher(transformer, card, folder, transformer.state_dict())
    return folder
