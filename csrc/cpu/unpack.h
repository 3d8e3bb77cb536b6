// Unpacking: one computed tile of P = rows x cols pixels x L lanes, of one channel or of L channels, into the output.
// With Stream, whole lines go past the cache; the caller has checked that they are aligned.
#pragma once

#include "transpose.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// P pixels that lie one after the other in the output (NCHW). P is known at compile time, so a
// rest is one masked store, or a move or two.
template <class T, bool Stream, int P>
GRASP_SPARSE_INLINE void unpack_pixel_run(const T* tile, T* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>, kWhole = P / L * L, kRest = P % L;
  alignas(64) T block[L * L];
  const auto to_block = [&](int l) { return block + l * L; };
  for (int q = 0; q < kWhole; q += L) {
    if (lanes == L) {
      transpose<T, Stream>(tile + q * L, L, L, [&](int l) { return out + l * on + q; });
    } else {
      transpose(tile + q * L, L, L, to_block);
      for (int l = 0; l < lanes; ++l) std::memcpy(out + l * on + q, block + l * L, sizeof(T) * L);
    }
  }
  if constexpr (kRest > 0) {
    constexpr int n = kNativeLanes<T>;
    transpose_parts(tile + kWhole * L, L, kRest, [&](int l, int i, Native<T> part) {
      if (l >= lanes) return;
      T* to = out + l * on + kWhole + i;
      if (i + n <= kRest) {
        std::memcpy(to, &part, sizeof part);
      } else if (i < kRest) {
        store_first<T, kRest % n>(to, part);
      }
    });
  }
}

// `channels` <= L neighbouring channels of one pixel (channels_last); tiles of two channels are tile_size elements apart.
template <class T, bool Stream>
GRASP_SPARSE_INLINE void unpack_channel_run(const T* tile, int64_t tile_size, int channels, T* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  if (channels == L && lanes == L) {
    transpose<T, Stream>(tile, tile_size, L, [&](int l) { return out + l * on; });
    return;
  }
  alignas(64) T block[L * L];
  transpose(tile, tile_size, channels, [&](int l) { return block + l * L; });
  for (int l = 0; l < lanes; ++l)
    for (int c = 0; c < channels; ++c) out[l * on + c] = block[l * L + c];
}

template <class T, bool Stream>
GRASP_SPARSE_INLINE void unpack_lanes(const T* tile, T* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  if (on == 1 && lanes == L) {
    const Vec<T> v = load(tile);
#pragma GCC unroll 4
    for (int i = 0; i < kNatives; ++i) put_native<T, Stream>(out + i * kNativeLanes<T>, v.part[i]);
  } else {
    for (int l = 0; l < lanes; ++l) out[l * on] = tile[l];
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
