"""GMFlow, and DX's closed form, on the CPU: a block of latent locations stays in the first-level cache for a rollout.

Compiled by numba at the first use (some seconds) and kept in numba's cache on disk. All compiled code is in this one
file: numba compiles again when the file of a cached function changes, but not when a file that it imports does.
Arrays are flat; the shapes in comments use N for the number of latent locations of a sample, H·W or T·H·W.

A kernel is a C function whose one argument points to a `JOB`. Any thread may call it, of Python or of OpenMP; threads
that are given the same job share its blocks. METHOD.md section 3 has the equations.
"""

from __future__ import annotations

import ctypes
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

# Lanes: 32 float32 numbers side by side, one latent location per lane. As a numba type this is one LLVM vector (two
# registers of AVX-512, four of AVX2, eight of NEON): numba by itself vectorises neither sums nor exponentials.

LANES = 32
"""Latent locations per block."""

CACHE_LINE = 64
"""In bytes; rows of scratch memory begin at multiples of it."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
# a·b + c may become one instruction. Nothing else is allowed: reordered sums, for one, would round differently.
_CONTRACT = ("contract",)

Floats = types.CPointer(types.float32)
"""Numba's type of a pointer to float32. numba counts references to arrays, which costs more than the work done here."""

# Decorator of the functions that kernels are made of. "numpy": division by zero gives infinity; as Python's exception,
# each division would need a branch.
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
    """The float32 numbers that begin at an address (an integer)."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return Floats(types.intp), emit


@intrinsic
def claim(_: Any, counter: types.Integer, amount: types.Integer) -> Any:
    """Add to the integer at an address, atomically, and return its value from before."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        # "monotonic" orders only this counter: threads share no other data while a kernel runs.
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.intp(types.intp, types.intp), emit


def _row(builder: ir.IRBuilder, rows: Any, row: Any) -> Any:
    first = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(rows, [first]), _FLOATS.as_pointer())


@intrinsic
def get(_: Any, rows: Floats, row: types.Integer) -> Any:
    """Read row `row` of scratch memory, `LANES` numbers."""

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
    """A pointer to the rows that begin at `row`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [builder.mul(args[1], ir.Constant(args[1].type, LANES))])

    return Floats(Floats, types.intp), emit


@intrinsic
def load(_: Any, flat: Floats, start: types.Integer) -> Any:
    """Read `LANES` consecutive numbers that begin at `flat[start]`, at any address."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(builder.gep(args[0], [args[1]]), _FLOATS.as_pointer())
        # N need not be a multiple of 32: tensors are aligned to one float32 only.
        return builder.load(pointer, align=4)

    return Lanes(Floats, types.intp), emit


