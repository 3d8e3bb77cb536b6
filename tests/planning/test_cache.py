"""What was measured once is not measured again, and nothing else is taken for it."""

from __future__ import annotations

import json

import pytest
import torch
from small_net import X, masks_of
from torch import nn

import grasp_sparse as gs
from grasp_sparse.planning import Times, cache
from grasp_sparse.planning.inputs import LayerInput

pytestmark = pytest.mark.skipif(not gs._extension.status().loaded, reason="without compiled kernels nothing is measured")


class TestCache:
    def test_the_same_layer_is_measured_once(self, net, stopwatch):
        masks = masks_of(net)
        first = gs.plan(net, masks, X)
        count = len(stopwatch.measured)
        assert count == 3 and gs.plan(net, masks, X).rows == first.rows and len(stopwatch.measured) == count

    @pytest.mark.parametrize("kept, again", [(1000, False), (1019, False), (981, False), (1030, True), (500, True)])
    def test_near_counts_of_weights_share_a_measurement(self, stopwatch, kept, again):
        model = nn.Sequential(nn.Linear(64, 64))
        for count in (1000, kept):
            gs.plan(model, {"0.weight": (torch.randperm(4096) < count).view(64, 64)}, torch.randn(8, 64))
        assert len(stopwatch.measured) == 1 + again

    def test_what_was_decided_once_is_decided_again(self, stopwatch, on_disk):
        """prune measures a step under one plan; sparsify_ must find it, though later tries have measured nearer counts."""
        model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
        masks = {count: {"0.weight": (torch.arange(4096) < count).view(64, 64)} for count in (1000, 1015, 1030)}
        stopwatch.set(lambda layer, kept, given: Times(1.0, 1.0, 0.5 if kept == 1000 else 2.0))
        ways = [gs.plan(model, masks[count], x)["0.weight"] for count in (1000, 1015, 1030, 1015)]
        cache._memory.clear()  # another process
        ways += [gs.plan(model, masks[count], x)["0.weight"] for count in (1015, 1030)]
        assert ways == ["sparse", "sparse", "masked", "sparse", "sparse", "masked"]

    @pytest.mark.parametrize("change", ["batch", "threads", "layout", "gradient", "stride"])
    def test_anything_else_is_measured_anew(self, stopwatch, change):
        model = nn.Sequential(nn.Conv2d(4, 4, 3))
        masks, x = masks_of(model), torch.randn(8, 4, 6, 6)
        gs.plan(model, masks, x)
        if change == "batch":
            x = x[:4]
        elif change == "threads":
            torch.set_num_threads(2)
        elif change == "layout":
            x = x.to(memory_format=torch.channels_last)
        elif change == "gradient":
            model[0].weight.requires_grad_(False)
        else:
            model[0].stride = (2, 2)
        gs.plan(model, masks, x)
        assert len(stopwatch.measured) == 2

    @pytest.mark.parametrize("of", [torch.backends.cuda.matmul, torch.backends.cudnn.conv], ids=["products", "convolutions"])
    def test_times_on_a_gpu_are_those_of_one_precision(self, monkeypatch, of):
        """Set in the way of today, beside which torch refuses to be asked in the older one."""
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
        before, keys = of.fp32_precision, []
        try:
            for of.fp32_precision in ("ieee", "tf32"):
                keys.append(cache._device(torch.device("cuda")))
        finally:
            of.fp32_precision = before
        assert keys[0] != keys[1]

    @pytest.mark.parametrize("kind, setting", [
        ("cpu", (torch.backends.mkldnn.matmul, "fp32_precision", "bf16")), ("cpu", (torch.backends.mkldnn, "deterministic", True)),
        ("cuda", (torch.backends.cudnn, "benchmark", True)), ("cuda", (torch.backends.cudnn, "deterministic", True)),
    ], ids=lambda value: value if isinstance(value, str) else value[1])  # fmt: skip
    def test_times_are_those_of_one_way_to_compute(self, monkeypatch, kind, setting):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
        where, name, value = setting
        before, key = getattr(where, name), cache._device(torch.device(kind))
        try:
            setattr(where, name, value)
            assert cache._device(torch.device(kind)) != key
        finally:
            setattr(where, name, before)
        assert cache._device(torch.device(kind)) == key

    @pytest.fixture
    def on_disk(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRASP_SPARSE_CACHE", str(tmp_path / "deep" / "cache"))
        return tmp_path / "deep" / "cache" / "layer-times.json"

    def test_another_process_does_not_measure_again(self, net, stopwatch, on_disk):
        masks = masks_of(net)
        first = gs.plan(net, masks, X)
        cache._memory.clear()
        assert gs.plan(net, masks, X).rows == first.rows and len(stopwatch.measured) == 3
        assert [path.name for path in on_disk.parent.iterdir()] == [on_disk.name]

    def test_files_of_two_processes_are_joined(self, stopwatch, on_disk):
        for model in (nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 6))):
            cache._memory.clear()
            gs.plan(model, masks_of(model), torch.randn(2, 8))
        assert len(json.loads(on_disk.read_text())["times"]) == 2

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"\xff\xfe", b"[]", b'{"format": 99, "times": {}}', b'{"format": 2, "times": []}', "bad rows", "bad times"],
    )
    def test_a_damaged_or_foreign_file_is_measured_over(self, stopwatch, on_disk, content):
        model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)
        masks = masks_of(model)
        key = cache.layer_key(model[0], LayerInput((2, 8), "row-major", torch.float32, False))
        if content == "bad rows":
            content = json.dumps({"format": 2, "times": {key: [7]}}).encode()
        elif content == "bad times":
            content = json.dumps({"format": 2, "times": {key: [[6, [1, -1, 0], True]]}}).encode()
        on_disk.parent.mkdir(parents=True)
        on_disk.write_bytes(content)
        gs.plan(model, masks, x)
        assert len(stopwatch.measured) == 1 and key in json.loads(on_disk.read_text())["times"]

    def test_a_folder_that_cannot_be_written_is_done_without(self, net, stopwatch, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("GRASP_SPARSE_CACHE", str(tmp_path / "file"))
        gs.plan(net, masks_of(net), X)
        assert len(stopwatch.measured) == 3

    def test_where_the_file_is(self, monkeypatch):
        for value in ("", "0"):
            monkeypatch.setenv("GRASP_SPARSE_CACHE", value)
            assert cache.cache_file() is None
        monkeypatch.setenv("GRASP_SPARSE_CACHE", "~nobody-of-this-name/cache")
        assert cache.cache_file() is None
        monkeypatch.delenv("GRASP_SPARSE_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert str(cache.cache_file()) == "/somewhere/grasp_sparse/layer-times.json"


def test_times_under_another_allocator_are_others(monkeypatch):
    """``keep_memory`` may be called after a first plan was made."""
    layer, given, keys = nn.Linear(8, 4), LayerInput((2, 8), "row-major", torch.float32, False), []
    for name in ("system default", "kept"):
        monkeypatch.setattr(cache, "allocator", lambda name=name: name)
        keys.append(cache.layer_key(layer, given))
    assert keys[0] != keys[1]
