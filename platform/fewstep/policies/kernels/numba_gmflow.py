"""GMFlow on the CPU: a block of 32 latent locations stays in the first-level cache for a whole rollout.

Compiled by numba at the first use (some seconds) and kept in numba's cache on disk. All that is compiled
stands in this one file, because numba compiles anew when the file of a cached function changes, not when
an imported one does. Array shapes are flat; N is the number of latent locations of a sample, H·W or T·H·W.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

from fewstep.policies.base import MIN_SIGMA
from fewstep.policies.gmflow import MIN_SPREAD

# Lanes: 32 float32 side by side, one latent location per lane. As a numba type it is one LLVM vector (two
# AVX-512 registers, four of AVX2, eight of NEON): numba by itself vectorises neither sums nor exponentials.

LANES = 32
"""Latent locations per block."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_CONTRACT = ("contract",)  # a·b + c may become one instruction; nothing else may be rearranged


part = njit(nogil=True, error_model="numpy")


def entry(function: Callable[..., None]) -> Callable[..., None]:
    """Compile what torch code calls."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither this folder, nor the user's cache, nor NUMBA_CACHE_DIR can be written
        return part(function)


class LanesType(types.Type):
    """Numba's type of a `Lanes` value."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{LANES}")


Lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: LanesType) -> None:
        super().__init__(manager, kind, _FLOATS)


def _element(context: Any, builder: ir.IRBuilder, kind: types.Array, array: Any, row: Any) -> Any:
    """Pointer to the vector at `row` of a flat float32 array."""
    data = context.make_array(kind)(context, builder, array).data
    first = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(data, [first]), _FLOATS.as_pointer())


@intrinsic
def get(_: Any, rows: types.Array, row: types.Integer) -> Any:
    """Row `row` of a buffer that `new_rows` made."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load(_element(context, builder, signature.args[0], *args), align=4 * LANES)

    return Lanes(rows, types.intp), emit


@intrinsic
def put(_: Any, rows: types.Array, row: types.Integer, value: LanesType) -> Any:
    """Write row `row` of a buffer that `new_rows` made."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store(args[2], _element(context, builder, signature.args[0], *args[:2]), align=4 * LANES)
        return context.get_dummy_value()

    return types.void(rows, types.intp, Lanes), emit


@intrinsic
def load(_: Any, flat: types.Array, start: types.Integer) -> Any:
    """`LANES` neighbours in any flat float32 array."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), _FLOATS.as_pointer())
        return builder.load(pointer, align=4)

    return Lanes(flat, types.intp), emit


@intrinsic
def store(_: Any, flat: types.Array, start: types.Integer, value: LanesType) -> Any:
    """Write `LANES` neighbours in any flat float32 array."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), _FLOATS.as_pointer())
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(flat, types.intp, Lanes), emit


@intrinsic
def splat(_: Any, value: types.Float) -> Any:
    """The same number in all lanes."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.IntType(32)(0))
        order = ir.Constant(_INTEGERS, [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(_FLOATS, ir.Undefined), order)

    return Lanes(types.float32), emit


def _arithmetic(operation: Callable[..., Any], instruction: str) -> None:
    """Define an operator on lanes and lanes, and on lanes and a number."""

    @intrinsic
    def both(_: Any, left: LanesType, right: LanesType) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args, flags=_CONTRACT)

        return Lanes(Lanes, Lanes), emit

    @overload(operation, inline="always", strict=False)
    def define(left: Any, right: Any) -> Any:
        if left == Lanes and right == Lanes:
            return lambda left, right: both(left, right)
        if left == Lanes and isinstance(right, types.Float):
            return lambda left, right: both(left, splat(right))
        if isinstance(left, types.Float) and right == Lanes:
            return lambda left, right: both(splat(left), right)
        return None


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_operation, _instruction)


@intrinsic
def larger(_: Any, left: LanesType, right: LanesType) -> Any:
    """The maximum, lane by lane."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return Lanes(Lanes, Lanes), emit


