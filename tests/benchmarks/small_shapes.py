"""Shapes that are measured in a moment, in place of the benchmarks' own."""

from __future__ import annotations

from benchmarks.shapes import ConvShape, LinearShape

SMALL = {
    "conv3x3": [ConvShape(4, 6, 5, 8), ConvShape(3, 4, 7, 8, kernel=5, stride=2, padding=2, bias=False, count=3)],
    "resnet50": [],
    "linear": [LinearShape(16, 24, 8)],
}