@intrinsic
def store(_: Any, flat: Floats, start: types.Integer, value: LanesType) -> Any:
    """Write `LANES` consecutive numbers that begin at `flat[start]`, at any address."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(builder.gep(args[0], [args[1]]), _FLOATS.as_pointer())
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(Floats, types.intp, Lanes), emit


@intrinsic
def prefetch(_: Any, flat: Floats, start: types.Integer) -> Any:
    """Have the CPU load `LANES` consecutive numbers from `flat[start]` on into its caches, without waiting for them."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        for line in range(0, 4 * LANES, CACHE_LINE):
            pointer = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
            pointer = builder.gep(pointer, [ir.Constant(ir.IntType(64), line)])
            builder.call(function, [pointer, flag(0), flag(3), flag(1)])  # to read, into all levels, data
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
    """Define an operator between two `Lanes`, and between `Lanes` and a number.

    Args:
        operation: Python's operator function, such as `operator.add`.
        instruction: name of LLVM's builder method, such as "fadd".
    """

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
        return None  # not ours: numba goes on with its own definitions


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
    """value · 2^n, where the low bits of `shifted` hold the integer n (see `_ROUND`)."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        bits, power = (builder.bitcast(arg, _INTEGERS) for arg in args)
        # The exponent of a float32 begins at bit 23; what is not n is shifted out.
        exponent = builder.shl(power, ir.Constant(_INTEGERS, [23] * LANES))
        return builder.bitcast(builder.add(bits, exponent), _FLOATS)

    return Lanes(Lanes, Lanes), emit


# Adding this rounds a float32 to an integer, which then is in its low bits: numbers of this size have no fraction.
_ROUND = np.float32(1.5 * 2**23)

SMALLEST = np.float32(-126.0)
"""Least n for which 2^n is a float32 of full precision."""


@part
def exp2(x: LanesType) -> LanesType:
    """2^x for x ≤ 0, with a relative error of 2e-7; 2^-126 (1e-38) for all x below −126, −∞ included."""
    x = larger(splat(SMALLEST), x)  # in this order, NaN stays NaN: `larger` returns its second argument then
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)  # x less its nearest integer, in [−½, ½]
    # 2^f by the minimax polynomial of degree 5
    p = f * np.float32(0.0013276471519582042) + np.float32(0.009675541330674808)
    p = p * f + np.float32(0.05550713274961089)
    p = p * f + np.float32(0.24022119723934107)
    p = p * f + np.float32(0.6931469670638657)
    p = p * f + np.float32(1.000000071654655)
    return _scale_by_power(p, shifted)


@part
def read(flat: Floats, start: int, count: int, spare: Floats) -> LanesType:
    """Read `count` numbers from `flat[start]` on; the lanes after them are 0. `spare` is a row of scratch memory."""
    if count == LANES:
        return load(flat, start)
    # The last block of a sample may be partly empty: beyond its end is another row, or no memory of ours.
    for lane in range(LANES):
        spare[lane] = flat[start + lane] if lane < count else np.float32(0)
    return get(spare, 0)


@part
def write(flat: Floats, start: int, count: int, value: LanesType, spare: Floats) -> None:
    """Write the first `count` lanes to `flat[start]` and on. `spare` is a row of scratch memory."""
    if count == LANES:
        store(flat, start, value)
    else:
        put(spare, 0, value)
        for lane in range(count):
            flat[start + lane] = spare[lane]


# The kernels. Their logarithms and powers are of base 2, as `exp2` is what can be computed fast.

LOG2E = np.float32(1.4426950408889634)

SIZES = ("samples", "components", "channels", "space", "steps", "grain")
"""B, K, C, N, the number of substeps S, and how many blocks a thread claims at a time."""

ADDRESSES = (
    # The policy: means (B·K·C·N,), log-stds (B,), log-weights (B·K·N,), x_src (B·C·N,), σ_src (B,)
    *("means", "logstds", "logweights", "x_src", "sigma_src"),
    # State at the start (B·C·N,), σ at the substeps' boundaries (S + 1, B), the substeps' shares in the mean (S, B)
    *("x_from", "sigmas", "shares"),
    # Results of `integrate`, those that are asked for: end state, mean velocity, (B·C·N,) each
    *("x_to", "mean_velocity"),
    # Of `pull_back`: the gradient to the mean velocity, and the results, gradients to the policy and the start state.
    # They are arranged as these are; but the gradient to the log-stds is a summand per block, (B·⌈N / LANES⌉,)
    *("cotangent", "to_means", "to_logstds", "to_logweights", "to_x_src", "to_x_from"),
    # Of `combine`: the factors of the outputs, of x_src and of x, (B, N + 2)
    "factors",
    # Scratch memory, `scratch_rows` for each thread, and two int64 counters: blocks and pieces of scratch given out
    *("scratch", "counters"),
)
"""Names of the arrays whose addresses a job holds; all of float32 but the counters."""

JOB = np.dtype([(name, np.intp) for name in SIZES + ADDRESSES])
"""The record that is a kernel's argument: `SIZES` and `ADDRESSES` as integers."""


