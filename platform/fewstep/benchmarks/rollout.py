"""`fewstep benchmark rollout`: the kernels of the policies' rollouts against a plain port, and against the machine."""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import isnan
from typing import Literal

import torch
from torch import Tensor

from fewstep.benchmarks.measure import (
    Rates,
    aligned,
    device_time,
    interleaved,
    log_to_mlflow,
    machine,
    peak_memory,
)
from fewstep.flow import TEXT_TO_IMAGE_SHIFT as SHIFT
from fewstep.models.devices import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
from fewstep.policies import SUBSTEPS, DXPolicy, GMFlowPolicy, Policy, mean_velocity, rollout
from fewstep.policies.rollout import rollout_reference, substep_sigmas

DESCRIPTION = """\
Time a whole rollout of a policy, from the head's output to the state at its end, three ways in one process:

  plain      the published algorithm as it is written: a masked loop over substeps, each a dozen operations on
             tensors of the size of the means
  torch      the library's reference: the same loop with the algebra arranged to read the means twice
  fused      what `fewstep.policies.rollout` uses: numba on CPUs, Triton on GPUs; DX in closed form

and then the part of a training step that needs gradients, a micro window of three substeps: its time, forward and
backward, with and without fusion, and the largest memory it holds, over that of one velocity query and its backward."""

EXAMPLES = """\
reading the table
  The three are timed in turns and medians are shown, so ratios hold on a busy machine too; milliseconds do not.
  "floor" is what no implementation undercuts here: the head's output read and the state written once, or the
  arithmetic of the algorithm in its cheapest form, at the rates at which this machine, in this run, copies 256 MB
  and multiplies float32 matrices (by the faster of torch's two libraries). DX needs almost no arithmetic: its
  floor is memory.

  "after work" is "fused" again, with other work before each call, which is not timed: a matrix product of torch and a
  pass over 32 MB. In between, the threads have slept, and code and data have left the CPU's caches, as behind a
  network. The tables of times are kept from call to call, as they are for a sampler that makes image after image.

  On a GPU, "fused ms" is a lone call, most of it the host's launching; "GPU ms" is what the GPU works for it, and
  all there is to pay behind a network that keeps the queue full. The floor is compared with that.

  On a CPU, "plain" depends on whether the C library hands freed memory back to the system and faults it in again
  at every operation: several times slower, and left to glibc's defaults decided by chance as a process goes on. So
  everything is timed twice, "returned" as glibc begins (what is larger than 128 KiB goes back at once) and "kept" as
  in this library's training workers; windows, which belong to training, "kept" alone. "fused" allocates next to
  nothing either way.

examples
  {program}                                 CPU, 2 threads, about a minute
  {program} --device cuda                   shapes of a data-centre GPU
  {program} --repeats 3 --tracking sqlite:///mlflow.db"""

FreedMemory = Literal["", "returned", "kept"]
"""What the C library does with freed memory; empty where it can't be told."""

EXPONENTIAL = 12
"""Operations of one exponential: reduction, polynomial, scaling."""


@dataclass(frozen=True)
class Case:
    """One rollout to time."""

    policy: str
    """gm, dx-grid or dx-polynomial."""
    shape: tuple[int, int, int, int, int]
    """(B, K, C, H, W); K is the number of grid points or orders of DX."""
    substeps: int
    """How many the rollout takes."""

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.policy} {self.shape} × {self.substeps}"

    @property
    def metric_key(self) -> str:
        """For MLflow, without characters that it refuses."""
        return f"{self.policy}/{'x'.join(map(str, self.shape))}x{self.substeps}"

    @property
    def moved(self) -> int:
        """Bytes that any implementation moves: head output, x_src and x read, the end state written."""
        batch, components, channels, height, width = self.shape
        weights = components if self.policy == "gm" else 0
        return 4 * batch * height * width * (components * channels + weights + 3 * channels)

    @property
    def operations(self) -> int:
        """Additions and multiplications of the algorithm, in the cheapest form we know.

        A substep of GMFlow needs the state's inner products with the means. Either they are computed anew, 2·C
        operations for each of K means, and as many for the posterior mean; or they are updated by the means' inner
        products with each other, 2·K² operations in all.
        """
        batch, components, channels, height, width = self.shape
        means, locations = components * channels, batch * height * width
        if self.policy != "gm":
            return locations * (2 * means + 3 * channels)
        softmax = components * (EXPONENTIAL + 6)
        direct = self.substeps * (4 * means + softmax + 12 * channels)
        before_and_after = means * (components + 1) + 6 * means
        by_products = before_and_after + self.substeps * (2 * components**2 + softmax + 6 * components)
        return locations * (8 * means + min(direct, by_products))


