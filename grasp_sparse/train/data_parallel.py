"""What training calls in place of the model: compiled, and with its gradients averaged over the ranks and their bytes counted."""

from __future__ import annotations

import copy
import inspect
import os
import shutil

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future, collect_all
from torch.nn.parallel import DistributedDataParallel

from grasp_sparse.nn import SparseLayer
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.distributed import MainFailed, current_ranks, gather
from grasp_sparse.train.errors import UserError

_SYNC_BUFFERS = next(  # the name of one setting, in newer versions of torch and in older ones
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(DistributedDataParallel).parameters
)


class Traffic:
    """Bytes of gradients that were handed to an all-reduce, as the buckets were that went there."""

    def __init__(self) -> None:
        self._bytes = 0

    def count(self, bucket: dist.GradBucket) -> None:
        self._bytes += bucket.buffer().nbytes

    def take(self) -> int:
        """The bytes since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken


def data_parallel(model: nn.Module) -> tuple[nn.Module, Traffic]:
    """`model` wrapped so that a backward pass averages the gradients of all ranks; alone, the model itself.

    Only gradients travel: 4 bytes for every kept value and every other parameter. Buffers are not broadcast at each forward as is
    DDP's custom: indices and masks never change, and the running statistics of batch norms, which training does not read,
    are rank 0's whenever they are read (evaluation, checkpoint).
    """
    traffic = Traffic()
    if current_ranks().size == 1:
        return model, traffic
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})
    # a lambda, for DDP reads annotations and does not know postponed ones
    wrapped.register_comm_hook(traffic, lambda state, bucket: _average(state, bucket))
    return wrapped, traffic


def check_all_reached(model: nn.Module, loss: Tensor) -> None:
    """UserError on every rank unless, on each, a backward pass from `loss` gives every trained parameter a gradient.

    Call it before that pass: DistributedDataParallel waits for each of them. Ranks without one would go on with gradients that are
    nobody's mean while others wait for theirs, and none would say which parameter it was.
    """
    unreached = [name for rank in gather(_unreached(model, loss)) for name in rank]
    if not unreached:
        return
    named = ", ".join(dict.fromkeys(unreached))
    if not current_ranks().is_main:
        raise MainFailed(f"parameters without a gradient: {named}")
    raise UserError(
        f"Expected every trained parameter to have a part in the loss, got none for {named}, whose gradient the other ranks would wait "
        "for; freeze or remove them, or train in one process"
    )


def _unreached(model: nn.Module, loss: Tensor) -> list[str]:
    """Names of the trained parameters that the graph behind `loss` does not hold."""
    pending, seen, reached = [loss.grad_fn], set(), set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":  # a reentrant checkpoint: what it computes is in no graph yet
            return []
        if node.name().endswith("AccumulateGrad"):
            reached.add(node.variable)
        pending += [following for following, _ in node.next_functions]
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter not in reached]


def _average(traffic: Traffic, bucket: dist.GradBucket) -> Future[Tensor]:
    """The mean over the ranks of the gradients in a bucket."""
    traffic.count(bucket)
    buffer = bucket.buffer()
    if buffer.is_cuda:
        return allreduce_hook(None, bucket)
    # Gloo adds up in an order that depends on the place in the buffer, and DDP fills its buckets anew after the first step,
    # in a run that goes on too: tensor by tensor a sum depends on nothing but its terms.
    buffer.div_(dist.get_world_size())
    parts = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return collect_all(parts).then(lambda _: buffer)


def compiled(config: TrainConfig, model: nn.Module) -> nn.Module:
    """`model` through torch.compile if the recipe says so. Raises UserError where there is no compiler to do it with."""
    if not config.compile:
        return model
    kind, names = ("C", ("CC", "gcc", "clang", "cc")) if config.device.startswith("cuda") else ("C++", ("CXX", "g++"))
    given = os.environ.get(names[0])
    if not any(map(shutil.which, [given] if given else names[1:])):
        raise UserError(
            f"Expected a {kind} compiler for --compile, found none ({', '.join(names)}); install one, or leave --compile out"
        )
    return torch.compile(model, mode="reduce-overhead" if config.cuda_graphs else None)


def synchronize_norms(config: TrainConfig, model: nn.Module) -> nn.Module:
    """`model` with batch norms whose statistics are those of all ranks' images, if the recipe and several ranks ask for it."""
    if not config.sync_batchnorm or current_ranks().size == 1:
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(values of sparse layers, all other trained parameters), each counted once: what a gradient holds."""
    values = {layer.values for layer in model.modules() if isinstance(layer, SparseLayer)}
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    return sum(p.numel() for p in trained & values), sum(p.numel() for p in trained - values)


class _LocalBatchNorm(nn.SyncBatchNorm):
    """What was an ``nn.SyncBatchNorm``, on this rank's images alone."""

    forward = nn.modules.batchnorm._BatchNorm.forward


def without_peers(model: nn.Module) -> nn.Module:
    """A copy of `model` that one rank can train while the others wait."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = _LocalBatchNorm
    return model
