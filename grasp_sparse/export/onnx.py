"""ONNX of the densified model, any batch size, and running it; the packages for it are optional."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from grasp_sparse.export.source import Source
from grasp_sparse.files import write_atomically
from grasp_sparse.surgery import densify_
from grasp_sparse.train.errors import UserError

OPSET = 18
INPUT, OUTPUT = "images", "logits"
_NEEDED = ("onnx", "onnxscript")


def check_packages() -> None:
    """UserError unless what writes ONNX is installed."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"Expected {' and '.join(_NEEDED)} for --format onnx, found no {' and no '.join(missing)}; pip install {' '.join(_NEEDED)}"
        )


def write_onnx(source: Source, path: Path) -> None:
    """Input "images" [batch, channels, height, width], normalised; output "logits" [batch, classes]."""
    model = densify_(copy.deepcopy(source.model)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            model, (source.images(2),), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    proto = program.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = "grasp_sparse.model", json.dumps(source.about)
    data = proto.SerializeToString()
    write_atomically(path, lambda file: file.write(data))


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Logits of images, by onnxruntime where it is installed, by the reference of the package onnx otherwise."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        run = session.run
    else:
        from onnx.reference import ReferenceEvaluator

        run = ReferenceEvaluator(str(path)).run
    return lambda images: torch.from_numpy(run(None, {INPUT: images.numpy()})[0])
