"""GMFlow on a GPU: each program takes a block of latent locations through all substeps, in registers.

Locations are the last axis of every tensor, so that Triton lays them out along a warp: reads are contiguous, and sums
over channels and components stay within a thread, or between the lanes of one warp. That also needs `space`
(N = H·W, or T·H·W) not to be specialised: if Triton knew that it is a multiple of 16, it would give four neighbouring
locations to a thread, and spread the components over the lanes that become free.

METHOD.md section 3 has the equations; shapes in docstrings are those of tensors in a program, with a block of N
locations.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Triton reads annotations: pointers and sizes have none)

from __future__ import annotations

import triton
import triton.language as tl

from fewstep.policies import base, gmflow

PER_LAUNCH = ["space", "steps"]
"""Arguments that Triton must not compile code of its own for, by value or divisibility."""

CHANNELS_AT_ONCE = tl.constexpr(4)
"""How many channels' reads are under way together, where channels are read one after the other."""

MIN_SIGMA = tl.constexpr(base.MIN_SIGMA)
MIN_SPREAD = tl.constexpr(gmflow.MIN_SPREAD)


@triton.jit
def _at_rows(n, space, rows: tl.constexpr, R: tl.constexpr):
    """Offsets and mask, (R, N), of a sample's `rows` channels or components at the locations `n`."""
    r = tl.arange(0, R)
    return r[:, None] * space + n[None, :], (r < rows)[:, None] & (n < space)[None, :]


