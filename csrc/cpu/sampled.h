// The sampled product (wgrad): a tile of R x C pixels of one gradient channel stays in registers while that channel's
// kept places pass by; each takes one dot product. Lanes are summed in batches of weights, so that a reduction costs
// about three operations a weight, and each sum has one fixed order.
#pragma once

#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// Weights summed together: the register file holds the tile of g and this many partial sums.
template <class T>
constexpr int kSumBatch = kNativeLanes<T> < 8 ? kNativeLanes<T> : 8;

template <class T>
GRASP_SPARSE_INLINE Native<T> fold(const Vec<T>& v) {
  Native<T> sum = v.part[0];
#pragma GCC unroll 4
  for (int i = 1; i < kNatives; ++i) sum += v.part[i];
  return sum;
}

// s[0] ends with, in lane l, the part of the sum of s[l % Count] that lives in lanes congruent to l modulo Count.
template <class T, int Count, int Bit>
GRASP_SPARSE_INLINE void interleave_sums(Native<T>* s) {
  if constexpr (Bit < Count) {
#pragma GCC unroll 8
    for (int i = 0; i < Count / Bit; i += 2)
      s[i / 2] = take<T, Bit, false>(s[i], s[i + 1]) + take<T, Bit, true>(s[i], s[i + 1]);
    interleave_sums<T, Count, Bit * 2>(s);
  }
}

// Halves added to one another until one lane is left.
template <class T, int Bit = kNativeLanes<T> / 2>
GRASP_SPARSE_INLINE T sum_of_lanes(Native<T> v) {
  if constexpr (Bit > 0) {
    return sum_of_lanes<T, Bit / 2>(take<T, Bit, false>(v, v) + take<T, Bit, true>(v, v));
  } else {
    return v[0];
  }
}

template <class T, int R, int C>
GRASP_SPARSE_INLINE Native<T> place_dot(const Vec<T>* g, const T* at, int64_t row_step) {
  constexpr int L = kLanes<T>;
  Vec<T> acc = broadcast(T(0));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) multiply_add(acc, g[r * C + c], load(at + r * row_step + c * L));
  }
  return fold(acc);
}

template <class T, int R, int C>
void sampled_strip(const SampledArgs<T>& p, int row, int col) {
  constexpr int L = kLanes<T>, B = kSumBatch<T>, n = kNativeLanes<T>;
  const T* packed = p.packed + row * p.row_step + col * L;
  for (int channel = p.channel_begin; channel < p.channel_end; ++channel) {
    const int32_t begin = p.row_begin[channel], end = p.row_end[channel];
    if (begin == end && !p.channel_sums) continue;
    const T* from = p.g + channel * p.g_channel_size + row * p.g_row_step + col * L;
    Vec<T> g[R * C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) g[r * C + c] = load(from + r * p.g_row_step + c * L);
    }
    if (p.channel_sums) {
      Vec<T> sum = g[0];
#pragma GCC unroll 16
      for (int i = 1; i < R * C; ++i) add(sum, g[i]);
      p.channel_sums[channel] += sum_of_lanes<T>(fold(sum));
    }
    for (int32_t j = begin; j < end; j += B) {
      const int count = end - j < B ? end - j : B;
      Native<T> s[B];
      if (count == B) {
#pragma GCC unroll 8
        for (int i = 0; i < B; ++i) s[i] = place_dot<T, R, C>(g, packed + p.offsets[j + i], p.row_step);
      } else {
        for (int i = 0; i < B; ++i)
          s[i] = i < count ? place_dot<T, R, C>(g, packed + p.offsets[j + i], p.row_step) : Native<T>{};
      }
      interleave_sums<T, B, 1>(s);
      for (int i = 0; i < count; ++i) {
        T sum = s[0][i];
        for (int l = i + B; l < n; l += B) sum += s[0][l];
        p.sums[j + i] += sum;
      }
    }
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