@intrinsic
def _scale_by_power(_: Any, value: LanesType, shifted: LanesType) -> Any:
    """value · 2^n, where the low bits of `shifted` hold the integer n."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        bits, power = (builder.bitcast(arg, _INTEGERS) for arg in args)
        exponent = builder.shl(power, ir.Constant(_INTEGERS, [23] * LANES))
        return builder.bitcast(builder.add(bits, exponent), _FLOATS)

    return Lanes(Lanes, Lanes), emit


@intrinsic
def _zero_below(_: Any, value: LanesType, x: LanesType, limit: LanesType) -> Any:
    """`value`, or 0 where x < limit."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        value, x, limit = args
        return builder.select(builder.fcmp_ordered("<", x, limit), ir.Constant(_FLOATS, None), value)

    return Lanes(Lanes, Lanes, Lanes), emit


# Adding it rounds to an integer, which then stands in the low bits: float32 of this size has no fraction.
_ROUND = np.float32(1.5 * 2**23)


@part
def exp2(x: LanesType) -> LanesType:
    """2^x for x ≤ 0, relative error 2e-7; 0 below 2^-126, so also at −∞."""
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)  # in [−½, ½]
    p = f * np.float32(0.0013276471519582042) + np.float32(0.009675541330674808)  # minimax, degree 5
    p = p * f + np.float32(0.05550713274961089)
    p = p * f + np.float32(0.24022119723934107)
    p = p * f + np.float32(0.6931469670638657)
    p = p * f + np.float32(1.000000071654655)
    return _zero_below(_scale_by_power(p, shifted), x, splat(np.float32(-126.0)))


@part
def read(flat: np.ndarray, start: int, count: int, spare: np.ndarray) -> LanesType:
    """The first `count` lanes from `flat[start:]`, zeros in the others; `spare` is a buffer of one row."""
    if count == LANES:
        return load(flat, start)
    for lane in range(LANES):
        spare[lane] = flat[start + lane] if lane < count else np.float32(0)
    return get(spare, 0)


@part
def write(flat: np.ndarray, start: int, count: int, value: LanesType, spare: np.ndarray) -> None:
    """The first `count` lanes to `flat[start:]`; `spare` is a buffer of one row."""
    if count == LANES:
        store(flat, start, value)
    else:
        put(spare, 0, value)
        for lane in range(count):
            flat[start + lane] = spare[lane]


