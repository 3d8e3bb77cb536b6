// Unpacking: computed tiles of P = rows x cols pixels x L lanes, of one channel or of a group of channels, into the output.
// With Stream, whole lines go past the cache; the caller has checked that they are aligned.
#pragma once

#include "transpose.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// L pixels of one channel that lie one after the other in the output.
template <class T, bool Stream, class S>
GRASP_SPARSE_INLINE void unpack_pixel_block(const T* pixels, S* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  if (lanes == L) {
    transpose<Stream>(pixels, L, L, Plain<T>{}, [&](int l) { return out + l * on; });
  } else {
    transpose_parts(pixels, L, L, Plain<T>{}, [&](int l, int i, Native<T> part) {
      if (l < lanes) put_native<T, Stream>(out + l * on + i, part);
    });
  }
}

// P pixels of one channel that lie one after the other in the output (NCHW). P is known at compile time, so a rest is one
// masked store, or a move or two.
template <class T, bool Stream, int P, class S>
GRASP_SPARSE_INLINE void unpack_pixel_run(const T* tile, S* out, int64_t on, int lanes) {
  constexpr int n = kNativeLanes<T>, L = kLanes<T>, kWhole = P / L * L, kRest = P % L;
  for (int q = 0; q < kWhole; q += L) unpack_pixel_block<T, Stream>(tile + q * L, out + q, on, lanes);
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

// The same for a number of pixels that is not known before.
template <class T, bool Stream, class S>
GRASP_SPARSE_INLINE void unpack_some_pixels(const T* tile, int pixels, S* out, int64_t on, int lanes) {
  constexpr int n = kNativeLanes<T>, L = kLanes<T>;
  const int whole = pixels / L * L, rest = pixels - whole;
  for (int q = 0; q < whole; q += L) unpack_pixel_block<T, Stream>(tile + q * L, out + q, on, lanes);
  if (rest == 0) return;
  transpose_parts(tile + whole * L, L, rest, Plain<T>{}, [&](int l, int i, Native<T> part) {
    if (l < lanes && i < rest) store_part<T>(out + l * on + whole + i, part, rest - i < n ? rest - i : n);
  });
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

// `pixels` of one channel that lie one after the other. The last block is shifted back: writing a pixel twice is harmless.
template <class T, class S>
GRASP_SPARSE_INLINE void unpack_pixels(const T* packed, int pixels, S* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  if (pixels < L) {
    for (int l = 0; l < lanes; ++l)
      for (int q = 0; q < pixels; ++q) put(out + l * on + q, packed[q * L + l]);
    return;
  }
  for (int q = 0; q < pixels; q += L) {
    const int first = q + L <= pixels ? q : pixels - L;
    unpack_pixel_block<T, false>(packed + first * L, out + first, on, lanes);
  }
}

template <class S>
void unpack(const UnpackArgs<S>& p) {
  using T = Compute<S>;
  const bool one_run = p.oh == p.cols;
  const int runs = one_run ? 1 : p.rows, length = one_run ? p.rows * p.cols : p.cols;
  for (int c = 0; c < p.channels; ++c)
    for (int run = 0; run < runs; ++run)
      unpack_pixels<T>(p.packed + c * p.channel_size + static_cast<int64_t>(run) * length * kLanes<T>, length,
                       p.out + c * p.oc + run * p.oh, p.on, p.lanes);
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
