"""UNets of diffusion models: diffusers' `UNet2DModel` and `UNet2DConditionModel` as teachers of a flow.

The pipeline's scheduler says what they predict and under which schedule; `prediction.py` converts noise, x_0 or v to a
velocity. The policy head takes the place of the last convolution, `conv_out`, so that its input is the output of
`conv_norm_out` and its activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.hub import hub_folder
from fewstep.models.family import Transformer
from fewstep.models.module_family import ModuleFamily, OwnNetwork
from fewstep.models.prediction import DiffusionPrediction
from fewstep.models.pretrained import SCHEDULER, VARIANTS, read, scheduler_config

FILES = ("config.json", "scheduler_config.json", "diffusion_pytorch_model*", "unet/*", "scheduler/*")
"""Files that are fetched of a hub repository: a UNet's own, or those of a pipeline's UNet and scheduler."""


def _unet(_class_name: str = "UNet2DModel", **config: Any) -> Transformer:
    """A new UNet of one of diffusers' classes."""
    import diffusers

    return getattr(diffusers, _class_name)(**config)


@dataclass(frozen=True)
class UNet(ModuleFamily):
    """Family of diffusers' UNets; a network's `config` may hold a `scheduler`, in place of the folder's."""

    name: str = "unet"
    network: Callable[..., nn.Module] = _unet
    projection: str = "conv_out"
    channels: int = 0  # unused, as `width`: the methods below read the network's config
    width: int = 0

    def load(self, path: str) -> Transformer:
        """The UNet of a pipeline's folder or hub id, or of its own with a `scheduler_config.json` in it."""
        import diffusers

        folder = Path(path) if Path(path).is_dir() else hub_folder(path, FILES, VARIANTS)
        place = folder if (folder / "config.json").exists() else folder / "unet"
        config = diffusers.UNet2DModel.load_config(place)
        # Pipelines differ in the class of their UNet: the configuration names it.
        kind = getattr(diffusers, config["_class_name"])
        _check_inputs(config)
        network = read(kind, place)
        scheduler = config[SCHEDULER] if SCHEDULER in config else _scheduler_config(folder)
        prediction = DiffusionPrediction.from_scheduler(scheduler)
        # The scheduler goes into the network's own configuration, so that teachers and students save it along.
        return OwnNetwork(network, self, prediction, {**config, SCHEDULER: dict(scheduler)})

    def build(self, config: dict[str, Any]) -> Transformer:
        """A new UNet from its class's keyword arguments, and a `scheduler`; default: 1,000 linear betas, predicts ε."""
        own = {key: value for key, value in config.items() if key != SCHEDULER}
        _check_inputs(config)
        prediction = DiffusionPrediction.from_scheduler(config.get(SCHEDULER, {}))
        return OwnNetwork(
            self.network(**own), self, prediction, {"_class_name": "UNet2DModel", SCHEDULER: {}} | config
        )

    def call(self, network: Transformer, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Call the UNet: noisy state (B, C, H, W) and timestep (B,) → its prediction (B, C, H, W)."""
        if not self._conditioned(network):
            return network(x, t, return_dict=False)[0]
        return network(
            x,
            t,
            encoder_hidden_states=conditioning.states,
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
        )[0]

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C."""
        return transformer.network.config.in_channels

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states that its cross-attention takes; 0 if it has none."""
        network = transformer.network
        return network.config.cross_attention_dim if self._conditioned(network) else 0

    def patch(self, transformer: Transformer) -> int:
        """Number that both sides must be multiples of: every level but the last halves them."""
        return 2 ** (len(transformer.network.config.block_out_channels) - 1)

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Its blocks in the order of the forward pass: down, middle, up."""
        network = transformer.network
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def _conditioned(self, network: Transformer) -> bool:
        return "cross_attention_dim" in network.config


def _check_inputs(config: Mapping[str, Any]) -> None:
    """Refuse a UNet that takes other inputs than a state, a time and token states, or has other output channels.

    Raises:
        UserError: it does, or has.
    """
    wanted = [
        key for key in ("addition_embed_type", "class_embed_type", "num_class_embeds") if config.get(key)
    ]
    if wanted:
        raise UserError(
            f"the teacher's UNet takes further inputs ({', '.join(wanted)}), which the family 'unet' does not give: "
            "register a family of your own that does (docs/tutorials/own_teacher.md)."
        )
    into, out = config.get("in_channels"), config.get("out_channels")
    if into is not None and out is not None and into != out:
        raise UserError(
            f"the teacher's UNet maps {into} channels to {out}, but a velocity has as many channels as the state: "
            "networks for inpainting, or that also predict variances, can't be teachers."
        )


def _scheduler_config(folder: Path) -> dict[str, Any]:
    """Configuration of the scheduler of a UNet's folder, or of its pipeline's folder.

    Raises:
        ValueError: the folder has none.
    """
    config = scheduler_config(folder)
    if config is None:
        raise ValueError(f"{folder} has no scheduler/scheduler_config.json to say what its UNet predicts")
    return config
