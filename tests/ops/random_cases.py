"""Random calls of the operations for the property tests: what hypothesis draws, and the arguments made of it.

A case is a handful of numbers and names, so that a failing one is read off the report; its tensors follow from its seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import IMAGE_LAYOUTS, ROW_LAYOUTS, STORED
from torch import Tensor

from grasp_sparse.formats import block_grid, csr_from_mask, gather_blocks
from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.layout import output_size, pooled_size

# name -> dtype of activations, dtype of values and bias
PRECISIONS = {name: (dtype, compute_dtype(dtype)) for name, dtype in STORED.items()}


def off_by_one(x: Tensor) -> Tensor:
    """Contiguous, its first entry not at the address an allocator would choose."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def _one_number(x: Tensor) -> Tensor:
    return torch.full((), 0.5, dtype=x.dtype).expand(x.shape)


_ANY_RANK = {"off-by-one": off_by_one, "expanded-number": _one_number}
IMAGES = {
    **{name: lay for name, (lay, _) in IMAGE_LAYOUTS.items()},
    **_ANY_RANK,
    "expanded-pixels": lambda x: x[:, :, :1, :1].expand(x.shape),
    "expanded-channels": lambda x: x.mean(1, keepdim=True).expand(x.shape),
}
ROWS = {
    **{name: lay for name, (lay, _) in ROW_LAYOUTS.items()},
    **_ANY_RANK,
    "expanded-features": lambda x: x.mean(1, keepdim=True).expand(x.shape),
}
MASKS = {  # name -> bool mask of [rows, cols]
    "none": lambda rows, cols: torch.zeros(rows, cols, dtype=torch.bool),
    "all": lambda rows, cols: torch.ones(rows, cols, dtype=torch.bool),
    "one weight": lambda rows, cols: _places(rows, cols, torch.randint(max(1, rows * cols), (1,))),
    "one row": lambda rows, cols: (torch.arange(rows) == rows // 2).unsqueeze(1).expand(rows, cols).clone(),
    "one column": lambda rows, cols: (torch.arange(cols) == cols // 2).expand(rows, cols).clone(),
    "5 %": lambda rows, cols: torch.rand(rows, cols) < 0.05,
    "half, with empty rows": lambda rows, cols: (torch.rand(rows, cols) < 0.5) & (torch.rand(rows, 1) < 0.5),
    "half, with empty columns": lambda rows, cols: (torch.rand(rows, cols) < 0.5) & (torch.rand(1, cols) < 0.5),
}


def _places(rows: int, cols: int, places: Tensor) -> Tensor:
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[places[places < rows * cols]] = True
    return mask.view(rows, cols)


@dataclass(frozen=True)
class LinearCase:
    batch: int
    cols: int
    rows: int
    mask: str
    bias: bool
    x_layout: str
    g_layout: str
    relu: bool
    input_grad: bool
    block_size: tuple[int, int]
    precision: str
    seed: int

    def arguments(self) -> dict[str, Any]:
        """Every argument an operation of the family may ask for, by its name in the schema."""
        torch.manual_seed(self.seed)
        x, g = torch.randn(self.batch, self.cols), torch.randn(self.batch, self.rows)
        available = {**_weight(self, self.cols), **_activations(self, ROWS, x, g), "relu": self.relu, "input_grad": self.input_grad}
        open_places = _activations(self, ROWS, x, torch.randn_like(g).relu())["g"]
        return {**available, "y": open_places if self.relu else None}

    def block_arguments(self) -> dict[str, Any]:
        """The same call on a weight of blocks."""
        sizes = {"out_features": self.rows, "in_features": self.cols}
        return {**self.arguments(), **_blocks(self, (self.rows, self.cols)), **sizes}


@dataclass(frozen=True)
class ConvCase:
    batch: int
    channels: int
    rows: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    mask: str
    bias: bool
    x_layout: str
    g_layout: str
    block_size: tuple[int, int]
    precision: str
    seed: int

    def arguments(self) -> dict[str, Any]:
        """As for LinearCase."""
        torch.manual_seed(self.seed)
        window = _window(self)
        x = torch.randn(self.batch, self.channels, *self.image)
        g = torch.randn(self.batch, self.rows, *output_size(self.image, *window.values()))
        weight = _weight(self, self.channels * math.prod(self.kernel))
        return {**weight, **_activations(self, IMAGES, x, g), "input_size": self.image, **window}

    def block_arguments(self) -> dict[str, Any]:
        """As for LinearCase."""
        sizes = {"out_channels": self.rows, "in_channels": self.channels, "relu": self.seed % 2 == 0}
        return {**self.arguments(), **_blocks(self, (self.rows, self.channels, *self.kernel)), **sizes}


@dataclass(frozen=True)
class ImageCase:
    batch: int
    size: tuple[int, int, int]  # channels, height, width
    x_layout: str
    g_layout: str
    precision: str
    seed: int

    def arguments(self) -> dict[str, Any]:
        """As for LinearCase; g is of a result of the size of x."""
        torch.manual_seed(self.seed)
        return _activations(self, IMAGES, *torch.randn(2, self.batch, *self.size))


@dataclass(frozen=True)
class PoolCase(ImageCase):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool
    outlier: float

    def arguments(self) -> dict[str, Any]:
        """As for LinearCase."""
        torch.manual_seed(self.seed)
        window = {**_window(self), "ceil_mode": self.ceil_mode}
        channels, *image = self.size
        x = torch.randn(self.batch, *self.size).relu()  # many windows have several largest values
        x[torch.rand(x.shape) < 0.02] = self.outlier
        g = torch.randn(self.batch, channels, *pooled_size(image, *window.values()))
        return {**_activations(self, IMAGES, x, g), "input_size": image, **window}


@dataclass(frozen=True)
class Norm:
    """A batch norm and what follows it, behind the images of another case."""

    weight: bool
    bias: bool
    relu: bool
    residual_layout: str | None  # None: no residual
    saved_layout: str | None  # None: as the forward left it
    eps: float
    input_grad: bool

    def arguments(self, g: Tensor) -> dict[str, Any]:
        """As for LinearCase, beside a gradient of the result."""
        weight, bias = torch.randn(2, g.shape[1], dtype=compute_dtype(g.dtype))
        weight[torch.rand_like(weight) < 0.1] = 0
        vectors = {"norm_weight": weight if self.weight else None, "norm_bias": bias if self.bias else None}
        residual = torch.randn(g.shape).to(g.dtype)
        residual = None if self.residual_layout is None else IMAGES[self.residual_layout](residual)
        return {**vectors, "residual": residual, "eps": self.eps, "relu": self.relu, "input_grad": self.input_grad}

    def saved(self, result: Tensor) -> Tensor:
        """What a forward gave, as its backward gets it: it need not lie where and as it did."""
        return result if self.saved_layout is None else IMAGES[self.saved_layout](result)


def _window(case: ConvCase | PoolCase) -> dict[str, tuple[int, ...]]:
    return {"kernel_size": case.kernel, "stride": case.stride, "padding": case.padding, "dilation": case.dilation}


def _weight(case: LinearCase | ConvCase, cols: int) -> dict[str, Tensor | None]:
    mask = MASKS[case.mask](case.rows, cols)
    _, dtype = PRECISIONS[case.precision]
    values, bias = torch.randn(1, int(mask.sum()), dtype=dtype), torch.randn(case.rows, dtype=dtype)
    return {"values": values, **csr_from_mask(mask)._asdict(), "bias": bias if case.bias else None}


def _blocks(case: LinearCase | ConvCase, weight_shape: tuple[int, ...]) -> dict[str, Any]:
    """Replaces what _weight gave. Past the weight values are NaN."""
    indices = csr_from_mask(MASKS[case.mask](*block_grid(weight_shape, case.block_size)))
    _, dtype = PRECISIONS[case.precision]
    values = torch.randn(indices.nnz, *case.block_size, dtype=dtype)
    values[gather_blocks(torch.ones(weight_shape), indices, case.block_size) == 0] = torch.nan
    return {"values": values, **indices._asdict(), "block_size": case.block_size}


def _activations(case: LinearCase | ConvCase | ImageCase, layouts: dict, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    dtype, _ = PRECISIONS[case.precision]
    return {"x": layouts[case.x_layout](x.to(dtype)), "g": layouts[case.g_layout](g.to(dtype))}


# Around the lanes of a slice (8 and 16), the channels of a block, and nothing at all.
_BATCHES = st.sampled_from((0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 40))
_CHANNELS = st.sampled_from((0, 1, 2, 3, 5, 8, 16, 17, 33))
_SIDES = st.integers(1, 9) | st.integers(10, 40)
_BLOCK_SIDES = st.integers(1, 9) | st.sampled_from((16, 17, 32))
_ACTIVATIONS = {"precision": st.sampled_from(sorted(PRECISIONS)), "seed": st.integers(0, 2**31)}
_LAYOUTS_OF_IMAGES = {"x_layout": st.sampled_from(sorted(IMAGES)), "g_layout": st.sampled_from(sorted(IMAGES))}
_WEIGHT = {
    "mask": st.sampled_from(sorted(MASKS)),
    "bias": st.booleans(),
    "block_size": st.tuples(_BLOCK_SIDES, _BLOCK_SIDES),
}

linear_cases = st.builds(
    LinearCase,
    batch=_BATCHES | st.integers(50, 300),
    cols=_CHANNELS | st.integers(30, 150),
    rows=_CHANNELS | st.integers(30, 150),
    x_layout=st.sampled_from(sorted(ROWS)),
    g_layout=st.sampled_from(sorted(ROWS)),
    relu=st.booleans(),
    input_grad=st.booleans(),
    **_WEIGHT,
    **_ACTIVATIONS,
)
image_cases = st.builds(
    ImageCase,
    batch=_BATCHES,
    size=st.tuples(_CHANNELS, _SIDES, _SIDES) | st.tuples(st.sampled_from((64, 130, 600)), st.integers(1, 9), st.integers(1, 9)),
    **_LAYOUTS_OF_IMAGES,
    **_ACTIVATIONS,
)
norms = st.builds(
    Norm,
    weight=st.booleans(),
    bias=st.booleans(),
    relu=st.booleans(),
    residual_layout=st.none() | st.sampled_from(sorted(IMAGES)),
    saved_layout=st.none() | st.sampled_from(sorted({*IMAGE_LAYOUTS, "off-by-one"})),
    eps=st.sampled_from((1e-5, 1e-3)),
    input_grad=st.booleans(),
)


def _pair(draw: st.DrawFn, low: int, high: int) -> tuple[int, int]:
    return draw(st.integers(low, high)), draw(st.integers(low, high))


def _reach(kernel: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    return [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]


def _image(draw: st.DrawFn, reach: list[int], begin: list[int], end: list[int]) -> tuple[int, ...]:
    """Height and width of an image that holds the window once it is padded."""
    least = [max(1, r - a - b) for r, a, b in zip(reach, begin, end)]
    return tuple(low + draw(st.integers(0, 9) | st.integers(10, 30)) for low in least)


@st.composite
def _conv_cases(draw: st.DrawFn, symmetric: bool) -> ConvCase:
    pointwise = draw(st.integers(0, 3)) == 0  # has ways of its own
    kernel, stride, dilation = ((1, 1),) * 3 if pointwise else (_pair(draw, 1, 5), _pair(draw, 1, 3), _pair(draw, 1, 3))
    reach = _reach(kernel, dilation)
    begin = [0 if pointwise else draw(st.integers(0, r + 2)) for r in reach]
    end = begin if symmetric else [draw(st.integers(0, r + 2)) for r in reach]
    image = _image(draw, reach, begin, end)
    return ConvCase(
        batch=draw(_BATCHES),
        channels=draw(_CHANNELS),
        rows=draw(_CHANNELS),
        image=image,
        kernel=kernel,
        stride=stride,
        padding=(begin[0], end[0], begin[1], end[1]),
        dilation=dilation,
        **{name: draw(strategy) for name, strategy in (_LAYOUTS_OF_IMAGES | _WEIGHT | _ACTIVATIONS).items()},
    )


conv_cases = _conv_cases(symmetric=False)
symmetric_conv_cases = _conv_cases(symmetric=True)  # what nn.Conv2d can say


@st.composite
def _pooling_cases(draw: st.DrawFn) -> PoolCase:
    kernel, stride, dilation = _pair(draw, 1, 5), _pair(draw, 1, 3), _pair(draw, 1, 3)
    reach = _reach(kernel, dilation)
    padding = [draw(st.integers(0, r // 2)) for r in reach]
    return PoolCase(
        batch=draw(_BATCHES),
        size=(draw(_CHANNELS), *_image(draw, reach, padding, padding)),
        kernel=kernel,
        stride=stride,
        padding=(padding[0], padding[1]),
        dilation=dilation,
        ceil_mode=draw(st.booleans()),
        outlier=draw(st.sampled_from((0.0, math.inf, -math.inf, math.nan))),
        **{name: draw(strategy) for name, strategy in (_LAYOUTS_OF_IMAGES | _ACTIVATIONS).items()},
    )


pooling_cases = _pooling_cases()
