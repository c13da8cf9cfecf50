"""Policies π(x_t, t): network-free velocity fields, and the integration of their ODE.

Imports nothing else of fewstep. The plain torch code defines what is computed; `kernels` has fused versions of it.
"""

from fewstep.policies.base import Policy, Shift
from fewstep.policies.dx import DXMode, DXPolicy
from fewstep.policies.gmflow import GMFlowPolicy
from fewstep.policies.rollout import SUBSTEPS, mean_velocity, rollout

__all__ = ["SUBSTEPS", "DXMode", "DXPolicy", "GMFlowPolicy", "Policy", "Shift", "mean_velocity", "rollout"]
