// Max pooling: a thread does one pixel of V neighbouring images. Both directions gather and write every element once, so nothing is
// added up in memory and the bits are the same on every run.
#pragma once

#include "device.h"
#include "launch.h"
#include "pool.h"

namespace grasp_sparse::cuda {

constexpr int kPoolThreads = 256;

struct PoolAxis {
  int kernel, stride, dilation, pad, input, output;
  Divisor by_stride;
};

struct PoolPlan {
  PoolAxis h, w;
  int64_t batch;
  int plane, blocks;              // of one channel of what is written: threads, and blocks of them
  Divisor by_packs, by_width;     // threads of a pixel, pixels of a row
};

inline PoolAxis pool_axis(const Axis& a) {
  narrow(a.input + 2 * a.pad_begin + a.reach(a.kernel - 1) + a.stride);
  return {narrow(a.kernel), narrow(a.stride), narrow(a.dilation), narrow(a.pad_begin), narrow(a.input), narrow(a.output),
          Divisor(static_cast<unsigned>(a.stride))};
}

inline PoolPlan plan_pool(const Window& window, int64_t batch, int vector, int64_t height, int64_t width) {
  PoolPlan plan{pool_axis(window.h), pool_axis(window.w), batch, 0, 0, {}, {}};
  const int64_t packs = batch / vector;
  plan.plane = narrow(height * width * packs), plan.blocks = narrow(blocks_for(plan.plane, kPoolThreads));
  plan.by_packs = Divisor(static_cast<unsigned>(packs)), plan.by_width = Divisor(static_cast<unsigned>(width));
  return plan;
}

// The pixel and the first image of a thread.
struct PoolPlace {
  int64_t channel, image;
  int h, w;
  bool inside;

  template <int V>
  __device__ static PoolPlace of(const PoolPlan& p) {
    const unsigned at = blockIdx.x % p.blocks * kPoolThreads + threadIdx.x;
    if (at >= static_cast<unsigned>(p.plane)) return {0, 0, 0, 0, false};
    const unsigned pixel = p.by_packs.divide(at), row = p.by_width.divide(pixel);
    return {static_cast<int64_t>(blockIdx.x / p.blocks), static_cast<int64_t>(at - pixel * p.by_packs.divisor) * V,
            static_cast<int>(row), static_cast<int>(pixel - row * p.by_width.divisor), true};
  }
  // Of the images at this place of another image, or the same.
  __device__ int64_t at(int64_t batch, int row, int col, int height, int width) const {
    return ((channel * height + row) * width + col) * batch + image;
  }
};

template <class S, int V>
__global__ void __launch_bounds__(kPoolThreads) max_pool_windows(const PoolPlan p, const S* x, S* y, uint8_t* places) {
  using T = Compute<S>;
  const PoolPlace place = PoolPlace::of<V>(p);
  if (!place.inside) return;
  T best[V];
  int from[V];
#pragma unroll
  for (int v = 0; v < V; ++v) best[v] = -static_cast<T>(INFINITY), from[v] = kNoTap;
  for (int r = 0; r < p.h.kernel; ++r) {
    const int row = place.h * p.h.stride - p.h.pad + r * p.h.dilation;
    if (row < 0 || row >= p.h.input) continue;
    for (int s = 0; s < p.w.kernel; ++s) {
      const int col = place.w * p.w.stride - p.w.pad + s * p.w.dilation;
      if (col < 0 || col >= p.w.input) continue;
      const auto seen = load<S, V>(x + place.at(p.batch, row, col, p.h.input, p.w.input));
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T value = widened(seen.at[v]);
        if (value > best[v] || value != value || from[v] == kNoTap) best[v] = value, from[v] = r * p.w.kernel + s;
      }
    }
  }
  Pack<S, V> result;
  Pack<uint8_t, V> taken;
#pragma unroll
  for (int v = 0; v < V; ++v) narrowed(best[v], result.at[v]), taken.at[v] = static_cast<uint8_t>(from[v]);
  const int64_t to = place.at(p.batch, place.h, place.w, p.h.output, p.w.output);
  *reinterpret_cast<Pack<S, V>*>(y + to) = result;
  *reinterpret_cast<Pack<uint8_t, V>*>(places + to) = taken;
}

