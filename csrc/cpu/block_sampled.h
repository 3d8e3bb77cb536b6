// The sampled product on blocks: of a kept block, tiles of G x K dot products stay in registers while the pixels of a chunk pass
// by. A pixel costs G + K loads for G*K multiply-adds; the rows of g that a row of blocks shares stay in L1.
#pragma once

#include "sampled.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// 16 sums, 4 pixels of g and one of x fill 21 of AVX-512's 32 registers; others have 16.
constexpr int kSampledOutputs = 4, kSampledInputs = kNatives == 1 ? 4 : 2;
constexpr int kSampledPixels = 32;

template <class T>
struct DotTile {
  const T *g, *x;  // at the first pixel of the first channel
  int64_t g_channel_size, g_row_step, channel_step, row_step;
  int rows, cols;
  T* sums;
  int64_t output_step;
};

// sums[output][input] += the dot products of G channels of g and K of x.
template <class T, int G, int K>
__attribute__((noinline)) void block_dots(const DotTile<T>& t) {
  constexpr int n = kNativeLanes<T>;
  Native<T> acc[G * K];
#pragma GCC unroll 16
  for (int i = 0; i < G * K; ++i) acc[i] = Native<T>{};
  const int64_t g_channel_size = t.g_channel_size, channel_step = t.channel_step;
  const int64_t length = static_cast<int64_t>(t.cols) * kLanes<T>;
  for (int r = 0; r < t.rows; ++r) {
    const T *from_g = t.g + r * t.g_row_step, *from_x = t.x + r * t.row_step;
    for (int64_t l = 0; l < length; l += n) {
      Native<T> g[G];
#pragma GCC unroll 4
      for (int i = 0; i < G; ++i) g[i] = *reinterpret_cast<const Native<T>*>(from_g + i * g_channel_size + l);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const Native<T> x = *reinterpret_cast<const Native<T>*>(from_x + k * channel_step + l);
#pragma GCC unroll 4
        for (int i = 0; i < G; ++i) acc[i * K + k] += g[i] * x;
      }
    }
  }
  constexpr int B = G * K < n ? G * K : n;  // sums that are folded together
  alignas(64) T dots[G * K < n ? n : G * K];
#pragma GCC unroll 8
  for (int i = 0; i < G * K; i += B) {
    interleave_sums<T, B, 1>(acc + i);
    put_native<T, false>(dots + i, fold_lanes<T, B>(acc[i]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < G; ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) t.sums[i * t.output_step + k] += dots[i * K + k];
  }
}

// The outputs of a block, or of what of it lies within the weight, and K of its inputs.
template <class T, int K>
void block_inputs(DotTile<T> t, int outputs) {
  const auto next = [&](int count) {
    t.g += count * t.g_channel_size, t.sums += count * t.output_step;
    outputs -= count;
  };
  for (; outputs >= kSampledOutputs; next(kSampledOutputs)) block_dots<T, kSampledOutputs, K>(t);
  if (outputs >= 2) block_dots<T, 2, K>(t), next(2);
  if (outputs) block_dots<T, 1, K>(t);
}

template <class T>
GRASP_SPARSE_INLINE void block_dot_products(DotTile<T> t, int outputs, int inputs) {
  const auto next = [&](int count) {
    t.x += count * t.channel_step, t.sums += count;
    inputs -= count;
  };
  for (; inputs >= kSampledInputs; next(kSampledInputs)) block_inputs<T, kSampledInputs>(t, outputs);
  if (inputs >= 2) block_inputs<T, 2>(t, outputs), next(2);
  if (inputs) block_inputs<T, 1>(t, outputs);
}

template <class T>
void block_sampled(const SampledArgs<T>& p) {
  constexpr int L = kLanes<T>;
  const Entries& e = p.entries;
  const Blocks& b = p.blocks;
  const int64_t block_size = static_cast<int64_t>(b.outputs) * b.inputs;
  if (p.channel_begin == p.channel_end) return;
  if (p.start) {
    const int64_t begin = e.begin[p.channel_begin], end = e.end[p.channel_end - 1];
    std::memset(p.sums + begin * block_size, 0, sizeof(T) * (end - begin) * block_size);
  }
  const int strips = (p.cols + kSampledPixels - 1) / kSampledPixels;
  if (strips == 0) return;
  const int width = (p.cols + strips - 1) / strips, height = kSampledPixels / width;
  for (int row = 0; row < p.rows; row += height) {
    for (int col = 0; col < p.cols; col += width) {
      const int rows = p.rows - row < height ? p.rows - row : height, cols = p.cols - col < width ? p.cols - col : width;
      for (int i = p.channel_begin; i < p.channel_end; ++i) {
        if (row == 0 && col == 0) {
          fetch_share(p.ahead, i - p.channel_begin, p.channel_end - p.channel_begin);
          fetch_share(p.ahead_g, i - p.channel_begin, p.channel_end - p.channel_begin);
        }
        const int64_t channel = static_cast<int64_t>(i) * b.outputs;
        const int outputs = b.channels - channel < b.outputs ? static_cast<int>(b.channels - channel) : b.outputs;
        const T* g = p.g + channel * p.g_channel_size + row * p.g_row_step + col * L;
        const T* packed = p.packed + row * p.row_step + col * L;
        for (int32_t j = e.begin[i]; j < e.end[i]; ++j)
          block_dot_products<T>({g, packed + e.place[j], p.g_channel_size, p.g_row_step, b.channel_step, p.row_step, rows, cols,
                                 p.sums + j * block_size, b.inputs},
                                outputs, e.place[j] < b.last ? b.inputs : b.last_inputs);
      }
    }
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
