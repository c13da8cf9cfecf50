"""GMFlow on the CPU: a block of latent locations stays in the first-level cache for a whole rollout.

Compiled by numba at the first use (some seconds) and kept in numba's cache on disk. All that is compiled
stands in this one file, because numba compiles anew when the file of a cached function changes, not when
an imported one does. Array shapes are flat; N is the number of latent locations of a sample, H·W or T·H·W.

A kernel is a C function of one pointer, to a `JOB`: any thread may call it, Python's or OpenMP's, and those
that are given the same job share its blocks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import cfunc, from_dtype, njit, types
from numba.extending import intrinsic, models, overload, register_jitable, register_model

from fewstep.policies.base import MIN_SIGMA
from fewstep.policies.gmflow import MIN_SPREAD

# Lanes: 32 float32 side by side, one latent location per lane. As a numba type it is one LLVM vector (two
# AVX-512 registers, four of AVX2, eight of NEON): numba by itself vectorises neither sums nor exponentials.

LANES = 32
"""Latent locations per block."""

CACHE_LINE = 64
"""Bytes: rows begin at multiples of it."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_CONTRACT = ("contract",)  # a·b + c may become one instruction; nothing else may be rearranged

Floats = types.CPointer(types.float32)
"""Numba's type of a pointer to float32. Arrays would be counted references, dearer than what is done with them."""

part = njit(nogil=True, error_model="numpy", forceinline=True)


class LanesType(types.Type):
    """Numba's type of a `Lanes` value."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{LANES}")


Lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: LanesType) -> None:
        super().__init__(manager, kind, _FLOATS)


@intrinsic
def floats(_: Any, address: types.Integer) -> Any:
    """The float32 numbers at an address."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return Floats(types.intp), emit


@intrinsic
def claim(_: Any, counter: types.Integer, amount: types.Integer) -> Any:
    """Add to the integer at an address, atomically, and return what it was."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.intp(types.intp, types.intp), emit


def _row(builder: ir.IRBuilder, rows: Any, row: Any) -> Any:
    first = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(rows, [first]), _FLOATS.as_pointer())


@intrinsic
def get(_: Any, rows: Floats, row: types.Integer) -> Any:
    """Row `row` of scratch memory."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load(_row(builder, *args), align=CACHE_LINE)

    return Lanes(Floats, types.intp), emit


@intrinsic
def put(_: Any, rows: Floats, row: types.Integer, value: LanesType) -> Any:
    """Write row `row` of scratch memory."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store(args[2], _row(builder, *args[:2]), align=CACHE_LINE)
        return context.get_dummy_value()

    return types.void(Floats, types.intp, Lanes), emit


@intrinsic
def from_row(_: Any, rows: Floats, row: types.Integer) -> Any:
    """The rows from `row` on."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [builder.mul(args[1], ir.Constant(args[1].type, LANES))])

    return Floats(Floats, types.intp), emit


@intrinsic
def load(_: Any, flat: Floats, start: types.Integer) -> Any:
    """`LANES` neighbours anywhere in memory."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(builder.gep(args[0], [args[1]]), _FLOATS.as_pointer())
        return builder.load(pointer, align=4)

    return Lanes(Floats, types.intp), emit


@intrinsic
def store(_: Any, flat: Floats, start: types.Integer, value: LanesType) -> Any:
    """Write `LANES` neighbours anywhere in memory."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(builder.gep(args[0], [args[1]]), _FLOATS.as_pointer())
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(Floats, types.intp, Lanes), emit


