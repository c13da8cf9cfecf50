"""One transformer, two roles: the frozen teacher, and the student that grows on it.

With LoRA the student shares every base weight with its teacher. Adapters and policy head off: the
teacher. On: the student. So a 20B teacher, its student and the student's EMA cost one base in memory. A student
of whom all weights are trained has a frozen copy of them beside it for its teacher.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow import GuidanceInterval, guided_velocity
from fewstep.models.family import Family
from fewstep.models.heads import PolicyHead, PolicySettings, build_head
from fewstep.models.pretrained import read_weights
from fewstep.models.sharded import fill
from fewstep.policies import Policy
from fewstep.policies.base import per_latent


class LoRASettings(BaseModel):
    """Low-rank adapters on the frozen base."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rank: int = Field(64, ge=1)
    """Rank of every adapter; alpha equals it, so the scale is 1."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs, in training."""
    targets: tuple[str, ...] = ("paper",)
    """Names of linear layers to adapt, as module-name suffixes; "paper" stands for the family's own list."""


class _SwitchedNorm(nn.Module):
    """In place of the base's last norm: the teacher's norm, or the student's whole head."""

    def __init__(self, teacher: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.teacher, self.head, self.student = teacher, head, True

    def forward(self, hidden: Tensor, time_embedding: Tensor) -> Tensor:
        return self.head(hidden, time_embedding) if self.student else self.teacher(hidden, time_embedding)


class _SwitchedProjection(nn.Module):
    """In place of the base's output projection: the projection, or nothing after the student's head."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = teacher, True

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if self.student else self.teacher(hidden)


class PolicyNetwork(nn.Module):
    """A frozen teacher transformer with LoRA adapters and a policy head grown on it.

    Everything goes through `forward`, the place where FSDP gathers weights. The student's role is the
    resting state (activation checkpointing re-runs blocks during backward, in that role).

    Args:
        transformer: the teacher; modified in place (its weights stay as they are, and frozen).
        family: how to call it.
        policy: which policy head.
        lora: adapters, or None for none.
        seed: of the initialisation of head and adapters.
        full: train all weights, and keep a copy of them as the teacher; otherwise adapters and head alone.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        policy: PolicySettings,
        lora: LoRASettings | None,
        seed: int = 0,
        full: bool = False,
    ) -> None:
        super().__init__()
        self.family, self.policy_settings, self.lora_settings, self.seed = family, policy, lora, seed
        self.channels = family.latent_channels(transformer)
        transformer.requires_grad_(False).eval()
        base = dict(transformer.named_parameters())
        self.teacher = copy.deepcopy(transformer) if full else None
        norm_out, proj_out = transformer.norm_out, transformer.proj_out
        head = build_head(norm_out, proj_out, self.channels, policy).requires_grad_(True)
        if lora is not None:
            _add_adapters(transformer, family, lora)
        transformer.norm_out = _SwitchedNorm(nn.Identity() if full else norm_out, head)
        transformer.proj_out = _SwitchedProjection(nn.Identity() if full else proj_out)
        if full:
            transformer.requires_grad_(True)
            for name in family.unused_parameters(transformer):
                transformer.get_parameter(name).requires_grad_(False)
        self.transformer = transformer
        here = {id(parameter): name for name, parameter in self.named_parameters()}
        self._base = {name: here[id(parameter)] for name, parameter in base.items() if id(parameter) in here}
        if not proj_out.weight.is_meta:
            self._begin()
        self.train()

    @property
    def head(self) -> PolicyHead:
        """The student's policy head."""
        return self.transformer.norm_out.head

    def transformers(self) -> list[nn.Module]:
        """The student's, and the teacher's where it is another."""
        return [self.transformer] if self.teacher is None else [self.transformer, self.teacher]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The student's own parameters by module name: head, and adapters or all others."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> PolicyNetwork:
        """Training mode for the student's own parts; the base is a teacher, and stays in evaluation mode."""
        super().train(False)
        self.training = mode
        self.head.train(mode)
        for layer in self._adapted_layers:
            layer.lora_dropout.train(mode)
        return self

    def fill(self, weights: Path, device: torch.device) -> None:
        """Give a network that was built on the meta device its values: the teacher's, and the student's first ones.

        May be sharded by then; each rank reads its own rows of each weight, and all must ask together.

        Args:
            weights: the teacher's folder of safetensors.
            device: where the values go.

        Raises:
            ValueError: the folder lacks a parameter, or has another shape of it.
        """
        computed = {name: buffer.clone() for name, buffer in self.named_buffers()}
        self.to_empty(device=device)
        for name, buffer in self.named_buffers():
            buffer.copy_(computed[name])
        read_weights({name: self.get_parameter(here) for name, here in self._base.items()}, weights)
        if self.teacher is not None:
            read_weights(dict(self.teacher.named_parameters()), weights)
        self._begin()

    def _begin(self) -> None:
        """The student's first values: adapters that change nothing, a head that moves as the teacher does."""
        generator = torch.Generator().manual_seed(self.seed)
        end = self.transformer if self.teacher is None else self.teacher
        norm_out, proj_out = end.norm_out, end.proj_out
        if self.teacher is None:
            norm_out, proj_out = norm_out.teacher, proj_out.teacher
        self.head.grow(norm_out, proj_out, generator)
        for layer in self._adapted_layers:
            for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                drawn = nn.init.kaiming_uniform_(
                    torch.empty(down.weight.shape), a=math.sqrt(5), generator=generator
                )
                fill(down.weight, drawn)
                fill(up.weight, torch.zeros(up.weight.shape))

    def keep_folded(self) -> None:
        """For generating alone: fold adapters into weights once instead of at each call. Training must not go on."""
        from fewstep.models.lora import FoldedLoRALinear

        for layer in self._adapted_layers:
            if isinstance(layer, FoldedLoRALinear):
                layer.keep_folded()

    def forward(self, x: Tensor, t: Tensor, conditioning: Any, *, student: bool) -> Tensor:
        """Packed output `(B, L, features)` of the head (student) or of the base (teacher).

        Args:
            x: (B, C, H, W) latents.
            t: (B,) shifted time in [0, 1].
            conditioning: what the family takes.
        """
        if student:
            return self.family.denoise(self.transformer, x, t, conditioning)
        if self.teacher is not None:
            return self.family.denoise(self.teacher, x, t, conditioning)
        with self._teacher_role():
            return self.family.denoise(self.transformer, x, t, conditioning)

    def velocity(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """The teacher's velocity (B, C, H, W), without guidance and without autograd."""
        with torch.no_grad():
            packed = self(x, t, conditioning, student=False)
        return self._unpack(packed, x)(packed.float(), self.channels)[:, 0]

    def policy(self, x_src: Tensor, t_src: Tensor, conditioning: Any) -> Policy:
        """The student's policy for the segment that starts at (x_src, t_src)."""
        packed = self(x_src, t_src, conditioning, student=True)
        return self.head.policy(packed, self._unpack(packed, x_src), x_src, t_src)

    def _unpack(self, packed: Tensor, x: Tensor):  # noqa: ANN202 — heads.Unpack
        return lambda tokens, channels: self.family.unpack(tokens, channels, x.shape[-2], x.shape[-1])

    @contextmanager
    def _teacher_role(self) -> Iterator[None]:
        self._switch(student=False)
        try:
            yield
        finally:
            self._switch(student=True)

    def _switch(self, *, student: bool) -> None:
        # peft's own switch, `enable_adapters`, also flips requires_grad, which FSDP2 reads only once, when it
        # shards; its flag is set directly instead.
        for layer in self._adapted_layers:
            layer._disable_adapters = not student
        self.transformer.norm_out.student = self.transformer.proj_out.student = student

    @property
    def _adapted_layers(self) -> list[nn.Module]:
        if "_adapted" not in self.__dict__:
            from peft.tuners.tuners_utils import BaseTunerLayer

            # Kept out of nn.Module's registry: the layers already are submodules of the transformer.
            self.__dict__["_adapted"] = [m for m in self.modules() if isinstance(m, BaseTunerLayer)]
        return self.__dict__["_adapted"]


class GuidedTeacher:
    """A network's teacher role with classifier-free guidance (METHOD.md section 4).

    Args:
        network: anything with `velocity(x, t, conditioning)`.
        null: the null condition (B = 1); None for teachers without guidance.
        scale: guidance scale w; 1 is no guidance, and costs one pass instead of two.
        interval: σ range in which the scale holds; outside it is 1.
        orthogonal: share of the guidance direction's component parallel to x0 that is removed.
    """

    def __init__(
        self,
        network: Any,
        null: Any,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        orthogonal: float = 0.0,
    ) -> None:
        self.network, self.null, self.scale = network, null, scale
        self.interval, self.orthogonal = GuidanceInterval(scale, *interval), orthogonal

    @property
    def passes(self) -> int:
        """Network passes of one velocity query."""
        return 1 if self.scale == 1 else 2

    def velocity(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Guided velocity (B, C, H, W); both passes run as one batch.

        Samples outside of the interval cost one pass, where that can be known without waiting for the device: `t` may
        lie on the CPU whatever the device of `x`.
        """
        here = t.to(x.device, non_blocking=True)
        if self.scale == 1:
            return self.network.velocity(x, here, conditioning)
        rows = self._guided_rows(t)
        if rows is not None:
            rows = rows.to(x.device, non_blocking=True)
        x_again, again = (x, here) if rows is None else (x[rows], here[rows])
        both = conditioning.cat(self.null.expand(len(x_again)))
        answers = self.network.velocity(torch.cat([x, x_again]), torch.cat([here, again]), both)
        positive, negative = answers.tensor_split([len(x)])
        of_rows = positive if rows is None else positive[rows]
        clean = x_again - per_latent(again, x_again) * of_rows if self.orthogonal else None
        guided = guided_velocity(of_rows, negative, self.interval.at(again), self.orthogonal, clean)
        return guided if rows is None else positive.index_copy(0, rows, guided)

    def _guided_rows(self, t: Tensor) -> Tensor | None:
        """Indices of the samples inside the interval; None if all are, or if it takes waiting to find out."""
        if t.device.type != "cpu":
            return None
        inside = self.interval.contains(t)
        return None if inside.all() else inside.nonzero().flatten()


def _add_adapters(transformer: nn.Module, family: Family, settings: LoRASettings) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from fewstep.models.lora import FoldedLoRALinear

    targets = lora_target_modules(transformer, family, settings.targets)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, lora_dropout=settings.dropout, target_modules=targets
    )
    config._register_custom_module({nn.Linear: FoldedLoRALinear})
    with torch.random.fork_rng():  # peft draws adapters from torch's global generator; `_begin` has its own
        inject_adapter_in_model(config, transformer)


def lora_target_modules(transformer: nn.Module, family: Family, targets: tuple[str, ...]) -> list[str]:
    """Full module names that `targets` mean.

    Raises:
        UserError: a target matches no linear or convolutional layer.
    """
    layers = [
        name for name, module in transformer.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    chosen: dict[str, None] = {}
    for target in targets:
        suffixes = family.lora_targets(transformer) if target == "paper" else [target]
        for suffix in suffixes:
            found = [name for name in layers if name == suffix or name.endswith(f".{suffix}")]
            if not found:
                raise UserError(
                    f"student.lora.targets: no linear layer of the {family.name} teacher ends in {suffix!r}; "
                    f"its layers are called like {layers[len(layers) // 2]!r}."
                )
            chosen.update(dict.fromkeys(found))
    return list(chosen)
