"""Memory of one GPU, by part; and the part of it that stays over the whole run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fewstep.models.network import PolicyNetwork
from fewstep.models.precision import held_bytes
from fewstep.train.optimizers import state_bytes
from fewstep.train.parallel import BUCKET_BYTES, is_sharded
from fewstep.train.recipe import DistillRecipe


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part."""

    weights: int
    """This GPU's share of all weights, as they are held."""
    gathered: int
    """What FSDP has gathered at a time: two blocks (one computes, one arrives) and what belongs to no block."""
    gradients: int
    """This GPU's share, float32, and those of one block before they are reduced."""
    optimizer: int
    """This GPU's share of the optimizer's averages, in float32 or, by Adam of 8 bits, in integers with their scales."""
    ema: int
    """This GPU's share of the EMA of the student's own weights, float32; nothing where the host keeps it."""
    activations: int
    """The most that is alive at a time besides, in one micro-batch."""

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(vars(self).values())

    def twice(self) -> Memory:
        """The same for two networks of one size, which compute one after the other, so that one is gathered at once."""
        return Memory(**{name: size if name == "gathered" else 2 * size for name, size in vars(self).items()})


def standing_memory(network: PolicyNetwork, recipe: DistillRecipe, gpus: int) -> Memory:
    """What stays in memory over the whole run, with no activations.

    Args:
        network: teacher and student, on the meta device, frozen weights as `train.precision` holds them.
        recipe: how the run is spread, and what optimizes it.
        gpus: how many GPUs share it.
    """
    train = recipe.train
    everything = network.nbytes
    own = sum(p.nbytes for p in network.trainable().values())
    own_blocks = network.family.blocks(network.transformer)
    slots = state_bytes(network.trainable().values(), own_blocks, recipe.optimizer)
    ema = 0 if recipe.optimizer.ema_offload and train.gpu else own
    if not is_sharded(train, gpus):
        # Averaging copies small gradients into messages, one after the other.
        gradients = own if gpus == 1 else own + min(own, BUCKET_BYTES)
        return Memory(everything, 0, gradients, slots, ema, activations=0)
    blocks = [block for part in network.transformers() for block in network.family.blocks(part)]
    sizes = sorted(held_bytes(block) for block in blocks)
    outside = everything - sum(sizes)
    largest = max([_trainable_bytes(block) for block in blocks], default=own)
    return Memory(
        weights=everything // gpus,
        gathered=outside + sum(sizes[-2:]),
        gradients=own // gpus + 2 * largest,
        optimizer=slots // gpus,
        ema=ema // gpus,
        activations=0,
    )


def _trainable_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)
