"""Conversion between conditions and the columns of a shard that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fewstep.data.schema import Encoding, float_lists, ragged_lists
from fewstep.encoders.base import storage_scale
from fewstep.encoders.labels import is_labels
from fewstep.models.conditioning import ClassConditioning, Conditioning, TextConditioning


def condition_columns(conditions: Sequence[Conditioning]) -> dict[str, pa.Array]:
    """The `CONDITION_COLUMNS` of a shard.

    Args:
        conditions: one for each row, all texts or all classes, each a batch of one without padding.
    """
    # One of the two lists is empty; the columns of that kind then are empty or null.
    texts = [condition for condition in conditions if isinstance(condition, TextConditioning)]
    labels = [int(condition.labels) for condition in conditions if isinstance(condition, ClassConditioning)]
    count = len(conditions)
    scales = [storage_scale(text.states) for text in texts]
    states = [(text.states[0] / scale).half().numpy() for text, scale in zip(texts, scales, strict=True)]
    pooled = [text.pooled.numpy() for text in texts if text.pooled is not None]
    flat = np.concatenate([s.reshape(-1) for s in states]) if states else np.empty(0, np.float16)
    return {
        "tokens": ragged_lists(flat, [s.size for s in states] or [0] * count),
        "token_count": pa.array([len(s) for s in states] or [0] * count, pa.int32()),
        "pooled": float_lists(np.concatenate(pooled) if pooled else None, count),
        "label": pa.array(labels, pa.int32()) if labels else pa.nulls(count, pa.int32()),
        "token_scale": pa.array(
            [None if scale == 1 else scale for scale in scales] or [None] * count, pa.float32()
        ),
    }


def conditioning_of(rows: pa.Table, encoding: Encoding) -> Conditioning:
    """The conditions of some rows of a dataset, as one batch.

    Args:
        rows: has SCHEMA's columns, each in one chunk.
        encoding: of the dataset.
    """
    if is_labels(encoding.text_encoder):
        return ClassConditioning(torch.tensor(_labels(rows), dtype=torch.int64))
    # A copy, because arrow's memory is read-only, which torch tensors can't be.
    flat = torch.from_numpy(_flat(rows["tokens"]).copy())
    stored = flat.view(-1, encoding.token_dim).split(rows["token_count"].to_pylist())
    scales = rows["token_scale"].to_pylist()
    states = [s if scale is None else s.float() * scale for s, scale in zip(stored, scales, strict=True)]
    pooled = floats(rows["pooled"])
    return TextConditioning.collate(states, None if pooled is None else list(pooled))


def floats(lists: pa.ChunkedArray) -> Tensor | None:
    """A column of N lists of equal length as a tensor, (N, ·) float32; None if there are nulls in it."""
    if lists.null_count:
        return None
    return torch.from_numpy(_flat(lists).copy()).view(len(lists), -1)


def _labels(rows: pa.Table) -> np.ndarray:
    """Class indices of the rows, (N,)."""
    labels = rows["label"].combine_chunks()
    if not labels.null_count:
        return labels.to_numpy(zero_copy_only=False)
    # Shards from before fewstep 0.2 hold the class's index as the only token state of its caption. Row by row: a folder
    # that the old version began and this one finished has shards of both kinds.
    states = zip(labels.to_pylist(), rows["tokens"].to_pylist(), strict=True)
    return np.array([int(tokens[0]) if label is None else label for label, tokens in states])


def _flat(lists: pa.ChunkedArray) -> np.ndarray:
    """The numbers of all lists of a column, one list after the other."""
    return lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
