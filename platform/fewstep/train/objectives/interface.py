"""The interface of objectives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.data.stream import Batch
from fewstep.distill import BatchGenerators, LossResult
from fewstep.models.conditioning import Conditioning
from fewstep.models.family import Family, Transformer


class Objective(Protocol):
    """Interface of objectives: a model to shard and train, its losses, and how it samples."""

    model: Any
    """The nn.Module that FSDP shards and gathers; all calls go through its `forward`. It has `transformers()`."""
    family: Family
    """Family of the network that is trained."""
    transformer: Transformer
    """The network that is trained."""

    @property
    def models(self) -> list[Any]:
        """All modules that are sharded: `model`, and what is trained beside it. They have `transformers()`."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer trains, by name."""
        ...

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """The losses of one micro-batch; call backward on each before taking the next.

        Args:
            batch: the micro-batch, on the model's device.
            generator: source of all random numbers.
            step: optimizer step, from 1, for what changes over the training.
        """
        ...

    def sample(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents (B, C, H, W) of B conditions for sample grids, from noise of that shape."""
        ...

    def read_weights(self, device: torch.device) -> None:
        """Fill a model that was built without values, after `shard`; every rank has to call it at the same time."""
        ...

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the trained model to a folder, with `weights` (name → whole tensor) for its parameters."""
        ...


def images_of(batch: Batch) -> Tensor:
    """The batch's latents. Validation has refused datasets without images for objectives that need them."""
    assert batch.latent is not None
    return batch.latent
