"""The teacher's guided velocity (METHOD.md section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.flow import GuidanceInterval, Renorm, guided_velocity, renormalised
from fewstep.policies.base import per_latent


class GuidedTeacher:
    """A network's velocity with classifier-free guidance (METHOD.md section 4).

    Args:
        network: anything with `velocity(x, t, conditioning)`.
        null: the null condition (B = 1); None for teachers without guidance.
        scale: guidance scale w; 1 is no guidance, and takes one network pass instead of two.
        interval: range of σ in which the scale applies; outside it is 1.
        orthogonal: share of the guidance direction's component parallel to x̂_0 that is removed.
        renorm: how the guided velocity is scaled back, see `renormalised`.
        patch: side of the patches that are the network's tokens.
    """

    def __init__(
        self,
        network: Any,
        null: Any,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        orthogonal: float = 0.0,
        renorm: Renorm = "none",
        patch: int = 1,
    ) -> None:
        self.renorm, self.patch = renorm, patch
        self.network, self.null, self.scale = network, null, scale
        self.interval, self.orthogonal = GuidanceInterval(scale, *interval), orthogonal

    @property
    def passes(self) -> int:
        """Largest number of network passes that one velocity takes."""
        return 1 if self.scale == 1 else 2

    def velocity(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Guided velocity (B, C, H, W); conditional and unconditional passes run as one batch.

        Samples outside of the interval take one pass, if `t` is on the CPU (whatever the device of `x`). On an
        accelerator, finding out which samples these are would wait for it, so all of them take two.

        Args:
            x: states, (B, C, H, W).
            t: their σ, (B,).
            conditioning: of B samples.
        """
        here = t.to(x.device, non_blocking=True)
        if self.scale == 1:
            return self.network.velocity(x, here, conditioning)
        rows = self._guided_rows(t)
        if rows is not None:
            # Indices rather than a mask: indexing by a mask would wait for the device, to learn the result's size.
            rows = rows.to(x.device, non_blocking=True)
        # The samples, R of the B, that also need an unconditional pass
        x_again, again = (x, here) if rows is None else (x[rows], here[rows])
        both = conditioning.cat(self.null.expand(len(x_again)))
        # One batch of B + R: weights are read once, and with FSDP gathered once.
        answers = self.network.velocity(torch.cat([x, x_again]), torch.cat([here, again]), both)
        positive, negative = answers.tensor_split([len(x)])
        of_rows = positive if rows is None else positive[rows]
        # x̂_0 of the conditional velocity: the direction that orthogonal guidance leaves alone
        clean = x_again - per_latent(again, x_again) * of_rows if self.orthogonal else None
        guided = guided_velocity(of_rows, negative, self.interval.at(again), self.orthogonal, clean)
        guided = renormalised(guided, of_rows, self.renorm, self.patch)
        # The other samples keep their conditional velocity.
        return guided if rows is None else positive.index_copy(0, rows, guided)

    def _guided_rows(self, t: Tensor) -> Tensor | None:
        """Indices of the samples inside the interval, (R,); None for all, also where finding out would wait."""
        if t.device.type != "cpu":
            return None
        inside = self.interval.contains(t)
        return None if inside.all() else inside.nonzero().flatten()
