"""Policy heads, which take the place of a teacher's last norm and output projection in the student.

A head is called with the transformer's last hidden states `(B, L, D)` and its time embedding `(B, D)`, and returns one
tensor `(B, L, head.features)`: everything the policy needs, packed in patches. The family unpacks it to latents, and
`head.policy` makes a `Policy` of it. Module names are those of the format in which π-Flow adapters are published, so
that the head's state dict is a part of such a file.

METHOD.md section 3 has the initialisation from a teacher.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from fewstep.config import Config
from fewstep.flow import TimeShift
from fewstep.models.ending import Ending
from fewstep.models.sharded import fill, whole
from fewstep.policies import DXPolicy, GMFlowPolicy, Policy

Unpack = Callable[[Tensor, int], Tensor]
"""(tokens (B, L, n·c·p²), c) → (B, n, c, H, W): the inverse of a family's packing to patches."""

INITIAL_STD = 0.05
"""Standard deviation of every mixture component at initialisation."""


class GMFlowConfig(Config):
    """Gaussian mixture policy (the paper's default)."""

    type: Literal["gmflow"] = "gmflow"
    """Kind of policy, "gmflow" or "dx"; the other fields depend on it."""
    components: int = Field(8, ge=1)
    """Mixture components K: 8 for text-to-image, 32 for ImageNet."""
    logstd_width: int = Field(1024, ge=1)
    """Inner width of the 2-layer MLP that predicts the mixture's log standard deviation."""
    bias_noise_std: float = Field(0.05, ge=0)
    """Standard deviation of the mixture's means around the teacher's velocity at the start; 0.1 in the published FLUX.2
    student."""


class DXConfig(Config):
    """Dynamic-x0 policy: x0 predicted at several times of the segment."""

    type: Literal["dx"] = "dx"
    """Kind of policy, "gmflow" or "dx"; the other fields depend on it."""
    points: int = Field(10, ge=1)
    """Number N of grid points, or of polynomial coefficients."""
    mode: Literal["grid", "polynomial"] = "grid"
    """What the outputs are: x0 at the points of a grid, with linear interpolation; or coefficients of a polynomial."""
    segment_size: float = Field(1.0, gt=0, le=1)
    """Raw time that the grid spans; belongs to the trained model."""
    shift: float = Field(1.0, gt=0)
    """The policy's own time shift; belongs to the trained model."""


def _kind(settings: object) -> str:
    """The `type` of a policy's settings, given as an object or as a recipe's tree, where it may be left out."""
    return settings.get("type", "gmflow") if isinstance(settings, dict) else getattr(settings, "type", "")


PolicyConfig = Annotated[
    Annotated[GMFlowConfig, Tag("gmflow")] | Annotated[DXConfig, Tag("dx")], Discriminator(_kind)
]


class PolicyHead(nn.Module, ABC):
    """Interface of heads: packed predictions from hidden states, and a policy from packed predictions.

    Attributes:
        norm_out: the student's own copy of the teacher's last norm.
        channels: latent channels C.
        outputs: values per token of the teacher's projection, C·p².
        bare: whether the teacher's projection, such as FLUX.2's, has no bias.
    """

    norm_out: nn.Module
    channels: int

    outputs: int
    bare: bool

    @property
    @abstractmethod
    def features(self) -> int:
        """Width of the packed output."""

    @abstractmethod
    def grow(self, ending: Ending, generator: torch.Generator) -> None:
        """Initialise from the teacher's last norm and output projection.

        All parameters, the teacher's and the head's, may be sharded; every rank has to call this at the same time.
        """

    @abstractmethod
    def parameters_of(self, packed: Tensor, unpack: Unpack) -> dict[str, Tensor]:
        """The result of `forward`, split and unpacked: arguments of the policy's class by name."""

    @abstractmethod
    def policy(self, packed: Tensor, unpack: Unpack, x_src: Tensor, sigma_src: Tensor) -> Policy:
        """The policy that starts at `x_src` (B, C, H, W), `sigma_src` (B,)."""


