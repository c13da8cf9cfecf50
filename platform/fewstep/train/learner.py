"""A model under training on one rank, and the optimizer step that updates it.

Random numbers come from generators seeded by (seed, step, sample), so that a resumed run gives what the uninterrupted
run would have given: bit for bit in float32 on a CPU, and up to the order of sums with another number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from fewstep.data.stream import Batch
from fewstep.distill import PowerEMA
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
    """

    def __init__(
        self,
        recipe: DistillRecipe | TeacherRecipe,
        null: Conditioning,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.recipe, self.device = recipe, device
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

    def set_lr(self, step: int) -> float:
        """Set the learning rates of an optimizer step (from 1) by the recipe's schedule.

        Returns:
            Their share of the peak rates.
        """
        share = lr_share(self.recipe.optimizer, step, self.recipe.train.steps)
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
        for result in self.objective.losses(self.to_device(batch), self.seed(step, part), step):
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
        seed = self.recipe.train.seed
        torch.manual_seed(mixed_seed(seed, step, part.start, self.share.total))
        seed_dropout(
            self.objective.model, [mixed_seed(seed, step, index, self.share.total) for index in part]
        )
        return SampleGenerators(seed, step, part, self.share.total)

    def to_device(self, batch: Batch) -> Batch:
        """A batch with its tensors on the model's device."""
        return batch if self.device.type == "cpu" else batch.to(self.device)
