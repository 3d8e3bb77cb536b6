// Both gradients at once: a product that takes its companion along. Of one input channel a tile of x and one of dx stay in registers
// while its kept weights pass by; each loads its pixels of g once, adds them to dx, times the weight, and takes their dot product
// with x. Loading g is what the two gradients spend their time on: forward and backward of 3x3 convolutions take .79 to .9 of the time
// of two walks (512 channels at 4x4, batch 128, 90 to 99 %: .81; 64 at 32x32 .83 to .89; an Intel Xeon).
#pragma once

#include <cstring>

#include "sampled.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// Two tiles and a batch of sums have to fit into the registers: where there are 32, of 64 bytes.
constexpr int kMaxGradientTile = kNatives == 1 ? 8 : 1;

// What is used twice is loaded once: compilers rather load it with each multiply-add, and then loads are what both wait for (half of
// the gain).
template <class V>
GRASP_SPARSE_INLINE V kept_in_registers(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v.part[0]));
#endif
  return v;
}

// A function of its own, as product_tile is.
template <class T, int R, int C, class S>
__attribute__((noinline)) void gradient_tile(const ProductArgs<S>& p, const T* packed, int channel, const T* x_at, bool start, T* tile) {
  constexpr int L = kLanes<T>, B = kSumBatch<T>;
  const Entries& e = p.entries;
  const T* const values = p.values;
  const int32_t* const places = e.place;
  T* const sums = p.with.sums;
  const int64_t row_step = p.row_step;
  int32_t j = e.begin[channel];
  const int32_t end = e.end[channel];
  if (j == end) {  // x is not asked for
    std::memset(tile, 0, R * C * L * sizeof(T));
    return;
  }
  Vec<T> acc[R * C], x[R * C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      acc[r * C + c] = broadcast(T(0));
      x[r * C + c] = load(x_at + r * p.with.row_step + c * L);
    }
  }
  for (; j < end; j += B) {
    const int count = end - j < B ? end - j : B;
    Native<T> s[B];
#pragma GCC unroll 8
    for (int i = 0; i < B; ++i) {
      s[i] = Native<T>{};
      if (i >= count) continue;
      const T* const at = packed + places[j + i];
      const Vec<T> value = broadcast(values[j + i]);
      Vec<T> dot = broadcast(T(0));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) {
          const Vec<T> g = kept_in_registers(load(at + r * row_step + c * L));
          multiply_add(acc[r * C + c], value, g);
          multiply_add(dot, x[r * C + c], g);
        }
      }
      s[i] = fold(dot);
    }
    interleave_sums<T, B, 1>(s);
    Native<T> sum = fold_lanes<T, B>(s[0]);
    if (!start) sum += load_part(sums + j, count);
    store_part(sums + j, sum, count);
    if (count < B) break;  // j + B may be more than 31 bits hold
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) store(tile + i * L, acc[i]);
}

// A tile as large as those of a product, so that whole lines of dx are written: in two halves, which read their weights from L1.
template <class T, int R, int C, class S>
GRASP_SPARSE_INLINE void gradient_tiles(const ProductArgs<S>& p, const T* packed, int channel, const T* x, bool start, T* tile) {
  constexpr int L = kLanes<T>;
  if constexpr (R * C <= kMaxGradientTile) {
    gradient_tile<T, R, C>(p, packed, channel, x, start, tile);
  } else if constexpr (R > 1) {
    constexpr int r = R / 2;
    gradient_tiles<T, r, C>(p, packed, channel, x, start, tile);
    gradient_tiles<T, R - r, C>(p, packed + r * p.row_step, channel, x + r * p.with.row_step, false, tile + r * C * L);
  } else {
    constexpr int c = (C + 1) / 2;
    gradient_tiles<T, 1, c>(p, packed, channel, x, start, tile);
    gradient_tiles<T, 1, C - c>(p, packed + c * L, channel, x + c * L, false, tile + c * L);
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