CASES = {
    "cpu": (
        Case("gm", (1, 8, 16, 64, 64), 32),
        Case("gm", (16, 32, 4, 32, 32), 32),
        Case("dx-grid", (1, 10, 16, 64, 64), 32),
        Case("dx-polynomial", (16, 10, 4, 32, 32), 32),
    ),
    "cuda": (
        Case("gm", (1, 8, 16, 128, 128), 32),
        Case("gm", (64, 32, 4, 32, 32), 128),
        Case("dx-grid", (1, 10, 16, 128, 128), 32),
        Case("dx-polynomial", (64, 10, 4, 32, 32), 128),
    ),
}


@dataclass(frozen=True)
class HeadOutput:
    """A random output of a policy head, and the state that it was asked at."""

    output: Tensor
    """Means or predictions, (B, K, C, H, W)."""
    logstds: Tensor
    """(B, 1, 1, 1, 1)."""
    logweights: Tensor
    """(B, K, 1, H, W), normalised over K."""
    x_src: Tensor
    """(B, C, H, W)."""
    raw_src: Tensor
    """(B,), on the CPU."""
    sigma_src: Tensor
    """(B,), where the network took it, on the device."""

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> HeadOutput:
        """Draw one of a case's shape, the same in every process."""
        (batch, components, channels, *space), generator = case.shape, torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        return cls(
            normal(batch, components, channels, *space),
            torch.full((batch, 1, 1, 1, 1), -2.0, device=device),
            normal(batch, components, 1, *space).log_softmax(1),
            normal(batch, channels, *space),
            raw_src := torch.ones(batch),
            SHIFT.warp(raw_src).to(device),
        )

    def policy(self, case: Case) -> Policy:
        """The policy of a case's kind that has this output."""
        if case.policy == "gm":
            return GMFlowPolicy(self.output, self.logstds, self.logweights, self.x_src, self.sigma_src)
        mode: Literal["grid", "polynomial"] = "grid" if case.policy == "dx-grid" else "polynomial"
        return DXPolicy(self.output, self.x_src, self.sigma_src, case.substeps / SUBSTEPS, SHIFT, mode)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=tuple(CASES), default=default, help="default here: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds; default: %(default)s")
    parser.add_argument("--tracking", metavar="URI", help="also log the table to this MLflow address")


