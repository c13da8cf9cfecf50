"""What a distillation, or serving a student, will cost, before it starts: parameters, memory, operations and time."""

from fewstep.plan.report import plan_table, serving_table
from fewstep.plan.serving import GPU, Served, ServingPlan, plan_serving
from fewstep.plan.training import Machine, Plan, make_plan

__all__ = [
    "GPU",
    "Machine",
    "Plan",
    "Served",
    "ServingPlan",
    "make_plan",
    "plan_serving",
    "plan_table",
    "serving_table",
]
