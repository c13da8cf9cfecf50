"""Encoder and decoder as deployments of their own, for models whose stages should scale apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fewstep.data.encoder import CaptionEncoder
    from fewstep.engine.models import LoadedModel
    from fewstep.models.conditioning import TextConditioning


@serve.deployment(max_ongoing_requests=64, health_check_period_s=2, ray_actor_options={"num_cpus": 0.5})
class Encoder:
    """Text encoders by name and longest prompt, loaded when first asked for. Prompts that wait are encoded together."""

    def __init__(self, threads: int) -> None:
        import torch

        from fewstep.engine.engine import PromptEncoder
        from fewstep.engine.in_flight import InFlight

        torch.set_num_threads(threads)
        self._loaded: dict[tuple[str, int], CaptionEncoder] = {}
        self._loading, self._prompts = InFlight(self._load), PromptEncoder()

    async def encode(self, name: str, max_tokens: int, prompts: list[str]) -> list[TextConditioning] | str:
        """Each prompt encoded (B = 1), or the sentence that refuses one."""
        from fewstep.errors import UserError

        try:
            if (key := (name, max_tokens)) not in self._loaded:
                await self._loading(key)
            return await self._prompts.encode(self._loaded[key], prompts)
        except UserError as error:
            return str(error)

    async def _load(self, key: tuple[str, int]) -> None:
        from fewstep.data.encoder import load_encoder

        name, max_tokens = key
        self._loaded[key] = await asyncio.to_thread(
            load_encoder, name, max_tokens=max_tokens, device=_device()
        )


@serve.deployment(max_ongoing_requests=64, health_check_period_s=2, ray_actor_options={"num_cpus": 0.5})
class Decoder:
    """Autoencoders by name, loaded when first asked for."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._loaded: dict[str, Any] = {}
        self._one_at_a_time = asyncio.Lock()

    async def decode(self, name: str, latents: np.ndarray) -> np.ndarray:
        """(B, C, H, W) float32 → (B, H', W', 3) uint8."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._decode, name, latents)

    def _decode(self, name: str, latents: np.ndarray) -> np.ndarray:
        import torch

        from fewstep.data.autoencoder import load_autoencoder

        if name not in self._loaded:
            self._loaded[name] = load_autoencoder(name, device=_device())
        return self._loaded[name].decode(torch.tensor(latents)).numpy()


class RemoteStages:
    """The engine's stages in those deployments."""

    def __init__(self, encoder: DeploymentHandle, decoder: DeploymentHandle) -> None:
        self._encoder, self._decoder = encoder, decoder

    async def encode(self, model: LoadedModel, prompts: Sequence[str]) -> list[TextConditioning]:
        from fewstep.errors import UserError

        card, different = model.pipeline.card, list(dict.fromkeys(prompts))
        answer = await self._encoder.encode.remote(card.text_encoder, card.max_tokens, different)
        if isinstance(answer, str):
            raise UserError(answer)
        texts = dict(zip(different, answer, strict=True))
        return [texts[prompt] for prompt in prompts]

    async def decode(self, model: LoadedModel, latents: Tensor) -> np.ndarray:
        return await self._decoder.decode.remote(model.pipeline.card.autoencoder, latents.numpy())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
