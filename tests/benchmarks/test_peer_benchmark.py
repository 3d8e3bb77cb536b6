"""Peers: right ones get rows, wrong and unsupported ones a line that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_shapes import SMALL
from torch import Tensor, nn

from benchmarks import peers
from grasp_sparse.bench.arms import Arm
from grasp_sparse.bench.results import read_rows


class _WrongPeer:
    name, version, note, layout = "wrong peer", "1.0", "", "features first"

    def available(self) -> bool:
        return True

    def make(self, layer: nn.Module, mask: Tensor, x: Tensor, grad: Tensor | None) -> Arm:
        with torch.no_grad():
            layer.weight.mul_(1.1)
        return Arm(layer, x, grad)


class _AbsentPeer(_WrongPeer):
    name = "absent peer"

    def available(self) -> bool:
        return False


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> int:
    monkeypatch.setattr(peers, "PEERS", (peers.TorchCsr(), peers.TorchCsrByHand(), _WrongPeer(), _AbsentPeer()))
    monkeypatch.setattr(peers, "QUICK", {"conv3x3": SMALL["conv3x3"][:1], "linear": SMALL["linear"]})
    return peers.main(["--quick", "--threads", "1", "--seconds-per-shape", "0.001", "--out", str(out), *flags])


def test_rows_of_what_is_right_and_lines_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert _run(monkeypatch, tmp_path / "peers.csv") == 0
    out = capsys.readouterr().out
    assert "absent peer: not installed, not measured" in out
    assert out.count("conv3x3 4->6 at 5x5 batch 8: no row for torch CSR: CSR tensors have no convolution") == 1
    assert "no row for wrong peer: wrong result: wrong peer: output differs from the dense layer's by" in out
    rows = read_rows(tmp_path / "peers.csv")
    assert {row["arm"] for row in rows} == {
        "dense nchw", "dense channels_last", "dense nn.Linear", "dense oneDNN", "sparse", "sparse nchw", "sparse channels_last",
        "torch CSR", "torch CSR by hand",
    }  # fmt: skip
    csr = [row for row in rows if row["arm"] == "torch CSR"]
    assert {(row["pass"], row["note"]) for row in csr} == {("forward", ""), ("forward+backward", "the gradient of the weight is dense")}
    assert all(row["peer_version"] == torch.__version__ and float(row["vs grasp_sparse"]) > 0 for row in csr)


def test_resume_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, tmp_path / "peers.csv")
    rows = read_rows(tmp_path / "peers.csv")
    monkeypatch.setattr(peers, "measure", None)
    assert _run(monkeypatch, tmp_path / "peers.csv", "--resume") == 0
    assert read_rows(tmp_path / "peers.csv") == rows


def test_sparseprop_is_not_fed_what_it_computes_wrongly() -> None:
    pytest.importorskip("sparseprop")
    with pytest.raises(peers.UnsupportedError, match="batch 12 is not a multiple of 8"):
        peers.SparseProp().make(nn.Linear(4, 4), torch.ones(4, 4, dtype=torch.bool), torch.randn(12, 4), None)


def test_a_kept_weight_that_is_zero_is_kept_by_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SMALL["linear"][0]
    dense = shape.layer()
    with torch.no_grad():
        dense.weight.zero_()
    monkeypatch.setattr(type(shape), "layer", lambda self: dense)
    arms, kept, left_out = peers.make_arms(shape, 0.5, True, (peers.TorchCsr(), peers.TorchCsrByHand()), seed=0)
    assert not left_out
    assert arms["torch CSR"].layer.weight.values().numel() == arms["torch CSR by hand"].layer.values.numel() == kept > 0
