"""What a distillation will cost, before it starts: parameters, memory, operations, storage and hours."""

from fewstep.train.plan.planner import Machine, Plan, make_plan
from fewstep.train.plan.report import plan_table

__all__ = ["Machine", "Plan", "make_plan", "plan_table"]