class GMFlowHead(PolicyHead):
    """Predicts a K-component Gaussian mixture over the velocity at every latent location.

    Args:
        ending: the teacher's last norm, which is copied, and output projection, as which every component's mean starts.
        channels: latent channels C.
        settings: number of components and width of the log-std MLP.
    """

    def __init__(self, ending: Ending, channels: int, settings: GMFlowConfig) -> None:
        super().__init__()
        proj_out = ending.projection
        self.channels, self.components = channels, settings.components
        self.bias_noise_std = settings.bias_noise_std
        self.outputs, self.bare = proj_out.out_features, proj_out.bias is None
        self.area = self.outputs // channels  # p², latent cells of a token
        width = proj_out.in_features
        self.norm_out = copy.deepcopy(ending.norm)
        self.proj_out_means = nn.Linear(width, self.components * proj_out.out_features)
        self.proj_out_logweights = nn.Linear(width, self.components * self.area)
        self.proj_out_logstds = nn.Sequential(
            nn.SiLU(),
            nn.Linear(ending.time_width or width, settings.logstd_width),
            nn.SiLU(),
            nn.Linear(settings.logstd_width, 1),
        )

    @property
    def features(self) -> int:
        """Width of the packed output: means, log-weights, and the sample's log-std on every token."""
        return self.components * (self.channels + 1) * self.area + 1

    def grow(self, ending: Ending, generator: torch.Generator) -> None:
        """Initialise from the teacher: at step 0 the policy moves like one teacher Euler step."""
        _copy(ending.norm, self.norm_out)
        weight, bias = _map(ending)  # (C·p², D), (C·p²,)
        # One number per component and latent channel, equal across the patch; components otherwise start as equals.
        noise = torch.randn(self.components, self.channels, 1, generator=generator) * self.bias_noise_std
        across = noise.expand(-1, -1, self.area)
        noise = (across.mT if ending.channel_last else across).flatten(1)
        fill(self.proj_out_means.weight, weight.repeat(self.components, 1))
        fill(self.proj_out_means.bias, (bias + noise.to(bias)).flatten())
        layers: Any = self.proj_out_logstds  # torch types what an index of a Sequential gives as Module alone
        for layer in (self.proj_out_logweights, layers[3]):
            fill(layer.weight, torch.zeros(layer.weight.shape))
            fill(layer.bias, torch.zeros(layer.bias.shape))
        fill(layers[3].bias, torch.tensor([math.log(INITIAL_STD)]))
        # torch's default initialisation of a linear layer, but from this generator
        hidden = layers[1]
        bound = 1 / math.sqrt(hidden.in_features)
        for parameter in (hidden.weight, hidden.bias):
            fill(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, hidden: Tensor, time_embedding: Tensor, *more: Any) -> Tensor:
        """(B, L, D), (B, D) → (B, L, features); `more` goes to the norm, if the network gives it more."""
        normed = self.norm_out(hidden, time_embedding, *more)
        # Some networks embed further times after the samples' own, or keep an axis of one token.
        of_samples = time_embedding[: len(hidden)].flatten(1)
        # Detached, as in the paper: the log-std is a function of time alone, and must not train the transformer.
        logstds = self.proj_out_logstds(of_samples.detach())
        return torch.cat(
            [
                self.proj_out_means(normed),
                self.proj_out_logweights(normed),
                # One number per sample, on every token: a network's output is one tensor, which FSDP and hooks handle.
                logstds[:, None].expand(-1, hidden.shape[1], -1),
            ],
            dim=-1,
        )

    def parameters_of(self, packed: Tensor, unpack: Unpack) -> dict[str, Tensor]:
        """The result of `forward`, split and unpacked, float32.

        Means (B, K, C, H, W), logweights (B, K, 1, H, W) normalised over K, logstds (B, 1, 1, 1, 1).
        """
        packed = packed.float()  # policies divide by small σ: bfloat16 ends with the network
        # As `forward` has concatenated them; unpacking gives p² cells of each token their own values.
        sizes = [self.components * self.channels * self.area, self.components * self.area, 1]
        means, logweights, logstds = packed.split(sizes, dim=-1)
        return {
            "means": unpack(means, self.channels),
            "logstds": logstds[:, 0].view(-1, 1, 1, 1, 1),
            "logweights": unpack(logweights, 1).log_softmax(dim=1),
        }

    def policy(self, packed: Tensor, unpack: Unpack, x_src: Tensor, sigma_src: Tensor) -> Policy:
        """The policy that starts at `x_src` (B, C, H, W), `sigma_src` (B,)."""
        return GMFlowPolicy(**self.parameters_of(packed, unpack), x_src=x_src, sigma_src=sigma_src)


