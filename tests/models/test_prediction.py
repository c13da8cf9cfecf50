"""Noise, x_0 and v predictors are the flow teachers that they should be: checked where the truth is known.

Of Gaussian data N(m, s²) every predictor is linear: at amplitudes (A, S) the state z ~ N(A·m, A²s² + S²), and
E[x_0 | z] = m + A·s²·(z − A·m)/(A²s² + S²). The flow is the case A = 1 − t, S = t.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.prediction import DiffusionPrediction

MEAN, STD = 0.7, 0.4
SCHEDULERS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.01 * (i + 1) / 20 for i in range(400)]},
    "zero_snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}
TYPES = ("epsilon", "sample", "v_prediction")


def data_given(z: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """E[x_0 | z]."""
    return MEAN + signal * STD**2 * (z - signal * MEAN) / ((signal * STD) ** 2 + noise**2)


def flow_velocity(x: Tensor, t: Tensor) -> Tensor:
    x_0 = data_given(x, 1 - t, t)
    return (x - x_0) / t


def predictor(prediction: DiffusionPrediction):
    """The exact network: knows amplitudes at its timesteps alone, and is linear between them in log-SNR."""

    def predict(z: Tensor, timestep: Tensor) -> Tensor:
        log_snr = 2 * ((1 - prediction.times) / prediction.times).log()
        low = timestep.double().floor().long().clamp(0, len(log_snr) - 2)
        level = torch.lerp(log_snr[low], log_snr[low + 1], timestep.double() - low)
        signal, noise = (torch.sigmoid(s * level).sqrt().view(-1, 1, 1, 1) for s in (1, -1))
        x_0 = data_given(z.double(), signal, noise)
        epsilon = (z - signal * x_0) / noise
        answers = {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - noise * x_0}
        return answers[prediction.type].float()

    return predict


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", TYPES)
def test_the_exact_predictor_gives_the_exact_velocity(kind: str, scheduler: str) -> None:
    prediction = DiffusionPrediction.from_scheduler(SCHEDULERS[scheduler] | {"prediction_type": kind})
    ends = prediction.times[[0, -1]].clamp(0.02, 0.98)
    t = torch.linspace(*ends.tolist(), 41)[1:-1]
    x = torch.randn(len(t), 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x = (1 - t).view(-1, 1, 1, 1) * MEAN + x
    ours = prediction.velocity(predictor(prediction), x, t)
    truth = flow_velocity(x.double(), t.double().view(-1, 1, 1, 1)).float()
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", TYPES)
def test_whole_timesteps_are_asked_at_their_own_times(kind: str) -> None:
    prediction = DiffusionPrediction.from_scheduler({"prediction_type": kind})
    torch.testing.assert_close(
        prediction.timestep(prediction.times), torch.arange(1000, dtype=torch.float64), atol=1e-6, rtol=0
    )
    t = torch.linspace(0, 1, 301)
    assert (prediction.timestep(t).diff() >= 0).all()
    assert prediction.timestep(t).min() == 0
    assert prediction.timestep(t).max() == 999


@pytest.mark.parametrize("kind", TYPES)
def test_beyond_the_schedule_velocities_stay_finite_and_continuous(kind: str) -> None:
    prediction = DiffusionPrediction.from_scheduler({"prediction_type": kind})
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for edge in prediction.times[[0, -1]].tolist():
        inside, outside = (
            prediction.velocity(predictor(prediction), x, torch.tensor([edge + step]))
            for step in (-1e-5, 1e-5)
        )
        torch.testing.assert_close(inside, outside, rtol=1e-2, atol=1e-2)
    for end in (0.0, 1.0):
        assert prediction.velocity(predictor(prediction), x, torch.tensor([end])).isfinite().all()


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "zero_snr"])
def test_schedules_are_those_of_diffusers(name: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler.from_config(SCHEDULERS[name]).alphas_cumprod
    ours = (1 - DiffusionPrediction.from_scheduler(SCHEDULERS[name]).times).double()
    times = 1 - ours
    signal = ours.square() / (ours.square() + times.square())
    torch.testing.assert_close(signal.float(), theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "score"}, "'score': known are epsilon"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'"),
    ],
)
def test_what_is_unknown_is_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiffusionPrediction.from_scheduler(config)
