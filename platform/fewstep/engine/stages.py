"""Where captions are encoded and latents decoded: beside the network, each in a thread of its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.encoders import ConditionEncoder
from fewstep.engine.batcher import DynamicBatcher, Waiting
from fewstep.engine.caller import Caller
from fewstep.engine.models import LoadedModel
from fewstep.models.conditioning import Conditioning

REMEMBERED_BYTES = 64 * 2**20
"""Bound on the remembered encodings; a caption of FLUX.1's encoder takes 8 MiB, of a small one 100 kB."""
CAPTIONS_TOGETHER = 8
"""Most captions encoded in one batch; on a CPU larger batches are no faster per caption."""


class Stages(Protocol):
    """Encodes captions and decodes latents: in this process, or in others."""

    async def encode(self, model: LoadedModel, captions: Sequence[str], caller: Caller) -> list[Conditioning]:
        """Each caption encoded, B = 1, on the CPU; those of several callers in fair shares.

        Raises:
            UserError: a caption is too long, or no class of the model.
        """
        ...

    async def encode_images(self, model: LoadedModel, images: np.ndarray) -> Tensor:
        """Reference images (N, H', W', 3) uint8 → latents (N, C, H, W) on the CPU, each encoded by itself."""
        ...

    async def decode(self, model: LoadedModel, latents: Tensor) -> np.ndarray:
        """(B, C, H, W) latents → (B, H', W', 3) uint8."""
        ...


class PromptEncoder:
    """Encodes captions in a thread of its own, several that wait in one batch.

    The latest encodings are remembered, but only of captions that were encoded alone. In a batch, rounding may change
    the last digits; remembering those would make a later request for the same caption and seed differ from a first
    one, which must be identical to the bit.
    """

    def __init__(self) -> None:
        self._thread = tensor_thread("encoder")
        self._remembered: OrderedDict[_Key, Conditioning] = OrderedDict()
        self._remembered_bytes = 0
        self._batcher: DynamicBatcher[ConditionEncoder, str, Conditioning] = DynamicBatcher(
            self._encode_batch, max_batch_size=CAPTIONS_TOGETHER, max_wait_s=0
        )

    async def encode(
        self, encoder: ConditionEncoder, captions: Sequence[str], caller: Caller
    ) -> list[Conditioning]:
        """Each caption encoded, B = 1, on the CPU.

        Raises:
            UserError: a caption that the encoder can't take.
        """
        encoder.check(captions)  # before they join a batch, which one refusal would fail for others
        known = {caption: self._remembered.get(_key(encoder, caption)) for caption in captions}
        encoded = {caption: one for caption, one in known.items() if one is not None}
        if missing := [caption for caption in known if caption not in encoded]:
            encoded |= zip(missing, await self._batcher.submit(encoder, missing, caller), strict=True)
        for caption in encoded:
            if (key := _key(encoder, caption)) in self._remembered:
                self._remembered.move_to_end(key)  # the least recently used is forgotten first
        return [encoded[caption] for caption in captions]

    async def _encode_batch(
        self, encoder: ConditionEncoder, entries: list[Waiting[str, Conditioning]]
    ) -> list[Conditioning]:
        loop = asyncio.get_running_loop()
        captions = [entry.item for entry in entries]
        encoded = await loop.run_in_executor(self._thread, encoder.each, captions)
        if len(captions) == 1:
            self._remember(_key(encoder, captions[0]), encoded[0])
        return list(encoded)

    def _remember(self, key: _Key, conditioning: Conditioning) -> None:
        # The same caption may have been encoded twice, for two requests at once.
        if (known := self._remembered.pop(key, None)) is not None:
            self._remembered_bytes -= known.nbytes
        self._remembered[key] = conditioning
        self._remembered_bytes += conditioning.nbytes
        while self._remembered_bytes > REMEMBERED_BYTES:
            _, oldest = self._remembered.popitem(last=False)
            self._remembered_bytes -= oldest.nbytes


_Key = tuple[str, str | None, str]
"""Name and precision of an encoder, and a caption."""


def _key(encoder: ConditionEncoder, caption: str) -> _Key:
    return encoder.name, encoder.precision, caption


class LocalStages:
    """Encodes and decodes in two threads of this process, while the network works in a third."""

    def __init__(self) -> None:
        self._encoder, self._decoder = PromptEncoder(), tensor_thread("decoder")

    async def encode(self, model: LoadedModel, captions: Sequence[str], caller: Caller) -> list[Conditioning]:
        """Each caption encoded, B = 1, on the CPU.

        Raises:
            UserError: a caption that the model's encoder can't take.
        """
        return await self._encoder.encode(model.pipeline.text_encoder, captions, caller)

    async def encode_images(self, model: LoadedModel, images: np.ndarray) -> Tensor:
        """Reference images (N, H', W', 3) uint8 → latents (N, C, H, W) on the CPU, each encoded by itself."""
        loop = asyncio.get_running_loop()
        # In the decoder's thread, as both need the autoencoder.
        return await loop.run_in_executor(self._decoder, model.pipeline.encode_images, images)

    async def decode(self, model: LoadedModel, latents: Tensor) -> np.ndarray:
        """(B, C, H, W) latents → (B, H', W', 3) uint8."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoder, model.pipeline.decode, latents)


def tensor_thread(name: str) -> ThreadPoolExecutor:
    """An executor of one thread for tensor work.

    The thread is told at its start how many threads torch may use: otherwise MKL uses all cores for the first product.
    """
    return ThreadPoolExecutor(
        1, f"fewstep-{name}", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    )
