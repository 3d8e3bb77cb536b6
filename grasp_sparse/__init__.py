"""Neural networks that are sparse from the first training step.

    import grasp_sparse as gs

    masks = gs.prune(model, batches, sparsity=0.95)
    gs.sparsify_(model, masks, example_input=x)
    ...  # train with a torch optimizer
    gs.densify_(model)
"""

from grasp_sparse import _extension  # isort: skip  (the compiled kernels, before anything that runs them)
from grasp_sparse import optim, patterns
from grasp_sparse.allocator import keep_memory
from grasp_sparse.costs import weight_costs
from grasp_sparse.criteria import score
from grasp_sparse.masks import MaskSet
from grasp_sparse.planning import Plan, plan
from grasp_sparse.pruning import make_masks, prune
from grasp_sparse import speedup  # isort: skip  (`prune` finds its search for budget="time" there)
from grasp_sparse.surgery import densify_, load_sparse, sparsify_

__all__ = [
    "MaskSet",
    "Plan",
    "densify_",
    "keep_memory",
    "load_sparse",
    "make_masks",
    "optim",
    "patterns",
    "plan",
    "prune",
    "score",
    "sparsify_",
    "weight_costs",
]
