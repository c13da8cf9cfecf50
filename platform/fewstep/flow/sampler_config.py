"""The settings of a student's sampler: the one place where they are declared and resolved.

Recipes, losses and students' cards all hold a `SamplerConfig`. To sample with other settings, callers use `override`:
settings that they leave out stay as trained.
"""

from __future__ import annotations

from functools import lru_cache
from numbers import Integral, Real
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from fewstep.config import Config
from fewstep.draws import Generators, uniform
from fewstep.errors import UserError
from fewstep.flow.schedule import NextStep, SamplerSchedule
from fewstep.flow.time import Segments, TimeShift
from fewstep.policies import SUBSTEPS

MAX_NFE = 128
"""Largest nfe. With the default 128 substeps, about one follows each evaluation then, and more would be of no use."""


class SamplerConfig(Config):
    """How a few-step student is trained to sample, and sampled (METHOD.md section 2)."""

    nfe: int = Field(4, ge=1)
    """Network evaluations (NFE) of the student, one per segment of raw time."""
    more_nfes: tuple[PositiveInt, ...] = ()
    """Further numbers of evaluations that the same student learns, so that one model serves 2 to 8. One of all of them
    is drawn at random per sample; with imitation.data_free they take turns over the optimizer steps."""
    shift: Annotated[float, Field(gt=0)] | Literal["dynamic"] = 3.2
    """Time shift m of the student's segments, which need not be the teacher's: 3.2 suits images of one megapixel, 1 is
    no shift. "dynamic" grows with the number of image tokens, from 1.65 at 256 to 3.16 at 4,096."""
    final_step_scale: float = Field(0.5, gt=0)
    """Size of the last segment (at the data) relative to the others; its share of the training follows from it."""
    substeps: int = Field(SUBSTEPS, ge=1)
    """Policy substeps per unit of raw time."""
    temperature: PositiveFloat | Literal["auto"] = 1.0
    """Mixture temperature at inference, of all steps but the last; "auto" = clamp(0.1·(nfe − 1), 0, 1)."""
    final_temperature: float = Field(1.0, gt=0, le=1)
    """Mixture temperature of the last step; below 1 it removes speckle from students of one or two evaluations."""
    final_temperature_below: float = Field(1.0, gt=0, le=1)
    """σ below which the last step has that temperature. Above it, where the composition of the image is decided, the
    mixture stays as predicted: sharpening it there would make images less varied."""
    h: float = Field(0.0, ge=0, allow_inf_nan=True)
    """How much noise is renewed between segments at inference: 0 is none (deterministic), .inf is all of it."""

    @property
    def nfes(self) -> tuple[int, ...]:
        """All numbers of evaluations that the student is trained for."""
        return (self.nfe, *self.more_nfes)

    @property
    def segments(self) -> Segments:
        """The student's segments of raw time."""
        return Segments(self.nfe, self.final_step_scale)

    @property
    def time_shift(self) -> TimeShift:
        """From raw time to σ.

        Raises:
            UserError: the shift is "dynamic", and `at_size` has to be called first.
        """
        if self.shift == "dynamic":
            raise UserError(
                'sampler.shift is "dynamic" and depends on the image size: call SamplerConfig.at_size first.'
            )
        return TimeShift(self.shift)

    @property
    def schedule(self) -> SamplerSchedule:
        """The times of the sampler's steps.

        Raises:
            UserError: as `time_shift`.
        """
        return _schedule(self.nfe, self.time_shift, self.final_step_scale, self.h)

    def override(
        self,
        nfe: int | None = None,
        temperature: float | Literal["auto"] | None = None,
        h: float | None = None,
    ) -> SamplerConfig:
        """These settings, with those that a caller asks for in place; the ones that are None stay as trained.

        Args:
            nfe: network evaluations, 1 to `MAX_NFE`.
            temperature: mixture temperature, above 0 and at most 1, or "auto".
            h: noise renewed between segments, 0 or more.

        Raises:
            UserError: a value out of range.
        """
        # "not (… <= …)" also refuses NaN, which fails every comparison.
        # The message uses the name by which pipelines and the HTTP API take nfe.
        if nfe is not None and (not isinstance(nfe, Integral) or isinstance(nfe, bool)):
            raise UserError(f"num_inference_steps must be a whole number from 1 to {MAX_NFE}, got {nfe!r}.")
        if nfe is not None and not 1 <= nfe <= MAX_NFE:
            raise UserError(f"num_inference_steps must be 1 to {MAX_NFE}, got {nfe}.")
        named = temperature is None or (isinstance(temperature, str) and temperature == "auto")
        if not named and not _is_number(temperature):
            raise UserError(
                f"temperature must be a number above 0 and at most 1, or 'auto'; got {temperature!r}, which is none."
            )
        if not named and not 0 < cast(float, temperature) <= 1:
            raise UserError(f"temperature must be above 0 and at most 1, or 'auto'; got {temperature}.")
        if h is not None and not (_is_number(h) and h >= 0):
            raise UserError(f"h must be 0 or more, got {h!r}.")
        # model_copy does not validate again, which is why values were checked above.
        given = {"nfe": nfe, "temperature": temperature, "h": h}
        changes = {name: value for name, value in given.items() if value is not None}
        return self.model_copy(update=changes) if changes else self

    def at_size(self, tokens: int) -> SamplerConfig:
        """These settings for images of `tokens` tokens (patches): a dynamic shift becomes a number."""
        if self.shift != "dynamic":
            return self
        return self.model_copy(update={"shift": TimeShift.for_sequence(tokens).m})

    def at_optimizer_step(self, step: int) -> SamplerConfig:
        """These settings with a single number of evaluations: those trained for take turns over optimizer steps."""
        # By step rather than at random: all ranks walk the same number of segments, and none waits for another.
        return self.model_copy(update={"nfe": self.nfes[step % len(self.nfes)], "more_nfes": ()})

    def draw_segments(self, raw_t: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """The segments that raw times fall in, for a number of evaluations drawn per sample.

        Args:
            raw_t: (B,), in (0, 1].
            generator: source of the numbers of evaluations; not used where there is only one.

        Returns:
            τ_src and the segment's size τ_src − τ_dst, (B,) float32 each.
        """
        if not self.more_nfes:
            return self.segments.containing(raw_t)
        # All numbers of evaluations for all samples, then one per sample: cheaper than grouping samples by number.
        found = [Segments(nfe, self.final_step_scale).containing(raw_t) for nfe in self.nfes]
        # (1, B): the row that `gather` picks of the (numbers, B) stacks below
        drawn = (len(found) * uniform((len(raw_t),), generator, raw_t.device)).long()[None]
        sources, sizes = (torch.stack(values).gather(0, drawn)[0] for values in zip(*found, strict=True))
        return sources, sizes

    def next_step(self, index: int, batch: int = 1) -> NextStep:
        """The step of `batch` samples at network evaluation `index` (from 0)."""
        # raw_tempered 1: the temperature acts on the whole rollout.
        temperature, raw_tempered = self.temperature, 1.0
        # The last step has a temperature of its own; "auto" is of the others alone (METHOD.md section 3).
        if index == self.nfe - 1:
            temperature, raw_tempered = (
                self.final_temperature,
                self.time_shift.unwarp(self.final_temperature_below),
            )
        elif temperature == "auto":
            temperature = auto_temperature(self.nfe)
        s = self.schedule  # its tables are cached, so that a step costs a few views
        # One row for all samples; batches in which samples differ are made by `NextStep.join`.
        rows = [
            table[index].expand(batch) for table in (s.raw_src, s.raw_dst, s.sigma_src, s.sigma_to, s.renoise)
        ]
        return NextStep(*rows, *(torch.full((batch,), float(value)) for value in (temperature, raw_tempered)))


def _is_number(value: object) -> bool:
    """Whether a value is a real number, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def auto_temperature(nfe: int) -> float:
    """The GM temperature for a number of evaluations: clamp(0.1·(n − 1), 0, 1), so 0.3 at 4 and 0.7 at 8."""
    return min(0.1 * (nfe - 1), 1.0)


@lru_cache(maxsize=256)
def _schedule(nfe: int, shift: TimeShift, final_step_scale: float, h: float) -> SamplerSchedule:
    # Cached: a server needs the same few schedules at every evaluation, and computing their tables takes time.
    return SamplerSchedule(nfe, shift, final_step_scale, h)
