// What a batch norm has to know of the pixels of a tile, taken while that is in L1, so that nobody reads them from memory once more for it.
#pragma once

#include "sampled.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// Adds `pixels` x `lanes` of each of `count` channels to their sums; the tiles of the channels lie one after the other. Sums of a tile
// are taken about its own first pixel, and are few: what is added up in double is exact enough for a mean of any size.
template <class T>
__attribute__((noinline)) void tile_moments(const T* tiles, int pixels, int count, int lanes, bool start, const Moments& to) {
  constexpr int L = kLanes<T>, n = kNativeLanes<T>, B = kSumBatch<T>, kChains = 4;
  alignas(64) T valid[L], firsts[B * n], seconds[B * n];
  for (int l = 0; l < L; ++l) valid[l] = l < lanes ? T(1) : T(0);
  const Vec<T> counts = load(valid);
  for (int channel = 0; channel < count; channel += B) {
    const int batch = count - channel < B ? count - channel : B;
    T pivots[B] = {};
    for (int i = 0; i < batch; ++i) {
      const T* const tile = tiles + static_cast<int64_t>(channel + i) * pixels * L;
      const Vec<T> pivot = broadcast(tile[0]);
      pivots[i] = tile[0];
      Vec<T> first[kChains], second[kChains];
      for (int k = 0; k < kChains; ++k) first[k] = second[k] = broadcast(T(0));
      const auto take = [&](const T* at, int k) {
        Vec<T> d = load(at);
        for (int p = 0; p < kNatives; ++p) d.part[p] -= pivot.part[p];
        add(first[k], d);
        multiply_add(second[k], d, d);
      };
      int pixel = 0;
      for (; pixel + kChains <= pixels; pixel += kChains) {
#pragma GCC unroll 4
        for (int k = 0; k < kChains; ++k) take(tile + (pixel + k) * L, k);
      }
      for (; pixel < pixels; ++pixel) take(tile + pixel * L, 0);
      for (int k = 1; k < kChains; ++k) add(first[0], first[k]), add(second[0], second[k]);
      for (int p = 0; p < kNatives; ++p) first[0].part[p] *= counts.part[p], second[0].part[p] *= counts.part[p];
      put_native<T, false>(firsts + i * n, fold(first[0]));
      put_native<T, false>(seconds + i * n, fold(second[0]));
    }
    const auto summed = [&](T* sums) {
      Native<T> s[B];
#pragma GCC unroll 8
      for (int i = 0; i < B; ++i) s[i] = load_native(sums + i * n);
      interleave_sums<T, B, 1>(s);
      put_native<T, false>(sums, fold_lanes<T, B>(s[0]));
    };
    summed(firsts), summed(seconds);
    const double of = static_cast<double>(pixels) * lanes;
    for (int i = 0; i < batch; ++i) {
      double &pivot = to.pivot[channel + i], &first = to.first[channel + i], &second = to.second[channel + i];
      if (start) pivot = pivots[i], first = second = 0;
      const double shift = pivots[i] - pivot, sum = firsts[i];
      first += sum + of * shift;
      second += seconds[i] + shift * (2 * sum + of * shift);
    }
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