@triton.jit
def _at_means(n, space, components: tl.constexpr, channels: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Offsets and mask, (K, C, N), of a sample's means at the locations `n`."""
    k, c = tl.arange(0, K), tl.arange(0, C)
    real = (k < components)[:, None] & (c < channels)[None, :]
    at = (k[:, None] * channels + c[None, :])[:, :, None] * space + n[None, None, :]
    return at, real[:, :, None] & (n < space)[None, None, :]


@triton.jit
def _read_source(
    logstds_ptr, sigma_src_ptr, sample, logstds_stride: tl.constexpr, sigma_src_stride: tl.constexpr
):  # fmt: skip
    """σ_src and variance v of a sample."""
    sigma_src = tl.maximum(tl.load(sigma_src_ptr + sample * sigma_src_stride).to(tl.float32), MIN_SIGMA)
    logstd = tl.load(logstds_ptr + sample * logstds_stride).to(tl.float32)
    return sigma_src, tl.exp(2 * logstd) * sigma_src * sigma_src


@triton.jit
def _read_weights(logweights_ptr, sample, n, space, components: tl.constexpr, K: tl.constexpr):
    """Log-weights and normalised weights of a sample at the locations `n`, (K, N) each; padding has weight 0."""
    at_k, of_k = _at_rows(n, space, components, K)
    logweights = tl.load(
        logweights_ptr + sample * components * space + at_k, mask=of_k, other=float("-inf")
    ).to(tl.float32)
    # Locations beyond the latent read −∞ for all components, and the softmax would be NaN: any finite number will do.
    logweights = tl.where((n < space)[None, :], logweights, 0.0)
    weights = tl.exp(logweights - tl.max(logweights, 0)[None, :])
    return logweights, weights / tl.sum(weights, 0)[None, :]


@triton.jit
def _read_policy(
    means_ptr, logstds_ptr, logweights_ptr, x_src_ptr, sigma_src_ptr, sample, n, space,
    logstds_stride: tl.constexpr, sigma_src_stride: tl.constexpr,
    components: tl.constexpr, channels: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A sample's policy at the locations `n`, in the coordinates of `GMFlowPolicy`.

    Returns σ_src, v, centres μ_k − c (K, C, N), −½·‖μ_k − c‖² (K, N), log-weights (K, N), origin c (C, N) and the
    source's term of ν (C, N), all float32. Padding of components and channels contributes nothing.
    """
    sigma_src, variance = _read_source(logstds_ptr, sigma_src_ptr, sample, logstds_stride, sigma_src_stride)
    logweights, weights = _read_weights(logweights_ptr, sample, n, space, components, K)
    at_c, of_c = _at_rows(n, space, channels, C)
    at_kc, of_kc = _at_means(n, space, components, channels, K, C)
    latent = sample * channels * space
    means = tl.load(means_ptr + latent * components + at_kc, mask=of_kc, other=0.0).to(tl.float32)
    x_src = tl.load(x_src_ptr + latent + at_c, mask=of_c, other=0.0).to(tl.float32)

    mean = tl.sum(weights[:, None, :] * means, 0)
    origin = x_src - sigma_src * mean
    # μ_k − c = σ_src·(mean − mean_k), without the cancellation of subtracting c from μ_k. Padding must be 0, as `mean`
    # is not.
    centres = tl.where(of_kc, sigma_src * (mean[None, :, :] - means), 0.0)
    evidence = _evidence(x_src, origin, sigma_src)
    squares = -0.5 * tl.sum(centres * centres, 1)
    return sigma_src, variance, centres, squares, logweights, origin, evidence


@triton.jit
def _read_channel(
    means_ptr, x_src_ptr, sample, c, n, space, sigma_src, weights,
    components: tl.constexpr, channels: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What `_read_policy` gives, for one channel: centres (K, N), origin (N,) and evidence (N,)."""
    # For the first channel Triton would find the offsets to be multiples of 16, and lay out registers another way (see
    # the module's docstring): `multiple_of` 1 keeps it from that.
    k, here = tl.arange(0, K), n < space
    of_k = (k < components)[:, None] & here[None, :]
    at_k = tl.multiple_of((k[:, None] * channels + c) * space + n[None, :], [1, 1])
    means = tl.load(means_ptr + sample * components * channels * space + at_k, mask=of_k, other=0.0)
    means = means.to(tl.float32)
    x_src = tl.load(x_src_ptr + sample * channels * space + (c * space + n), mask=here, other=0.0)
    x_src = x_src.to(tl.float32)
    mean = tl.sum(weights * means, 0)
    origin = x_src - sigma_src * mean
    centres = tl.where(of_k, sigma_src * (mean[None, :] - means), 0.0)
    return centres, origin, _evidence(x_src, origin, sigma_src)


@triton.jit
def _evidence(x_src, origin, sigma_src):
    """The source's term of ν, α_src·(x_src − α_src·c)/σ_src²."""
    alpha = 1 - sigma_src
    return alpha * (x_src - alpha * origin) / (sigma_src * sigma_src)


@triton.jit
def _moment(sigma, sigma_src, variance):
    """The scalars of a query at `sigma`: 1/σ, α, α/σ², ζ and 1 / (v·ζ + 1)."""
    sigma = tl.maximum(sigma, MIN_SIGMA)
    inverse, inverse_src, alpha = 1 / sigma, 1 / sigma_src, 1 - sigma
    # ζ = a² − b² as (a − b)·(a + b): next to the source a² and b² cancel in float32, while σ_src − σ is exact.
    zeta = (sigma_src - sigma) * inverse * inverse_src * (alpha * inverse + (1 - sigma_src) * inverse_src)
    return inverse, alpha, alpha * inverse * inverse, zeta, 1 / tl.maximum(variance * zeta + 1, MIN_SPREAD)


@triton.jit
def _query(centres, squares, logweights, nu, zeta, shrink):
    """μ_k·ν (K, N), the posterior weights (K, N), and the posterior mean of the centres (C, N)."""
    agreement = tl.sum(centres * nu[None, :, :], 1)
    logits = logweights + (agreement + zeta * squares) * shrink  # `squares` are −½·‖μ_k‖²
    weights = tl.exp(logits - tl.max(logits, 0)[None, :])
    inverse = 1 / tl.sum(weights, 0)[None, :]
    return agreement, weights * inverse, tl.sum(weights[:, None, :] * centres, 0) * inverse


@triton.jit
def _velocity(x, sigma, sigma_src, variance, centres, squares, logweights, origin, evidence):
    """The policy's velocity π(x, σ), (C, N)."""
    inverse, alpha, gain, zeta, shrink = _moment(sigma, sigma_src, variance)
    nu = gain * (x - alpha * origin) - evidence
    _, _, posterior = _query(centres, squares, logweights, nu, zeta, shrink)
    return inverse * (x - (origin + (posterior + variance * nu) * shrink))


@triton.jit(do_not_specialize=PER_LAUNCH)
def integrate_kernel(
    means_ptr,  # (B, K, C, N)
    logstds_ptr,  # one number, or (B,)
    logweights_ptr,  # (B, K, N)
    x_src_ptr,  # (B, C, N)
    sigma_src_ptr,  # one number, or (B,)
    x_ptr,  # (B, C, N)
    sigmas_ptr,  # (S + 1, B) float32
    shares_ptr,  # (S, B) float32
    out_ptr,  # (B, C, N)
    space,
    steps,
    logstds_stride: tl.constexpr,  # 0 where there is one number
    sigma_src_stride: tl.constexpr,
    MEAN: tl.constexpr,
    components: tl.constexpr,
    channels: tl.constexpr,
    K: tl.constexpr,  # powers of two that hold components and channels
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Integrate the policy of sample `program_id(1)` at `BLOCK` locations, over all substeps.

    Writes the end state or, if `MEAN`, Σ_s share_s·velocity_s; only then is `shares_ptr` read.
    """
    # int64: offsets of a large batch exceed 2^31.
    batch, sample = tl.num_programs(1), tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sigma_src, variance, centres, squares, logweights, origin, evidence = _read_policy(
        means_ptr, logstds_ptr, logweights_ptr, x_src_ptr, sigma_src_ptr, sample, n, space,
        logstds_stride, sigma_src_stride, components, channels, K, C,
    )  # fmt: skip
    at_c, of_c = _at_rows(n, space, channels, C)
    at_c += sample * channels * space
    x = tl.load(x_ptr + at_c, mask=of_c, other=0.0).to(tl.float32)
    out = tl.full([C, BLOCK], 0.0, tl.float32)
    for step in range(steps):
        start = tl.load(sigmas_ptr + step * batch + sample)
        change = tl.load(sigmas_ptr + (step + 1) * batch + sample) - start
        share = 0.0
        if MEAN:
            share = tl.load(shares_ptr + step * batch + sample)
        if (change != 0) | (share != 0):  # otherwise the sample is at its end already
            velocity = _velocity(
                x, start, sigma_src, variance, centres, squares, logweights, origin, evidence
            )
            x += change * velocity  # explicit Euler
            if MEAN:
                out += share * velocity
    if not MEAN:
        out = x
    tl.store(out_ptr + at_c, out.to(out_ptr.dtype.element_ty), mask=of_c)


@triton.jit(do_not_specialize=PER_LAUNCH)
def integrate_by_products_kernel(
    means_ptr, logstds_ptr, logweights_ptr, x_src_ptr, sigma_src_ptr, x_ptr, sigmas_ptr, out_ptr,
    space, steps, logstds_stride: tl.constexpr, sigma_src_stride: tl.constexpr,
    components: tl.constexpr, channels: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The end state as `integrate_kernel` gives it, by the centres' inner products: K² numbers per location, not K·C.

    The state y = x − α·c is always a linear combination of the start state, the evidence of the source and the centres.
    Queries need only its inner products with the centres, which follow the same recursion (METHOD.md section 3). So
    channels are read only before the first substep and after the last, one after the other.
    """
    batch, sample = tl.num_programs(1), tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sigma_src, variance = _read_source(logstds_ptr, sigma_src_ptr, sample, logstds_stride, sigma_src_stride)
    logweights, prior = _read_weights(logweights_ptr, sample, n, space, components, K)
    at_x = sample * channels * space + n
    alpha_from = 1 - tl.maximum(tl.load(sigmas_ptr + sample), MIN_SIGMA)
    # Inner products of the centres with each other, with the state and with the evidence
    gram = tl.full([K, K, BLOCK], 0.0, tl.float32)
    squares = tl.full([K, BLOCK], 0.0, tl.float32)
    on_state = tl.full([K, BLOCK], 0.0, tl.float32)
    on_evidence = tl.full([K, BLOCK], 0.0, tl.float32)
    for c in tl.range(channels, loop_unroll_factor=CHANNELS_AT_ONCE):
        centres, origin, evidence = _read_channel(
            means_ptr, x_src_ptr, sample, c, n, space, sigma_src, prior, components, channels, K
        )
        x = tl.load(x_ptr + at_x + c * space, mask=n < space, other=0.0).to(tl.float32)
        gram += centres[:, None, :] * centres[None, :, :]
        squares -= 0.5 * centres * centres
        on_state += centres * (x - alpha_from * origin)[None, :]
        on_evidence += centres * evidence[None, :]

    # The state as a combination: factors of each centre, of the start state and of the evidence
    taken = tl.full([K, BLOCK], 0.0, tl.float32)
    of_start, of_evidence, alpha_to = 1.0, 0.0, alpha_from
    for step in range(steps):
        start = tl.load(sigmas_ptr + step * batch + sample)
        change = tl.load(sigmas_ptr + (step + 1) * batch + sample) - start
        if change != 0:  # otherwise the sample is at its end already
            inverse, _, gain, zeta, shrink = _moment(start, sigma_src, variance)
            logits = logweights + (gain * on_state - on_evidence + zeta * squares) * shrink
            weights = tl.exp(logits - tl.max(logits, 0)[None, :])
            # METHOD.md's rule y ← keep·y + evident·e + believed·Σ_k w_k·m_k with r = change/σ
            believed = -change * inverse * shrink
            evident = -believed * variance
            keep = 1 + change * inverse - evident * gain
            believed = believed / tl.sum(weights, 0)[None, :]
            sums = tl.sum(weights[:, None, :] * gram, 0)  # Σ_l w_l·(m_l·m_k), not normalised: `believed` is
            on_state = on_state * keep + on_evidence * evident + sums * believed
            taken = taken * keep + weights * believed
            of_start *= keep
            of_evidence = of_evidence * keep + evident
            alpha_to -= change

    # Means are read again rather than kept: registers hold the K×K products.
    for c in tl.range(channels, loop_unroll_factor=CHANNELS_AT_ONCE):
        centres, origin, evidence = _read_channel(
            means_ptr, x_src_ptr, sample, c, n, space, sigma_src, prior, components, channels, K
        )
        x = tl.load(x_ptr + at_x + c * space, mask=n < space, other=0.0).to(tl.float32)
        x = (x - alpha_from * origin) * of_start + evidence * of_evidence + origin * alpha_to
        x += tl.sum(centres * taken, 0)
        tl.store(out_ptr + at_x + c * space, x.to(out_ptr.dtype.element_ty), mask=n < space)


@triton.jit(do_not_specialize=PER_LAUNCH)
def pull_back_kernel(
    means_ptr, logstds_ptr, logweights_ptr, x_src_ptr, sigma_src_ptr, x_ptr, sigmas_ptr, shares_ptr,
    cotangent_ptr,  # gradient to the mean velocity, (B, C, N)
    states_ptr,  # scratch, (S, B, C, N) float32
    to_means_ptr, to_logweights_ptr, to_x_src_ptr, to_x_ptr,  # gradients, in the shapes of what they are to
    to_logstds_ptr,  # (B, programs) float32: the gradient to a log-std is the sum over programs
    space, steps, logstds_stride: tl.constexpr, sigma_src_stride: tl.constexpr,
    components: tl.constexpr, channels: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of `integrate_kernel`'s mean velocity: integrates once more, then goes back through the substeps.

    Of the integration only the states are kept, (C, N) for each substep; queries are computed again. Names that end in
    `_bar` are gradients to the quantities in the class docstring of `GMFlowPolicy`. There is none to the origin c, on
    which the velocity does not depend.
    """
    batch, sample = tl.num_programs(1), tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sigma_src, variance, centres, squares, logweights, origin, evidence = _read_policy(
        means_ptr, logstds_ptr, logweights_ptr, x_src_ptr, sigma_src_ptr, sample, n, space,
        logstds_stride, sigma_src_stride, components, channels, K, C,
    )  # fmt: skip
    latent = channels * space
    at_c, of_c = _at_rows(n, space, channels, C)
    at_c += sample * latent
    x = tl.load(x_ptr + at_c, mask=of_c, other=0.0).to(tl.float32)
    mean_bar = tl.load(cotangent_ptr + at_c, mask=of_c, other=0.0).to(tl.float32)

    for step in range(steps):
        tl.store(states_ptr + step * batch * latent + at_c, x, mask=of_c)
        start = tl.load(sigmas_ptr + step * batch + sample)
        change = tl.load(sigmas_ptr + (step + 1) * batch + sample) - start
        if (change != 0) & (step + 1 < steps):
            x += change * _velocity(
                x, start, sigma_src, variance, centres, squares, logweights, origin, evidence
            )
    # If Triton lays out reads and writes differently, threads read states that other threads have written.
    tl.debug_barrier()

    centres_bar = tl.full([K, C, BLOCK], 0.0, tl.float32)
    logweights_bar = tl.full([K, BLOCK], 0.0, tl.float32)
    # Σ_s ζ·ā'_k / (v·ζ + 1): the gradient to μ_k through ‖μ_k‖² is −μ_k times this, multiplied in at the end.
    contraction = tl.full([K, BLOCK], 0.0, tl.float32)
    x_bar = tl.full([C, BLOCK], 0.0, tl.float32)
    evidence_bar = tl.full([C, BLOCK], 0.0, tl.float32)
    variance_bar = tl.full([BLOCK], 0.0, tl.float32)
    for back in range(steps):
        step = steps - 1 - back
        start = tl.load(sigmas_ptr + step * batch + sample)
        change = tl.load(sigmas_ptr + (step + 1) * batch + sample) - start
        share = tl.load(shares_ptr + step * batch + sample)
        if (change != 0) | (share != 0):
            inverse, alpha, gain, zeta, shrink = _moment(start, sigma_src, variance)
            x = tl.load(states_ptr + step * batch * latent + at_c, mask=of_c, other=0.0)
            nu = gain * (x - alpha * origin) - evidence
            agreement, weights, posterior = _query(centres, squares, logweights, nu, zeta, shrink)

            # The velocity acts on the mean with its share, and on the next state with the change of σ.
            through_x = (mean_bar * share + x_bar * change) * inverse
            scaled = -shrink * through_x  # gradient to Σ_k w_k·μ_k + v·ν
            expected = tl.sum(scaled * posterior, 0)  # Σ_k w_k·w̄_k, which the softmax subtracts
            weights_bar = tl.sum(centres * scaled[None, :, :], 1)
            logits_bar = weights * (weights_bar - expected[None, :])
            pull = logits_bar * shrink
            nu_bar = scaled * variance + tl.sum(pull[:, None, :] * centres, 0)
            centres_bar += weights[:, None, :] * scaled[None, :, :] + pull[:, None, :] * nu[None, :, :]
            logweights_bar += logits_bar
            contraction += pull * zeta

            shrink_bar = tl.sum(logits_bar * (agreement + zeta * squares), 0)
            shrink_bar -= tl.sum(through_x * (posterior + variance * nu), 0)
            # Where v·ζ + 1 is clamped, nothing flows through it.
            clamped = variance * zeta + 1 <= MIN_SPREAD
            variance_bar += tl.sum(scaled * nu, 0)
            variance_bar -= tl.where(clamped, 0.0, shrink_bar * (shrink * shrink * zeta))
            x_bar += through_x + nu_bar * gain
            evidence_bar -= nu_bar

    centres_bar -= contraction[:, None, :] * centres
    x_src_bar = evidence_bar * ((1 - sigma_src) / (sigma_src * sigma_src)) + tl.sum(centres_bar, 0)
    at_k, of_k = _at_rows(n, space, components, K)
    at_k += sample * components * space
    at_kc, of_kc = _at_means(n, space, components, channels, K, C)
    means_bar = (-sigma_src * centres_bar).to(to_means_ptr.dtype.element_ty)
    tl.store(to_means_ptr + sample * components * latent + at_kc, means_bar, mask=of_kc)
    tl.store(to_logweights_ptr + at_k, logweights_bar.to(to_logweights_ptr.dtype.element_ty), mask=of_k)
    tl.store(to_x_src_ptr + at_c, x_src_bar.to(to_x_src_ptr.dtype.element_ty), mask=of_c)
    tl.store(to_x_ptr + at_c, x_bar.to(to_x_ptr.dtype.element_ty), mask=of_c)
    # v = exp(2·logstd)·σ_src²
    summand = 2 * variance * tl.sum(variance_bar, 0)
    tl.store(to_logstds_ptr + sample * tl.num_programs(0) + tl.program_id(0), summand)