class DXHead(PolicyHead):
    """Predicts N velocities, which become x0 at N times of the segment.

    Args:
        ending: the teacher's last norm, which is copied, and output projection, as whose copies the velocities start.
        channels: latent channels C.
        settings: number of points, and what they stand for.
    """

    def __init__(self, ending: Ending, channels: int, settings: DXConfig) -> None:
        super().__init__()
        proj_out = ending.projection
        self.channels, self.settings = channels, settings
        self.outputs, self.bare = proj_out.out_features, proj_out.bias is None
        self.norm_out = copy.deepcopy(ending.norm)
        self.proj_out = nn.Linear(proj_out.in_features, settings.points * proj_out.out_features)

    @property
    def features(self) -> int:
        """Width of the packed output."""
        return self.proj_out.out_features

    def grow(self, ending: Ending, generator: torch.Generator) -> None:
        """Initialise from the teacher: grid, N copies; polynomial, a copy for order 0 and zeros above."""
        _copy(ending.norm, self.norm_out)
        points = self.settings.points
        weight, bias = _map(ending)
        weight, bias = weight.repeat(points, 1), bias.repeat(points)
        if self.settings.mode == "polynomial":  # order 0 is x̂_0 at the source; higher orders start at 0
            weight[self.outputs :] = 0
            bias[self.outputs :] = 0
        fill(self.proj_out.weight, weight)
        fill(self.proj_out.bias, bias)

    def forward(self, hidden: Tensor, time_embedding: Tensor, *more: Any) -> Tensor:
        """(B, L, D), (B, D) → (B, L, features); `more` goes to the norm, if the network gives it more."""
        return self.proj_out(self.norm_out(hidden, time_embedding, *more))

    def parameters_of(self, packed: Tensor, unpack: Unpack) -> dict[str, Tensor]:
        """The result of `forward`, unpacked: output (B, N, C, H, W), float32."""
        return {"output": unpack(packed.float(), self.channels)}

    def policy(self, packed: Tensor, unpack: Unpack, x_src: Tensor, sigma_src: Tensor) -> Policy:
        """The policy that starts at `x_src` (B, C, H, W), `sigma_src` (B,)."""
        s = self.settings
        return DXPolicy(
            **self.parameters_of(packed, unpack), x_src=x_src, sigma_src=sigma_src,
            segment_size=s.segment_size, shift=TimeShift(s.shift), mode=s.mode,
        )  # fmt: skip


def _map(ending: Ending) -> tuple[Tensor, Tensor]:
    """The whole weight (C·p², D) and bias (C·p²,) of the map to velocities, whose parameters may be sharded."""
    layer = ending.projection
    weight = ending.sign * whole(layer.weight)
    # Some teachers, such as FLUX.2, have no bias.
    return weight, torch.zeros(len(weight)) if layer.bias is None else ending.sign * whole(layer.bias)


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters of `source` to `target`, a module of the same structure; either may be sharded."""
    for theirs, own in zip(source.parameters(), target.parameters(), strict=True):
        fill(own, whole(theirs))


def build_head(ending: Ending, channels: int, settings: PolicyConfig) -> PolicyHead:
    """The head that `settings` describe; `grow` initialises it."""
    if isinstance(settings, GMFlowConfig):
        return GMFlowHead(ending, channels, settings)
    return DXHead(ending, channels, settings)
