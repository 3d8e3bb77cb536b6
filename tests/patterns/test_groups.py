"""Every pattern on literal matrices; and its laws: groups cover the weight once, are pooled by their sum and kept whole."""

from __future__ import annotations

import pytest
import torch

import grasp_sparse as gs
from grasp_sparse.patterns import NM, Block, Channel, Unstructured, Vector, get_pattern
from grasp_sparse.pruning import make_masks

BLOCKS = ("block(2, 2)", "block(4, 3)", "block(1, 5)", "block(16, 16)")
GROUPED = ("unstructured", *BLOCKS, "vector(4)", "vector(2)", "channel", "channel(in)")
SHAPES = ((4, 4), (6, 5), (1, 9), (6, 5, 3, 2), (8, 4, 1, 1))


def matrix(*rows: str) -> torch.Tensor:
    """Rows of 0 and 1 as a bool mask."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def size_of_each(pattern, shape) -> torch.Tensor:
    groups = pattern.pool(torch.zeros(shape)).numel()
    return torch.as_tensor(pattern.group_size(shape)).expand(groups)


class TestLiteral:
    RANKED = torch.arange(16.0).view(4, 4)

    @pytest.mark.parametrize(
        "pattern, sums, kept",
        [
            ("unstructured", list(range(16)), ("0000", "0000", "1111", "1111")),
            ("block(2, 2)", [10, 18, 42, 50], ("0000", "0000", "1111", "1111")),
            ("block(4, 1)", [24, 28, 32, 36], ("0011", "0011", "0011", "0011")),
            ("block(1, 4)", [6, 22, 38, 54], ("0000", "0000", "1111", "1111")),
            ("vector(2)", [4, 6, 8, 10, 20, 22, 24, 26], ("0000", "0000", "1111", "1111")),
            ("channel", [6, 22, 38, 54], ("0000", "0000", "1111", "1111")),
            ("channel(in)", [24, 28, 32, 36], ("0011", "0011", "0011", "0011")),
        ],
    )
    def test_4x4_half_kept(self, pattern, sums, kept):
        assert get_pattern(pattern).pool(self.RANKED).tolist() == sums
        assert torch.equal(make_masks({"w": self.RANKED}, 0.5, pattern)["w"], matrix(*kept))

    @pytest.mark.parametrize(
        "pattern, sizes, kept, expected",
        [
            ("block(4, 2)", [8, 8, 4, 4, 4, 2], [0, 5], ("11000", "11000", "11000", "11000", "00001", "00001")),
            ("block(4, 2)", [8, 8, 4, 4, 4, 2], [1, 2, 3], ("00111", "00111", "00111", "00111", "11000", "11000")),
            ("vector(4)", [4] * 5 + [2] * 5, [1, 9], ("01000", "01000", "01000", "01000", "00001", "00001")),
            ("channel", [5] * 6, [0, 4], ("11111", "00000", "00000", "00000", "11111", "00000")),
            ("channel(in)", [6] * 5, [3], ("00010",) * 6),
        ],
    )
    def test_6x5_ragged(self, pattern, sizes, kept, expected):
        pattern, weight = get_pattern(pattern), torch.zeros(6, 5)
        assert size_of_each(pattern, weight.shape).tolist() == sizes
        chosen = torch.zeros(len(sizes), dtype=torch.bool)
        chosen[kept] = True
        assert torch.equal(pattern.expand(chosen, weight), matrix(*expected))

    def test_a_convolution_is_cut_tap_by_tap(self):
        weight = torch.arange(6.0).view(1, 3, 1, 2)  # channel by tap: 0 1 | 2 3 | 4 5
        pattern = get_pattern("block(1, 2)")
        assert pattern.pool(weight).tolist() == [0 + 2, 4, 1 + 3, 5]
        mask = pattern.expand(torch.tensor([True, False, False, True]), weight)
        assert mask.squeeze().tolist() == [[True, False], [True, False], [False, True]]

    def test_sums_are_signed(self):
        scores = torch.tensor([[9.0, -9.0, 1.0, 1.0]])
        assert get_pattern("block(1, 2)").pool(scores).tolist() == [0, 2]
        assert torch.equal(make_masks({"w": scores}, 0.5, "block(1, 2)")["w"], matrix("0011"))

    def test_nm_keeps_the_best_n_of_every_m_inputs(self):
        scores = torch.tensor([[5.0, 1, 4, 2, 9], [1, 1, 1, 1, -3], [0, -1, -2, -3, 0], [1, 2, 3, 4, 0]])
        expected = matrix("10101", "11001", "11001", "00111")  # of the last one input ceil(2·1 / 4) = 1
        assert torch.equal(make_masks({"w": scores}, pattern="nm(2, 4)")["w"], expected)
        assert torch.equal(make_masks({"w": scores[:, :4]}, 0.5, "nm(2, 4)")["w"], expected[:, :4])
        assert torch.equal(make_masks({"w": scores[:, :4]}, 0.75, "nm(1, 4)")["w"], matrix("1000", "1000", "1000", "0001"))

    def test_nm_of_a_convolution_counts_channels_of_one_tap(self):
        scores = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0]]).view(1, 3, 1, 2)
        mask = make_masks({"w": scores}, 0.5, "nm(1, 2)")["w"]
        assert mask.squeeze().tolist() == [[False, True], [True, False], [True, True]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("written", GROUPED)
class TestGroups:
    def test_they_cover_the_weight_once_and_are_as_large_as_said(self, written, shape):
        pattern, weight = get_pattern(written), torch.randn(shape)
        sizes, covered = size_of_each(pattern, shape), torch.zeros(shape)
        for group in range(len(sizes)):
            mask = pattern.expand(torch.arange(len(sizes)) == group, weight)
            assert mask.dtype == torch.bool and mask.shape == weight.shape and int(mask.sum()) == sizes[group]
            covered += mask
        assert bool((covered == 1).all())

    def test_the_score_of_a_group_is_the_sum_of_its_weights(self, written, shape):
        pattern, scores = get_pattern(written), torch.randn(shape, dtype=torch.float64)
        pooled = pattern.pool(scores)
        for group in range(len(pooled)):
            mask = pattern.expand(torch.arange(len(pooled)) == group, scores)
            torch.testing.assert_close(pooled[group], scores[mask].sum())

    def test_pooling_a_mask_counts(self, written, shape):
        pattern = get_pattern(written)
        assert pattern.pool(torch.ones(shape)).tolist() == size_of_each(pattern, shape).tolist()


@pytest.mark.parametrize("written", ["nm(1, 2)", "nm(2, 4)", "nm(1, 3)", "nm(5, 5)"])
@pytest.mark.parametrize("shape", [(6, 8), (6, 7), (4, 3, 3, 3), (2, 1)], ids=str)
def test_nm_keeps_n_of_m_everywhere_and_the_share_rounded_up_at_the_end(written, shape):
    pattern, scores = get_pattern(written), torch.randn(shape).round()  # with ties
    mask = make_masks({"w": scores}, pattern=pattern)["w"]
    for start in range(0, shape[1], pattern.m):
        some, those = scores[:, start : start + pattern.m], mask[:, start : start + pattern.m]
        kept = -(-pattern.n * some.shape[1] // pattern.m)
        assert bool((those.sum(1) == kept).all())
        lowest_kept = some.masked_fill(~those, float("inf")).amin(1)
        assert bool((some.masked_fill(those, -float("inf")).amax(1) <= lowest_kept).all())


def test_sums_of_large_scores_do_not_overflow():
    assert get_pattern("block(2, 2)").pool(torch.full((2, 2), 3e38)).item() == pytest.approx(1.2e39)


class TestWriting:
    @pytest.mark.parametrize(
        "written, pattern, name",
        [
            ("unstructured", Unstructured(), "unstructured"),
            ("block(32, 16)", Block(32, 16), "block(32, 16)"),
            (" block( 32,16 ) ", Block(32, 16), "block(32, 16)"),
            ("vector(8)", Vector(8), "vector(8)"),
            ("nm(2,4)", NM(2, 4), "nm(2, 4)"),
            ("channel", Channel(), "channel"),
            ("channel()", Channel("out"), "channel"),
            ("channel(in)", Channel("in"), "channel(in)"),
        ],
    )
    def test_names_and_objects_are_one(self, written, pattern, name):
        assert get_pattern(written) == pattern and get_pattern(pattern) is pattern
        assert pattern.name == name and get_pattern(pattern.name) == pattern
        assert gs.patterns.Block is Block

    @pytest.mark.parametrize(
        "written, message",
        [
            ("zebra(3)", r"unstructured, block\(bh, bw\), vector\(v\), nm\(n, m\), channel or channel\(in\), got 'zebra\(3\)'"),
            ("block", r"written block\(bh, bw\), got 'block'"),
            ("block(3)", r"written block\(bh, bw\), got 'block\(3\)'"),
            ("nm(1, 2, 3)", r"written nm\(n, m\)"),
            ("unstructured(3)", "written unstructured"),
            ("block(3, 4", "one of unstructured"),
            ("", "one of unstructured"),
            ("block(0, 4)", r"positive integers in block\(0, 4\), got 0, 4"),
            ("vector(-2)", "positive integers"),
            ("vector(2.5)", "positive integers"),
            ("nm(3, 2)", r"n of at most m in nm\(3, 2\)"),
            ("channel(up)", r"Expected channel or channel\(in\), got channel\(up\)"),
        ],
    )
    def test_mistakes_are_refused_in_words(self, written, message):
        with pytest.raises(ValueError, match=message):
            get_pattern(written)

    @pytest.mark.parametrize("written", [p for p in (*GROUPED, "nm(2, 4)") if p != "unstructured"])
    def test_only_weights_have_groups(self, written):
        with pytest.raises(ValueError, match=r"weight \[out, in\] or \[out, in, kh, kw\] with pattern .*, got shape \[7\]"):
            make_masks({"w": torch.rand(7)}, 0.5 if "nm" in written else 0.1, written)

    def test_only_blocks_are_stored_whole(self):
        sizes = [get_pattern(p).block_size for p in ("block(4, 2)", "vector(4)", "nm(2, 4)", "channel")]
        assert sizes == [(4, 2), None, None, None]
