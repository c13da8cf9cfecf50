"""How workers share a model: sharded by FSDP2, or as whole replicas, DDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from fewstep.errors import UserError
from fewstep.models.precision import LIBRARIES
from fewstep.train.objectives import Objective
from fewstep.train.recipe import TrainConfig

BUCKET_BYTES = 1 << 25
"""Of the gradients that workers average in one message: the most that is copied for it, at a time."""


def is_sharded(settings: TrainConfig, world_size: int) -> bool:
    """Whether FSDP shards the model: neither replicas nor the model of a lone worker are sharded."""
    return settings.parallel == "fsdp" and world_size > 1


def check_sharding(settings: TrainConfig, workers: int) -> None:
    """Refuse quantised weights where so many workers would share them.

    Raises:
        UserError: they would.
    """
    if settings.precision in LIBRARIES and is_sharded(settings, workers):
        raise UserError(
            f"train.precision {settings.precision}: FSDP does not shard quantised weights: set train.parallel=ddp, "
            "with which every worker holds all of them."
        )


def shard(objective: Objective, settings: TrainConfig, world_size: int) -> None:
    """Prepare the objective's model in place: checkpointing of activations, compilation, sharding.

    With `parallel: fsdp` each transformer block is one FSDP group, and the rest of the model another. With
    `parallel: ddp` every worker keeps the whole model, and `average_gradients` is all that workers exchange. A lone
    worker keeps its model as it is: it has nothing to share, and FSDP's hooks take 13 % of a small model's step.

    Frozen and trained weights of a group are gathered in the types that they are held in. FSDP's own mixed precision is
    not used: it would also round what the model's root is called with, and so times (0.9987 would be 1.0). Gradients
    are averaged in float32, as trained weights are float32.
    """
    if settings.activation_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
    networks = [one for model in objective.models for one in model.transformers()]
    blocks = [block for network in networks for block in objective.family.blocks(network)]
    if settings.compile is not None:
        # Block by block: FSDP gathers weights between blocks, which would break a graph of the whole anyway.
        for block in blocks:
            block.compile(backend=settings.compile)
    if not is_sharded(settings, world_size):
        return
    # One dimension: all workers share one copy of the model.
    mesh = init_device_mesh("cuda" if settings.gpu else "cpu", (world_size,))
    # Blocks first: what is left of the parameters when the whole model is sharded becomes its own group.
    for module in (*blocks, *objective.models):
        fully_shard(module, mesh=mesh)
    for model in objective.models:
        register_fsdp_forward_method(model, "prepare")  # which reads weights outside of blocks, too


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], settings: TrainConfig, world_size: int) -> None:
    """Replace each worker's gradients by their mean over all workers, for `parallel: ddp`. FSDP does so in backward.

    Done once per step and in place, in messages of many small gradients or one large one. torch's
    `DistributedDataParallel` would send gradients in every backward, of which a data-free step has one per segment.
    """
    if settings.parallel == "fsdp" or world_size == 1:
        return
    # The same parameters have gradients on every worker, so that the messages agree.
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        _average(bucket, world_size)


def _average(gradients: list[Tensor], world_size: int) -> None:
    """Average some gradients in place, in one message, which a single one is itself."""
    alone = len(gradients) == 1 and gradients[0].is_contiguous()
    message = gradients[0] if alone else torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(message)
    message.div_(world_size)
    if not alone:
        parts = message.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, in groups that have at most `BUCKET_BYTES` together unless it is a single one."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def drop_gathered(model: nn.Module) -> None:
    """Have FSDP gather weights again, after the shards were changed directly (such as by `PowerEMA.swapped`)."""
    # FSDP keeps weights gathered, after a forward without backward for example, and does not notice changed shards.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
