// y = W x (+ bias, max with 0): each kept weight multiplies one line of staged inputs.
//
// A block computes warp_rows tiles of R rows each for a tile of outputs, 32 * V of them to a warp: accumulators, R * V a lane, stay
// in registers over all channels. Per weight a warp reads one line from shared memory (which bounds its speed: 32 floats a clock
// and multiprocessor) and a quarter of a group of weights, the same for all its lanes. Its weights come as one stream, 32 groups
// at a time: the next are on their way from memory while these are used.
#pragma once

#include "lists.cuh"
#include "stage.cuh"

namespace grasp_sparse::cuda {

constexpr int kProductThreads = 512;

template <class S>
struct ProductArgs {
  const S* x;
  S* y;
  const Compute<S>* bias;  // or null
  bool relu;
  Tiling tiling;
  GatherAxis h, w;
  int rows, tiles;         // tiles of rows
  int row_blocks, warp_rows_log2;
  const int* by_count;
  const uint16_t* sizes;
  const int* totals;
  const int64_t* begins;
  const Group<Compute<S>>* groups;
};

// 32 groups of one warp in shared memory, values apart from places so that each is one read.
template <class T>
struct Ring {
  Pack<uint16_t, kGroup> place[kWarp];
  Pack<T, sizeof(T) == 4 ? 4 : 2> value[kWarp * kGroup / (sizeof(T) == 4 ? 4 : 2)];
};

template <class T>
class Stream {
 public:
  __device__ Stream(Ring<T>& ring, const Group<T>* groups, int total, int lane) : ring_(ring), left_(total), lane_(lane) {
    next_ = groups + lane;
    fetch();
  }

  struct Taken {
    Pack<uint16_t, kGroup> place;
    T value[kGroup];
  };

  // The next group; the whole warp takes it.
  __device__ Taken take() {
    if (at_ == kWarp) refill();
    Taken t;
    t.place = ring_.place[at_];
    constexpr int parts = sizeof(T) == 4 ? 1 : 2;
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const auto values = ring_.value[at_ * parts + part];
#pragma unroll
      for (int i = 0; i < kGroup / parts; ++i) t.value[part * (kGroup / parts) + i] = values.at[i];
    }
    ++at_;
    return t;
  }

 private:
  __device__ void fetch() {
    if (lane_ < left_) held_ = *next_;
    next_ += kWarp, left_ -= kWarp;
  }

  __device__ void refill() {
    constexpr int parts = sizeof(T) == 4 ? 1 : 2;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      ring_.place[lane_].at[i] = held_.place[i];
      ring_.value[lane_ * parts + i / (kGroup / parts)].at[i % (kGroup / parts)] = held_.value[i];
    }
    __syncwarp();
    fetch();
    at_ = 0;
  }

  Ring<T>& ring_;
  const Group<T>* next_;
  int left_, lane_, at_ = kWarp;
  Group<T> held_{};
};

// sums[r] += row. Registers have no address: a few branches lead to the right ones, which the whole warp takes together. Unrolling
// the loop over rows instead would need none, but its code would not fit into the instruction cache.
template <int First, int Count, class T, int R, int V>
__device__ inline void add_row(T (&sums)[R][V], int r, const T (&row)[V]) {
  if constexpr (Count == 1) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[First][v] += row[v];
  } else if (r < First + Count / 2) {
    add_row<First, Count / 2>(sums, r, row);
  } else {
    add_row<First + Count / 2, Count - Count / 2>(sums, r, row);
  }
}

template <class S, int R, int V>
__global__ void __launch_bounds__(kProductThreads, 1) product(const __grid_constant__ ProductArgs<S> a) {
  using T = Compute<S>;
  const Tiling& t = a.tiling;
  S* const buffers = reinterpret_cast<S*>(shared_memory());
  const int elements = t.buffer_elements();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Ring<T>* const rings = reinterpret_cast<Ring<T>*>(shared_memory() + (2 * elements * sizeof(S) + 15) / 16 * 16);

  const int row_block = blockIdx.x % a.row_blocks;
  const TileAt tile(t, blockIdx.x / a.row_blocks);
  const int row_tile = (row_block << a.warp_rows_log2) + (warp & ((1 << a.warp_rows_log2) - 1));
  const PlaceAt place(t, a.h, a.w, tile, ((warp >> a.warp_rows_log2) * kWarp + lane) * V);

  const int64_t begin = row_tile < a.tiles && t.chunks ? a.begins[row_tile] : 0;
  const int total = row_tile < a.tiles && t.chunks && begin >= 0 ? a.totals[row_tile] : 0;
  Stream<T> weights(rings[warp], a.groups + begin, total, lane);
  const uint16_t* const sizes = a.sizes + static_cast<int64_t>(row_tile) * t.chunks * R;

  const unsigned line_bytes = sizeof(S) << t.images_log2;
  T sums[R][V] = {};
  const auto size_of = [&](int chunk) { return lane < R && total && chunk < t.chunks ? sizes[chunk * R + lane] : 0; };
  int next_size = size_of(0);
  stage(t, a.x, tile, 0, buffers);
  for (int chunk = 0; chunk < t.chunks; ++chunk) {
    stage(t, a.x, tile, chunk + 1, buffers + (chunk + 1) % 2 * elements);
    wait_for_copies<1>();
    __syncthreads();
    const unsigned char* const x = reinterpret_cast<const unsigned char*>(buffers + chunk % 2 * elements + place.staged);
    const int size = next_size;
    next_size = size_of(chunk + 1);
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      T row[V] = {};
#pragma unroll 1
      for (int left = __shfl_sync(kAllLanes, size, r); left > 0; --left) {
        const typename Stream<T>::Taken group = weights.take();
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          T line[V];
          load_wide(reinterpret_cast<const S*>(x + group.place.at[i] * line_bytes), line);
#pragma unroll
          for (int v = 0; v < V; ++v) row[v] += group.value[i] * line[v];
        }
      }
      add_row<0, R>(sums, r, row);
    }
    __syncthreads();
  }

  if (row_tile >= a.tiles || !place.valid) return;
  const int64_t out_h = a.h.first + static_cast<int64_t>(place.h) * a.h.every;
  const int64_t out_w = a.w.first + static_cast<int64_t>(place.w) * a.w.every;
  const bool whole = t.batch % V == 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = dealt_row(a.by_count, a.rows, a.tiles, row_tile, r);
    if (row < 0) continue;
    const T bias = a.bias ? a.bias[row] : T{0};
    Pack<S, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      T y = begin < 0 ? not_a_number<T>() : sums[r][v] + bias;
      if (a.relu && y <= 0) y = 0;
      narrowed(y, result.at[v]);
    }
    S* const to = a.y + ((row * static_cast<int64_t>(a.h.output) + out_h) * a.w.output + out_w) * t.batch + place.image;
    if (whole)
      *reinterpret_cast<Pack<S, V>*>(to) = result;
    else
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (place.image + v < t.batch) to[v] = result.at[v];
  }
}

}  // namespace grasp_sparse::cuda
