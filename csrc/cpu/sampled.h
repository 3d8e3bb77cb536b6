// The sampled product (wgrad): a tile of R x C pixels of one gradient channel stays in registers while that channel's
// kept places pass by; each takes one dot product. Lanes are summed in batches of weights, so that a reduction costs
// about three operations a weight, and each sum has one fixed order.
#pragma once

#include "walk.h"

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

// Lanes that are congruent modulo Count added up, in lanes 0 … Count - 1.
template <class T, int Count, int Bit = kNativeLanes<T> / 2>
GRASP_SPARSE_INLINE Native<T> fold_lanes(Native<T> v) {
  if constexpr (Bit >= Count) {
    return fold_lanes<T, Count, Bit / 2>(take<T, Bit, false>(v, v) + take<T, Bit, true>(v, v));
  } else {
    return v;
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

// The weights of one channel. A function of its own, as product_tile is.
template <class T, int R, int C, bool Checked>
__attribute__((noinline)) void sampled_channel(const SampledArgs<T>& p, const T* packed, const T* from, int channel, bool start) {
  constexpr int L = kLanes<T>, B = kSumBatch<T>;
  const Entries& e = p.entries;
  const int64_t row_step = p.row_step;
  T* const sums = p.sums;
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
    p.channel_sums[channel] = fold_lanes<T, 1>(fold(sum))[0] + (start ? T(0) : p.channel_sums[channel]);
  }
  if constexpr (!Checked) prefetch_walk<T>(e, start ? nullptr : sums, channel + kPrefetchAhead, p.channel_end);
  int32_t j = e.begin[channel];
  const int32_t end = e.end[channel];
  for (int count = B; count == B; j += count) {
    count = end - j < B ? end - j : B;
    if constexpr (!Checked) {
      const int left = count;
      for (count = 0; count < left && place_of(e, j + count) < e.count;) ++count;
    }
    if (count == 0) break;
    Native<T> s[B];
#pragma GCC unroll 8
    for (int i = 0; i < B; ++i) {
      s[i] = Native<T>{};
      if (i >= count) continue;
      const T* at = packed + (Checked ? e.place[j + i] : place_of(e, j + i) * e.step);
      s[i] = place_dot<T, R, C>(g, at, row_step);
    }
    interleave_sums<T, B, 1>(s);
    Native<T> sum = fold_lanes<T, B>(s[0]);
    if (!start) sum += load_part(sums + j, count);
    store_part(sums + j, sum, count);
  }
  if constexpr (!Checked) end_walk(e, channel, j);
}

template <class T, int R, int C>
void sampled_strip(const SampledArgs<T>& p, int row, int col) {
  constexpr int L = kLanes<T>;
  const T* packed = p.packed + row * p.row_step + col * L;
  const bool start = p.start && row == 0 && col == 0;
  const auto channel_of = p.entries.checked ? &sampled_channel<T, R, C, true> : &sampled_channel<T, R, C, false>;
  for (int channel = p.channel_begin; channel < p.channel_end; ++channel) {
    if (row == 0 && col == 0) {
      fetch_share(p.ahead, channel - p.channel_begin, p.channel_end - p.channel_begin);
      fetch_share(p.ahead_g, channel - p.channel_begin, p.channel_end - p.channel_begin);
    }
    if (p.channel_sums || !is_idle(p.entries, channel)) {
      channel_of(p, packed, p.g + channel * p.g_channel_size + row * p.g_row_step + col * L, channel, start);
    } else {
      end_walk(p.entries, channel, p.entries.begin[channel]);
    }
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
