"""UNets of diffusion models: diffusers' `UNet2DModel` and `UNet2DConditionModel` as teachers of a flow.

Their schedule and prediction come from the pipeline's scheduler; `prediction.py` turns noise, x_0 or v into a
velocity. The policy head takes the place of the last convolution, `conv_out`, and sees what follows `conv_norm_out`
and its activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.own import ModuleFamily, OwnNetwork
from fewstep.models.prediction import DiffusionPrediction
from fewstep.models.pretrained import SCHEDULER, read, scheduler_config


def _unet(_class_name: str = "UNet2DModel", **config: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, _class_name)(**config)


@dataclass(frozen=True)
class UNet(ModuleFamily):
    """Family of diffusers' UNets; its `config` is theirs, with `scheduler` where it is not the folder's."""

    name: str = "unet"
    network: Callable[..., nn.Module] = _unet
    projection: str = "conv_out"
    channels: int = 0  # of the network's config
    width: int = 0

    def load(self, path: str) -> nn.Module:
        """The UNet of a pipeline's folder or hub id, or of a folder of its own with `scheduler_config.json` in it."""
        import diffusers

        parts = {"subfolder": "unet"} if not (Path(path) / "config.json").exists() else {}
        config = diffusers.UNet2DModel.load_config(path, **parts)
        kind = getattr(diffusers, config["_class_name"])
        _check_inputs(config)
        network = read(kind, path, **parts)
        scheduler = config[SCHEDULER] if SCHEDULER in config else _scheduler_config(path)
        prediction = DiffusionPrediction.from_scheduler(scheduler)
        return OwnNetwork(network, self, prediction, {**config, SCHEDULER: dict(scheduler)})

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A new UNet, from its class's keyword arguments and a `scheduler` ({} is 1,000 linear betas, predicting ε)."""
        own = {key: value for key, value in config.items() if key != SCHEDULER}
        _check_inputs(config)
        prediction = DiffusionPrediction.from_scheduler(config.get(SCHEDULER, {}))
        return OwnNetwork(
            self.network(**own), self, prediction, {"_class_name": "UNet2DModel", SCHEDULER: {}} | config
        )

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        if not self._conditioned(network):
            return network(x, t, return_dict=False)[0]
        return network(
            x,
            t,
            encoder_hidden_states=conditioning.states,
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
        )[0]

    def latent_channels(self, transformer: nn.Module) -> int:
        return transformer.network.config.in_channels

    def condition_width(self, transformer: nn.Module) -> int:
        network = transformer.network
        return network.config.cross_attention_dim if self._conditioned(network) else 0

    def patch(self, transformer: nn.Module) -> int:
        """What sides must be multiples of: every level but the last halves them."""
        return 2 ** (len(transformer.network.config.block_out_channels) - 1)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        network = transformer.network
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def _conditioned(self, network: nn.Module) -> bool:
        return "cross_attention_dim" in network.config


def _check_inputs(config: Mapping[str, Any]) -> None:
    """Refuse a UNet that wants more than a state, a time and token states, or answers in other channels.

    Raises:
        UserError: it does.
    """
    wanted = [
        key for key in ("addition_embed_type", "class_embed_type", "num_class_embeds") if config.get(key)
    ]
    if wanted:
        raise UserError(
            f"the teacher's UNet takes further inputs ({', '.join(wanted)}), which the family 'unet' does not give: "
            "register a family of your own that does (docs/own_teacher.md)."
        )
    into, out = config.get("in_channels"), config.get("out_channels")
    if into is not None and out is not None and into != out:
        raise UserError(
            f"the teacher's UNet maps {into} channels to {out}, and a velocity has the state's own: networks for "
            "inpainting, or that learned variances, are no teachers."
        )


def _scheduler_config(path: str) -> dict[str, Any]:
    """The scheduler of a UNet's folder, of its pipeline's, or of a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        from diffusers import DDPMScheduler

        return DDPMScheduler.load_config(path, subfolder=SCHEDULER)
    config = scheduler_config(folder)
    if config is None:
        raise ValueError(f"{path} has no scheduler/scheduler_config.json to say what its UNet predicts")
    return config
