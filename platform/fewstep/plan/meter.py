"""Counting bytes and operations of code that runs on the meta device, whose tensors have shapes and no data."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

FLASH_BACKWARD = 2.5
"""Operations of attention's backward per operation of its forward: it recomputes the scores (five products for two)."""


class DispatchMeter(TorchDispatchMode):
    """Counts the bytes that are alive and the operations that are done while it is active (`with meter:`).

    Args:
        outside: tensors that exist already and are counted elsewhere, such as weights.

    Attributes:
        now: bytes alive, beside those of `outside`.
        peak: the largest value of `now` so far.
        operations: floating-point operations so far; a multiply-add is two.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        # Storages and not tensors: views of one storage are counted once, and bytes live as long as their last view.
        self._known = WeakIdKeyDictionary()
        for tensor in outside:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        # Python frees a storage when its last tensor goes, at the very place where a real run would free its memory.
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


@contextmanager
def fused_attention(meter: DispatchMeter, on_cpu: bool = False) -> Iterator[None]:
    """Within it, attention costs what fused kernels take: of the scores nothing is kept but a sum per row.

    On the meta device torch would decompose attention, with all L² scores in memory.

    Args:
        meter: what the operations are added to.
        on_cpu: whether it stands for a CPU's, which is computed in float32 (see `models/precision.py`); a GPU's is
            computed in the lowest type of queries, keys and values, which autocast casts them to.
    """
    own = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        lowest = min((query.dtype, key.dtype, value.dtype), key=lambda dtype: dtype.itemsize)
        dtype = torch.float32 if on_cpu else lowest
        return _FusedAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), meter)

    # The function itself is replaced, and no function mode is used: torch leaves function modes during backward, where
    # checkpointed blocks run their forward again.
    F.scaled_dot_product_attention = fused
    try:
        with warnings.catch_warnings():
            # About kernels that take no mixed types, which is of no concern where nothing is computed.
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            yield
    finally:
        F.scaled_dot_product_attention = own


class _FusedAttention(torch.autograd.Function):
    """Shapes, saved tensors and operations of a fused attention kernel; q (B, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meter: DispatchMeter) -> Tensor:
        ctx.meter, ctx.operations = meter, 4 * q.numel() * k.shape[-2]
        meter.operations += ctx.operations
        batch, heads, length, _ = q.shape
        # Kernels write (B, L, H, D): what follows flattens the heads without a copy.
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.meter.operations += int(FLASH_BACKWARD * ctx.operations)
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None
