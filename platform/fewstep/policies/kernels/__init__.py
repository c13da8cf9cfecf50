"""Fused rollouts: one kernel launch for all of GMFlow's substeps, by numba on CPUs and by Triton on GPUs; DX's on CPUs.

A kernel's module is imported at the first rollout that uses it, because importing its compiler takes long.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

from fewstep.policies.gmflow import GMFlowPolicy

log = logging.getLogger(__name__)

MODULES = {"cpu": ("cpu", "numba"), "cuda": ("cuda", "triton")}
"""Device type → the module of this package for it, and the compiler that the module needs."""

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def kernel(policy: object, x: Tensor) -> ModuleType | None:
    """The module of fused kernels for a policy's rollout from `x`, or None where plain torch has to compute it."""
    # Subclasses may compute another velocity, which the kernels would not know.
    if type(policy) is not GMFlowPolicy or x.device.type not in MODULES:
        return None
    tensors = (x, policy.means, policy.logstds, policy.logweights, policy.x_src)
    # One policy for several states, which broadcasting allows, is beyond the kernels: they index both alike.
    one_each = (len(policy.means), *policy.means.shape[2:]) == policy.x_src.shape == x.shape
    fits = one_each and all(t.device == x.device and t.dtype in DTYPES for t in tensors)
    # σ and variance that differ by location are, too: a kernel computes its scalars once per sample and substep.
    per_sample = _per_sample(policy.sigma_src, x) and _per_sample(policy.logstds, policy.means)
    return _load(x.device.type) if fits and per_sample and x.numel() else None


def combination(output: Tensor, x_src: Tensor, x: Tensor, sigmas: Tensor) -> ModuleType | None:
    """The module whose `combine` takes DX's closed form, or None where plain torch has to compute it.

    Args:
        output: of the head, (B, N, C, H, W).
        x_src, x: states, (B, C, H, W).
        sigmas: the table of times.
    """
    tensors = (output, x_src, x)
    # Training differentiates the closed form, which torch does.
    followed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (*tensors, sigmas))
    one_each = (len(output), *output.shape[2:]) == x_src.shape == x.shape
    return _load("cpu") if fits and one_each and not followed and x.numel() else None


def _per_sample(scalars: Tensor, of: Tensor) -> bool:
    """Whether `scalars` holds one number for the whole batch, or one for each sample of `of`."""
    one_each = scalars.ndim in (1, of.ndim) and scalars.numel() == len(scalars) == len(of)
    return one_each or scalars.numel() == 1


@functools.cache  # also of a failure: the warning is logged once per process
def _load(device_type: str) -> ModuleType | None:
    name, compiler = MODULES[device_type]
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        log.warning(
            "rollouts run in plain torch, several times slower: %s is not usable (%s)", compiler, error
        )
        return None
