"""The two roles in distillation. They often are one network: adapters off is the teacher, on the student."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

from fewstep.policies import Policy

Conditioning = TypeVar("Conditioning", contravariant=True)


class Teacher(Protocol[Conditioning]):
    """A frozen flow model whose ODE the student learns to follow."""

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity u = dx/dσ to imitate, guidance included.

        Args:
            x: states, (B, C, H, W).
            t: their σ, (B,), each its own.
            conditioning: of each sample; the family defines what it is.
        """
        ...


class Student(Protocol[Conditioning]):
    """A network that predicts a policy for a whole segment in one evaluation."""

    def policy(self, x_src: Tensor, t_src: Tensor, conditioning: Conditioning) -> Policy:
        """The policy from the source state on, differentiable in the student's parameters.

        Args:
            x_src: states at the segments' sources, (B, C, H, W).
            t_src: their σ, (B,).
            conditioning: of each sample; the family defines what it is.
        """
        ...
