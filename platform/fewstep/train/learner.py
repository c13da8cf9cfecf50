"""A model under training on one rank, and the optimizer step that updates it.

Random numbers come from generators seeded by (seed, step, sample), so that a resumed run gives what the uninterrupted
run would have given: bit for bit in float32 on a CPU, and up to the order of sums with another number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep.data.stream import Batch
from fewstep.distill import PowerEMA, sample_rms
from fewstep.draws import SampleGenerators, mixed_seed
from fewstep.models.conditioning import Conditioning
from fewstep.models.dropout import seed_dropout
from fewstep.models.sharded import whole
from fewstep.train.checkpoint import optimizer_tensors
from fewstep.train.objectives import build_objective
from fewstep.train.optimizers import build_optimizers, lr_share
from fewstep.train.parallel import average_gradients, is_sharded, shard
from fewstep.train.progress import LossMeter
from fewstep.train.recipe import DistillRecipe, TeacherRecipe


class Learner:
    """The objective with its model, the optimizers, and the EMA of the weights.

    Args:
        recipe: what is trained, and how.
        null: the null condition (B = 1) of guidance.
        device: of the model.
        rank, world_size: this process, and the number of processes that train together.
        setbacks: how often the run went back to an earlier checkpoint.

    Attributes:
        recipe: what is trained, and how.
        device: of the model.
        rank, world_size: this process, and the number of processes that train together.
        sharded: whether each rank holds a part of the model (FSDP) instead of all of it.
        objective: the model and its losses.
        parameters: the trained ones, by name.
        optimizers: of those parameters.
        ema: of those parameters.
        share: this rank's part of every global batch.
        draw_seed: seed of the order of the data and of all random numbers of the steps.
        lr_factor: factor on the scheduled learning rates.
    """

    def __init__(
        self,
        recipe: DistillRecipe | TeacherRecipe,
        null: Conditioning,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        setbacks: int = 0,
    ) -> None:
        self.recipe, self.device = recipe, device
        # After the run went back: other random numbers and a lower rate, or the same would happen again.
        self.draw_seed = mixed_seed(recipe.train.seed, setbacks) if setbacks else recipe.train.seed
        self.lr_factor = recipe.health.lr_factor**setbacks
        self.rank, self.world_size = rank, world_size
        self.sharded = is_sharded(recipe.train, world_size)
        self.objective = build_objective(recipe, null, device, self.sharded)
        shard(self.objective, recipe.train, world_size)
        self.objective.read_weights(device)  # after sharding: each rank reads its own part of the files
        self.parameters = self.objective.parameters()
        blocks = self.objective.family.blocks(self.objective.transformer)
        self.optimizers = build_optimizers(self.parameters.values(), blocks, recipe.optimizer)
        config = recipe.optimizer
        self.ema = PowerEMA(self.parameters, config.ema_gamma, config.ema_offload, config.ema_from)
        self.share = recipe.share(rank, world_size)

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds: parameters, EMA and the optimizers' state."""
        slots = optimizer_tensors(self.optimizers, self.parameters)
        # The EMA is called "average" in checkpoints since the first version: under another name, those would not load.
        return {"model": self.parameters, "average": self.ema.state_dict(), "optimizer": slots}

    def averaged(self) -> dict[str, Tensor]:
        """The EMA's weights by name, whole and on the CPU; every rank has to call it at the same time."""
        # Shards are sent from the GPUs, also where the host keeps the EMA.
        return {name: whole(ema.to(self.device)).cpu() for name, ema in self.ema.state_dict().items()}

    def set_lr(self, step: int) -> float:
        """Set the learning rates of an optimizer step (from 1) by the recipe's schedule.

        Returns:
            Their share of the peak rates.
        """
        share = self.lr_factor * lr_share(self.recipe.optimizer, step, self.recipe.train.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_lr"]
        return share

    def step(self, step: int, source: Iterator[Batch], meter: LossMeter) -> None:
        """Take an optimizer step (from 1) with this rank's micro-batches, which are the source's next ones."""
        for part in self.share.parts:
            self.backward(next(source), part, step, meter)
        self.update(step, meter)

    def backward(self, batch: Batch, part: range, step: int, meter: LossMeter) -> None:
        """Add the gradients of one micro-batch, the part of step's global batch that has these indices."""
        weight = self.share.weight(part)
        batch = self.to_device(batch)
        if batch.latent is not None:
            meter.data(batch.keys, sample_rms(batch.latent))
        for result in self.objective.losses(batch, self.seed(step, part), step):
            # Before the next loss is computed: data-free losses keep the graph of one segment at a time.
            (weight * result.loss).backward()
            meter.add(result)  # on the device: reading values here would make the host wait for them

    def update(self, step: int, meter: LossMeter) -> None:
        """Update the weights by the gradients of all ranks, clear the gradients, and update the EMA."""
        parameters, config = self.parameters.values(), self.recipe.optimizer
        average_gradients(parameters, self.recipe.train, self.world_size)
        # Before `clip_from`, the norm is only told.
        limit = config.max_grad_norm if step >= config.clip_from else math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory for the next forward
        self.ema.update(step)
        meter.norm(whole(norm))

    def seed(self, step: int, part: range) -> SampleGenerators:
        """The generators of a micro-batch's samples, on the CPU, so that numbers are the same on every device.

        The dropout of adapters is seeded likewise; and torch's own generator, which only layers that are not by sample
        use.
        """
        # Anew for each micro-batch, so that a resumed run draws what the uninterrupted one would have drawn.
        seed = self.draw_seed
        torch.manual_seed(mixed_seed(seed, step, part.start, self.share.total))
        seed_dropout(
            self.objective.model, [mixed_seed(seed, step, index, self.share.total) for index in part]
        )
        return SampleGenerators(seed, step, part, self.share.total)

    def to_device(self, batch: Batch) -> Batch:
        """A batch with its tensors on the model's device."""
        return batch if self.device.type == "cpu" else batch.to(self.device)
