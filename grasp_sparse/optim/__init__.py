"""Optimizers that update every tensor in one pass and keep pruned weights at exactly zero; states as in torch.optim."""

from grasp_sparse.optim.adamw import AdamW
from grasp_sparse.optim.masks import layer_masks
from grasp_sparse.optim.one_pass import one_pass
from grasp_sparse.optim.sgd import SGD

__all__ = ["AdamW", "SGD", "layer_masks", "one_pass"]
