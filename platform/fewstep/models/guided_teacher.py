"""The teacher's guided velocity (METHOD.md section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.flow import GuidanceInterval, Renorm, guided_velocity, renormalised
from fewstep.models.styles import StyledConditioning
from fewstep.policies.base import per_latent


class GuidedTeacher:
    """A network's velocity with classifier-free guidance (METHOD.md section 4).

    Args:
        network: anything with `velocity(x, t, conditioning)`, and with `prepare(conditioning)` where that is used here.
        null: the null condition (B = 1); None for teachers without guidance.
        scale: guidance scale w; 1 is no guidance, and takes one network pass instead of two.
        interval: range of σ in which the scale applies; outside it is 1.
        orthogonal: share of the guidance direction's component parallel to x̂_0 that is removed.
        renorm: how the guided velocity is scaled back, see `renormalised`.
        patch: side of the patches that are the network's tokens.
        frozen: whether the network's weights stay as they are, so that the null condition is prepared only once.
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
        frozen: bool = False,
    ) -> None:
        self.renorm, self.patch = renorm, patch
        self.network, self.null, self.scale, self.frozen = network, null, scale, frozen
        self._prepared_null: Any = None
        self.interval, self.orthogonal = GuidanceInterval(scale, *interval), orthogonal

    @property
    def passes(self) -> int:
        """Largest number of network passes that one velocity takes."""
        return 1 if self.scale == 1 else 2

    @torch.no_grad()
    def prepare(self, conditioning: Any) -> Any:
        """What the network computes of a conditioning, and of the null condition, for many calls of `velocity`.

        It holds, as does what `velocity` uses of the null condition, until the network's weights change.
        """
        if self.scale != 1 and not (self.frozen and self._prepared_null is not None):
            self._prepared_null = self.network.prepare(self.null)
        return self.network.prepare(conditioning)

    def velocity(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Guided velocity (B, C, H, W); conditional and unconditional passes run as one batch.

        Samples outside of the interval take one pass, if `t` is on the CPU (whatever the device of `x`). On an
        accelerator, finding out which samples these are would wait for it, so all of them take two.

        Args:
            x: states, (B, C, H, W).
            t: their σ, (B,).
            conditioning: of B samples, or what `prepare` made of it.
        """
        here = t.to(x.device, non_blocking=True)
        if self.scale == 1:
            return self.network.velocity(x, here, conditioning)
        rows = self._guided_rows(t)
        nulls = self._nulls(conditioning, rows)
        if rows is not None:
            # Indices rather than a mask: indexing by a mask would wait for the device, to learn the result's size.
            rows = rows.to(x.device, non_blocking=True)
        # The samples, R of the B, that also need an unconditional pass
        x_again, again = (x, here) if rows is None else (x[rows], here[rows])
        both = conditioning.cat(nulls)
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

    def _nulls(self, conditioning: Any, rows: Tensor | None) -> Any:
        """The null condition for these samples of a batch (None: for all), in the sample's styles if it has any."""
        null = self._prepared_null if conditioning.prepared else self.null
        if not isinstance(conditioning, StyledConditioning):
            return conditioning.unconditional(null, rows)
        mixes = (
            conditioning.mixes if rows is None else tuple(conditioning.mixes[row] for row in rows.tolist())
        )
        if not conditioning.prepared:
            return StyledConditioning(conditioning.plain.unconditional(null, rows), mixes)
        # What is prepared has the styles in it.
        in_mix = {mix: StyledConditioning(self.null, (mix,)) for mix in dict.fromkeys(mixes) if mix}
        prepared = {mix: self.network.prepare(one) for mix, one in in_mix.items()}
        plain = StyledConditioning(null, ((),))
        return StyledConditioning.join([prepared.get(mix, plain) for mix in mixes])

    def _guided_rows(self, t: Tensor) -> Tensor | None:
        """Indices of the samples inside the interval, (R,); None for all, also where finding out would wait."""
        if t.device.type != "cpu":
            return None
        inside = self.interval.contains(t)
        return None if inside.all() else inside.nonzero().flatten()