@intrinsic
def prefetch(_: Any, flat: Floats, start: types.Integer) -> Any:
    """Have `LANES` neighbours anywhere in memory brought near."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        for line in range(0, 4 * LANES, CACHE_LINE):
            pointer = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
            pointer = builder.gep(pointer, [ir.Constant(ir.IntType(64), line)])
            builder.call(function, [pointer, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(Floats, types.intp), emit


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


# Adding it rounds to an integer, which then stands in the low bits: float32 of this size has no fraction.
_ROUND = np.float32(1.5 * 2**23)

SMALLEST = np.float32(-126.0)
"""Below this power of 2 there is no float32 of full precision."""


@part
def exp2(x: LanesType) -> LanesType:
    """2^x for x ≤ 0, relative error 2e-7; 2^-126, which is 1e-38, where it would be less, so also at −∞."""
    x = larger(splat(SMALLEST), x)  # in this order: NaN remains
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)  # in [−½, ½]
    p = f * np.float32(0.0013276471519582042) + np.float32(0.009675541330674808)  # minimax, degree 5
    p = p * f + np.float32(0.05550713274961089)
    p = p * f + np.float32(0.24022119723934107)
    p = p * f + np.float32(0.6931469670638657)
    p = p * f + np.float32(1.000000071654655)
    return _scale_by_power(p, shifted)


@part
def read(flat: Floats, start: int, count: int, spare: Floats) -> LanesType:
    """The first `count` lanes from `flat[start:]`, zeros in the others; `spare` is a row of scratch memory."""
    if count == LANES:
        return load(flat, start)
    for lane in range(LANES):
        spare[lane] = flat[start + lane] if lane < count else np.float32(0)
    return get(spare, 0)


@part
def write(flat: Floats, start: int, count: int, value: LanesType, spare: Floats) -> None:
    """The first `count` lanes to `flat[start:]`; `spare` is a row of scratch memory."""
    if count == LANES:
        store(flat, start, value)
    else:
        put(spare, 0, value)
        for lane in range(count):
            flat[start + lane] = spare[lane]


# The kernels

LOG2E = np.float32(1.4426950408889634)

SIZES = ("samples", "components", "channels", "space", "steps", "grain")
"""B, K, C, N, the number of substeps S, and the blocks that a thread takes at a time."""

ADDRESSES = (
    # of the policy: means (B·K·C·N,), one logstd each (B,), log-weights (B·K·N,), x_src (B·C·N,), σ_src (B,)
    *("means", "logstds", "logweights", "x_src", "sigma_src"),
    # of the state at the start (B·C·N,), σ at the substeps' ends (S + 1, B), their shares in the mean (S, B)
    *("x_from", "sigmas", "shares"),
    # of what is asked for: end state, mean velocity (B·C·N,)
    *("x_to", "mean_velocity"),
    # of the gradient to the mean velocity, and of those to the policy and the start, arranged as these are; the
    # one to logstd is a summand per block, (B·⌈N / LANES⌉,)
    *("cotangent", "to_means", "to_logstds", "to_logweights", "to_x_src", "to_x_from"),
    # of scratch memory, `scratch_rows` for each thread, and of two int64 counters: blocks and scratch given out
    *("scratch", "counters"),
)

JOB = np.dtype([(name, np.intp) for name in SIZES + ADDRESSES])
"""What a kernel is told."""


def new_job(*sizes: int, **addresses: int) -> np.ndarray:
    """A job of these `SIZES` and `ADDRESSES`; those left out are 0, which asks for nothing."""
    return np.array((*sizes, *(addresses.get(name, 0) for name in ADDRESSES)), JOB)


@intrinsic
def job_at(_: Any, pointer: types.RawPointer) -> Any:
    """The job at an address."""
    record = from_dtype(JOB)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(record))

    return record(types.voidptr), emit


@functools.cache
def compiled(kernel: Callable[..., None]) -> Any:
    """The kernel as a C function `void (JOB *)`, which allocates nothing."""
    settings = {"nopython": True, "error_model": "numpy", "_nrt": False}
    signature = types.void(types.voidptr)
    try:
        return cfunc(signature, cache=True, **settings)(kernel)
    except RuntimeError:  # neither this folder, nor the user's cache, nor NUMBA_CACHE_DIR can be written
        return cfunc(signature, **settings)(kernel)


class Block(NamedTuple):
    """A policy at `LANES` locations, in the coordinates of `GMFlowPolicy`, and one query's answer.

    A state is y = x − α·c: in these coordinates the mixture's own mean c occurs nowhere else.
    """

    centres: Floats  # μ_k − c, K·C rows
    squares: Floats  # ‖μ_k − c‖², K rows
    logweights: Floats  # log2 A_k, K rows
    origin: Floats  # c, C rows
    evidence: Floats  # ν's part of the source, C rows
    nu: Floats  # ν of the query, C rows
    weights: Floats  # exp(a'_k − max a') of the query, K rows
    posterior: Floats  # Σ_k w_k·(μ_k − c) of the query, w = softmax(a'), C rows
    spare: Floats  # one row
    rest: Floats  # what follows


class Moment(NamedTuple):
    """One sample's scalars at one σ."""

    sigma: float
    gain: float  # α/σ²
    zeta: float
    shrink: float  # 1 / (v·ζ + 1)