def new_job(*sizes: int, **addresses: int) -> ctypes.Array[ctypes.c_ssize_t]:
    """A job of these `SIZES` and `ADDRESSES`. Addresses left out are 0: such a result is not computed."""
    # Not a numpy record of type `JOB`, which takes several times as long to fill.
    return (ctypes.c_ssize_t * len(JOB))(*sizes, *[addresses.get(name, 0) for name in ADDRESSES])


@intrinsic
def job_at(_: Any, pointer: types.RawPointer) -> Any:
    """The job at an address."""
    record = from_dtype(JOB)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(record))

    return record(types.voidptr), emit


@functools.cache
def compiled(kernel: Callable[..., None]) -> Any:
    """The kernel compiled as a C function `void (JOB *)`, which allocates no memory."""
    # "_nrt" is numba's runtime for arrays, which counts references; kernels have pointers alone and need none of it.
    settings = {"nopython": True, "error_model": "numpy", "_nrt": False}
    signature = types.void(types.voidptr)
    try:
        return cfunc(signature, cache=True, **settings)(kernel)
    except RuntimeError:  # neither this folder, nor the user's cache, nor NUMBA_CACHE_DIR can be written
        return cfunc(signature, **settings)(kernel)


class Block(NamedTuple):
    """A policy at `LANES` locations, in the coordinates of `GMFlowPolicy`, and the results of its last query.

    A state is y = x − α·c. In these coordinates the equations do not contain the mixture's own mean c.
    """

    centres: Floats  # μ_k − c, K·C rows
    squares: Floats  # ‖μ_k − c‖², K rows
    logweights: Floats  # log2 A_k, K rows
    origin: Floats  # c, C rows
    evidence: Floats  # the source's term of ν, C rows
    nu: Floats  # ν of the query, C rows
    weights: Floats  # exp(a'_k − max a') of the query, K rows
    posterior: Floats  # Σ_k w_k·(μ_k − c) of the query, w = softmax(a'), C rows
    spare: Floats  # one row
    rest: Floats  # the scratch memory that follows, whose use differs by kernel


class Moment(NamedTuple):
    """One sample's scalars at one σ."""

    sigma: float
    gain: float  # α/σ²
    zeta: float
    shrink: float  # 1 / (v·ζ + 1)


