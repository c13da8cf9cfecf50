"""Conversion of diffusion networks to velocities of the flow x_t = (1 − t)·x_0 + t·ε, by an exact change of variables.

A diffusion network is given z = A·x_0 + S·ε (variance preserving: A² + S² = 1) and a discrete timestep, and predicts ε,
x_0 or v = A·ε − S·x_0. Up to its scale, a state of the flow is a state of the diffusion process, at the timestep where
both have the same signal-to-noise ratio, A/S = (1 − t)/t:

    z = s·x_t,   s = 1/√((1 − t)² + t²),   A = (1 − t)·s,   S = t·s

The flow's velocity u = ε − x_0 is linear in the state and in the network's prediction: u = a·x_t + b·prediction.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.policies.base import per_latent

PredictionType = Literal["epsilon", "sample", "v_prediction"]
"""What the network predicts, by diffusers' names: ε, x_0, or v = A·ε − S·x_0."""

SMALLEST_SIGNAL = 1e-8
"""Smallest A² used: schedules rescaled to zero terminal SNR end at A² = 0, where the log-SNR is infinite."""


@dataclass(frozen=True, eq=False)
class DiffusionPrediction:
    """What a network predicts, and for which variance-preserving schedule.

    Attributes:
        type: ε, x_0 or v, by diffusers' names.
        times: flow time t of every timestep, (T,) float64, rising.
    """

    type: PredictionType
    times: Tensor

    def __post_init__(self) -> None:
        if self.type not in get_args(PredictionType):
            raise UserError(
                f"the teacher's scheduler says prediction_type {self.type!r}: known are "
                f"{', '.join(get_args(PredictionType))}; correct its scheduler_config.json."
            )

    @classmethod
    def from_alphas(
        cls, type: PredictionType, alphas_cumprod: Sequence[float] | Tensor
    ) -> DiffusionPrediction:
        """For a schedule given by A² of every timestep, `alphas_cumprod` (T,), falling."""
        # On the CPU also while a network is built on the meta device: the values are needed.
        signal = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").clamp(
            SMALLEST_SIGNAL, 1 - 1e-12
        )
        return cls(type, 1 / (1 + (signal / (1 - signal)).sqrt()))

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> DiffusionPrediction:
        """For the schedule of a diffusers scheduler's configuration (`scheduler_config.json`).

        Raises:
            UserError: the prediction type or the schedule of betas is unknown, or it is no diffusion schedule.
        """
        if is_flow(config):
            raise UserError(
                f"the teacher's scheduler is {config['_class_name']}, a flow's: its network needs no conversion, and "
                "families of one's own (fewstep.models.register) take it without a prediction."
            )
        if not {"beta_schedule", "trained_betas"} & set(config) and not _has_betas(config.get("_class_name")):
            raise UserError(
                f"the teacher's scheduler is {config['_class_name']}, which has no betas: only variance-preserving "
                "schedules can be converted; give its scheduler_config.json a beta_schedule or trained_betas."
            )
        kind = config.get("prediction_type", "epsilon")
        alphas = torch.cumprod(1 - _betas(config), 0)
        if config.get("rescale_betas_zero_snr"):
            # As in diffusers: the amplitudes A are shifted to end at zero, and scaled to start as before.
            amplitudes = alphas.sqrt()
            first, last = amplitudes[0], amplitudes[-1]
            alphas = ((amplitudes - last) * first / (first - last)).square()
        return cls.from_alphas(kind, alphas)

    def question(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's inputs for a state of the flow.

        Args:
            x: x_t, (B, C, H, W).
            t: (B,).

        Returns:
            z (B, C, H, W), and its timestep (B,), which need not be whole.
        """
        scale = torch.rsqrt((1 - t).square() + t.square())
        return per_latent(scale, x) * x, self.timestep(t).to(x)

    def timestep(self, t: Tensor) -> Tensor:
        """The timestep of the same signal-to-noise ratio, (B,) float64, interpolated in log-SNR between whole ones.

        Outside the schedule it is the nearest end.
        """
        times = self.times.to(t.device)
        level = self._within(t)
        above = torch.searchsorted(times, level.contiguous()).clamp(1, len(times) - 1)
        low, high = _log_snr(times[above - 1]), _log_snr(times[above])
        return (above - 1) + (_log_snr(level) - low) / (high - low)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of u = a·x_t + b·prediction, (B,) float32 each.

        Outside the schedule, A and S are those of its nearest end: the network was not trained on others.
        """
        # In float64: differences of A and S cancel near the ends. u = ε − x_0 with one of the two from the prediction:
        exact, level = t.double(), self._within(t)
        scale = torch.rsqrt((1 - exact).square() + exact.square())
        norm = torch.rsqrt((1 - level).square() + level.square())
        signal, noise = (1 - level) * norm, level * norm
        if self.type == "epsilon":  # x_0 = (z − S·ε)/A
            a, b = -scale / signal, 1 + noise / signal
        elif self.type == "sample":  # ε = (z − A·x_0)/S
            a, b = scale / noise, -(1 + signal / noise)
        else:  # x_0 = A·z − S·v, ε = S·z + A·v
            a, b = (noise - signal) * scale, signal + noise
        return a.float(), b.float()

    def velocity(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
        """The flow's velocity (B, C, H, W) from a network `predict(z, timestep)`."""
        a, b = self.coefficients(t)
        return per_latent(a, x) * x + per_latent(b, x) * predict(*self.question(x, t))

    def _within(self, t: Tensor) -> Tensor:
        """t clamped to the schedule's range, float64."""
        return t.double().clamp(float(self.times[0]), float(self.times[-1]))


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler's configuration is one of flow matching, whose network predicts the velocity."""
    return scheduler.get("_class_name", "").startswith("FlowMatch")


def _has_betas(scheduler: str | None) -> bool:
    """Whether a class of diffusers' schedulers has a schedule of betas, at least by default; so does None, no name."""
    import diffusers

    kind = None if scheduler is None else getattr(diffusers, scheduler, None)
    return kind is None or "beta_schedule" in inspect.signature(kind.__init__).parameters


def _log_snr(t: Tensor) -> Tensor:
    """log((1 − t)²/t²), the flow's log signal-to-noise ratio."""
    return 2 * ((1 - t) / t).log()


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The betas (variance of the noise that each timestep adds) of a scheduler's configuration, (T,) float64."""
    # Defaults are those of diffusers' DDPM scheduler, for entries that a configuration leaves out.
    if (trained := config.get("trained_betas")) is not None:
        return torch.tensor(trained, dtype=torch.float64, device="cpu")
    count = config.get("num_train_timesteps", 1000)
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64, device="cpu").square()
    if kind == "squaredcos_cap_v2":
        # Nichol and Dhariwal (arXiv 2102.09672, eq. 17): A² = cos²(½π·(τ + 0.008)/1.008), betas at most 0.999.
        ends = torch.linspace(0, 1, count + 1, dtype=torch.float64, device="cpu")
        signal = torch.cos((ends + 0.008) / 1.008 * torch.pi / 2).square()
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    raise UserError(
        f"the teacher's scheduler says beta_schedule {kind!r}: known are linear, scaled_linear and "
        "squaredcos_cap_v2; give the betas themselves as trained_betas in its scheduler_config.json."
    )
