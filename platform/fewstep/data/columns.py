"""Conversion between conditions or latents and the columns of a shard that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fewstep.data.schema import Encoding, NumberType, bytes_column, float_lists
from fewstep.encoders.base import storage_scale
from fewstep.encoders.labels import is_labels
from fewstep.models.conditioning import ClassConditioning, Conditioning, TextConditioning

TORCH_TYPES: dict[NumberType, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


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
    return {
        "tokens": bytes_column(states or [np.empty(0, np.float16)] * count),
        "token_count": pa.array([len(s) for s in states] or [0] * count, pa.int32()),
        "pooled": float_lists(np.concatenate(pooled) if pooled else None, count),
        "label": pa.array(labels, pa.int32()) if labels else pa.nulls(count, pa.int32()),
        "token_scale": pa.array(
            [None if scale == 1 else scale for scale in scales] or [None] * count, pa.float32()
        ),
    }


def latent_column(latents: Tensor, numbers: NumberType) -> pa.Array:
    """A column of latents (N, …), stored as such numbers."""
    stored = latents.to(TORCH_TYPES[numbers])
    # numpy has no bfloat16: only the bytes matter here.
    return bytes_column(list((stored.view(torch.int16) if numbers == "bfloat16" else stored).numpy()))


def conditioning_of(rows: pa.Table, encoding: Encoding, *, stored: bool = False) -> Conditioning:
    """The conditions of some rows of a dataset, as one batch.

    Args:
        rows: has SCHEMA's columns.
        encoding: of the dataset.
        stored: whether token states stay float16, as they are stored, where none of them is beyond its range;
            otherwise they come as float32.
    """
    if is_labels(encoding.text_encoder):
        return ClassConditioning(torch.tensor(_labels(rows), dtype=torch.int64))
    counts, scales = rows["token_count"].to_pylist(), rows["token_scale"].to_pylist()
    # Each caption is copied once, from arrow's memory to its place in the batch.
    states = torch.empty(len(counts), max(counts, default=0), encoding.token_dim, dtype=torch.float16)
    for place, count, row in zip(states.numpy(), counts, row_views(rows["tokens"], np.float16), strict=True):
        place[:count] = row.reshape(count, -1)
        place[count:] = 0
    if not stored or any(scale is not None for scale in scales):
        states = states.float()
        for place, scale in zip(states, scales, strict=True):
            if scale is not None:
                place *= scale
    mask = torch.arange(states.shape[1])[None] < torch.tensor(counts)[:, None]
    return TextConditioning(states, mask, _pooled(rows["pooled"]))


def latents_of(
    rows: pa.Table,
    encoding: Encoding,
    *,
    stored: bool = False,
    name: Literal["latent", "references"] = "latent",
) -> Tensor | None:
    """The latents of some rows of a dataset, (B, C·H·W); None in datasets of prompts without images.

    Args:
        rows, encoding: as for `conditioning_of`.
        stored: whether they keep the type that they are stored in; otherwise they come as float32.
        name: of the column; of N reference images they are (B, N·C·H·W), and None where rows have none.
    """
    column = rows[name]
    if column.null_count:
        return None
    kind = TORCH_TYPES[encoding.latent_type]
    views = row_views(column, np.float32 if kind is torch.float32 else np.int16)
    latents = torch.from_numpy(np.stack(views) if views else np.empty((0, 0), np.float32)).view(kind)
    return latents if stored else latents.float()


def row_views(column: pa.ChunkedArray, kind: type[np.generic]) -> list[np.ndarray]:
    """The numbers of each row of a column of bytes, as views of arrow's memory, which is read-only."""
    views: list[np.ndarray] = []
    for chunk in column.chunks:
        if isinstance(chunk, pa.DictionaryArray):  # of `order.permuted`
            content, rows = chunk.dictionary, chunk.indices.to_numpy()
        else:
            content, rows = chunk, np.arange(len(chunk))
        _, places, numbers = content.buffers()
        ends = np.frombuffer(places, np.int64)[content.offset : content.offset + len(content) + 1]
        memory = np.frombuffer(numbers or b"", np.uint8)
        views += [
            memory[first:last].view(kind)
            for first, last in zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)
        ]
    return views


def _pooled(column: pa.ChunkedArray) -> Tensor | None:
    """Vectors of whole captions, (B, P) float32; None where there are none."""
    if column.null_count:
        return None
    # A copy, because arrow's memory is read-only, which torch tensors can't be.
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()
    return torch.from_numpy(flat).view(len(column), -1)


def _labels(rows: pa.Table) -> np.ndarray:
    """Class indices of the rows, (N,)."""
    labels = rows["label"].combine_chunks()
    if not labels.null_count:
        return labels.to_numpy(zero_copy_only=False)
    # Shards from before fewstep 0.2 hold the class's index as the only token state of its caption. Row by row: a folder
    # that the old version began and this one finished has shards of both kinds.
    states = zip(labels.to_pylist(), row_views(rows["tokens"], np.float16), strict=True)
    return np.array([int(tokens[0]) if label is None else label for label, tokens in states])
