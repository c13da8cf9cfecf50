"""Families for your own networks: any network that maps (x, t, conditioning) to a velocity.

    register(ModuleFamily("mine", MyNetwork, projection="out", channels=3, width=384))

makes a folder with the network's weights (safetensors) and a config.json of its keyword arguments a teacher. Where your
network differs from what is assumed here, override a method. `jobs/examples/own_teacher.py` is a complete example;
docs/tutorials/own_teacher.md explains it.

The student's policy head takes the place of the network's last projection: it gets the features that the projection
gets, and starts as copies of it. So the network has to end in a linear or convolutional layer, whose output may only be
rearranged (patches to an image). The first call checks this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.hub import hub_folder
from fewstep.models.family import Family, Transformer
from fewstep.models.prediction import DiffusionPrediction
from fewstep.models.projection import LastProjection, time_features, tokens_of
from fewstep.policies.base import per_latent


@dataclass(frozen=True)
class ModuleFamily(Family):
    """A family of networks `network(**config)` whose call `(x, t, conditioning)` gives a velocity (B, C, H, W).

    Attributes:
        name: of the family, in recipes.
        network: class of the network.
        projection: name of the last layer (nn.Linear on tokens, or nn.Conv2d), such as "out" or "head.proj".
        channels: latent channels C.
        width: width D of the token states (B, L, D) in its conditioning; 0 if it takes none.
        patch_size: side p of a patch, where `projection` gives tokens (B, H·W/p², C·p²).
        prediction: for networks that predict noise, x_0 or v under a diffusion schedule: they are called with that
            schedule's states and timesteps (see `prediction.py`). None for those that predict the velocity.
    """

    name: str
    network: Callable[..., nn.Module]
    projection: str
    channels: int
    width: int
    patch_size: int = 1
    prediction: DiffusionPrediction | None = None

    def load(self, path: str) -> Transformer:
        """The network of a folder or hub id with `config.json` (optional) and `*.safetensors`, in float32."""
        folder = Path(path)
        if not folder.is_dir():
            # Only what is read below: repositories may hold much more.
            folder = hub_folder(path, ["config.json", "*.safetensors"])
        config = json.loads(file.read_text()) if (file := folder / "config.json").exists() else {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise OSError(f"{folder} has no *.safetensors")
        transformer = self.build(config)
        state = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
        try:
            transformer.network.load_state_dict(state)
        except RuntimeError as error:  # names or shapes don't match; torch lists them in many lines
            raise ValueError(" ".join(str(error).split())[:300]) from None
        return transformer

    def build(self, config: dict[str, Any]) -> Transformer:
        """A new network, from the keyword arguments of its class; entries whose names begin with _ are left out."""
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        return OwnNetwork(self.network(**own), self, self.prediction, config)

    def published(self, transformer: Transformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights under the network's own names, without the wrapper's prefix."""
        return {name.removeprefix("network."): tensor for name, tensor in weights.items()}

    def call(self, network: Transformer, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Call your network itself: (B, C, H, W), (B,) → (B, C, H, W)."""
        return network(x, t, conditioning)

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C, as registered."""
        return self.channels

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of its token states, as registered."""
        return self.width

    def patch(self, transformer: Transformer) -> int:
        """Side of a patch, as registered."""
        return self.patch_size

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: Any,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the wrapped network; it takes no guidance scale."""
        return transformer(x, t, conditioning)

    def pack(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → tokens (B, H·W/p², C·p²), values ordered by channel, row, column; the inverse of `unpack`."""
        return F.pixel_unshuffle(x, self.patch_size).flatten(2).mT

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·p²) → n latents per sample, (B, n, c, H, W)."""
        p, batch = self.patch_size, len(tokens)
        patches = tokens.mT.reshape(batch, -1, height // p, width // p)
        return F.pixel_shuffle(patches, p).view(batch, -1, channels, height, width)

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """All linear and ungrouped convolutional layers except the last projection."""
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

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """None, so that FSDP gathers the network as one piece; families of large networks name their blocks here."""
        return []

    def trunk(self, transformer: Transformer) -> list[nn.Module]:
        """Its blocks, or the network as a whole if it names none."""
        return self.blocks(transformer) or [transformer.network]

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """None; families whose networks have such parameters name them here."""
        return []


class OwnNetwork(nn.Module):
    """Your network in the form that students need: features, then a last norm, then a last projection.

    Args:
        network: gives a velocity, or another prediction.
        family: how to call the network, and how its output is packed.
        prediction: what the network predicts, if not the velocity.
        config: keyword arguments of the network's class, for the files of teachers and students.
    """

    projection: LastProjection

    def __init__(
        self,
        network: Transformer,
        family: ModuleFamily,
        prediction: DiffusionPrediction | None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network, self.family, self.prediction, self.config = network, family, prediction, dict(config)
        layer = _last_layer(network, family)
        # The network is called as it is, and its last layer's input, the features, caught on the way.
        layer.register_forward_hook(self._catch)
        projection = LastProjection(layer, prediction is not None)
        self.norm_out, self.proj_out = _NoNorm(), projection  # a student's head takes their places
        self.__dict__["projection"] = projection  # not as a submodule: the network has the layer already
        self._caught: tuple[Tensor, Tensor] | None = None
        self._checked = False

    def forward(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """(B, C, H, W), (B,) → packed velocity (B, L, C·p²), or a policy head's output for the same features."""
        state, time = (x, t) if self.prediction is None else self.prediction.question(x, t)
        answer = self.family.call(self.network, state, time, conditioning)
        caught, self._caught = self._caught, None  # not kept: it holds the step's activations
        if not self._checked and not x.is_meta:
            self._check(answer, caught)
        assert caught is not None, "`_check` has refused networks that don't call their last layer"
        # In float32 again, also where the network computes in bfloat16.
        tokens = self.projection.tokens(caught[0].float())
        if self.prediction is not None:
            a, b = (per_latent(c, tokens).to(tokens) for c in self.prediction.coefficients(t))
            packed = self.family.pack(x).to(tokens)
            # The tokens that `LastProjection` maps to a·x + b·prediction
            tokens = torch.cat([b * tokens, a * packed, b.expand(-1, tokens.shape[1], 1)], dim=-1)
        # Heads predict the log-std from a time embedding; the network's own, if it has one, is unknown here.
        time_embedding = time_features(t, self.projection.in_features).to(tokens)
        return self.proj_out(self.norm_out(tokens, time_embedding))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, if the network has a method for it.

        Raises:
            UserError: it has none.
        """
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
        """Nothing: diffusers' models record here where they were loaded from, which this config does not hold."""

    def _catch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._caught = inputs[0], output

    @torch.no_grad()
    def _check(self, answer: Tensor, caught: tuple[Tensor, Tensor] | None) -> None:
        """Refuse a network whose output is not that of its last projection, rearranged.

        Args:
            answer: the network's output, (B, C, H, W).
            caught: input and output of the layer that the family names as the last; None if it was not called.

        Raises:
            UserError: the outputs differ, or the layer was not called.
        """
        name, family = self.family.projection, self.family
        if caught is None:
            raise UserError(
                f"family {family.name!r}: its network never calls its layer {name!r}: name the last one."
            )
        is_image = isinstance(self.projection.layer, nn.Conv2d)
        output = caught[1].flatten(2).mT if is_image else tokens_of(caught[1])
        # Bit for bit: rearranging does not round, whereas any arithmetic after the layer would.
        unpacked = family.unpack(output, *answer.shape[1:])[:, 0]
        if not torch.equal(unpacked.float(), answer.float()):
            raise UserError(
                f"family {family.name!r}: its network's answer is not the output of {name!r} unpacked: name the last "
                "layer, give patch_size, or override `unpack` (and `pack`) with the network's own order."
            )
        self._checked = True  # once per network: the order of its output does not change


class _NoNorm(nn.Module):
    """Takes the place of a last norm: the features that were caught are normalised already."""

    def forward(self, hidden: Tensor, time_embedding: Tensor) -> Tensor:
        return hidden


def _last_layer(network: Transformer, family: ModuleFamily) -> nn.Linear | nn.Conv2d:
    """The layer that the family names as the network's last.

    Raises:
        UserError: there is no such layer, or it is none that `LastProjection` can copy.
    """
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
