"""GMFlow: a Gaussian mixture over x_0 at every latent location, updated at each state by Bayes' rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.draws import Generators, uniform
from fewstep.policies.base import MIN_SIGMA, per_latent

MIN_SPREAD = 1e-6
"""Smallest v·ζ + 1 that is divided by. It is at least 1 wherever σ_t ≤ σ_src."""


class GMFlowPolicy:
    """π-Flow's default policy (METHOD.md section 3; arXiv 2510.14974).

    The head predicts, per latent location, a K-component isotropic mixture over the velocity at the source.
    As x_0 = x_src − σ_src·velocity, it is also a mixture over x_0, the student's belief about the clean latent given
    `x_src`, with means μ_k = x_src − σ_src·mean_k, variance v = exp(2·logstd)·σ_src² and weights A_k. A later state
    `x_t` of the same trajectory adds evidence: a Gaussian likelihood of x_0 with precision ζ and precision-weighted
    mean ν. The posterior is again a mixture, with means μ'_k and log-weights a'_k:

        ζ = (α_t/σ_t)² − (α_src/σ_src)²        ν = α_t·x_t/σ_t² − α_src·x_src/σ_src²
        μ'_k = (v·ν + μ_k) / (v·ζ + 1)         a'_k = log A_k + μ_k·(ν − ½·ζ·μ_k) / (v·ζ + 1)

    and the velocity points at the posterior mean x̂_0 = Σ_k softmax(a')_k · μ'_k: π = (x_t − x̂_0) / σ_t.

    These equations hold in any coordinates x_0 − c, x_t − α_t·c. The code takes the mixture's own mean for c: ν and
    ζ·μ_k grow as 1/σ² and nearly cancel, and the rounding error of float32 is proportional to their size.
    """

    def __init__(
        self, means: Tensor, logstds: Tensor, logweights: Tensor, x_src: Tensor, sigma_src: Tensor
    ) -> None:
        """Build the policy from the head's output, in velocity space.

        Args:
            means: (B, K, C, H, W), or (B, K, C, T, H, W) for video.
            logstds: (B, 1, 1, 1, 1), one per sample (one more 1 for video).
            logweights: (B, K, 1, H, W), normalised over K or not.
            x_src: state the network saw, (B, C, H, W).
            sigma_src: its σ, (B,) or broadcastable to the latent.
        """
        self.means, self.logstds, self.logweights = means, logstds, logweights
        self.x_src, self.sigma_src = x_src, sigma_src

        # Not computed here: fused rollouts read the tensors above and never need it.
        self._mixture: _Mixture | None = None

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """π(x_t, σ_t) of shape (B, C, H, W); `sigma_t` is (B,) or broadcastable to the latent."""
        mixture = self.mixture()
        sigma = per_latent(sigma_t, x_t).clamp(min=MIN_SIGMA)
        alpha = 1 - sigma
        zeta = (alpha / sigma).square() - mixture.src_precision
        # ν of x_t − α_t·c; the origin c is added back to x̂_0 below.
        nu = alpha * (x_t - alpha * mixture.origin) / sigma.square() - mixture.src_evidence
        spread = (mixture.variance * zeta + 1).clamp(min=MIN_SPREAD)

        # `spread` is the same for all components, so x̂_0 needs only Σ_k w_k·μ_k: two passes over the means in all.
        # Products and sums instead of einsum: K and C are too small for a matrix product to pay, and autocast, which
        # would run einsum in bfloat16, leaves these in float32.
        agreement = (mixture.centres * nu.unsqueeze(1)).sum(2)  # μ_k·ν, (B, K, H, W)
        logits = self.logweights.squeeze(2) + (agreement - 0.5 * zeta * mixture.squared_centres) / spread
        weights = logits.softmax(1).unsqueeze(2)  # (B, K, 1, H, W)
        x_0 = mixture.origin + ((weights * mixture.centres).sum(1) + mixture.variance * nu) / spread
        return (x_t - x_0) / sigma

    def mixture(self) -> _Mixture:
        """The mixture over x_0 − c, computed at the first query and kept for all later ones."""
        # A mixture that was computed under no_grad has no graph: the first query with autograd computes it again.
        head = (self.means, self.logstds, self.logweights, self.x_src)
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in head)
        if self._mixture is None or (wanted and not self._mixture.differentiable):
            self._mixture = _Mixture.of(*head, self.sigma_src, wanted)
        return self._mixture

    def detach(self) -> GMFlowPolicy:
        """The same policy without gradient to the head."""
        return GMFlowPolicy(
            self.means.detach(),
            self.logstds.detach(),
            self.logweights.detach(),
            self.x_src.detach(),
            self.sigma_src,
        )

    def with_temperature(self, temperature: float | Tensor) -> GMFlowPolicy:
        """GM temperature T > 0, one or per sample (B,): weights ∝ A_k^(1/T), variance ×T."""
        # The variance is exp(2·logstd)·σ_src²: half of log T on the log-std multiplies it by T.
        temperature = torch.as_tensor(temperature, device=self.means.device)
        temperature = temperature.view(-1, *[1] * (self.means.ndim - 1))
        return GMFlowPolicy(
            self.means,
            self.logstds + 0.5 * temperature.log(),
            (self.logweights / temperature).log_softmax(1),
            self.x_src,
            self.sigma_src,
        )

    def with_dropout(self, p: float, generator: Generators = None) -> GMFlowPolicy:
        """GM dropout (METHOD.md section 3): drop whole components with probability `p`, the same at all locations.

        At least one component of each sample is kept, chosen uniformly where all would be dropped. Random numbers
        are drawn on the generator's device.
        """
        batch, components = self.means.shape[:2]
        draw = uniform((batch, components), generator, self.means.device)
        # The second condition matters only where all draws are below p: it keeps the component with the largest.
        dropped = (draw < p) & (draw < draw.amax(1, keepdim=True))
        dropped = dropped.view(batch, components, *[1] * (self.means.ndim - 2))
        return GMFlowPolicy(
            self.means,
            self.logstds,
            # Log-weight −∞ drops a component without changing shapes, so that batches stay rectangular.
            self.logweights.masked_fill(dropped, -torch.inf).log_softmax(1),
            self.x_src,
            self.sigma_src,
        )


class _Mixture(NamedTuple):
    """The quantities of the source that every velocity query of a `GMFlowPolicy` uses."""

    origin: Tensor
    """c, (B, C, H, W)."""
    centres: Tensor
    """μ_k − c, (B, K, C, H, W)."""
    squared_centres: Tensor
    """‖μ_k − c‖², (B, K, H, W)."""
    variance: Tensor
    """v, (B, 1, 1, 1)."""
    src_precision: Tensor
    """(α_src/σ_src)², the source's term of ζ, (B, 1, 1, 1)."""
    src_evidence: Tensor
    """α_src·(x_src − α_src·c)/σ_src², the source's term of ν, (B, C, H, W)."""
    differentiable: bool
    """Whether autograd recorded how it follows from the head's output."""

    @classmethod
    def of(
        cls,
        means: Tensor,
        logstds: Tensor,
        logweights: Tensor,
        x_src: Tensor,
        sigma_src: Tensor,
        differentiable: bool,
    ) -> _Mixture:
        sigma = per_latent(sigma_src, x_src).clamp(min=MIN_SIGMA)
        alpha = 1 - sigma
        centres = x_src.unsqueeze(1) - sigma.unsqueeze(1) * means
        # The velocity does not depend on the choice of c: detaching it saves its graph and changes no gradient.
        origin = (logweights.softmax(1) * centres).sum(1).detach()
        centres = centres - origin.unsqueeze(1)
        return cls(
            origin,
            centres,
            centres.square().sum(2),
            (2 * logstds).exp().squeeze(1) * sigma.square(),
            (alpha / sigma).square(),
            alpha * (x_src - alpha * origin) / sigma.square(),
            differentiable,
        )