@register_jitable
def padded(count: int) -> int:
    """Rounded up to groups of four: sums are taken four at a time."""
    return -(-count // 4) * 4


@register_jitable
def block_rows(components: int, channels: int) -> int:
    """Rows of scratch memory before `rest`."""
    return padded(components) * (channels + 3) + 4 * channels + 7


@register_jitable
def by_products(components: int, channels: int) -> bool:
    """Whether a rollout is less work by the centres' inner products: K² per substep, not 2·K·C."""
    return components <= 2 * channels


@register_jitable
def scratch_rows(components: int, channels: int, steps: int) -> int:
    """Rows that any kernel needs per thread."""
    rest = (
        components * (channels + 2) + (steps + 6) * channels
    )  # of `pull_back`, and more than `follow` needs
    if by_products(components, channels):
        rest = max(rest, padded(components) * (padded(components) + 4) + channels)
    return block_rows(components, channels) + rest


@part
def new_block(job: Any) -> Block:
    """In scratch memory that no other thread has."""
    components, channels = job.components, job.channels
    number = claim(job.counters + 8, 1)  # 8 bytes from the first counter to the second
    begin = from_row(floats(job.scratch), number * scratch_rows(components, channels, job.steps))
    rows = padded(components)
    squares = from_row(begin, rows * channels + 3)
    logweights = from_row(squares, rows)
    weights = from_row(logweights, rows)
    origin = from_row(weights, rows)
    evidence = from_row(origin, channels)
    nu = from_row(evidence, channels)
    posterior = from_row(nu, channels)
    spare = from_row(posterior, channels + 3)
    rest = from_row(spare, 1)
    for row in range(components * channels, rows * channels + 3):  # components beyond K have no weight
        put(begin, row, splat(np.float32(0)))
    for k in range(components, rows):
        put(squares, k, splat(np.float32(0)))
        put(logweights, k, splat(np.float32(-np.inf)))
    return Block(begin, squares, logweights, origin, evidence, nu, weights, posterior, spare, rest)


@part
def source(job: Any, sample: int) -> tuple[float, float]:
    """σ_src and v of a sample."""
    sigma, logstd = np.float64(floats(job.sigma_src)[sample]), np.float64(floats(job.logstds)[sample])
    return sigma, np.exp(2 * logstd) * sigma**2


@part
def moment(sigma: float, sigma_src: float, variance: float) -> Moment:
    s, s_src = max(np.float64(sigma), MIN_SIGMA), max(np.float64(sigma_src), MIN_SIGMA)
    zeta = ((1 - s) / s) ** 2 - ((1 - s_src) / s_src) ** 2
    return Moment(s, (1 - s) / s**2, zeta, 1 / max(variance * zeta + 1, MIN_SPREAD))


@part
def expectation(
    logits: Floats, top: LanesType, components: int, values: Floats, width: int, into: Floats
) -> LanesType:
    """Write Σ_k w_k·values_k, rows of `width`, w = softmax in base 2 of the K rows of `logits`.

    `top` is their maximum. Leaves 2^(logit − top) in `logits`; returns 1 / their sum. The first sums, four at a
    time, are taken while the power is at hand; up to three beyond `width` have no meaning.
    """
    zero = splat(np.float32(0))
    total, a, b, c, d = zero, zero, zero, zero, zero
    for k in range(components):
        power, row = exp2(get(logits, k) - top), k * width
        put(logits, k, power)
        total = total + power
        a = a + get(values, row) * power
        b = b + get(values, row + 1) * power
        c = c + get(values, row + 2) * power
        d = d + get(values, row + 3) * power
    scale = splat(np.float32(1)) / total
    put_four(into, 0, a * scale, b * scale, c * scale, d * scale)
    for first in range(4, width, 4):
        a, b, c, d = zero, zero, zero, zero
        for k in range(components):
            power, row = get(logits, k), k * width + first
            a = a + get(values, row) * power
            b = b + get(values, row + 1) * power
            c = c + get(values, row + 2) * power
            d = d + get(values, row + 3) * power
        put_four(into, first, a * scale, b * scale, c * scale, d * scale)
    return scale


@part
def put_four(rows: Floats, first: int, a: LanesType, b: LanesType, c: LanesType, d: LanesType) -> None:
    put(rows, first, a)
    put(rows, first + 1, b)
    put(rows, first + 2, c)
    put(rows, first + 3, d)


@part
def products(block: Block, vector: Floats, channels: int, k: int) -> tuple[LanesType, ...]:
    """Four inner products of centres, from `k` on, and the C rows of `vector`."""
    zero = splat(np.float32(0))
    a, b, c, d = zero, zero, zero, zero
    for channel in range(channels):
        value, row = get(vector, channel), k * channels + channel
        a = a + get(block.centres, row) * value
        b = b + get(block.centres, row + channels) * value
        c = c + get(block.centres, row + 2 * channels) * value
        d = d + get(block.centres, row + 3 * channels) * value
    return a, b, c, d


@part
def sample_blocks(job: Any) -> int:
    """Blocks per sample."""
    return -(-job.space // LANES)


@part
def place(job: Any, index: int) -> tuple[int, int]:
    """The sample of a block, and its first location."""
    return index // sample_blocks(job), index % sample_blocks(job) * LANES


@part
def next_block(job: Any, index: int) -> int:
    """What the thread does after block `index`: the next of its slice, or the first of another slice."""
    return index + 1 if (index + 1) % job.grain else claim(job.counters, job.grain)


@part
def load_block(job: Any, block: Block, index: int) -> tuple[int, int, int]:
    """Fill a block with the policy at its locations; returns its sample, the first of them and their count."""
    components, channels, space = job.components, job.channels, job.space
    sample, n = place(job, index)
    count = min(LANES, space - n)
    means, weights = floats(job.means), floats(job.logweights)
    top, zero = splat(np.float32(-np.inf)), splat(np.float32(0))
    for k in range(components):
        log2 = read(weights, (sample * components + k) * space + n, count, block.spare) * LOG2E
        put(block.logweights, k, log2)
        top = larger(top, log2)
    total = zero
    for k in range(components):
        power = exp2(get(block.logweights, k) - top)
        put(block.weights, k, power)
        total = total + power
    scale = splat(np.float32(1)) / total

    sigma = max(np.float64(floats(job.sigma_src)[sample]), MIN_SIGMA)
    alpha, gain = 1 - sigma, (1 - sigma) / sigma**2
    for c in range(channels):
        mean = zero
        for k in range(components):
            row = k * channels + c
            value = read(means, (sample * components * channels + row) * space + n, count, block.spare)
            put(block.centres, row, value)
            mean = mean + get(block.weights, k) * value
        mean = mean * scale
        x = read(floats(job.x_src), (sample * channels + c) * space + n, count, block.spare)
        origin = x - mean * sigma
        put(block.origin, c, origin)
        put(block.evidence, c, (x - origin * alpha) * gain)
        for k in range(components):
            row = k * channels + c
            put(block.centres, row, (mean - get(block.centres, row)) * sigma)
    for k in range(components):
        square = zero
        for c in range(channels):
            centre = get(block.centres, k * channels + c)
            square = square + centre * centre
        put(block.squares, k, square)
    return sample, n, count


@part
def load_state(job: Any, block: Block, sample: int, n: int, count: int, into: Floats) -> float:
    """Write y at the start to C rows; returns its α."""
    alpha = 1 - max(np.float64(floats(job.sigmas)[sample]), MIN_SIGMA)
    for c in range(job.channels):
        x = read(floats(job.x_from), (sample * job.channels + c) * job.space + n, count, block.spare)
        put(into, c, x - get(block.origin, c) * alpha)
    return alpha


@part
def query(block: Block, state: Floats, at: Moment, components: int, channels: int) -> LanesType:
    """Write ν, the weights and their mean centre for the state in the C rows `state`; returns 1 / Σ weights."""
    for channel in range(channels):
        put(block.nu, channel, get(state, channel) * at.gain - get(block.evidence, channel))
    scale = at.shrink * LOG2E
    contrast = 0.5 * at.zeta * scale
    top = splat(np.float32(-np.inf))
    for first in range(0, padded(components), 4):
        a, b, c, d = products(block, block.nu, channels, first)
        a = a * scale + (get(block.logweights, first) - get(block.squares, first) * contrast)
        b = b * scale + (get(block.logweights, first + 1) - get(block.squares, first + 1) * contrast)
        c = c * scale + (get(block.logweights, first + 2) - get(block.squares, first + 2) * contrast)
        d = d * scale + (get(block.logweights, first + 3) - get(block.squares, first + 3) * contrast)
        put_four(block.weights, first, a, b, c, d)
        top = larger(top, larger(larger(a, b), larger(c, d)))
    return expectation(block.weights, top, components, block.centres, channels, block.posterior)


@part
def direction(at: Moment, variance: float) -> tuple[float, float, float]:
    """Of y with σ, at the last query: factors of y, of the source's evidence and of the posterior mean."""
    return (
        (1 - at.shrink * variance * at.gain) / at.sigma,
        at.shrink * variance / at.sigma,
        -at.shrink / at.sigma,
    )


@part
def look_ahead(job: Any, start: int, s: int, share: int) -> None:
    """Have the means of a block brought near, beginning at `start`: in each substep a share of its rows."""
    for row in range(s * share, min((s + 1) * share, job.components * job.channels)):
        prefetch(floats(job.means), start + row * job.space)


@part
def follow(job: Any, block: Block, sample: int, n: int, count: int, next_start: int) -> None:
    """Integrate one block, and sum its velocities where the mean is asked for."""
    components, channels, samples = job.components, job.channels, job.samples
    sigmas, shares = floats(job.sigmas), floats(job.shares)
    sigma_src, variance = source(job, sample)
    state, mean, shared = block.rest, from_row(block.rest, channels), 0.0
    ahead = -(-components * channels // job.steps)
    alpha = load_state(job, block, sample, n, count, state)
    for c in range(channels):
        put(mean, c, splat(np.float32(0)))
    for s in range(job.steps):
        here = s * samples + sample
        change, share = np.float64(sigmas[here + samples]) - sigmas[here], np.float64(0)
        if job.mean_velocity:
            share = np.float64(shares[here])
        if change == 0 and share == 0:
            continue  # a sample with fewer substeps rests
        at = moment(sigmas[here], sigma_src, variance)
        query(block, state, at, components, channels)
        look_ahead(job, next_start, s, ahead)
        along, evident, believed = direction(at, variance)
        for c in range(channels):
            y, evidence, posterior = get(state, c), get(block.evidence, c), get(block.posterior, c)
            if share != 0:
                u = y * (share * along) + evidence * (share * evident) + posterior * (share * believed)
                put(mean, c, get(mean, c) + u)
            moved = y * (1 + change * along) + evidence * (change * evident)
            put(state, c, moved + posterior * (change * believed))
        alpha -= change
        shared += share
    for c in range(channels):
        start, origin = (sample * channels + c) * job.space + n, get(block.origin, c)
        if job.x_to:
            write(floats(job.x_to), start, count, get(state, c) + origin * alpha, block.spare)
        if job.mean_velocity:
            write(floats(job.mean_velocity), start, count, get(mean, c) - origin * shared, block.spare)


@part
def follow_by_products(job: Any, block: Block, sample: int, n: int, count: int, next_start: int) -> None:
    """Integrate one block by the inner products of its centres alone (METHOD.md section 3).

    The state moves in the span of where it began, the evidence of the source and the centres; queries need its
    products with the centres, and these move as it does. The C channels occur before the first substep and after
    the last.
    """
    components, channels, samples = job.components, job.channels, job.samples
    rows = padded(components)
    sigmas = floats(job.sigmas)
    sigma_src, variance = source(job, sample)
    ahead = -(-components * channels // job.steps)
    gram = block.rest
    on_evidence = from_row(gram, rows * rows)
    on_state = from_row(on_evidence, rows)
    sums = from_row(on_state, rows)
    taken = from_row(sums, rows)  # how much of each centre the state has taken on
    state = from_row(taken, rows)
    alpha = load_state(job, block, sample, n, count, state)
    for k in range(0, rows, 4):
        a, b, c, d = products(block, state, channels, k)
        put_four(on_state, k, a, b, c, d)
        a, b, c, d = products(block, block.evidence, channels, k)
        put_four(on_evidence, k, a, b, c, d)
        for other in range(min(k + 4, components)):
            a, b, c, d = products(block, from_row(block.centres, other * channels), channels, k)
            put_four(gram, other * rows + k, a, b, c, d)
            put(gram, k * rows + other, a)
            put(gram, (k + 1) * rows + other, b)
            put(gram, (k + 2) * rows + other, c)
            put(gram, (k + 3) * rows + other, d)
        zero = splat(np.float32(0))
        put_four(taken, k, zero, zero, zero, zero)

    of_start, of_evidence = 1.0, 0.0
    for s in range(job.steps):
        here = s * samples + sample
        change = np.float64(sigmas[here + samples]) - sigmas[here]
        if change == 0:
            continue  # a sample with fewer substeps rests
        at = moment(sigmas[here], sigma_src, variance)
        scale, contrast = at.shrink * LOG2E, 0.5 * at.zeta
        top = splat(np.float32(-np.inf))
        for k in range(components):
            constant = get(on_evidence, k) + get(block.squares, k) * contrast
            constant = get(block.logweights, k) - constant * scale
            a = get(on_state, k) * (at.gain * scale) + constant
            put(block.weights, k, a)
            top = larger(top, a)
        look_ahead(job, next_start, s, ahead)
        inverse = expectation(block.weights, top, components, gram, rows, sums)
        along, evident, believed = direction(at, variance)
        keep, evident, believed = 1 + change * along, change * evident, change * believed
        for k in range(components):
            moved = get(on_state, k) * keep + get(on_evidence, k) * evident
            put(on_state, k, moved + get(sums, k) * believed)
            put(taken, k, get(taken, k) * keep + get(block.weights, k) * inverse * believed)
        of_start, of_evidence = of_start * keep, of_evidence * keep + evident
        alpha -= change

    for channel in range(channels):
        x = get(state, channel) * of_start + get(block.evidence, channel) * of_evidence
        x = x + get(block.origin, channel) * alpha
        for k in range(components):
            x = x + get(block.centres, k * channels + channel) * get(taken, k)
        write(floats(job.x_to), (sample * channels + channel) * job.space + n, count, x, block.spare)


def integrate(pointer: Any) -> None:
    """End states and mean velocities: what the job asks for."""
    job = job_at(pointer)
    block, rows = new_block(job), job.components * job.channels
    short = job.mean_velocity == 0 and by_products(job.components, job.channels)
    index = next_block(job, -1)
    while index < job.samples * sample_blocks(job):
        sample, n, count = load_block(job, block, index)
        next_sample, next_n = place(job, index + 1)
        next_start = next_sample * rows * job.space + next_n
        if short:
            follow_by_products(job, block, sample, n, count, next_start)
        else:
            follow(job, block, sample, n, count, next_start)
        index = next_block(job, index)


def pull_back(pointer: Any) -> None:
    """Vector-Jacobian product of `integrate`'s mean velocity."""
    job = job_at(pointer)
    block, index = new_block(job), next_block(job, -1)
    while index < job.samples * sample_blocks(job):
        sample, n, count = load_block(job, block, index)
        floats(job.to_logstds)[index] = pull_back_block(job, block, sample, n, count)
        index = next_block(job, index)


@part
def pull_back_block(job: Any, block: Block, sample: int, n: int, count: int) -> float:
    """Write one block's gradients; returns its part of the one to logstd.

    The states of the block are integrated again and kept, S·C rows; everything else is recomputed query by
    query, from the last substep to the first. A bar marks the gradient to a quantity of the class docstring
    of `GMFlowPolicy`; c has none, for the velocity does not depend on it.
    """
    components, channels, samples, steps = job.components, job.channels, job.samples, job.steps
    space, spare, zero = job.space, block.spare, splat(np.float32(0))
    sigmas, shares = floats(job.sigmas), floats(job.shares)
    sigma_src, variance = source(job, sample)
    states = block.rest
    centres_bar = from_row(states, (steps + 1) * channels)
    logweights_bar = from_row(centres_bar, components * channels)
    contraction = from_row(logweights_bar, components)  # Σ_s ζ·ā'_k / (v·ζ + 1): through ‖μ_k‖², per μ_k
    mean_bar = from_row(contraction, components)
    x_bar = from_row(mean_bar, channels)
    x_0_bar = from_row(x_bar, channels)
    nu_bar = from_row(x_0_bar, channels)
    evidence_bar = from_row(nu_bar, channels)

    load_state(job, block, sample, n, count, states)
    for c in range(channels):
        put(mean_bar, c, read(floats(job.cotangent), (sample * channels + c) * space + n, count, spare))
        put(x_bar, c, zero)
        put(evidence_bar, c, zero)
    for k in range(components):
        put(logweights_bar, k, zero)
        put(contraction, k, zero)
    for row in range(components * channels):
        put(centres_bar, row, zero)
    variance_bar = zero

    for s in range(steps - 1):
        here = s * samples + sample
        change = np.float64(sigmas[here + samples]) - sigmas[here]
        at, state = moment(sigmas[here], sigma_src, variance), from_row(states, s * channels)
        query(block, state, at, components, channels)
        along, evident, believed = direction(at, variance)
        for c in range(channels):
            moved = get(state, c) * (1 + change * along) + get(block.evidence, c) * (change * evident)
            put(state, channels + c, moved + get(block.posterior, c) * (change * believed))

    for s in range(steps - 1, -1, -1):
        here = s * samples + sample
        change, share = np.float64(sigmas[here + samples]) - sigmas[here], np.float64(shares[here])
        if change == 0 and share == 0:
            continue
        at = moment(sigmas[here], sigma_src, variance)
        inverse = query(block, from_row(states, s * channels), at, components, channels)

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
            weight = get(block.weights, k) * inverse
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

    at = moment(sigma_src, sigma_src, variance)
    for c in range(channels):
        x_src_bar = get(evidence_bar, c) * at.gain
        for k in range(components):
            row = k * channels + c
            centre_bar = get(centres_bar, row) - get(contraction, k) * get(block.centres, row)
            x_src_bar = x_src_bar + centre_bar
            start = (sample * components * channels + row) * space + n
            write(floats(job.to_means), start, count, centre_bar * (-at.sigma), spare)
        start = (sample * channels + c) * space + n
        write(floats(job.to_x_src), start, count, x_src_bar, spare)
        write(floats(job.to_x_from), start, count, get(x_bar, c), spare)
    for k in range(components):
        start = (sample * components + k) * space + n
        write(floats(job.to_logweights), start, count, get(logweights_bar, k), spare)
    put(spare, 0, variance_bar)
    total = 0.0
    for lane in range(LANES):
        total += spare[lane]
    return total * 2 * variance
