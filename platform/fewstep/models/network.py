"""One transformer in two roles: the frozen teacher, and the student that is built on it.

With LoRA the student shares all base weights with its teacher: with adapters and policy head switched off the
transformer is the teacher, with both switched on it is the student. So a 20B teacher, its student and the student's EMA
need the memory of one base. A student whose weights are all trained has a frozen copy of the teacher beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fewstep.config import Precision
from fewstep.models.adapters import LoRAConfig, add_adapters
from fewstep.models.cached_texts import CachedTexts
from fewstep.models.conditioning import Conditioning
from fewstep.models.ending import SwitchedNorm, put_switches
from fewstep.models.family import Family, Transformer
from fewstep.models.heads import PolicyConfig, PolicyHead, Unpack, build_head
from fewstep.models.precision import (
    bytes_of,
    compute_in_bfloat16,
    frozen_layers,
    held_bytes,
    set_weight,
)
from fewstep.models.pretrained import stream_weights
from fewstep.models.sharded import fill, read_weights
from fewstep.models.styles import Style, StyledConditioning, StyledLayers
from fewstep.policies import Policy

PART_TOKENS = 4096
"""Tokens that the teacher computes at a time on a CPU: at a width of 128, its largest tensor then takes 8 MB."""


class PolicyNetwork(nn.Module):
    """A frozen teacher transformer with a student's LoRA adapters and policy head.

    All calls of the network go through `forward` and `prepare`, because FSDP gathers weights there. Between calls the
    network is in the student's role: activation checkpointing runs the student's blocks again during backward.

    Args:
        transformer: the teacher's; modified in place. Its weights are not changed, and frozen unless `full`.
        family: how to call it.
        policy: which policy head.
        lora: adapters, or None for none.
        seed: of the initialisation of head and adapters.
        full: train all weights, and keep a copy of them as the teacher; otherwise only adapters and head.
        ranks: ranks of single layers' adapters, by the layers' full names, where they differ from `lora.rank`.

    Attributes:
        precision: of the weights that are not trained, see `lower`.
    """

    def __init__(
        self,
        transformer: Transformer,
        family: Family,
        policy: PolicyConfig,
        lora: LoRAConfig | None,
        seed: int = 0,
        full: bool = False,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.family, self.policy_config, self.lora_config, self.seed = family, policy, lora, seed
        self.channels = family.latent_channels(transformer)
        self.precision: Precision = "float32"
        self._lowered: set[int] = set()  # ids of the layers whose weights are held in it
        self._styled = StyledLayers()
        transformer.requires_grad_(False).eval()
        # Names of the teacher's parameters in its files, before adapters and head change the structure.
        base = dict(transformer.named_parameters())
        # Before adapters and head are added, so that the copy is the teacher itself.
        self.teacher = copy.deepcopy(transformer) if full else None
        ending = family.ending(transformer)
        head = build_head(ending, self.channels, policy).requires_grad_(True)
        if lora is not None:
            add_adapters(transformer, family, lora, ranks)
        # With `full` the teacher is the copy, and the student's own norm and projection would only be unused weights.
        self._switches = put_switches(transformer, family.last_layers, head, keep=not full)
        if full:
            transformer.requires_grad_(True)
            for name in family.unused_parameters(transformer):
                transformer.get_parameter(name).requires_grad_(False)
        self.transformer = transformer
        # By identity, because adapters and head have moved parameters to other module names.
        here = {id(parameter): name for name, parameter in self.named_parameters()}
        self._base = {name: here[id(parameter)] for name, parameter in base.items() if id(parameter) in here}
        # On the meta device there are no values yet: `fill` reads them, and begins then.
        if not ending.projection.weight.is_meta:
            self._begin()
        self.train()

    @property
    def head(self) -> PolicyHead:
        """The student's policy head."""
        [switch] = [one for one in self._switches if isinstance(one, SwitchedNorm)]
        return cast(PolicyHead, switch.head)

    @property
    def head_prefix(self) -> str:
        """What the names of the head's parameters begin with."""
        return f"transformer.{self.family.last_layers[0]}.head."

    def transformers(self) -> list[nn.Module]:
        """The student's transformer, and the teacher's if that is another one."""
        return [self.transformer] if self.teacher is None else [self.transformer, self.teacher]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The student's own parameters by name: head, and adapters or all weights."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> PolicyNetwork:
        """Training mode for head and adapters; the base, which also is the teacher, stays in evaluation mode."""
        super().train(False)
        # The base's dropout stays off in both roles; the student's own parts follow `mode`.
        self.training = mode
        self.head.train(mode)
        for layer in self._adapted_layers:
            layer.lora_dropout.train(mode)
        return self

    def lower(self, precision: Precision) -> None:
        """Hold the frozen linear layers of the trunk in a lower precision, and have the trunk compute in bfloat16.

        Called once, before the network is sharded. Layers whose weights are trained keep float32. On the meta device
        only the type changes, and `fill` reads values straight into it.

        Args:
            precision: of the weights; "float32" changes nothing.
        """
        if precision == "float32":
            return
        self.precision = precision
        for transformer in self.transformers():
            trunk = self.family.trunk(transformer)
            for layer in frozen_layers(trunk):
                set_weight(layer, layer.weight, precision, layer.weight.device)
                self._lowered.add(id(layer))
            compute_in_bfloat16(trunk)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights and buffers; of a network without values, those that it will have."""
        lowered = {id(layer.weight) for layer in self.modules() if id(layer) in self._lowered}
        planned = [p for p in self.parameters() if p.is_meta and id(p) in lowered]
        more = sum(bytes_of(p.numel(), self.precision) - p.nbytes for p in planned)
        return held_bytes(self) + more

    def fill(self, weights: Path, device: torch.device) -> None:
        """Give a network that was built on the meta device its values: the teacher's, and the student's initial ones.

        The network may be sharded already: each rank reads its own rows of each weight. Every rank has to call this at
        the same time. Otherwise weights are read one after the other, each into the precision and to the device where
        it stays: no second copy of the network is made anywhere.

        Args:
            weights: the teacher's folder of safetensors.
            device: where the values go.

        Raises:
            ValueError: the folder lacks a parameter, or has another shape of it.
        """
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            self._read_shards(weights, device)
            self._begin()
        else:
            self.fill_from(stream_weights(weights), device)

    def fill_from(self, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        """As `fill`, for a network that is not sharded, of the teacher's weights one after the other.

        Args:
            weights: by their names in the teacher's files; all of them.
            device: where the values go.
        """
        teacher = {} if self.teacher is None else dict(self.teacher.named_parameters())
        for name, value in weights:
            if name in self._base:
                self.assign(self._base[name], value, device)
            if name in teacher:
                self.assign(f"teacher.{name}", value, device)
        # Adapters and head, to which `_begin` gives values.
        for name, parameter in [(n, p) for n, p in self.named_parameters() if p.is_meta]:
            self.assign(name, torch.empty(parameter.shape), device)
        for module in self.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._begin()

    @property
    def base_shapes(self) -> dict[str, torch.Size]:
        """Names of the teacher's weights in its files → their shapes."""
        return {name: self.get_parameter(here).shape for name, here in self._base.items()}

    def assign(self, name: str, value: Tensor, device: torch.device) -> None:
        """Give a parameter of a network that is not sharded its value, in the precision and on the device it has then.

        Args:
            name: of the parameter.
            value: of its shape, of any floating-point type.
            device: where it goes.
        """
        path, _, last = name.rpartition(".")
        module = self.get_submodule(path)
        if last == "weight" and id(module) in self._lowered:
            set_weight(cast(nn.Linear, module), value, self.precision, device)
            return
        trained = self.get_parameter(name).requires_grad
        # It may be a view of a mapped file, which can't be trained; and which would stay in memory as a whole where
        # the large weights, being converted, no longer need it.
        copied = trained or self.precision != "float32"
        setattr(
            module, last, nn.Parameter(value.to(device, torch.float32, copy=copied), requires_grad=trained)
        )

    def _read_shards(self, weights: Path, device: torch.device) -> None:
        # to_empty also empties buffers, which the constructors have computed and no file has.
        computed = {name: buffer.clone() for name, buffer in self.named_buffers()}
        self.to_empty(device=device)
        for name, buffer in self.named_buffers():
            buffer.copy_(computed[name])
        read_weights({name: self.get_parameter(here) for name, here in self._base.items()}, weights)
        if self.teacher is not None:
            read_weights(dict(self.teacher.named_parameters()), weights)

    def _begin(self) -> None:
        """Initialise the student: adapters that change nothing, and a head that starts from the teacher's output.

        METHOD.md section 3 has the head's initialisation.
        """
        # On the CPU whatever the device, and in the same order on each rank: all draw the same values.
        generator = torch.Generator().manual_seed(self.seed)
        teacher = self.transformer if self.teacher is None else self.teacher
        self.head.grow(self.family.ending(teacher), generator)
        for layer in self._adapted_layers:
            for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                # As peft initialises: A at random, B zero, so that B·A is zero.
                drawn = torch.empty(down.weight.shape)
                if self.lora_config is not None and self.lora_config.init == "gaussian":
                    nn.init.normal_(drawn, std=1 / len(drawn), generator=generator)
                else:
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                fill(down.weight, drawn)
                fill(up.weight, torch.zeros(up.weight.shape))

    def keep_folded(self) -> None:
        """Fold adapters into weights once instead of at each call. For generating only: it ends training."""
        from fewstep.models.lora import FoldedLoRALinear

        for layer in self._adapted_layers:
            if isinstance(layer, FoldedLoRALinear):
                layer.keep_folded()

    def take(self, style: Style) -> Style:
        """Have the layers that a style adapts take it, in both roles, from calls with a `StyledConditioning`.

        Args:
            style: of this network; as read from a file.

        Returns:
            The style on the network's device and in the type that its layers compute in.
        """
        around = {layer.get_base_layer(): layer for layer in self._adapted_layers}
        matrices = {}
        for name, low_rank in style.layers.items():
            layers = list(self._layers_of(name))
            for layer in layers:
                # What has adapters of the student's is hooked around them: they may be folded into the weight.
                self._styled.hook(name, around.get(layer, layer))
            lowered = any(id(layer) in self._lowered for layer in layers)
            dtype = torch.bfloat16 if lowered else torch.float32
            matrices[name] = low_rank.to(layers[0].weight.device, dtype)
        return Style(matrices)

    def _layers_of(self, name: str) -> Iterator[nn.Linear]:
        """The linear layers that the teacher's files call so: the shared one, or one in each of two transformers."""
        if (here := self._base.get(f"{name}.weight")) is not None:
            yield cast(nn.Linear, self.get_submodule(here.removesuffix(".weight")))
        if self.teacher is not None:
            yield cast(nn.Linear, self.teacher.get_submodule(name))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Any,
        *,
        student: bool,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Packed output `(B, L, features)` of the head (student) or of the base (teacher).

        Args:
            x: (B, C, H, W) latents.
            t: σ of the latents, in [0, 1], (B,).
            conditioning: of B samples, as the family takes it, or what `prepare` made of it for the same role.
            student: whether the student is called, or the teacher.
            guidance_scale: input of a guidance-distilled network, in place of its family's scale.

        Raises:
            ValueError: the conditioning was prepared for the other role.
        """
        if isinstance(conditioning, StyledConditioning):
            if not conditioning.prepared:
                conditioning = self._prepare_styled(conditioning, student)
            with self._styled.wearing(conditioning.mixes):
                return self.forward(x, t, conditioning.plain, student=student, guidance_scale=guidance_scale)
        if isinstance(conditioning, CachedTexts) and conditioning.student != student:
            roles = ("student", "teacher") if conditioning.student else ("teacher", "student")
            raise ValueError("a conditioning prepared for the {} was given to the {}".format(*roles))
        with self._role(student) as transformer:
            return self.family.denoise(transformer, x, t, conditioning, guidance_scale)

    def prepare(self, conditioning: Any, *, student: bool = False) -> Any:
        """What of a conditioning depends on neither states nor times, computed once for many calls in one role.

        It holds until the student's weights change; the teacher's holds for ever, and has no gradient. FSDP has to know
        this method as one that reads weights, see `fewstep.train.parallel.shard`.

        Args:
            conditioning: as the family takes it.
            student: whether for the student, whose adapters change what texts are to the network, or for the teacher.
        """
        if isinstance(conditioning, StyledConditioning):
            return self._prepare_styled(conditioning, student)
        gradients = student and torch.is_grad_enabled()
        with torch.set_grad_enabled(gradients), self._role(student) as transformer:
            prepared = self.family.prepare(transformer, conditioning)
        return replace(prepared, student=student) if isinstance(prepared, CachedTexts) else prepared

    def _prepare_styled(self, conditioning: StyledConditioning, student: bool) -> StyledConditioning:
        if type(self.family).prepare is Family.prepare:  # which prepares nothing
            return conditioning
        # Texts of one batch may share what a network computes of their time, and so must have the same styles.
        if len(set(conditioning.mixes)) > 1:
            each = [conditioning[row : row + 1] for row in range(len(conditioning))]
            joined = Conditioning.join([self._prepare_styled(one, student) for one in each])
            return cast(StyledConditioning, joined)
        with self._styled.wearing(conditioning.mixes):
            return replace(conditioning, plain=self.prepare(conditioning.plain, student=student))

    @contextmanager
    def _role(self, student: bool) -> Iterator[Transformer]:
        """The transformer in a role, as long as the context lasts."""
        if student:
            yield self.transformer
        elif self.teacher is not None:
            yield self.teacher
        else:
            # Adapters and head off while the shared transformer computes the teacher.
            with self._teacher_role():
                yield self.transformer

    def velocity(
        self, x: Tensor, t: Tensor, conditioning: Any, guidance_scale: float | Tensor | None = None
    ) -> Tensor:
        """The teacher's velocity (B, C, H, W), without classifier-free guidance and without autograd.

        Args:
            x: states, (B, C, H, W).
            t: their σ, in [0, 1], (B,).
            conditioning: of B samples.
            guidance_scale: as for `forward`.
        """
        rows = self._rows_at_a_time(x, len(conditioning.references))
        parts = [slice(first, first + rows) for first in range(0, max(1, len(x)), rows)]
        per_sample = isinstance(guidance_scale, Tensor) and guidance_scale.ndim > 0
        with torch.no_grad():
            packed = [
                self(
                    x[part],
                    t[part],
                    conditioning if len(parts) == 1 else conditioning[part],
                    student=False,
                    guidance_scale=cast(Tensor, guidance_scale)[part] if per_sample else guidance_scale,
                )
                for part in parts
            ]
        whole = packed[0] if len(packed) == 1 else torch.cat(packed)  # which would copy one, too
        return self.family.velocity(whole, self.channels, *x.shape[-2:])

    def _rows_at_a_time(self, x: Tensor, references: int) -> int:
        """Samples of a batch that a call without gradient computes at a time.

        On a CPU as many as its cache has room for. They also reuse memory of the samples before them, where the
        operating system would hand out and take back that of a large batch page by page at each operation. Elsewhere,
        and where FSDP would gather the weights anew each time, all.
        """
        if x.device.type != "cpu" or isinstance(self, FSDPModule):
            return max(1, len(x))
        tokens = self.family.tokens(self.transformer, *x.shape[-2:])
        return max(1, PART_TOKENS // (tokens * (1 + references)))

    def policy(
        self, x_src: Tensor, t_src: Tensor, conditioning: Any, guidance_scale: float | Tensor | None = None
    ) -> Policy:
        """The student's policy for the segments that start at x_src (B, C, H, W), t_src (B,).

        Args:
            x_src: states at the segments' sources.
            t_src: their σ.
            conditioning: of B samples.
            guidance_scale: as for `forward`.
        """
        packed = self(x_src, t_src, conditioning, student=True, guidance_scale=guidance_scale)
        return self.head.policy(packed, self._unpack(packed, x_src), x_src, t_src)

    def _unpack(self, packed: Tensor, x: Tensor) -> Unpack:
        """The family's `unpack` for latents of the size of `x`."""
        return lambda tokens, channels: self.family.unpack(tokens, channels, x.shape[-2], x.shape[-1])

    @contextmanager
    def _teacher_role(self) -> Iterator[None]:
        self._switch(student=False)
        try:
            yield
        finally:  # also after an error: outside of a call the network is the student
            self._switch(student=True)

    def _switch(self, *, student: bool) -> None:
        # peft's own switch, `enable_adapters`, also changes requires_grad, which FSDP2 reads only once, when it shards.
        # So the flag that peft's layers read is set directly.
        for layer in self._adapted_layers:
            layer._disable_adapters = not student
        for switch in self._switches:
            switch.student = student

    @property
    def _adapted_layers(self) -> list[Any]:
        if "_adapted" not in self.__dict__:
            from peft.tuners.tuners_utils import BaseTunerLayer

            # Cached in __dict__, past nn.Module's registry: the layers are submodules of the transformer already.
            self.__dict__["_adapted"] = [m for m in self.modules() if isinstance(m, BaseTunerLayer)]
        return self.__dict__["_adapted"]
