"""Styles: LoRAs that a request chooses, so that each sample of a batch may have its own, and its own scale.

A style was trained on the teacher's base. Teacher and student share that base, so a style acts on both, as it would if
it were added to the base's weights: y = W·x + Σ scale·B·(A·x). The base's product W·x is computed of all samples
together, as without styles, and each sample's low-rank products are added to its own rows. So a sample without a style
is computed as ever, and what one with a style gets does not depend on the styles of the others.

A policy head takes the place of the base's last layers in the student: there a style acts on the teacher alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.conditioning import Conditioning
from fewstep.models.family import Family, Transformer
from fewstep.models.lora_files import adapted_layers, taking_loras

FIELD = "lora"
"""What error messages of loading begin with."""


class LowRank(NamedTuple):
    """What a style adds to one layer's weight: up·down."""

    down: Tensor
    """A, (rank, in)."""
    up: Tensor
    """B times the style's own factor alpha/rank, (out, rank)."""

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same on a device, in a type."""
        return LowRank(self.down.to(device, dtype), self.up.to(device, dtype))


# Compared by identity: another file of the same name is another style.
@dataclass(frozen=True, eq=False)
class Style:
    """A style LoRA in memory.

    Attributes:
        layers: names of the network's layers → what it adds to their weights.
    """

    layers: Mapping[str, LowRank]

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return sum(part.nbytes for low_rank in self.layers.values() for part in low_rank)


StyleMix = tuple[tuple[Style, float], ...]
"""The styles of one sample with their scales; () for none."""


def read_style(family: Family, transformer: Transformer, path: str) -> Style:
    """Read a style from a LoRA file, float32 on the CPU.

    Args:
        family: of the network.
        transformer: the network that it is for; only its configuration is looked at.
        path: a safetensors file, a folder with one, or a hub id; keys in the style of diffusers, peft or kohya.

    Raises:
        UserError: the file can't be read, holds no LoRA of this network, has values that are not finite, or adapts
            layers in a way that can't be computed for each sample by itself.
    """
    family = taking_loras(family, FIELD)
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        network = family.build(config)
    layers = adapted_layers(family, network, path, FIELD)
    return Style({name: _low_rank(name, layer, family, path) for name, layer in layers.items()})


def _low_rank(name: str, layer: Any, family: Family, path: str) -> LowRank:
    """The matrices of one of peft's layers.

    Raises:
        UserError: as `read_style`.
    """
    [adapter] = layer.lora_A
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(layer.get_base_layer(), nn.Linear) or name.startswith(family.joint_layers):
        raise UserError(
            f"{FIELD}: {path} adapts {name}, which is no layer that can be computed for each image by itself: choose "
            "another, or fold it into the teacher (teacher.loras)."
        )
    if layer.use_dora.get(adapter, False) or up.bias is not None:
        raise UserError(
            f"{FIELD}: {path} is not only low-rank matrices at {name} (DoRA, or a bias): choose a plain LoRA."
        )
    low_rank = LowRank(down.weight.detach().float(), up.weight.detach().float() * layer.scaling[adapter])
    if not all(part.isfinite().all() for part in low_rank):
        raise UserError(f"{FIELD}: {path} has values at {name} that are not finite: get the file again.")
    return low_rank


@dataclass(frozen=True)
class StyledConditioning(Conditioning):
    """A conditioning with the styles of each sample.

    Attributes:
        plain: texts or classes.
        mixes: of each sample.
    """

    plain: Conditioning
    mixes: tuple[StyleMix, ...]

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, samples: slice) -> StyledConditioning:
        return StyledConditioning(self.plain[samples], self.mixes[samples])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the texts or classes."""
        return self.plain.tensors

    @property
    def prepared(self) -> bool:
        """Whether the texts or classes are."""
        return self.plain.prepared

    def map(self, change: Callable[[Tensor], Tensor]) -> StyledConditioning:
        """The same styles, with texts or classes of which every tensor is `change` of this one's."""
        return replace(self, plain=self.plain.map(change))

    def expand(self, batch: int) -> StyledConditioning:
        """A single condition (B = 1) for each sample of a batch."""
        return StyledConditioning(self.plain.expand(batch), self.mixes * batch)

    def repeat(self, times: int) -> StyledConditioning:
        """The whole batch `times` times: row s·B + b is sample b."""
        return StyledConditioning(self.plain.repeat(times), self.mixes * times)

    def where(self, keep: Tensor, other: StyledConditioning) -> StyledConditioning:
        """The samples of this batch where `keep` (B,) is True, and those of `other` (B or 1) where it is False."""
        others = other.mixes * (len(self) if len(other) == 1 else 1)
        chosen = zip(keep.tolist(), self.mixes, others, strict=True)
        mixes = tuple(ours if kept else theirs for kept, ours, theirs in chosen)
        return StyledConditioning(self.plain.where(keep, other.plain), mixes)

    def _joined(self, parts: Sequence[StyledConditioning]) -> StyledConditioning:
        plain = Conditioning.join([part.plain for part in parts])
        return StyledConditioning(plain, tuple(mix for part in parts for mix in part.mixes))


class StyledLayers:
    """Adds styles to the outputs of a network's layers, by forward hooks, during calls that have styles."""

    def __init__(self) -> None:
        self._hooked: set[nn.Module] = set()
        self._mixes: Sequence[StyleMix] = ()

    def hook(self, name: str, layer: nn.Module) -> None:
        """Have a layer take styles.

        Args:
            name: by which styles call it.
            layer: takes x (B, …, in) and gives (B, …, out), contiguous.
        """
        if layer not in self._hooked:
            self._hooked.add(layer)
            layer.register_forward_hook(partial(self._add, name))

    @contextmanager
    def wearing(self, mixes: Sequence[StyleMix]) -> Iterator[None]:
        """Have the samples of the network's calls in a `with` block these styles, in their order."""
        self._mixes = mixes if any(mixes) else ()
        try:
            yield
        finally:
            self._mixes = ()

    def _add(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The hook: adds each sample's products to its rows of the output, in place."""
        for row, mix in enumerate(self._mixes_of(len(output))):
            for style, scale in mix:
                if (low_rank := style.layers.get(name)) is None:
                    continue
                # For each sample by itself: what it gets is then the same to the bit in every batch. Batched products
                # of padded ranks are no faster: docs/speed.md has the measurement.
                down, up = low_rank
                x = inputs[0][row].reshape(-1, down.shape[1]).to(down.dtype)
                rows = output[row].view(-1, len(up))
                rows.addmm_((x @ down.mT).to(rows.dtype), up.mT.to(rows.dtype), alpha=scale)

    def _mixes_of(self, rows: int) -> Sequence[StyleMix]:
        """The mixes of a layer's rows, one per sample; a further row, in `QwenImage21`, is that of the texts' time."""
        if len(self._mixes) in (0, rows):
            return self._mixes
        # Texts are prepared in one mix at a time, and where they are prepared already, that row is not used.
        assert rows == len(self._mixes) + 1, "layers whose rows are not samples are in `Family.joint_layers`"
        return (*self._mixes, self._mixes[-1])
