// Into the layout of the kernels, images innermost, and back.
#pragma once

#include "device.h"
#include "passes.h"

namespace grasp_sparse::cuda {

constexpr int kTile = 32, kTransposeThreads = 256;

// One tile of one matrix a block, read and written along its contiguous side.
template <class S>
__global__ void __launch_bounds__(kTransposeThreads) transpose_tiles(const Transposition m, const S* from, const S* gate, S* to) {
  S* const tile = reinterpret_cast<S*>(shared_memory());  // [kTile, kTile + 1]
  const int64_t row_tiles = (m.rows + kTile - 1) / kTile, col_tiles = (m.cols + kTile - 1) / kTile;
  const int64_t block = blockIdx.x;
  const int64_t col = block % col_tiles * kTile, row = block / col_tiles % row_tiles * kTile;
  const int64_t matrix = block / col_tiles / row_tiles;
  const int lane = threadIdx.x % kTile, first = threadIdx.x / kTile;
  constexpr int step = kTransposeThreads / kTile;
#pragma unroll
  for (int r = first; r < kTile; r += step)
    if (row + r < m.rows && col + lane < m.cols) {
      const int64_t at = matrix * m.from_matrix + (row + r) * m.from_row + col + lane;
      S value = from[at];
      if (gate && widened(gate[at]) <= 0) narrowed(Compute<S>{0}, value);
      tile[r * (kTile + 1) + lane] = value;
    }
  __syncthreads();
#pragma unroll
  for (int c = first; c < kTile; c += step)
    if (col + c < m.cols && row + lane < m.rows)
      to[matrix * m.to_matrix + (col + c) * m.to_row + row + lane] = tile[lane * (kTile + 1) + c];
}

template <class S>
__global__ void __launch_bounds__(kTransposeThreads) gate_elements(int64_t count, const S* from, const S* gate, S* to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTransposeThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kTransposeThreads + threadIdx.x; i < count; i += step) {
    S value = from[i];
    if (widened(gate[i]) <= 0) narrowed(Compute<S>{0}, value);
    to[i] = value;
  }
}

}  // namespace grasp_sparse::cuda
