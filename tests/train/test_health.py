"""A run that turns to noise is named within 200 steps; one that only varies is left alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fewstep.train.health import Band, HealthMonitor
from fewstep.train.preview import BestStudent, clearly_better, grid_statistics, takes_place


def readings(losses: np.ndarray, every: int, rng: np.random.Generator) -> list[tuple[int, dict[str, float]]]:
    """What a loop reads of the losses of steps 1, 2, …: at step 1, and then every so many."""
    read, since = [], 0
    for step in range(1, len(losses) + 1):
        if step == 1 or step % every == 0:
            loss, since = float(losses[since:step].mean()), step
            quarters = {f"train/loss_t{q}of4": loss * float(rng.lognormal(0, 0.2)) for q in (1, 2, 3, 4)}
            norm, rms = loss * float(rng.lognormal(0, 0.3)), float(rng.uniform(0.8, 1.4))
            read.append(
                (step, {"train/loss": loss, "train/gradient_norm": norm, "health/data_rms": rms,
                        "health/state_rms": rms, "train/non_finite": 0.0} | quarters)
            )  # fmt: skip
    return read


def healthy(steps: int, rng: np.random.Generator, spread: float = 0.3) -> np.ndarray:
    """Losses that fall as trainings' do, with noise of heavy tails."""
    falling = 3.0 / np.sqrt(1 + np.arange(steps) / 10) + 0.05
    return falling * rng.lognormal(0, spread, steps) * np.where(rng.random(steps) < 0.01, 4, 1)


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_raises_nothing_however_it_varies(seed: int, every: int) -> None:
    rng, monitor = np.random.default_rng(seed), HealthMonitor()
    for step, metrics in readings(healthy(3000, rng), every, rng):
        assert monitor.read(step, metrics) == [], step


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("unjudged_steps", [200, 2000])
def test_a_loss_that_rises_while_trajectories_are_mixed_is_no_divergence(
    unjudged_steps: int, every: int
) -> None:
    """As of the recipes of guidance-distilled teachers, whose students first go the teacher's own ways."""
    steps = unjudged_steps + 600
    share = np.minimum(np.arange(steps) / unjudged_steps, 1)

    def losses(rng: np.random.Generator) -> np.ndarray:
        return healthy(steps, rng) * 30**share

    rng, monitor = np.random.default_rng(1), HealthMonitor(unjudged_steps)
    for step, metrics in readings(losses(rng), every, rng):
        assert monitor.read(step, metrics) == [], step
        assert not monitor.suspicious or step > unjudged_steps
    rng, watchful = np.random.default_rng(1), HealthMonitor(unjudged_steps)
    turned = losses(rng)
    turned[unjudged_steps + 200 :] *= 1.2 ** np.arange(400)
    found = [one for step, metrics in readings(turned, every, rng) for one in watchful.read(step, metrics)]
    diverged = [one.step for one in found if one.diverged]
    assert unjudged_steps + 200 < diverged[0] <= unjudged_steps + 400


def test_what_is_out_of_every_range_is_named_while_trajectories_are_mixed_too() -> None:
    [(step, metrics)] = readings(np.ones(1), 1, np.random.default_rng(0))
    [finding] = HealthMonitor(1000).read(step, metrics | {"health/state_rms": 1e3})
    assert finding.diverged


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize(("begin", "growth"), [(2, 1.5), (40, 1.2), (700, 1.05), (1500, 1.03), (1500, 2.0)])
def test_a_run_that_turns_to_noise_is_named_within_200_steps(begin: int, growth: float, every: int) -> None:
    rng, monitor = np.random.default_rng(0), HealthMonitor()
    losses = healthy(begin + 400, rng)
    after = np.arange(len(losses)) - begin
    losses *= np.minimum(growth ** np.maximum(after, 0), 1e6)
    named = [
        (step, finding)
        for step, metrics in readings(losses, every, rng)
        for finding in monitor.read(step, metrics)
        if finding.diverged
    ]
    step, finding = named[0]
    assert begin < step <= begin + 200
    assert finding.step == step
    assert "loss" in finding.message
    assert str(step) in finding.message
    assert "\n" not in finding.message


def test_no_checkpoint_is_made_from_the_first_bad_reading_on() -> None:
    rng, monitor = np.random.default_rng(0), HealthMonitor()
    losses = healthy(400, rng, spread=0.1)
    losses[303:] *= 1000
    suspicious = []
    for step, metrics in readings(losses, 5, rng):
        found = monitor.read(step, metrics)
        if monitor.suspicious:
            suspicious.append(step)
        if found:
            break
    assert suspicious[0] == 305
    assert step == 330


def test_one_bad_window_is_no_divergence() -> None:
    rng, monitor = np.random.default_rng(0), HealthMonitor()
    losses = healthy(600, rng, spread=0.1)
    losses[300:320] *= 1000
    found = [monitor.read(step, metrics) for step, metrics in readings(losses, 10, rng)]
    assert not any(found)
    assert not monitor.suspicious


