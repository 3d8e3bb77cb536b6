"""Sums of GraSP scores over groups are the first-order change of the squared gradient norm when a group goes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import data, smooth_net

from grasp_sparse.criteria import score
from grasp_sparse.patterns import get_pattern


def squared_gradient(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, names, temperature: float) -> float:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(x) / temperature, y), [parameters[name] for name in names])
    return sum(float(gradient.square().sum()) for gradient in gradients)


@pytest.mark.parametrize("written", ["unstructured", "block(2, 2)", "block(4, 3)", "vector(3)", "channel", "channel(in)"])
def test_removing_a_group_changes_the_squared_gradient_norm_by_its_score(written):
    """The change when the weights of group Q shrink by a share ε is −2·ε·score(Q), edges that are smaller included."""
    pattern, step, temperature = get_pattern(written), 1e-4, 1.0
    model, (x, y) = smooth_net().double(), data()
    x = x.double()
    scores = score(model, [(x, y)], temperature=temperature)
    for name, values in scores.items():
        pooled = pattern.pool(values)
        for group in torch.linspace(0, len(pooled) - 1, min(5, len(pooled))).long().tolist():
            mask = pattern.expand(torch.arange(len(pooled)) == group, values)
            norms = []
            for share in (step, -step):
                shrunk = copy.deepcopy(model)
                with torch.no_grad():
                    dict(shrunk.named_parameters())[name].mul_(1 - share * mask.double())
                norms.append(squared_gradient(shrunk, x, y, scores, temperature))
            change = (norms[0] - norms[1]) / (2 * step)
            assert change == pytest.approx(-2 * pooled[group].item(), rel=1e-5, abs=1e-9), (name, group)
