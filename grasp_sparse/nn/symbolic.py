"""What a symbolic trace (torch.fx) sees of the layers: one node each, as of torch's own, and nothing fused.

Its users name nodes after layers and expect of each what the dense network gives there: feature extractors, graphs that are edited.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Proxy


def is_symbolic(x: object) -> bool:
    """Whether ``x`` stands for a tensor in a symbolic trace."""
    return isinstance(x, Proxy)


def called(layer: nn.Module, x: Proxy, **given: object) -> Proxy:
    """``layer(x, **given)`` as a node of the graph that x is traced into, without a look inside. What is None or False is not asked for."""
    asked = {name: value for name, value in given.items() if value is not None and value is not False}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), asked)
