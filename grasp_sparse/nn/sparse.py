"""What every sparse layer has: the kept values, the indices that place them, and how both travel in a state_dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grasp_sparse.formats import CsrIndices, Storage, csr_from_indices, is_consistent, storage_of, stored_block_size
from grasp_sparse.ops.differentiable import is_transformed
from grasp_sparse.weights import PrunedLayer

STORED = ("values", "crow_indices", "col_indices")  # the keys in a state_dict that together are the weight


class SparseLayer(PrunedLayer, nn.Module):
    """A layer whose weight is ``values``, an ordinary Parameter, and int32 index buffers.

    Single weights are ``values [1, nnz]``, whole blocks ``values [nblocks, bh, bw]`` with the indices of the grid of blocks;
    what a block holds past the edge of the weight is zero and stays so, its gradient being zero. Gradient and optimizer state
    have the size of ``values``. A state_dict holds ``values``, ``crow_indices`` and ``col_indices``; the transposed list that
    the backward pass walks is rebuilt when one is loaded. Nobody else writes into the indices: a forward that finds other numbers
    in them, which averages of all buffers leave (``AveragedModel`` with ``use_buffers=True``), raises RuntimeError.

    Args:
        weight_shape: shape of the dense weight.
        values: ``[1, nnz]`` or ``[nblocks, bh, bw]`` in the order of ``indices``; a Parameter is taken over, not copied.
        indices: from ``csr_from_mask``, ``bsr_from_mask`` or ``csr_from_indices``, which check them.
        bias: ``[rows]`` or None; a Parameter is taken over, not copied.

    Raises:
        ValueError: ``values``, ``indices`` or ``bias`` do not fit each other or ``weight_shape``.
    """

    _seen: tuple[int, ...] | None = None  # how often the indices had been written into when they were last known to be sound

    def __init__(self, weight_shape: tuple[int, ...], values: Tensor, indices: CsrIndices, bias: Tensor | None) -> None:
        super().__init__()
        self.block_size = stored_block_size(values)
        grid, size = self.storage.grid(weight_shape), self.storage.values_shape(indices.nnz)
        if indices.shape != grid:
            raise ValueError(f"Expected indices of a {list(grid)} matrix, got {list(indices.shape)}.")
        if values.shape != size:
            raise ValueError(f"Expected values of shape {list(size)}, got {list(values.shape)}.")
        if bias is not None and bias.shape != weight_shape[:1]:
            raise ValueError(f"Expected bias of shape [{weight_shape[0]}], got {list(bias.shape)}.")
        self.weight_shape = torch.Size(weight_shape)
        self.values = _parameter(values)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        for name, index in indices._asdict().items():
            self.register_buffer(name, index, persistent=name in STORED)
        self._seen = _versions(indices)

    @property
    def indices(self) -> CsrIndices:
        """The five index buffers, in the order that the operations take them."""
        return CsrIndices(*map(self._buffers.__getitem__, CsrIndices._fields))  # past __getattr__, which costs as much as a small layer

    def _walked(self) -> CsrIndices:
        """The indices for a kernel, looked at again where something has been written into them.

        Kernels stay inside their memory whatever indices say, but they would compute with other places than those of the weights.

        Raises:
            RuntimeError: the two orders no longer agree.
        """
        indices = self.indices
        # Where a function is traced or transformed there are no numbers to look at.
        if torch.compiler.is_compiling() or is_transformed() or type(indices.col_indices) is not Tensor or indices.col_indices.is_meta:
            return indices
        versions = _versions(indices)
        if versions != self._seen:
            if not is_consistent(indices):
                raise RuntimeError(
                    "Expected the index buffers of a sparse layer as they were built or loaded, got others: something wrote into them, as "
                    "averages of all buffers do. Average parameters and floating-point buffers only (AveragedModel with "
                    "use_buffers=False), and load the layer again."
                )
            self._seen = versions
        return indices

    @property
    def storage(self) -> Storage:
        """How ``values`` and ``indices`` stand for the weight."""
        return storage_of(self.block_size)

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.storage.nnz(self.indices, self.weight_shape)

    @property
    def density(self) -> float:
        """Kept weights as a share of all."""
        return self.nnz / max(1, self.weight_shape.numel())

    @property
    def mask(self) -> Tensor:
        """The kept places as a bool tensor of ``weight_shape``; a new tensor at each call."""
        return self.storage.mask(self.indices, self.weight_shape)

    def to_dense_weight(self) -> Tensor:
        """A dense copy of the weight with exact zeros where pruned; differentiable with respect to ``values``."""
        return self.placed(self.values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws values and bias anew as ``nn.Linear`` and ``nn.Conv2d`` draw theirs: evenly within ±1/√(inputs of an output)."""
        bound = max(1, self.weight_shape[1:].numel()) ** -0.5
        self.values.uniform_(-bound, bound)
        if self.block_size is not None:  # zeros again past the edge of the weight
            self.values.copy_(self.storage.gather(self.to_dense_weight(), self.indices))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def placed(self, values: Tensor) -> Tensor:
        """What belongs to ``values``, their gradient say, as belonging to the dense weight; zeros where pruned."""
        return self.storage.scatter(values, self.indices, self.weight_shape)

    def __getattr__(self, name: str):
        # Code that reads .weight would go on with a copy and never see an update, so it is told instead.
        if name == "weight":
            raise AttributeError(
                f"'{type(self).__name__}' stores only its kept weights: use .values (trainable), .to_dense_weight() (a copy), "
                "or have this layer run masked, which has a weight, as sparsify_ does where an example_input shows that the layer "
                "is not called or its weight is read outside the layer."
            )
        return super().__getattr__(name)

    def _apply(self, fn, recurse: bool = True):
        before = self.indices
        super()._apply(fn, recurse)
        for name, index in before._asdict().items():  # .type(dtype), unlike .to(dtype), converts integers as well
            now = self._buffers[name]
            if now.dtype != torch.int32:
                self._buffers[name] = index.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Adopts the structure of the checkpoint, once it is known to be sound; otherwise the structure stays as it is.

        A checkpoint with another number of weights or blocks is refused, like any other wrong size in torch: an optimizer may
        hold moments of the old size, and fused ones would write past their end.
        """
        if any(prefix + name in state_dict for name in STORED):
            try:
                storage, indices = stored_structure(state_dict, prefix, self.weight_shape)
            except ValueError as error:
                error_msgs.append(str(error))
                return
            if (storage, indices.nnz) != (self.storage, self.indices.nnz):
                wanted = self.storage.describe(self.indices.nnz)
                got = indices.nnz if storage == self.storage else storage.describe(indices.nnz)
                error_msgs.append(
                    f"{prefix.removesuffix('.') or 'this layer'}: Expected a checkpoint with {wanted}, got {got}; "
                    "load another structure into a freshly built dense model with grasp_sparse.load_sparse."
                )
                return
            self._adopt(indices, keep_device=not local_metadata.get("assign_to_params_buffers", False))
            values = state_dict[prefix + "values"]
            if storage.nnz(indices, self.weight_shape) != values.numel():  # zeros past the edge, whatever was stored there
                dense = storage.scatter(values, indices, self.weight_shape)
                state_dict[prefix + "values"] = storage.gather(dense, indices)
            state_dict[prefix + "crow_indices"] = indices.crow_indices
            state_dict[prefix + "col_indices"] = indices.col_indices
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _adopt(self, indices: CsrIndices, keep_device: bool) -> None:
        # Through .data the buffers stay the same objects, so that layers that share them follow.
        for name, index in indices._asdict().items():
            buffer = self._buffers[name]
            if keep_device:
                index = index.to(buffer.device)
            if index.is_inference() and not buffer.is_inference():  # loaded in torch.inference_mode: no backward may save it
                with torch.inference_mode(False):
                    index = index.clone()
            if index.device == buffer.device:
                buffer.data = index
            else:
                self._buffers[name] = index

    def _kept(self) -> str:
        """For ``extra_repr``: how much is kept, and in which blocks."""
        blocks = [] if self.block_size is None else [f"block_size={self.block_size}"]
        counted = [] if blocks and self.values.is_meta else [f"nnz={self.nnz}, density={self.density:.4g}"]
        return ", ".join(counted + blocks)


def stored_structure(state_dict: Mapping[str, Tensor], prefix: str, weight_shape: torch.Size) -> tuple[Storage, CsrIndices]:
    """The storage and the checked indices of the layer whose keys in ``state_dict`` start with ``prefix``; changes nothing.

    Raises:
        ValueError: naming the layer, if one of values, crow_indices, col_indices is missing or they are corrupt.
    """
    layer = prefix.removesuffix(".") or "this layer"
    stored = [state_dict.get(prefix + name) for name in STORED]
    missing = [name for name, tensor in zip(STORED, stored, strict=True) if not isinstance(tensor, Tensor)]
    if missing:
        raise ValueError(f"{layer}: Expected tensors {', '.join(STORED)} in the state_dict, got none for {', '.join(missing)}.")
    values, crow_indices, col_indices = stored
    try:
        storage = storage_of(stored_block_size(values))
        size = storage.values_shape(col_indices.numel())
        if values.shape != size or not values.is_floating_point():
            raise ValueError(f"Expected floating-point values of shape {list(size)}, got {values.dtype} {list(values.shape)}.")
        return storage, csr_from_indices(crow_indices, col_indices, *storage.grid(weight_shape))
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None


def _versions(indices: CsrIndices) -> tuple[int, ...] | None:
    """How often each has been written into; None of inference tensors, which do not count."""
    return None if indices.col_indices.is_inference() else tuple([index._version for index in indices])


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