@part
def new_rows(count: int) -> np.ndarray:
    """An uninitialised buffer of `count` rows; it begins at a cache line, for aligned loads."""
    buffer = np.empty((count + 1) * LANES, np.float32)
    first = (-(buffer.ctypes.data // 4)) % LANES
    return buffer[first : first + count * LANES]


# The kernels

LOG2E = np.float32(1.4426950408889634)


class FlatPolicy(NamedTuple):
    """A `GMFlowPolicy` as flat float32 arrays."""

    means: np.ndarray  # (B·K·C·N,)
    logweights: np.ndarray  # (B·K·N,)
    variances: np.ndarray  # v, (B,)
    x_src: np.ndarray  # (B·C·N,)
    sigma_src: np.ndarray  # (B,)


class Gradients(NamedTuple):
    """Where `pull_back` writes, arranged like the quantities themselves."""

    means: np.ndarray
    logweights: np.ndarray
    variances: np.ndarray  # one summand per block, (B·⌈N / LANES⌉,)
    x_src: np.ndarray
    x_from: np.ndarray


class Block(NamedTuple):
    """A policy at `LANES` locations, in the coordinates of `GMFlowPolicy`, and one query's answer."""

    centres: np.ndarray  # μ_k − c, K·C rows
    squares: np.ndarray  # ‖μ_k − c‖², K rows
    logweights: np.ndarray  # log2 A_k, K rows
    origin: np.ndarray  # c, C rows
    evidence: np.ndarray  # ν's part of the source, C rows
    nu: np.ndarray  # ν of the query, C rows
    weights: np.ndarray  # softmax(a') of the query, K rows
    posterior: np.ndarray  # Σ_k w_k·(μ_k − c) of the query, C rows


class Moment(NamedTuple):
    """One sample's scalars at one σ."""

    sigma: float
    alpha: float
    gain: float  # α/σ²
    zeta: float
    shrink: float  # 1 / (v·ζ + 1)


@part
def padded(components: int) -> int:
    """K, rounded up to groups of four: `query` takes sums four at a time."""
    return -(-components // 4) * 4


@part
def new_block(components: int, channels: int) -> Block:
    rows = padded(components)
    block = Block(
        new_rows(rows * channels + 3),
        new_rows(rows),
        new_rows(rows),
        new_rows(channels),
        new_rows(channels),
        new_rows(channels),
        new_rows(rows),
        new_rows(channels + 3),
    )
    block.centres[:] = 0  # components beyond K have no weight
    block.squares[:] = 0
    block.logweights[:] = -np.inf
    return block


@part
def moment(sigma: float, sigma_src: float, variance: float) -> Moment:
    s, s_src = max(np.float64(sigma), MIN_SIGMA), max(np.float64(sigma_src), MIN_SIGMA)
    zeta = ((1 - s) / s) ** 2 - ((1 - s_src) / s_src) ** 2
    return Moment(s, 1 - s, (1 - s) / s**2, zeta, 1 / max(variance * zeta + 1, MIN_SPREAD))


@part
def softmax(logits: np.ndarray, components: int) -> None:
    """Base-2 softmax over the rows, in place."""
    top = get(logits, 0)
    for k in range(1, components):
        top = larger(top, get(logits, k))
    total = splat(np.float32(0))
    for k in range(components):
        power = exp2(get(logits, k) - top)
        total = total + power
        put(logits, k, power)
    scale = splat(np.float32(1)) / total
    for k in range(components):
        put(logits, k, get(logits, k) * scale)


@part
def load_block(
    block: Block, policy: FlatPolicy, shape: tuple[int, int, int], sample: int, n: int, spare: np.ndarray
) -> None:
    """Fill a block with the policy at a sample's locations from `n` on."""
    components, channels, space = shape
    count = min(LANES, space - n)
    for k in range(components):
        log2 = read(policy.logweights, (sample * components + k) * space + n, count, spare) * LOG2E
        put(block.logweights, k, log2)
        put(block.weights, k, log2)
    softmax(block.weights, components)

    sigma = max(np.float64(policy.sigma_src[sample]), MIN_SIGMA)
    alpha, gain = 1 - sigma, (1 - sigma) / sigma**2
    for c in range(channels):
        x = read(policy.x_src, (sample * channels + c) * space + n, count, spare)
        mean = splat(np.float32(0))
        for k in range(components):
            value = read(policy.means, ((sample * components + k) * channels + c) * space + n, count, spare)
            put(block.centres, k * channels + c, value)
            mean = mean + get(block.weights, k) * value
        origin = x - mean * sigma
        put(block.origin, c, origin)
        put(block.evidence, c, (x - origin * alpha) * gain)
        for k in range(components):
            put(block.centres, k * channels + c, (mean - get(block.centres, k * channels + c)) * sigma)
    for k in range(components):
        square = splat(np.float32(0))
        for c in range(channels):
            centre = get(block.centres, k * channels + c)
            square = square + centre * centre
        put(block.squares, k, square)


@part
def logit(block: Block, k: int, agreement: LanesType, scale: float, contrast: float) -> LanesType:
    """a'_k in base 2, given μ_k·ν."""
    return agreement * scale + (get(block.logweights, k) - get(block.squares, k) * contrast)


@part
def query(block: Block, x: np.ndarray, first: int, at: Moment, components: int, channels: int) -> None:
    """Write ν, the weights and their mean centre for the state in rows `first` … of `x`."""
    for c in range(channels):
        shifted = get(x, first + c) - get(block.origin, c) * at.alpha
        put(block.nu, c, shifted * at.gain - get(block.evidence, c))
    scale = at.shrink * LOG2E
    contrast = 0.5 * at.zeta * scale
    zero, rows = splat(np.float32(0)), padded(components)
    # Sums four at a time: one factor of each product then stays in a register.
    for k in range(0, rows, 4):
        a, b, c, d = zero, zero, zero, zero
        for channel in range(channels):
            nu, row = get(block.nu, channel), k * channels + channel
            a = a + get(block.centres, row) * nu
            b = b + get(block.centres, row + channels) * nu
            c = c + get(block.centres, row + 2 * channels) * nu
            d = d + get(block.centres, row + 3 * channels) * nu
        put(block.weights, k, logit(block, k, a, scale, contrast))
        put(block.weights, k + 1, logit(block, k + 1, b, scale, contrast))
        put(block.weights, k + 2, logit(block, k + 2, c, scale, contrast))
        put(block.weights, k + 3, logit(block, k + 3, d, scale, contrast))
    softmax(block.weights, rows)
    for channel in range(0, channels, 4):  # up to three beyond C, of no meaning
        a, b, c, d = zero, zero, zero, zero
        for k in range(components):
            weight, row = get(block.weights, k), k * channels + channel
            a = a + get(block.centres, row) * weight
            b = b + get(block.centres, row + 1) * weight
            c = c + get(block.centres, row + 2) * weight
            d = d + get(block.centres, row + 3) * weight
        put(block.posterior, channel, a)
        put(block.posterior, channel + 1, b)
        put(block.posterior, channel + 2, c)
        put(block.posterior, channel + 3, d)


@part
def velocity(block: Block, x: LanesType, c: int, at: Moment, variance: float) -> LanesType:
    """Channel `c` of π at the state of the last query."""
    correction = (get(block.posterior, c) + get(block.nu, c) * variance) * at.shrink
    return (x - get(block.origin, c) - correction) * (1 / at.sigma)


@entry
def integrate(
    policy: FlatPolicy,
    x_from: np.ndarray,
    sigmas: np.ndarray,
    shares: np.ndarray,
    x_to: np.ndarray,
    mean_velocity: np.ndarray,
    shape: tuple[int, int, int],
    first: int,
    last: int,
) -> None:
    """Integrate blocks `first` … `last`, counted over all samples.

    Args:
        policy: what to follow.
        x_from: start states, (B·C·N,).
        sigmas: σ at the substeps' ends, (S + 1, B).
        shares: weight of each substep in the mean velocity, (S, B).
        x_to: receives the end states, (B·C·N,).
        mean_velocity: receives Σ_s share_s·velocity_s, (B·C·N,).
        shape: K, C, N.
        first, last: range of blocks.
    """
    components, channels, space = shape
    blocks = -(-space // LANES)
    block = new_block(components, channels)
    x, mean, spare = new_rows(channels), new_rows(channels), new_rows(1)
    for index in range(first, last):
        sample, n = index // blocks, index % blocks * LANES
        count = min(LANES, space - n)
        sigma_src, variance = policy.sigma_src[sample], np.float64(policy.variances[sample])
        load_block(block, policy, shape, sample, n, spare)
        for c in range(channels):
            put(x, c, read(x_from, (sample * channels + c) * space + n, count, spare))
            put(mean, c, splat(np.float32(0)))
        for s in range(len(shares)):
            change, share = sigmas[s + 1, sample] - sigmas[s, sample], shares[s, sample]
            if change == 0 and share == 0:
                continue  # a sample with fewer substeps rests
            at = moment(sigmas[s, sample], sigma_src, variance)
            query(block, x, 0, at, components, channels)
            for c in range(channels):
                u = velocity(block, get(x, c), c, at, variance)
                put(x, c, get(x, c) + u * change)
                put(mean, c, get(mean, c) + u * share)
        for c in range(channels):
            write(x_to, (sample * channels + c) * space + n, count, get(x, c), spare)
            write(mean_velocity, (sample * channels + c) * space + n, count, get(mean, c), spare)


@entry
def pull_back(
    policy: FlatPolicy,
    x_from: np.ndarray,
    sigmas: np.ndarray,
    shares: np.ndarray,
    cotangent: np.ndarray,
    gradients: Gradients,
    shape: tuple[int, int, int],
    first: int,
    last: int,
) -> None:
    """Vector-Jacobian product of `integrate`'s mean velocity, for blocks `first` … `last`.

    The states of the block are integrated again and kept, S·C rows; everything else is recomputed query by
    query, from the last substep to the first. A bar marks the gradient to a quantity of the class docstring
    of `GMFlowPolicy`.

    Args:
        policy, x_from, sigmas, shares, shape, first, last: as for `integrate`.
        cotangent: gradient to the mean velocity, (B·C·N,).
        gradients: receives the gradients.
    """
    components, channels, space = shape
    blocks, steps = -(-space // LANES), len(shares)
    block, zero = new_block(components, channels), splat(np.float32(0))
    x, spare = new_rows((steps + 1) * channels), new_rows(1)
    centres_bar, logweights_bar = new_rows(components * channels), new_rows(components)
    contraction = new_rows(components)  # Σ_s ζ·ā'_k / (v·ζ + 1): the gradient through ‖μ_k‖², per μ_k
    mean_bar, x_bar, x_0_bar = new_rows(channels), new_rows(channels), new_rows(channels)
    nu_bar, evidence_bar = new_rows(channels), new_rows(channels)
    for index in range(first, last):
        sample, n = index // blocks, index % blocks * LANES
        count = min(LANES, space - n)
        sigma_src, variance = policy.sigma_src[sample], np.float64(policy.variances[sample])
        load_block(block, policy, shape, sample, n, spare)
        for c in range(channels):
            start = (sample * channels + c) * space + n
            put(x, c, read(x_from, start, count, spare))
            put(mean_bar, c, read(cotangent, start, count, spare))
            put(x_bar, c, zero)
            put(evidence_bar, c, zero)
        for k in range(components):
            put(logweights_bar, k, zero)
            put(contraction, k, zero)
        for row in range(components * channels):
            put(centres_bar, row, zero)
        variance_bar = zero

        for s in range(steps - 1):
            change, now = sigmas[s + 1, sample] - sigmas[s, sample], s * channels
            at = moment(sigmas[s, sample], sigma_src, variance)
            query(block, x, now, at, components, channels)
            for c in range(channels):
                value = get(x, now + c)
                put(x, now + channels + c, value + velocity(block, value, c, at, variance) * change)

        for s in range(steps - 1, -1, -1):
            change, share = sigmas[s + 1, sample] - sigmas[s, sample], shares[s, sample]
            if change == 0 and share == 0:
                continue
            at = moment(sigmas[s, sample], sigma_src, variance)
            query(block, x, s * channels, at, components, channels)

            shrink_bar, expected = zero, zero
            for c in range(channels):
                u_bar = get(mean_bar, c) * share + get(x_bar, c) * change
                through_x = u_bar * (1 / at.sigma)
                put(x_bar, c, get(x_bar, c) + through_x)
                scaled = through_x * (-at.shrink)  # gradient to Σ_k w_k·μ_k + v·ν
                put(x_0_bar, c, scaled)
                posterior, nu = get(block.posterior, c), get(block.nu, c)
                shrink_bar = shrink_bar - through_x * (posterior + nu * variance)
                variance_bar = variance_bar + scaled * nu
                expected = expected + scaled * posterior
                put(nu_bar, c, scaled * variance)

            for k in range(components):
                agreement, weight_bar = zero, zero
                for c in range(channels):
                    centre = get(block.centres, k * channels + c)
                    agreement = agreement + centre * get(block.nu, c)
                    weight_bar = weight_bar + centre * get(x_0_bar, c)
                weight = get(block.weights, k)
                logit_bar = weight * (weight_bar - expected)
                put(logweights_bar, k, get(logweights_bar, k) + logit_bar)
                shrink_bar = shrink_bar + logit_bar * (agreement - get(block.squares, k) * (0.5 * at.zeta))
                pull = logit_bar * at.shrink
                put(contraction, k, get(contraction, k) + pull * at.zeta)
                for c in range(channels):
                    row = k * channels + c
                    put(nu_bar, c, get(nu_bar, c) + pull * get(block.centres, row))
                    change_bar = weight * get(x_0_bar, c) + pull * get(block.nu, c)
                    put(centres_bar, row, get(centres_bar, row) + change_bar)

            if at.shrink < 1 / MIN_SPREAD:
                variance_bar = variance_bar - shrink_bar * (at.shrink**2 * at.zeta)
            for c in range(channels):
                put(x_bar, c, get(x_bar, c) + get(nu_bar, c) * at.gain)
                put(evidence_bar, c, get(evidence_bar, c) - get(nu_bar, c))

        source = moment(sigma_src, sigma_src, variance)
        for c in range(channels):
            x_src_bar = get(evidence_bar, c) * source.gain
            for k in range(components):
                row = k * channels + c
                centre_bar = get(centres_bar, row) - get(contraction, k) * get(block.centres, row)
                x_src_bar = x_src_bar + centre_bar
                write(
                    gradients.means,
                    ((sample * components + k) * channels + c) * space + n,
                    count,
                    centre_bar * (-source.sigma),
                    spare,
                )
            write(gradients.x_src, (sample * channels + c) * space + n, count, x_src_bar, spare)
            write(gradients.x_from, (sample * channels + c) * space + n, count, get(x_bar, c), spare)
        for k in range(components):
            write(
                gradients.logweights,
                (sample * components + k) * space + n,
                count,
                get(logweights_bar, k),
                spare,
            )
        put(spare, 0, variance_bar)
        total = 0.0
        for lane in range(LANES):
            total += spare[lane]
        gradients.variances[index] = total