// The output that sees this input through this tap, or -1.
__device__ inline int output_of(const PoolAxis& a, int input, int tap) {
  const int first = input + a.pad - tap * a.dilation;
  if (first < 0) return -1;
  const int output = a.by_stride.divide(first);
  return output * a.stride == first && output < a.output ? output : -1;
}

template <class S, int V>
__global__ void __launch_bounds__(kPoolThreads) max_pool_gradients(const PoolPlan p, const S* g, const uint8_t* places, S* gx) {
  using T = Compute<S>;
  const PoolPlace place = PoolPlace::of<V>(p);
  if (!place.inside) return;
  T sum[V];
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = 0;
  for (int r = 0; r < p.h.kernel; ++r) {
    const int row = output_of(p.h, place.h, r);
    if (row < 0) continue;
    for (int s = 0; s < p.w.kernel; ++s) {
      const int col = output_of(p.w, place.w, s);
      if (col < 0) continue;
      const int64_t at = place.at(p.batch, row, col, p.h.output, p.w.output);
      const auto taken = load<uint8_t, V>(places + at);
      const auto gradient = load<S, V>(g + at);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (taken.at[v] == r * p.w.kernel + s) sum[v] += widened(gradient.at[v]);
    }
  }
  Pack<S, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) narrowed(sum[v], result.at[v]);
  *reinterpret_cast<Pack<S, V>*>(gx + place.at(p.batch, place.h, place.w, p.h.input, p.w.input)) = result;
}

template <class S>
constexpr int kPoolVector = sizeof(S) == 8 ? 1 : 16 / sizeof(S);  // two doubles at a time do not fit the registers of full occupancy

// Whether kPoolVector neighbouring images can be read and written at once.
template <class S>
bool images_in_vectors(int64_t batch, const S* from, const uint8_t* places, const S* to) {
  constexpr uintptr_t V = kPoolVector<S>;
  const uintptr_t numbers = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  return batch % V == 0 && numbers % (V * sizeof(S)) == 0 && reinterpret_cast<uintptr_t>(places) % V == 0;
}

template <class S>
void max_pool(const Queue& queue, const Window& window, int64_t channels, int64_t batch, const S* x, S* y, uint8_t* places) {
  const bool wide = images_in_vectors<S>(batch, x, places, y);
  const PoolPlan plan = plan_pool(window, batch, wide ? kPoolVector<S> : 1, window.h.output, window.w.output);
  const auto kernel = wide ? max_pool_windows<S, kPoolVector<S>> : max_pool_windows<S, 1>;
  launch(queue.stream, kernel, channels * plan.blocks, kPoolThreads, 0, plan, x, y, places);
}

template <class S>
void max_pool_gradient(const Queue& queue, const Window& window, int64_t channels, int64_t batch, const S* g, const uint8_t* places,
                       S* gx) {
  const bool wide = images_in_vectors<S>(batch, g, places, gx);
  const PoolPlan plan = plan_pool(window, batch, wide ? kPoolVector<S> : 1, window.h.input, window.w.input);
  const auto kernel = wide ? max_pool_gradients<S, kPoolVector<S>> : max_pool_gradients<S, 1>;
  launch(queue.stream, kernel, channels * plan.blocks, kPoolThreads, 0, plan, g, places, gx);
}

#define GRASP_SPARSE_POOL(S)                                                                               \
  template void max_pool(const Queue&, const Window&, int64_t, int64_t, const S*, S*, uint8_t*);           \
  template void max_pool_gradient(const Queue&, const Window&, int64_t, int64_t, const S*, const uint8_t*, S*);

GRASP_SPARSE_POOL(float)
GRASP_SPARSE_POOL(double)
GRASP_SPARSE_POOL(Bf16)
GRASP_SPARSE_POOL(Fp16)

}  // namespace grasp_sparse::cuda