def test_a_gradient_norm_out_of_its_band_is_told_and_no_more() -> None:
    rng, monitor = np.random.default_rng(0), HealthMonitor()
    found = []
    for step, metrics in readings(healthy(600, rng, spread=0.1), 10, rng):
        if step > 300:
            metrics["train/gradient_norm"] *= 1e4
        found += monitor.read(step, metrics)
    [finding] = found
    assert finding.message.startswith("the gradient norm was")
    assert not finding.diverged
    assert not monitor.suspicious


@pytest.mark.parametrize("name", ["health/data_rms", "health/state_rms"])
def test_latents_out_of_their_range_are_named_at_once(name: str) -> None:
    rng, monitor = np.random.default_rng(0), HealthMonitor()
    for step, metrics in readings(healthy(100, rng), 10, rng):
        [*_, last] = [monitor.read(step, metrics)]
        assert last == []
    [finding] = monitor.read(110, metrics | {name: 1e4})
    assert finding.diverged
    assert "1e+04 at step 110" in finding.message
    [finding] = HealthMonitor().read(1, metrics | {name: math.inf})
    assert finding.diverged, "and in the first reading"


def test_what_is_not_finite_is_named_with_the_last_figures() -> None:
    metrics = {"train/loss": math.nan, "train/gradient_norm": 3.0, "train/non_finite": 1.0}
    [finding] = HealthMonitor().read(7, metrics)
    assert finding.diverged
    assert "infinite or NaN at or before step 7 (last loss nan, gradient norm 3)" in finding.message


def test_a_monitor_that_was_saved_judges_as_if_it_had_not_been() -> None:
    rng = np.random.default_rng(0)
    losses = healthy(400, rng)
    losses[250:] *= 1.05 ** np.arange(150)
    whole, parts = HealthMonitor(), HealthMonitor()
    for step, metrics in readings(losses, 7, rng):
        resumed = HealthMonitor()
        resumed.load(json.loads(json.dumps(parts.state(), allow_nan=False)))
        parts = resumed
        assert parts.read(step, metrics) == whole.read(step, metrics)
        assert (parts.suspicious, parts.state()) == (whole.suspicious, whole.state())
    HealthMonitor().load({})


def test_a_band_does_not_follow_what_leaves_it() -> None:
    band = Band()
    for _ in range(10):
        assert not band.take(1.0)
    top = band.top()
    assert top == pytest.approx(3.0)
    for _ in range(50):
        assert band.take(10.0)
    assert band.top() == top
    slow = Band()
    taken = [slow.take(1.02**index) for index in range(300)]
    assert any(taken), "it does not follow a slow rise for ever"


def pictures(rng: np.random.Generator) -> np.ndarray:
    """Smooth pictures, (8, 16, 16, 3) uint8."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (8, 3, 4, 4)))
    smooth = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")
    return smooth.permute(0, 2, 3, 1).to(torch.uint8).numpy()


@pytest.mark.parametrize("known", [1, 2, 5])
def test_a_grid_of_noise_is_named_and_one_of_pictures_is_not(known: int) -> None:
    rng, monitor = np.random.default_rng(0), HealthMonitor()
    for step in range(known):
        assert monitor.look(step, grid_statistics(pictures(rng))) == []
    noise = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    [finding] = monitor.look(500, grid_statistics(noise))
    assert finding.diverged
    assert finding.message.startswith("the roughness of the sample grid is 1.1")
    assert "at step 500" in finding.message
    assert monitor.look(510, grid_statistics(pictures(rng))) == [], (
        "noise is not what others are compared with"
    )


def test_a_grid_of_one_colour_is_named() -> None:
    rng, monitor = np.random.default_rng(0), HealthMonitor()
    for step in range(2):
        monitor.look(step, grid_statistics(pictures(rng)))
    found = monitor.look(500, grid_statistics(np.full((8, 16, 16, 3), 128, np.uint8)))
    assert any("contrast" in finding.message for finding in found)


def test_a_student_is_clearly_better_only_beyond_chance() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(5, 15, 32)
    assert clearly_better(base - 0.5, base)
    assert not clearly_better(base, base)
    assert not clearly_better(base + rng.normal(0, 3, 32), base)
    assert not clearly_better(base + 1, base)
    assert not clearly_better([1.0], [2.0])


def test_the_last_student_is_taken_unless_another_is_clearly_better() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(5, 15, 32)
    best, worse = BestStudent(5, list(base)), BestStudent(10, list(base + 1))
    alike, broken = BestStudent(10, list(base + rng.normal(0.1, 3, 32))), BestStudent(10, [math.nan] * 32)
    assert takes_place(worse, None, last=False)
    assert takes_place(best, worse, last=False)
    assert not takes_place(worse, best, last=False)
    assert not takes_place(worse, best, last=True)
    assert takes_place(alike, best, last=True)
    assert not takes_place(broken, best, last=True)
    assert takes_place(best, broken, last=False)
    assert BestStudent.of(json.loads(json.dumps(best.as_dict()))) == best