def run(options: argparse.Namespace) -> None:
    """Time all cases of the device, and print the table."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rates, description = Rates.measured(device), machine(device)
    measured = [
        measure_rollout(case, options.repeats, device, rates, memory)
        for case in CASES[options.device]
        for memory in memory_settings(device)
    ]
    set_memory(memory_settings(device)[-1])  # as in training workers, where windows belong
    windows = [
        measure_window(case, options.repeats, device)
        for case in CASES[options.device]
        if case.policy in ("gm", "dx-grid")
    ]
    table = (
        f"{description}\ncopies {rates.copy / 1e9:.1f} GB/s, multiplies matrices at {rates.matrix / 1e9:.0f} GFLOPS\n\n"
        + aligned(ROLLOUT_HEADER, [row for row, _ in measured])
        + "\n\n"
        + aligned(WINDOW_HEADER, [row for row, _ in windows])
    )
    print(table)
    if options.tracking:
        metrics = {key: value for _, values in (*measured, *windows) for key, value in values.items()}
        log_to_mlflow(options.tracking, f"rollout-{options.device}", description, table, metrics)


ROLLOUT_HEADER = (
    "rollout, no gradient (B,K,C,H,W) × substeps", "freed memory", "plain ms", "torch ms", "fused ms", "GPU ms",
    "plain/fused", "torch/fused", "MB", "MFLOP", "floor ms", "fused/floor", "after work ms", "after/floor",
)  # fmt: skip
WINDOW_HEADER = (
    "window of 3 substeps, with gradient", "torch ms", "fused ms", "torch/fused", "query MB", "window MB",
    "window/query",
)  # fmt: skip


def memory_settings(device: torch.device) -> tuple[FreedMemory, ...]:
    """What the C library is told to do with freed memory, one after the other: both on a CPU with glibc."""
    return ("returned", "kept") if device.type == "cpu" and hasattr(ctypes.CDLL(None), "mallopt") else ("",)


def set_memory(memory: FreedMemory) -> None:
    """Tell the C library what to do with freed memory from now on."""
    if memory:
        trim, mmap = (2**31 - 1, 2**25) if memory == "kept" else (2**17, 2**17)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, trim)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, mmap)


def measure_rollout(
    case: Case, repeats: int, device: torch.device, rates: Rates, memory: FreedMemory
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Time one rollout in all ways; first it is checked that they agree.

    Args:
        case: what is rolled out.
        repeats: timed rounds.
        device: where.
        rates: of the machine, for the floor.
        memory: what the C library is to do with freed memory.

    Returns:
        The table's row, and metrics for MLflow.
    """
    set_memory(memory)
    head = HeadOutput.draw(case, device)
    raw_to = head.raw_src - case.substeps / SUBSTEPS
    sigmas = substep_sigmas(head.raw_src, raw_to, SHIFT)
    runs: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain_rollout(case, head, sigmas),
        "torch": lambda: rollout_reference(head.policy(case), head.x_src, sigmas.to(device)),
        "fused": lambda: rollout(head.policy(case), head.x_src, head.raw_src, raw_to, SHIFT)[0],
    }
    with torch.no_grad():
        # A fast rollout that ends elsewhere is worth nothing.
        for name in ("torch", "fused"):
            torch.testing.assert_close(runs[name](), runs["plain"](), atol=1e-3, rtol=1e-3)
        seconds = interleaved(runs, repeats, device)
        after = interleaved({"fused": runs["fused"]}, repeats, device, OtherWork(device))["fused"]
        on_gpu = device_time(runs["fused"], repeats, device)
    plain, reference, fused = (seconds[name] for name in runs)
    floor = rates.floor(case.moved, case.operations)
    # On a GPU the lone call's time is mostly the host's launching, which a queue kept full hides.
    over_floor = (fused if isnan(on_gpu) else on_gpu) / floor
    row = (
        case.name, memory, f"{plain * 1e3:.1f}", f"{reference * 1e3:.1f}", f"{fused * 1e3:.2f}",
        "" if isnan(on_gpu) else f"{on_gpu * 1e3:.3f}", f"{plain / fused:.1f}", f"{reference / fused:.1f}",
        f"{case.moved / 1e6:.1f}", f"{case.operations / 1e6:.0f}", f"{floor * 1e3:.3f}", f"{over_floor:.1f}",
        f"{after * 1e3:.2f}", f"{after / floor:.1f}",
    )  # fmt: skip
    key = "/".join(filter(None, (case.metric_key, memory)))
    return row, {
        f"{key}/plain_over_fused": plain / fused,
        f"{key}/torch_over_fused": reference / fused,
        f"{key}/fused_over_floor": over_floor,
        f"{key}/fused_ms": fused * 1e3,
        f"{key}/after_work_over_floor": after / floor,
    }


class OtherWork:
    """What a program does between two rollouts: a matrix product, and a pass over 32 MB, more than caches hold."""

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.randn(1024, 1024, device=device)
        self._memory = torch.zeros(8 * 2**20, device=device)

    def __call__(self) -> None:
        """Do it once."""
        torch.mm(self._matrix, self._matrix)
        self._memory.add_(1)


