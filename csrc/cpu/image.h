// The three passes over images seen through strides. A matrix is an image too (linear.cpp), so these are all the loops.
#pragma once

#include <cstdint>

#include "isa.h"
#include "window.h"

namespace grasp_sparse {

class ChannelMoments;

template <class T>
struct Image {
  T* data;
  int64_t n, c, h, w;      // sizes: batch, channels, rows, columns
  int64_t sn, sc, sh, sw;  // strides in elements
  int64_t ss;              // from one slice, L images, to the next: L * sn, unless lanes are no images (pixel_lanes.h)

  // Of a gradient behind a ReLU what that gave, in the same strides: where it is not positive the image counts as zero. Or null.
  const T* gate = nullptr;
  // Of a gradient behind a batch norm what that makes of it.
  NormGradient<std::remove_const_t<T>> norm{};

  T* slice(int64_t i) const { return data + i * ss; }
  Image some_channels(int64_t begin, int64_t count) const {
    Image some = *this;
    some.data += begin * sc, some.c = count, some.norm = norm.from(begin * sc, begin);
    if (gate) some.gate += begin * sc;
    return some;
  }
};

// The index tensors of one weight, as CsrIndices of the Python side: by row and by column. Rows, columns and nnz count single
// weights, or blocks of bh x bw weights of one tap. Columns: all taps of a channel, then of the next; of blocks, all chunks of
// bw channels of a tap, then of the next (formats/blocks.py).
struct CsrView {
  int64_t rows, cols, nnz;
  const int32_t *crow, *col, *ccol, *row, *permutation;
  bool has_blocks = false;
  int64_t bh = 1, bw = 1;

  int64_t weights() const { return nnz * bh * bw; }
};

// Blocks as a pass walks them: transposed for dgrad.
struct BlockOrder {
  int64_t outputs, inputs, output_step, input_step;  // as in Blocks
};

// The weights in the order in which one pass walks them: by row, or by column (a permutation leads back to the values).
struct Walk {
  int64_t rows, cols, nnz;
  const int32_t *ptr, *col, *permutation;  // permutation: null for the order of the values
  bool has_blocks;
  BlockOrder block;
};
inline Walk by_row(const CsrView& csr) {
  return {csr.rows, csr.cols, csr.nnz, csr.crow, csr.col, nullptr, csr.has_blocks, {csr.bh, csr.bw, csr.bw, 1}};
}
inline Walk by_column(const CsrView& csr) {
  return {csr.cols, csr.rows, csr.nnz, csr.ccol, csr.row, csr.permutation, csr.has_blocks, {csr.bw, csr.bh, 1, csr.bw}};
}

// Each throws std::runtime_error when an index lies outside the weight it claims to index, or when columns do not rise within
// their row where that is asked (ChannelBlocks). Nothing outside the results is touched, and those are then void.
// S is how activations are stored; values, bias and their sums are Compute<S>.
// y = conv(x, walked weight) + bias, and max(y, 0) with `relu`; fprop, and dgrad where that is a plain product too. `moments`, of
// single weights and a y in whose pixels channels lie side by side, takes those of y.
template <class S>
void image_product(const Walk& walk, const Compute<S>* values, const Compute<S>* bias, const Image<const S>& x, const Window& window,
                   const Image<S>& y, bool relu, ChannelMoments* moments = nullptr);
template <class S>
void image_fprop(const CsrView& csr, const Compute<S>* values, const Compute<S>* bias, const Image<const S>& x, const Window& window,
                 const Image<S>& y, bool relu, ChannelMoments* moments = nullptr);
template <class S>
void image_dgrad(const CsrView& csr, const Compute<S>* values, const Image<const S>& g, const Window& window, const Image<S>& dx);
// sums [weights] = the sampled product, or += with `add`; so bias_sums [rows] and the sums of g, unless null (as beside blocks).
template <class S>
void image_wgrad(const CsrView& csr, const Image<const S>& g, const Image<const S>& x, const Window& window, Compute<S>* sums,
                 Compute<S>* bias_sums, bool add);
// All three gradients in one walk over g and x, where their bands agree.
template <class S>
void image_backward(const CsrView& csr, const Compute<S>* values, const Image<const S>& g, const Image<const S>& x,
                    const Window& window, const Image<S>& dx, Compute<S>* sums, Compute<S>* bias_sums, bool add);

}  // namespace grasp_sparse
