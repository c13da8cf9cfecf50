"""GMFlow on a GPU: one program carries a block of latent locations through all substeps in registers."""

# ruff: noqa: ANN001, ANN201 (Triton reads annotations: pointers and sizes have none)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rollout_kernel(
    means_ptr,  # (B, K, C, N)
    logweights_ptr,  # (B, K, N)
    variances_ptr,  # v, (B,) float32
    x_src_ptr,  # (B, C, N)
    sigma_src_ptr,  # (B,) float32
    x_ptr,  # (B, C, N)
    sigmas_ptr,  # (B, S + 1) float32
    counts_ptr,  # (B,) int32, substeps of each sample
    out_ptr,  # (B, C, N)
    components,
    channels,
    space,
    table_length,
    min_sigma,
    min_spread,
    K: tl.constexpr,  # powers of two that hold components and channels
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Follow the policy of sample `program_id(1)` at `BLOCK` locations from σ to σ of its table.

    The means are read once and stay on the chip, (K, C, BLOCK) float32 in the coordinates of `GMFlowPolicy`.
    Locations come last, so that Triton lays them along a warp: reads are contiguous, and sums over channels
    and components stay within a thread as long as one warp holds the block.
    """
    sample = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, c = tl.arange(0, K), tl.arange(0, C)
    here = n < space
    of_k = (k < components)[:, None] & here[None, :]
    of_c = (c < channels)[:, None] & here[None, :]
    of_kc = of_k[:, None, :] & (c < channels)[None, :, None]
    at_k = (sample * components + k)[:, None] * space + n[None, :]
    at_c = (sample * channels + c)[:, None] * space + n[None, :]
    at_kc = ((sample * components + k)[:, None] * channels + c[None, :])[:, :, None] * space + n[
        None, None, :
    ]

    means = tl.load(means_ptr + at_kc, mask=of_kc, other=0.0).to(tl.float32)
    logweights = tl.load(logweights_ptr + at_k, mask=of_k, other=float("-inf")).to(tl.float32)
    logweights = tl.where(here[None, :], logweights, 0.0)  # beyond the latent: anything finite
    x_src = tl.load(x_src_ptr + at_c, mask=of_c, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at_c, mask=of_c, other=0.0).to(tl.float32)
    variance = tl.load(variances_ptr + sample)
    sigma_src = tl.maximum(tl.load(sigma_src_ptr + sample), min_sigma)

    weights = tl.exp(logweights - tl.max(logweights, 0)[None, :])
    weights = weights / tl.sum(weights, 0)[None, :]
    mean = tl.sum(weights[:, None, :] * means, 0)
    origin = x_src - sigma_src * mean
    centres = sigma_src * (mean[None, :, :] - means)
    centres = tl.where(of_kc, centres, 0.0)
    squares = tl.sum(centres * centres, 1)
    alpha_src = 1 - sigma_src
    precision = (alpha_src / sigma_src) * (alpha_src / sigma_src)
    evidence = alpha_src * (x_src - alpha_src * origin) / (sigma_src * sigma_src)

    table = sigmas_ptr + sample * table_length
    for step in range(tl.load(counts_ptr + sample)):
        start = tl.load(table + step)
        change = tl.load(table + step + 1) - start
        sigma = tl.maximum(start, min_sigma)
        alpha = 1 - sigma
        zeta = (alpha / sigma) * (alpha / sigma) - precision
        shrink = 1 / tl.maximum(variance * zeta + 1, min_spread)
        nu = alpha * (x - alpha * origin) / (sigma * sigma) - evidence
        agreement = tl.sum(centres * nu[None, :, :], 1)
        logits = logweights + (agreement - 0.5 * zeta * squares) * shrink
        weights = tl.exp(logits - tl.max(logits, 0)[None, :])
        posterior = tl.sum(weights[:, None, :] * centres, 0) / tl.sum(weights, 0)[None, :]
        x_0 = origin + (posterior + variance * nu) * shrink
        x += change * (x - x_0) / sigma
    tl.store(out_ptr + at_c, x.to(out_ptr.dtype.element_ty), mask=of_c)
