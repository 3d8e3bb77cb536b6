"""How each layer runs, decided by measuring it: what layers are given, seconds per layer, their cache, the plan."""

from grasp_sparse.planning.inputs import LayerInput, layer_inputs
from grasp_sparse.planning.measure import Times
from grasp_sparse.planning.plan import MAX_DENSITY, Plan, PlanRow, decided_by_example, density_plan, given_plan, measured_plan, plan

__all__ = [
    "MAX_DENSITY",
    "LayerInput",
    "Plan",
    "PlanRow",
    "Times",
    "decided_by_example",
    "density_plan",
    "given_plan",
    "layer_inputs",
    "measured_plan",
    "plan",
]