@register_jitable
def padded(count: int) -> int:
    """`count` rounded up to a multiple of four, as sums are computed four at a time.

    Four independent sums hide the latency of each addition, and share the reads of what they have in common.
    """
    return -(-count // 4) * 4


@register_jitable
def block_rows(components: int, channels: int) -> int:
    """Rows of scratch memory before `Block.rest`."""
    # Centres, squares, log-weights and weights for padded components; origin, evidence, ν and posterior for C channels;
    # three rows more behind centres and posterior each, as sums four at a time read and write past them; one spare row.
    return padded(components) * (channels + 3) + 4 * channels + 7


@register_jitable
def by_products(components: int, channels: int) -> bool:
    """Whether a rollout by the centres' inner products is less work: K² operations per substep against 2·K·C."""
    return components <= 2 * channels


@register_jitable
def scratch_rows(components: int, channels: int, steps: int) -> int:
    """Rows of scratch memory that any of the kernels needs per thread."""
    rest = (
        components * (channels + 2) + (steps + 6) * channels
    )  # of `pull_back`, and more than `follow` needs
    if by_products(components, channels):
        rest = max(rest, padded(components) * (padded(components) + 4) + channels)
    return block_rows(components, channels) + rest


@part
def new_block(job: Any) -> Block:
    """An empty block in a piece of scratch memory that no other thread has."""
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
    # Components beyond K, up to the padding: log-weight −∞ makes their weight 0.
    for row in range(components * channels, rows * channels + 3):
        put(begin, row, splat(np.float32(0)))
    for k in range(components, rows):
        put(squares, k, splat(np.float32(0)))
        put(logweights, k, splat(np.float32(-np.inf)))
    return Block(begin, squares, logweights, origin, evidence, nu, weights, posterior, spare, rest)


@part
def source(job: Any, sample: int) -> tuple[float, float]:
    """σ_src and v of a sample."""
    # float64, as for all scalars here: there is one per sample and substep, so precision costs nothing.
    sigma, logstd = np.float64(floats(job.sigma_src)[sample]), np.float64(floats(job.logstds)[sample])
    return sigma, np.exp(2 * logstd) * sigma**2


@part
def moment(sigma: float, sigma_src: float, variance: float) -> Moment:
    """The scalars of `GMFlowPolicy`'s equations at σ, with `variance` v."""
    s, s_src = max(np.float64(sigma), MIN_SIGMA), max(np.float64(sigma_src), MIN_SIGMA)
    # Next to the source this is a small difference of large squares: float64 keeps its digits.
    zeta = ((1 - s) / s) ** 2 - ((1 - s_src) / s_src) ** 2
    return Moment(s, (1 - s) / s**2, zeta, 1 / max(variance * zeta + 1, MIN_SPREAD))


@part
def expectation(
    logits: Floats, top: LanesType, components: int, values: Floats, width: int, into: Floats
) -> LanesType:
    """Write Σ_k w_k·values_k to the rows of `into`, where w is the softmax in base 2 of the K rows of `logits`.

    Overwrites `logits` with the unnormalised weights 2^(logit − top), and returns 1 / their sum. Rows are written four
    at a time: up to three after the last one of `width` have no meaning.

    Args:
        logits: K rows.
        top: their maximum.
        components: K.
        values: `width` rows for each component.
        width: rows of the result.
        into: where it is written.
    """
    zero = splat(np.float32(0))
    total, a, b, c, d = zero, zero, zero, zero, zero
    # The first four sums share their loop with the exponentials, so that each is used while still in a register.
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
    """Write four rows that begin at `first`."""
    put(rows, first, a)
    put(rows, first + 1, b)
    put(rows, first + 2, c)
    put(rows, first + 3, d)


@part
def products(block: Block, vector: Floats, channels: int, k: int) -> tuple[LanesType, ...]:
    """Inner products of the C rows of `vector` with each of the four centres from component `k` on."""
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
    """The sample that block `index` belongs to, and the first of its locations."""
    return index // sample_blocks(job), index % sample_blocks(job) * LANES


@part
def next_block(job: Any, index: int) -> int:
    """The block that a thread takes after `index`: the next of its slice, or the first of a slice that it claims."""
    return index + 1 if (index + 1) % job.grain else claim(job.counters, job.grain)


@part
def load_block(job: Any, block: Block, index: int) -> tuple[int, int, int]:
    """Fill a block with the policy at its locations; returns its sample, its first location, and their number."""
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
    scale = splat(np.float32(1)) / total  # of the unnormalised prior weights, which give the mixture's mean c

    sigma = max(np.float64(floats(job.sigma_src)[sample]), MIN_SIGMA)
    alpha, gain = 1 - sigma, (1 - sigma) / sigma**2
    for c in range(channels):
        mean = zero
        for k in range(components):
            row = k * channels + c
            value = read(means, (sample * components * channels + row) * space + n, count, block.spare)
            put(block.centres, row, value)
            mean = mean + get(block.weights, k) * value
        mean = mean * scale  # in velocity space; c = x_src − σ_src·mean
        x = read(floats(job.x_src), (sample * channels + c) * space + n, count, block.spare)
        origin = x - mean * sigma
        put(block.origin, c, origin)
        put(block.evidence, c, (x - origin * alpha) * gain)
        # μ_k − c = σ_src·(mean − mean_k), without the cancellation of subtracting c from μ_k
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
    """Write the start state, y = x − α·c, to C rows of `into`; returns α there."""
    alpha = 1 - max(np.float64(floats(job.sigmas)[sample]), MIN_SIGMA)
    for c in range(job.channels):
        x = read(floats(job.x_from), (sample * job.channels + c) * job.space + n, count, block.spare)
        put(into, c, x - get(block.origin, c) * alpha)
    return alpha


@part
def query(block: Block, state: Floats, at: Moment, components: int, channels: int) -> LanesType:
    """Compute ν, the unnormalised weights and the posterior mean centre for a state, into the block's rows for them.

    Args:
        block: holds the policy.
        state: y, C rows.
        at: the scalars at the state's σ.
        components: K.
        channels: C.

    Returns:
        1 / Σ weights.
    """
    for channel in range(channels):
        put(block.nu, channel, get(state, channel) * at.gain - get(block.evidence, channel))
    # a'_k in base 2: log2 A_k + (μ_k·ν − ½·ζ·‖μ_k‖²)·shrink·log2 e
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
    """dy/dσ at the last query as a sum: the factors of y, of the source's evidence and of the posterior mean."""
    # (y − ŷ_0)/σ with ŷ_0 = (posterior + v·ν)·shrink and ν = gain·y − evidence
    return (
        (1 - at.shrink * variance * at.gain) / at.sigma,
        at.shrink * variance / at.sigma,
        -at.shrink / at.sigma,
    )


@part
def look_ahead(job: Any, start: int, s: int, share: int) -> None:
    """Prefetch the means of the next block, which begin at `start`: at substep `s` the rows of its `share`."""
    # Spread over the substeps, memory works while the CPU computes. Past the last block, the address is not ours to
    # read; a prefetch of it does nothing.
    for row in range(s * share, min((s + 1) * share, job.components * job.channels)):
        prefetch(floats(job.means), start + row * job.space)


@part
def follow(job: Any, block: Block, sample: int, n: int, count: int, next_start: int) -> None:
    """Integrate one block substep by substep, and sum its velocities where the mean is asked for."""
    components, channels, samples = job.components, job.channels, job.samples
    sigmas, shares = floats(job.sigmas), floats(job.shares)
    sigma_src, variance = source(job, sample)
    state, mean, shared = block.rest, from_row(block.rest, channels), 0.0
    ahead = -(-components * channels // job.steps)  # rows to prefetch per substep
    alpha = load_state(job, block, sample, n, count, state)
    for c in range(channels):
        put(mean, c, splat(np.float32(0)))
    for s in range(job.steps):
        here = s * samples + sample
        change, share = np.float64(sigmas[here + samples]) - sigmas[here], np.float64(0)  # change < 0
        if job.mean_velocity:
            share = np.float64(shares[here])
        if change == 0 and share == 0:
            continue  # a sample with fewer substeps than others of its batch is at its end already
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
        alpha -= change  # α = 1 − σ
        shared += share
    # Back from y to x = y + α·c, whose velocity is dy/dσ − c.
    for c in range(channels):
        start, origin = (sample * channels + c) * job.space + n, get(block.origin, c)
        if job.x_to:
            write(floats(job.x_to), start, count, get(state, c) + origin * alpha, block.spare)
        if job.mean_velocity:
            write(floats(job.mean_velocity), start, count, get(mean, c) - origin * shared, block.spare)


@part
def follow_by_products(job: Any, block: Block, sample: int, n: int, count: int, next_start: int) -> None:
    """Integrate one block by the inner products of its centres alone (METHOD.md section 3).

    The state is always a linear combination of the start state, the evidence of the source and the centres. Queries
    need only its inner products with the centres, which follow the same recursion. So the C channels are read only
    before the first substep and after the last.
    """
    components, channels, samples = job.components, job.channels, job.samples
    rows = padded(components)
    sigmas = floats(job.sigmas)
    sigma_src, variance = source(job, sample)
    ahead = -(-components * channels // job.steps)
    gram = block.rest  # inner products of the centres, K×K, padded to multiples of four
    on_evidence = from_row(gram, rows * rows)  # the centres' inner products with the evidence
    on_state = from_row(on_evidence, rows)  # the centres' inner products with the state
    sums = from_row(on_state, rows)
    taken = from_row(sums, rows)  # factor of each centre in the state
    state = from_row(taken, rows)
    alpha = load_state(job, block, sample, n, count, state)
    for k in range(0, rows, 4):
        a, b, c, d = products(block, state, channels, k)
        put_four(on_state, k, a, b, c, d)
        a, b, c, d = products(block, block.evidence, channels, k)
        put_four(on_evidence, k, a, b, c, d)
        # The products are symmetric: half of them is computed, and mirrored.
        for other in range(min(k + 4, components)):
            a, b, c, d = products(block, from_row(block.centres, other * channels), channels, k)
            put_four(gram, other * rows + k, a, b, c, d)
            put(gram, k * rows + other, a)
            put(gram, (k + 1) * rows + other, b)
            put(gram, (k + 2) * rows + other, c)
            put(gram, (k + 3) * rows + other, d)
        zero = splat(np.float32(0))
        put_four(taken, k, zero, zero, zero, zero)

    of_start, of_evidence = 1.0, 0.0  # factors of the start state and of the evidence in the state
    for s in range(job.steps):
        here = s * samples + sample
        change = np.float64(sigmas[here + samples]) - sigmas[here]
        if change == 0:
            continue  # a sample with fewer substeps than others of its batch is at its end already
        at = moment(sigmas[here], sigma_src, variance)
        scale, contrast = at.shrink * LOG2E, 0.5 * at.zeta
        top = splat(np.float32(-np.inf))
        # a'_k in base 2 as in `query`, with μ_k·ν = gain·(μ_k·y) − μ_k·evidence
        for k in range(components):
            constant = get(on_evidence, k) + get(block.squares, k) * contrast
            constant = get(block.logweights, k) - constant * scale
            a = get(on_state, k) * (at.gain * scale) + constant
            put(block.weights, k, a)
            top = larger(top, a)
        look_ahead(job, next_start, s, ahead)
        # Σ_l w_l·(μ_l·μ_k): the posterior mean's inner product with each centre
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
    """Kernel: the end states or mean velocities that the job asks for."""
    job = job_at(pointer)
    block, rows = new_block(job), job.components * job.channels
    # By inner products, velocities are not computed channel by channel, so that there is no mean of them.
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


def combine(pointer: Any) -> None:
    """Kernel: Σ_i factor_i·output_i + factor_N·x_src + factor_{N+1}·x, the closed form of DX.

    The job's `means` are the N outputs, its `components` their number, and its one channel is all of a sample's.
    """
    job = job_at(pointer)
    space, number = job.space, job.components
    outputs, x_src, x, x_to = floats(job.means), floats(job.x_src), floats(job.x_from), floats(job.x_to)
    spare = from_row(floats(job.scratch), claim(job.counters + 8, 1))
    index = next_block(job, -1)
    while index < job.samples * sample_blocks(job):
        sample, n = place(job, index)
        count, start = min(LANES, space - n), sample * space + n
        factors = floats(job.factors + 4 * sample * (number + 2))
        total = read(x_src, start, count, spare) * factors[number]
        total = total + read(x, start, count, spare) * factors[number + 1]
        for i in range(number):
            output = read(outputs, (sample * number + i) * space + n, count, spare)
            total = total + output * factors[i]
        write(x_to, start, count, total, spare)
        index = next_block(job, index)


def pull_back(pointer: Any) -> None:
    """Kernel: the vector-Jacobian product of `integrate`'s mean velocity."""
    job = job_at(pointer)
    block, index = new_block(job), next_block(job, -1)
    while index < job.samples * sample_blocks(job):
        sample, n, count = load_block(job, block, index)
        floats(job.to_logstds)[index] = pull_back_block(job, block, sample, n, count)
        index = next_block(job, index)


@part
def pull_back_block(job: Any, block: Block, sample: int, n: int, count: int) -> float:
    """Write one block's gradients, and return its summand of the gradient to the log-std.

    Integrates the block again and keeps its states, S·C rows; everything else is recomputed query by query, from the
    last substep to the first. Names that end in `_bar` are gradients to the quantities in the class docstring of
    `GMFlowPolicy`. There is none to c, on which the velocity does not depend.
    """
    components, channels, samples, steps = job.components, job.channels, job.samples, job.steps
    space, spare, zero = job.space, block.spare, splat(np.float32(0))
    sigmas, shares = floats(job.sigmas), floats(job.shares)
    sigma_src, variance = source(job, sample)
    states = block.rest
    centres_bar = from_row(states, (steps + 1) * channels)
    logweights_bar = from_row(centres_bar, components * channels)
    # Σ_s ζ·ā'_k / (v·ζ + 1): the gradient to μ_k through ‖μ_k‖² is −μ_k times this, so it is multiplied in at the end.
    contraction = from_row(logweights_bar, components)
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

    # Forward: the states at the start of each substep. The last substep's end is not needed.
    for s in range(steps - 1):
        here = s * samples + sample
        change = np.float64(sigmas[here + samples]) - sigmas[here]
        at, state = moment(sigmas[here], sigma_src, variance), from_row(states, s * channels)
        query(block, state, at, components, channels)
        along, evident, believed = direction(at, variance)
        for c in range(channels):
            moved = get(state, c) * (1 + change * along) + get(block.evidence, c) * (change * evident)
            put(state, channels + c, moved + get(block.posterior, c) * (change * believed))

    # Backward: x_bar is the gradient to the state at the end of the substep, then to that at its start.
    for s in range(steps - 1, -1, -1):
        here = s * samples + sample
        change, share = np.float64(sigmas[here + samples]) - sigmas[here], np.float64(shares[here])
        if change == 0 and share == 0:
            continue
        at = moment(sigmas[here], sigma_src, variance)
        inverse = query(block, from_row(states, s * channels), at, components, channels)

        shrink_bar, expected = zero, zero
        for c in range(channels):
            # The velocity acts on the mean with its share, and on the next state with the change of σ.
            u_bar = get(mean_bar, c) * share + get(x_bar, c) * change
            through_x = u_bar * (1 / at.sigma)
            put(x_bar, c, get(x_bar, c) + through_x)
            scaled = through_x * (-at.shrink)  # gradient to Σ_k w_k·μ_k + v·ν
            put(x_0_bar, c, scaled)
            posterior, nu = get(block.posterior, c), get(block.nu, c)
            shrink_bar = shrink_bar - through_x * (posterior + nu * variance)
            variance_bar = variance_bar + scaled * nu
            expected = expected + scaled * posterior  # Σ_k w_k·w̄_k, which the softmax subtracts
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

        if at.shrink < 1 / MIN_SPREAD:  # where v·ζ + 1 is clamped, nothing flows through it
            variance_bar = variance_bar - shrink_bar * (at.shrink**2 * at.zeta)
        for c in range(channels):
            put(x_bar, c, get(x_bar, c) + get(nu_bar, c) * at.gain)
            put(evidence_bar, c, get(evidence_bar, c) - get(nu_bar, c))

    # From centres and evidence to what they are made of: μ_k = x_src − σ_src·mean_k, evidence = gain·(x_src − α·c).
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
    # Lanes beyond `count` add nothing: `read` made their cotangent 0.
    put(spare, 0, variance_bar)
    total = 0.0
    for lane in range(LANES):
        total += spare[lane]
    return total * 2 * variance  # v = exp(2·logstd)·σ_src²
