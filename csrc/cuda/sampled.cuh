// The sampled product: for each kept weight the sum, over all outputs, of the gradient of its row times the input it multiplies.
//
// A block takes one chunk of input channels, some rows, and one share of the tiles of outputs; it stages the inputs of a tile as
// the product does, 32 * V outputs. A warp holds the gradient of one row at these outputs in registers and walks the row's weights
// in this chunk: one staged line each, V multiply-adds a lane, and 8 weights at a time are summed over the lanes by halving. A sum
// is added up by one lane of one warp in a fixed order; the shares meet in a workspace and are summed in order, so results are the
// same at every run.
//
// Corrupt indices show: the sum of a weight whose index points outside the chunk, or that no row has, is NaN.
#pragma once

#include "lists.cuh"
#include "stage.cuh"

namespace grasp_sparse::cuda {

constexpr int kSampledThreads = 512;
constexpr int kBatch = 8;  // weights that are summed over the lanes together

template <class S>
struct SampledArgs {
  const S *g, *x;
  Compute<S>* sums;  // [shares, nnz]
  Tiling tiling;
  GatherAxis h, w;
  Lists lists;
  Bounds bounds;
  const int* by_count;
  const uint32_t* places;  // of every weight, as find_places writes them
  int64_t tiles;
  int shares, row_blocks, block_rows;
};

template <class S, int V>
struct Row {
  int begin, end;
  Pack<S, V> gradient;  // zero where there is no output
};

// The sum over all lanes of values[lane % kBatch].
template <class T>
__device__ inline T sum_lanes(T (&values)[kBatch], int lane) {
#pragma unroll
  for (int half = kBatch / 2; half; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T other = __shfl_xor_sync(kAllLanes, upper ? values[i] : values[i + half], half);
      values[i] = (upper ? values[i + half] : values[i]) + other;
    }
  }
#pragma unroll
  for (int far = kBatch; far < kWarp; far *= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], far);
  return values[0];
}

template <class S, int V>
__global__ void __launch_bounds__(kSampledThreads, 1) sampled(const __grid_constant__ SampledArgs<S> a) {
  using T = Compute<S>;
  const Tiling& t = a.tiling;
  const Lists& lists = a.lists;
  S* const buffers = reinterpret_cast<S*>(shared_memory());
  const int elements = t.buffer_elements();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  int* const places = reinterpret_cast<int*>(shared_memory() + (2 * elements * sizeof(S) + 15) / 16 * 16) + warp * kWarp;

  int64_t block = blockIdx.x;
  const int row_block = static_cast<int>(block % a.row_blocks);
  block /= a.row_blocks;
  const int chunk = static_cast<int>(block % t.chunks), share = static_cast<int>(block / t.chunks);
  const int64_t first_tile = a.tiles * share / a.shares, end_tile = a.tiles * (share + 1) / a.shares;
  const int first_row = row_block * a.block_rows, end_row = min(first_row + a.block_rows, lists.rows);
  const uint32_t here = static_cast<uint32_t>(chunk) << 16;
  T* const sums = a.sums + static_cast<int64_t>(share) * lists.nnz;
  const int64_t plane = static_cast<int64_t>(a.h.output) * a.w.output * t.batch;
  const bool whole = t.batch % V == 0 && reinterpret_cast<uintptr_t>(a.g) % sizeof(Pack<S, V>) == 0;

  if (row_block == 0 && chunk == 0) {  // pointers that begin after the first weight or end before the last
    for (int j = threadIdx.x; j < lists.begin(0); j += blockDim.x) sums[j] = not_a_number<T>();
    for (int j = lists.end(lists.rows - 1) + threadIdx.x; j < lists.nnz; j += blockDim.x) sums[j] = not_a_number<T>();
  }

  const int line_bytes = static_cast<int>(sizeof(S)) << t.images_log2;
  const auto stage_tile = [&](int64_t tile) {
    const bool more = tile < end_tile;
    stage(t, a.x, TileAt(t, more ? tile : 0), more ? chunk : t.chunks, buffers + (tile - first_tile) % 2 * elements);
  };
  stage_tile(first_tile);
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    stage_tile(tile + 1);
    wait_for_copies<1>();
    __syncthreads();
    const PlaceAt place(t, a.h, a.w, TileAt(t, tile), lane * V);
    const S* const seen = buffers + (tile - first_tile) % 2 * elements + place.staged;
    const unsigned char* const x = reinterpret_cast<const unsigned char*>(seen);
    const S* const g = a.g + (static_cast<int64_t>(place.h) * a.w.output + place.w) * t.batch + place.image;

    // The weights of a row in this chunk and its gradient; on their way while those of the row before are worked on.
    const auto read_row = [&](int rank) {
      Row<S, V> row{};
      if (rank >= end_row) return row;
      const int64_t index = a.by_count[rank];
      row.begin = a.bounds.begin(index, chunk), row.end = row.begin + a.bounds.count(index, chunk);
      if (row.begin == row.end || !place.valid) return row;
      if (whole) {
        row.gradient = load<S, V>(g + index * plane);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (place.image + v < t.batch) row.gradient.at[v] = g[index * plane + v];
      }
      return row;
    };
    Row<S, V> next = read_row(first_row + warp);
    for (int rank = first_row + warp; rank < end_row; rank += warps) {
      const int begin = next.begin, end = next.end;
      T gradient[V];
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] = widened(next.gradient.at[v]);
      next = read_row(rank + warps);
      for (int first = begin; first < end; first += kWarp) {
        const int j = first + lane;
        const uint32_t found = j < end ? a.places[j] : here;
        const bool sound = (found & ~kPlaceBits) == here;
        __syncwarp();
        places[lane] = sound ? static_cast<int>(found & kPlaceBits) * line_bytes : 0;  // some line, for a sum that nobody takes
        __syncwarp();
        T own_sum = 0;
        for (int batch = 0; batch * kBatch < kWarp && first + batch * kBatch < end; ++batch) {
          T parts[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            T line[V];
            load_wide(reinterpret_cast<const S*>(x + places[batch * kBatch + i]), line);
            parts[i] = 0;
#pragma unroll
            for (int v = 0; v < V; ++v) parts[i] += gradient[v] * line[v];
          }
          const T sum = sum_lanes(parts, lane);
          if (lane / kBatch == batch) own_sum = sum;
        }
        if (j < end) {
          if (!sound) own_sum = not_a_number<T>();
          sums[j] = tile == first_tile ? own_sum : sums[j] + own_sum;
        }
      }
    }
    __syncthreads();
  }
}

constexpr int kSumThreads = 256;

// to[i] = the sum over shares of from[share, i].
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_shares(const T* from, int64_t count, int shares, T* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  T sum = 0;
  for (int share = 0; share < shares; ++share) sum += from[share * count + i];
  to[i] = sum;
}

// to[share, row] = the sum of one share of a row of `length` numbers: the bias gradient.
template <class S>
__global__ void __launch_bounds__(kSumThreads) sum_rows(const S* from, int rows, int64_t length, int shares, Compute<S>* to) {
  using T = Compute<S>;
  T* const sums = reinterpret_cast<T*>(shared_memory());
  const int row = blockIdx.x % rows, share = blockIdx.x / rows;
  const int64_t end = length * (share + 1) / shares;
  T sum = 0;
  for (int64_t i = length * share / shares + threadIdx.x; i < end; i += kSumThreads) sum += widened(from[row * length + i]);
  sums[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) to[static_cast<int64_t>(share) * rows + row] = sums[0];
}

}  // namespace grasp_sparse::cuda
