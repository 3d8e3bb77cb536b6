// Unpacking: computed tiles of P = rows x cols pixels x L lanes, of one channel or of a group of channels, into the output.
// With Stream, whole lines go past the cache; the caller has checked that they are aligned.
#pragma once

#include "transpose.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// P pixels of one channel that lie one after the other in the output (NCHW). P is known at compile time, so a rest is one
// masked store, or a move or two.
template <class T, bool Stream, int P, class S>
GRASP_SPARSE_INLINE void unpack_pixel_run(const T* tile, S* out, int64_t on, int lanes) {
  constexpr int n = kNativeLanes<T>, L = kLanes<T>, kWhole = P / L * L, kRest = P % L;
  for (int q = 0; q < kWhole; q += L) {
    if (lanes == L) {
      transpose<Stream>(tile + q * L, L, L, Plain<T>{}, [&](int l) { return out + l * on + q; });
    } else {
      transpose_parts(tile + q * L, L, L, Plain<T>{}, [&](int l, int i, Native<T> part) {
        if (l < lanes) put_native<T, Stream>(out + l * on + q + i, part);
      });
    }
  }
  if constexpr (kRest > 0) {
    transpose_parts(tile + kWhole * L, L, kRest, Plain<T>{}, [&](int l, int i, Native<T> part) {
      if (l >= lanes) return;
      S* to = out + l * on + kWhole + i;
      if (i + n <= kRest) {
        put_native<T, false>(to, part);
      } else if (i < kRest) {
        store_first<T, kRest % n>(to, part);
      }
    });
  }
}

constexpr int kStagedBlocks = 4;

// `channels` <= kStagedBlocks * L neighbouring channels of one pixel (channels_last); tiles of two channels are tile_size
// elements apart. Lanes are often a multiple of 4 KiB apart, and then the L lines that one transposed block writes compete
// for one set of the first-level cache. So blocks are staged and written lane by lane, several lines of a lane in a row:
// with 1024 features that unpacks three times as fast. (For NCHW it costs a tenth: there, few weights pass between two
// blocks, and stores that come in bursts wait.)
template <class T, bool Stream, class S>
GRASP_SPARSE_INLINE void unpack_channel_runs(const T* tiles, int64_t tile_size, int channels, S* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  alignas(64) T stage[L][kStagedBlocks][L];
  const int blocks = channels / L, rest = channels % L;
  for (int q = 0; q * L < channels; ++q) {
    const int count = channels - q * L < L ? channels - q * L : L;
    transpose(tiles + q * L * tile_size, tile_size, count, Plain<T>{}, [&](int l) { return stage[l][q]; });
  }
  for (int l = 0; l < lanes; ++l) {
    for (int q = 0; q < blocks; ++q) {
      const Vec<T> row = load(stage[l][q]);
#pragma GCC unroll 4
      for (int i = 0; i < kNatives; ++i) put_native<T, Stream>(out + l * on + q * L + i * kNativeLanes<T>, row.part[i]);
    }
    for (int c = 0; c < rest; ++c) put(out + l * on + blocks * L + c, stage[l][blocks][c]);
  }
}

template <class T, bool Stream, class S>
GRASP_SPARSE_INLINE void unpack_lanes(const T* tile, S* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  if (on == 1 && lanes == L) {
    const Vec<T> v = load(tile);
#pragma GCC unroll 4
    for (int i = 0; i < kNatives; ++i) put_native<T, Stream>(out + i * kNativeLanes<T>, v.part[i]);
  } else {
    for (int l = 0; l < lanes; ++l) put(out + l * on, tile[l]);
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
