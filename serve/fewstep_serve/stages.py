"""Encoder and decoder as deployments of their own, for models whose stages should scale apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from fewstep.config import PartsConfig
from fewstep.engine.caller import Caller
from fewstep_serve.config import MAX_ONGOING_REQUESTS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fewstep.encoders import Autoencoder, ConditionEncoder
    from fewstep.engine.models import LoadedModel
    from fewstep.models.conditioning import Conditioning


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS, health_check_period_s=2, ray_actor_options={"num_cpus": 0.5}
)
class Encoder:
    """Text encoders by name and longest prompt, loaded when first asked for. Waiting prompts are encoded in batches.

    Args:
        threads: torch threads of a replica on a CPU.
        parts: a `PartsConfig` as plain data.
    """

    def __init__(self, threads: int, parts: dict[str, Any]) -> None:
        import torch

        from fewstep.engine.in_flight import InFlight
        from fewstep.engine.stages import PromptEncoder

        torch.set_num_threads(threads)
        self._parts = PartsConfig.model_validate(parts)
        self._loaded: dict[tuple[str, int], ConditionEncoder] = {}
        self._loading, self._prompts = InFlight(self._load), PromptEncoder()

    async def encode(
        self, name: str, max_tokens: int, prompts: list[str], caller: Caller
    ) -> list[Conditioning] | str:
        """Each prompt encoded (B = 1), or the sentence that refuses one of them.

        Args:
            name: of the encoder.
            max_tokens: longest prompt.
            prompts: texts, or classes where the encoder is one of labels.
            caller: for whom.
        """
        from fewstep.errors import UserError

        try:
            # Requests that arrive while an encoder loads wait for that one load.
            if (key := (name, max_tokens)) not in self._loaded:
                await self._loading(key)
            return await self._prompts.encode(self._loaded[key], prompts, caller)
        except UserError as error:
            return str(error)  # not raised: Ray would wrap it in an exception of its own

    async def _load(self, key: tuple[str, int]) -> None:
        from fewstep.encoders import load_encoder

        name, max_tokens = key
        self._loaded[key] = await asyncio.to_thread(
            load_encoder,
            name,
            max_tokens=max_tokens,
            device=_device(),
            precision=self._parts.text_encoder_precision,
            offload=self._parts.text_encoder_offload,
        )


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS, health_check_period_s=2, ray_actor_options={"num_cpus": 0.5}
)
class Decoder:
    """Autoencoders by name, loaded when first asked for.

    Args:
        threads: torch threads of a replica on a CPU.
        parts: a `PartsConfig` as plain data.
    """

    def __init__(self, threads: int, parts: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(threads)
        self._parts = PartsConfig.model_validate(parts)
        self._loaded: dict[str, Autoencoder] = {}
        self._one_at_a_time = asyncio.Lock()

    async def decode(self, name: str, latents: np.ndarray) -> np.ndarray:
        """(B, C, H, W) float32 latents → (B, H', W', 3) uint8, by the autoencoder called `name`."""
        # The thread keeps health checks answered; the lock keeps several decodings from sharing its cores and memory.
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._decode, name, latents)

    async def encode(self, name: str, images: np.ndarray) -> np.ndarray:
        """(N, H', W', 3) uint8 → (N, C, H, W) float32 latents, by the autoencoder called `name`."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._encode, name, images)

    def _decode(self, name: str, latents: np.ndarray) -> np.ndarray:
        import torch

        return self._autoencoder(name).decode(torch.tensor(latents)).numpy()

    def _encode(self, name: str, images: np.ndarray) -> np.ndarray:
        from fewstep.encoders import encode_each

        return encode_each(self._autoencoder(name), images).numpy()

    def _autoencoder(self, name: str) -> Autoencoder:
        from fewstep.encoders import load_autoencoder

        if name not in self._loaded:
            self._loaded[name] = load_autoencoder(
                name,
                device=_device(),
                precision=self._parts.autoencoder_precision,
                tiling=self._parts.autoencoder_tiling,
            )
        return self._loaded[name]


class RemoteStages:
    """The engine's stages in those deployments.

    Args:
        encoder: handle of `Encoder`.
        decoder: handle of `Decoder`.
    """

    def __init__(self, encoder: DeploymentHandle, decoder: DeploymentHandle) -> None:
        self._encoder, self._decoder = encoder, decoder

    async def encode(self, model: LoadedModel, captions: Sequence[str], caller: Caller) -> list[Conditioning]:
        """Each caption encoded, B = 1, on the CPU.

        Raises:
            UserError: a caption that the model's encoder can't take.
        """
        from fewstep.errors import UserError

        # A request for several images has one prompt: it is sent once.
        card, different = model.pipeline.card, list(dict.fromkeys(captions))
        answer = await self._encoder.encode.remote(card.text_encoder, card.max_tokens, different, caller)
        if isinstance(answer, str):
            raise UserError(answer)
        encoded = dict(zip(different, answer, strict=True))
        return [encoded[caption] for caption in captions]

    async def encode_images(self, model: LoadedModel, images: np.ndarray) -> Tensor:
        """Reference images (N, H', W', 3) uint8 → latents (N, C, H, W) on the CPU, each encoded by itself."""
        import torch

        latents = await self._decoder.encode.remote(model.pipeline.card.autoencoder, images)
        return torch.tensor(latents)

    async def decode(self, model: LoadedModel, latents: Tensor) -> np.ndarray:
        """(B, C, H, W) latents → (B, H', W', 3) uint8."""
        return await self._decoder.decode.remote(model.pipeline.card.autoencoder, latents.numpy())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