def measure_window(
    case: Case, repeats: int, device: torch.device
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Time a micro window of three substeps, forward and backward, from the head's output to its gradient.

    Args:
        case: what is rolled out.
        repeats: timed rounds.
        device: where.

    Returns:
        The table's row, and metrics for MLflow.
    """
    head = HeadOutput.draw(case, device)
    leaves = [head.output, head.logstds, head.logweights] if case.policy == "gm" else [head.output]
    for leaf in leaves:
        leaf.requires_grad_()
    raw_a = head.raw_src
    raw_to = raw_a - 3 / SUBSTEPS
    sigmas = substep_sigmas(raw_a, raw_to, SHIFT)
    changes = sigmas.diff(dim=0)

    def gradient(velocity: Callable[[Policy], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(velocity(head.policy(case)).square().mean(), leaves)

    def kept(policy: Policy) -> Tensor:
        """The window without fusion: autograd keeps the intermediate tensors of every substep."""
        x = head.x_src
        for sigma, change in zip(sigmas.to(device), changes.to(device), strict=False):
            x = x + change.view(-1, 1, 1, 1) * policy.velocity(x, sigma)
        return (x - head.x_src) / changes.sum(0).to(device).view(-1, 1, 1, 1)

    query = gradient(lambda policy: policy.velocity(head.x_src, sigmas[1].to(device)))
    fused = gradient(lambda policy: mean_velocity(policy, head.x_src, raw_a, raw_to, SHIFT))
    seconds = interleaved({"torch": gradient(kept), "fused": fused}, repeats, device)
    one, window = peak_memory(query, device), peak_memory(fused, device)
    # Memory is compared with one velocity query's: what a training without windows would hold.
    ratio = seconds["torch"] / seconds["fused"]
    row = (
        case.name, f"{seconds['torch'] * 1e3:.1f}", f"{seconds['fused'] * 1e3:.1f}", f"{ratio:.1f}",
        f"{one / 1e6:.1f}", f"{window / 1e6:.1f}", f"{window / one:.2f}",
    )  # fmt: skip
    key = case.metric_key
    return row, {
        f"{key}/window_torch_over_fused": ratio,
        f"{key}/window_memory_over_query": window / one,
    }


def plain_rollout(case: Case, head: HeadOutput, sigmas: Tensor) -> Tensor:
    """METHOD.md sections 1 and 3 as they are written, on tensors (B, K, C, H, W); for comparison alone.

    Args:
        case: says which policy.
        head: of which output.
        sigmas: σ at the ends of all substeps, (substeps + 1, B).

    Returns:
        The state at the end, (B, C, H, W).
    """
    x_src, device = head.x_src, head.x_src.device
    sigma_src = head.sigma_src.view(-1, 1, 1, 1, 1)
    points = x_src.unsqueeze(1) - sigma_src * head.output
    variance = (2 * head.logstds).exp() * sigma_src.square()
    raw_src, raw_end = head.raw_src.to(device), (head.raw_src - case.substeps / SUBSTEPS).to(device)
    counts = sigmas.diff(dim=0).ne(0).sum(0).to(device)

    def gm_x_0(x: Tensor, sigma: Tensor) -> Tensor:
        s, alpha, alpha_src = sigma.view(-1, 1, 1, 1, 1), 1 - sigma.view(-1, 1, 1, 1, 1), 1 - sigma_src
        zeta = (alpha / s) ** 2 - (alpha_src / sigma_src) ** 2
        nu = alpha * x.unsqueeze(1) / s**2 - alpha_src * x_src.unsqueeze(1) / sigma_src**2
        spread = (variance * zeta + 1).clamp(min=1e-6)
        posterior = (variance * nu + points) / spread
        evidence = (points * (nu - 0.5 * zeta * points) / spread).sum(2, keepdim=True)
        return ((head.logweights + evidence).softmax(1) * posterior).sum(1)

    def dx_x_0(_: Tensor, sigma: Tensor) -> Tensor:
        raw = SHIFT.unwarp(sigma)
        orders = torch.arange(len(points[0]), device=device)
        if case.policy == "dx-polynomial":
            basis = (raw_src - raw).unsqueeze(1) ** orders
        else:
            position = (raw - raw_end) / (raw_src - raw_end) * (len(orders) - 1)
            basis = (1 - (position.unsqueeze(1) - orders).abs()).clamp(min=0)
        return (basis.view(*basis.shape, 1, 1, 1) * points).sum(1)

    x_0_at, x = gm_x_0 if case.policy == "gm" else dx_x_0, x_src
    for i, (sigma, after) in enumerate(pairwise(sigmas.to(device))):
        s = sigma.view(-1, 1, 1, 1)
        velocity = (x - x_0_at(x, sigma)) / s.clamp(min=1e-6)
        moved = x + velocity * (after.view(-1, 1, 1, 1) - s)
        # Samples whose rollout ends earlier stay where they are.
        x = torch.where((i < counts).view(-1, 1, 1, 1), moved, x)
    return x
