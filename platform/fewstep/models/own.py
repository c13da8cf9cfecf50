"""A teacher of one's own: any network that maps (x, t, conditioning) to a velocity.

    register(ModuleFamily("mine", MyNetwork, projection="out", channels=3, width=384))

and its weights, as safetensors beside a config.json of `MyNetwork`'s keyword arguments, are a teacher. What else
differs overrides a method. `jobs/examples/own_teacher.py` is a whole one; docs/own_teacher.md explains it.

The student's policy head takes the place of the network's last projection: it sees the features that the
projection sees, and starts as copies of it. So the network must end in one linear or convolutional layer;
after it, its output may be rearranged (patches to an image) and nothing else, which the first call checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.models.family import Family
from fewstep.models.prediction import DiffusionPrediction
from fewstep.policies.base import per_latent

TIME_SCALE = 1000.0
"""t in [0, 1] × this is what sinusoids of the usual frequencies resolve."""


@dataclass(frozen=True)
class ModuleFamily(Family):
    """A family of networks `network(**config)` whose call `(x, t, conditioning)` gives a velocity (B, C, H, W).

    Attributes:
        name: what recipes call it.
        network: its class.
        projection: name of the last layer (nn.Linear on tokens, or nn.Conv2d), such as "out" or "head.proj".
        channels: latent channels C.
        width: width D of the token states (B, L, D) in its conditioning; 0 if it takes none.
        patch_size: side p of a patch, where `projection` gives tokens (B, H·W/p², C·p²).
        prediction: if it predicts noise, x_0 or v under a diffusion schedule; it then is called with that
            schedule's states and timesteps (see `prediction.py`).
    """

    name: str
    network: Callable[..., nn.Module]
    projection: str
    channels: int
    width: int
    patch_size: int = 1
    prediction: DiffusionPrediction | None = None

    def load(self, path: str) -> nn.Module:
        """The network of a folder or hub id with `config.json` (optional) and `*.safetensors`, in float32."""
        folder = Path(path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(path, allow_patterns=["config.json", "*.safetensors"]))
        config = json.loads(file.read_text()) if (file := folder / "config.json").exists() else {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise OSError(f"{folder} has no *.safetensors")
        transformer = self.build(config)
        state = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
        try:
            transformer.network.load_state_dict(state)
        except RuntimeError as error:  # names or shapes; torch lists them over many lines
            raise ValueError(" ".join(str(error).split())[:300]) from None
        return transformer

    def build(self, config: dict[str, Any]) -> nn.Module:
        own = {key: value for key, value in config.items() if not key.startswith("_")}  # `_…` are notes
        return OwnNetwork(self.network(**own), self, self.prediction, config)

    def published(self, transformer: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's own names, without the wrapper's."""
        return {name.removeprefix("network."): tensor for name, tensor in weights.items()}

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Ask the network itself: (B, C, H, W), (B,) → (B, C, H, W)."""
        return network(x, t, conditioning)

    def latent_channels(self, transformer: nn.Module) -> int:
        return self.channels

    def condition_width(self, transformer: nn.Module) -> int:
        return self.width

    def patch(self, transformer: nn.Module) -> int:
        return self.patch_size

    def denoise(self, transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        return transformer(x, t, conditioning)

    def pack(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → tokens (B, H·W/p², C·p²): channel, then row, then column; `unpack`'s inverse."""
        return F.pixel_unshuffle(x, self.patch_size).flatten(2).mT

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        p, batch = self.patch_size, len(tokens)
        patches = tokens.mT.reshape(batch, -1, height // p, width // p)
        return F.pixel_shuffle(patches, p).view(batch, -1, channels, height, width)

    def lora_targets(self, transformer: nn.Module) -> list[str]:
        """Every linear and ungrouped convolutional layer but the last projection."""
        last = transformer.network.get_submodule(self.projection)
        targets = [
            name
            for name, module in transformer.named_modules()
            if module is not last
            and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        ]
        if not targets:
            raise UserError(
                f"student.lora: the family {self.name!r} has no linear or convolutional layer to adapt: set "
                "student.lora=null to train the head alone."
            )
        return targets

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """None: FSDP gathers the network as one piece; large ones name their blocks here."""
        return []

    def unused_parameters(self, transformer: nn.Module) -> list[str]:
        return []


class OwnNetwork(nn.Module):
    """A network in the form that policy heads grow on: features, a last norm, a last projection.

    Args:
        network: gives a velocity, or another prediction.
        family: how to call it and how its output is packed.
        prediction: what it predicts, if that is no velocity.
        config: its keyword arguments, for the files of teachers and students.
    """

    def __init__(
        self,
        network: nn.Module,
        family: ModuleFamily,
        prediction: DiffusionPrediction | None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network, self.family, self.prediction, self.config = network, family, prediction, dict(config)
        layer = _last_layer(network, family)
        layer.register_forward_hook(self._catch)
        projection = LastProjection(layer, prediction is not None)
        self.norm_out, self.proj_out = _NoNorm(), projection  # whose places a student's head takes
        self.__dict__["projection"] = projection
        self._caught: tuple[Tensor, Tensor] | None = None
        self._checked = False

    def forward(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """(B, C, H, W), (B,) → packed velocity (B, L, C·p²), or what a policy head makes of the same features."""
        state, time = (x, t) if self.prediction is None else self.prediction.question(x, t)
        answer = self.family.call(self.network, state, time, conditioning)
        caught, self._caught = self._caught, None
        if not self._checked and not x.is_meta:
            self._check(answer, caught)
        tokens = self.projection.tokens(caught[0])
        if self.prediction is not None:
            a, b = (per_latent(c, tokens).to(tokens) for c in self.prediction.coefficients(t))
            packed = self.family.pack(x).to(tokens)
            tokens = torch.cat([b * tokens, a * packed, b.expand(-1, tokens.shape[1], 1)], dim=-1)
        time_embedding = time_features(t, self.projection.in_features).to(tokens)
        return self.proj_out(self.norm_out(tokens, time_embedding))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute in backward, where the network knows how."""
        if not hasattr(self.network, "enable_gradient_checkpointing"):
            raise UserError(
                f"train.activation_checkpointing: networks of the family {self.family.name!r} have no "
                "enable_gradient_checkpointing(): set it to false, or write that method."
            )
        self.network.enable_gradient_checkpointing()

    def save_config(self, folder: Path) -> None:
        """Write `config.json`, as diffusers' models do."""
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    def register_to_config(self, **_: Any) -> None:
        """Diffusers' models note here where they were loaded from; this one's config has no such notes."""

    def _catch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._caught = inputs[0], output

    @torch.no_grad()
    def _check(self, answer: Tensor, caught: tuple[Tensor, Tensor] | None) -> None:
        """Refuse a network whose answer is not its last projection's, rearranged."""
        name, family = self.family.projection, self.family
        if caught is None:
            raise UserError(
                f"family {family.name!r}: its network never calls its layer {name!r}: name the last one."
            )
        is_image = isinstance(self.projection.layer, nn.Conv2d)
        output = caught[1].flatten(2).mT if is_image else _tokens(caught[1])
        unpacked = family.unpack(output, *answer.shape[1:])[:, 0]
        if not torch.equal(unpacked.float(), answer.float()):
            raise UserError(
                f"family {family.name!r}: its network's answer is not the output of {name!r} unpacked: name the last "
                "layer, give patch_size, or override `unpack` (and `pack`) with the network's own order."
            )
        self._checked = True


class LastProjection(nn.Module):
    """A network's last layer as a linear map of tokens, the form in which heads copy it.

    A k×k convolution is a linear map of each location's k×k neighbourhood. Where the layer gives another
    prediction than a velocity, tokens are `[b·features, a·x, b]` and the map `[W, 1, bias]`: u = a·x + b·(W·features
    + bias), so that a head's copy is a velocity, too.

    Args:
        layer: the layer.
        mixes_state: whether tokens have those two parts more.
        owns_layer: whether the layer is a part of this module; otherwise it stays registered in the network alone.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, mixes_state: bool, *, owns_layer: bool = False) -> None:
        super().__init__()
        if owns_layer:
            self.layer = layer
        else:
            self.__dict__["layer"] = layer
        self.mixes_state = mixes_state

    @property
    def weight(self) -> Tensor:
        """(C·p², features)."""
        weight = self.layer.weight.flatten(1)
        if not self.mixes_state:
            return weight
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return torch.cat([weight, identity, self._layer_bias()[:, None]], dim=1)

    @property
    def bias(self) -> Tensor:
        """(C·p²,)."""
        bias = self._layer_bias()
        return torch.zeros_like(bias) if self.mixes_state else bias

    @property
    def in_features(self) -> int:
        """Features of a token."""
        own = self.layer.weight[0].numel()
        return own + self.out_features + 1 if self.mixes_state else own

    @property
    def out_features(self) -> int:
        """C·p²."""
        return len(self.layer.weight)

    def tokens(self, hidden: Tensor) -> Tensor:
        """The layer's input → (B, L, features of the layer)."""
        if isinstance(self.layer, nn.Linear):
            return _tokens(hidden)
        layer = self.layer
        return F.unfold(hidden, layer.kernel_size, layer.dilation, _padding(layer)).mT

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, features) → (B, L, C·p²)."""
        return F.linear(tokens, self.weight, self.bias)

    def _layer_bias(self) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        return weight.new_zeros(len(weight)) if bias is None else bias


class _NoNorm(nn.Module):
    """In the place of a last norm: the features that were caught are normed already."""

    def forward(self, hidden: Tensor, time_embedding: Tensor) -> Tensor:
        return hidden


def time_features(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t (B,) at frequencies from 1 down to 1/10,000, (B, width) float32."""
    half = (width + 1) // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = TIME_SCALE * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]


def _tokens(hidden: Tensor) -> Tensor:
    """(B, D) or (B, …, D) → (B, L, D)."""
    return hidden[:, None] if hidden.ndim == 2 else hidden.flatten(1, -2)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer.padding, tuple):
        return layer.padding
    same = layer.padding == "same"
    return tuple(
        d * (k - 1) // 2 if same else 0 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
    )


def _last_layer(network: nn.Module, family: ModuleFamily) -> nn.Linear | nn.Conv2d:
    try:
        layer = network.get_submodule(family.projection)
    except AttributeError:
        layer = None
    plain = isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and layer.stride == (1, 1)
        and layer.padding_mode == "zeros"
    )
    if not plain:
        raise UserError(
            f"family {family.name!r}: projection {family.projection!r} is {type(layer).__name__}: name the network's "
            "last layer, an nn.Linear or an ungrouped, unstrided nn.Conv2d with zero padding."
        )
    return layer
