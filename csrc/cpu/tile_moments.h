// What a batch norm has to know of the pixels of a tile, taken while that is in L1, so that nobody reads them from memory once more for it.
#pragma once

#include "sampled.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// Adds `pixels` x `lanes` of each of `count` channels to their sums; the tiles of the channels lie one after the other. Sums of a tile
// are taken about its own first pixel, and are few: what is added up in double is exact enough for a mean of any size.
template <class T>
__attribute__((noinline)) void tile_moments(const T* tiles, int pixels, int count, int lanes, const Moments& to) {
  constexpr int L = kLanes<T>, B = kSumBatch<T>, kChains = 4;
  alignas(64) T valid[L];
  for (int l = 0; l < L; ++l) valid[l] = l < lanes ? T(1) : T(0);
  const Vec<T> counts = load(valid);
  const auto summed = [](Native<T>* sums, T* out) {
    interleave_sums<T, B, 1>(sums);
    put_native<T, false>(out, fold_lanes<T, B>(sums[0]));
  };
  for (int channel = 0; channel < count; channel += B) {
    const int batch = count - channel < B ? count - channel : B;
    Native<T> firsts[B]{}, seconds[B]{};
    for (int i = 0; i < batch; ++i) {
      const T* const tile = tiles + static_cast<int64_t>(channel + i) * pixels * L;
      const Vec<T> pivot = broadcast(tile[0]);
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
      firsts[i] = fold(first[0]), seconds[i] = fold(second[0]);
    }
    T sums[kNativeLanes<T>], squares[kNativeLanes<T>];
    summed(firsts, sums), summed(seconds, squares);
    for (int i = 0; i < batch; ++i) {
      const T near = tiles[static_cast<int64_t>(channel + i) * pixels * L];
      to.add(channel + i, static_cast<double>(pixels) * lanes, near, sums[i], squares[i]);
    }
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
