// Unpacking: one computed tile of P = rows x cols pixels x L lanes, of one channel or of L channels, into the output.
#pragma once

#include "transpose.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// P pixels that lie one after the other in the output (NCHW). P is known at compile time, so each lane's copy is a move
// or two and no call.
template <class T, int P>
GRASP_SPARSE_INLINE void unpack_pixel_run(const T* tile, T* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  alignas(64) T block[L * L];
#pragma GCC unroll 2
  for (int q = 0; q < P; q += L) {
    const int count = P - q < L ? P - q : L;
    transpose(tile + q * L, L, count, block);
    if (lanes == L) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) std::memcpy(out + l * on + q, block + l * L, sizeof(T) * count);
    } else {
      for (int l = 0; l < lanes; ++l) std::memcpy(out + l * on + q, block + l * L, sizeof(T) * count);
    }
  }
}

// `channels` <= L neighbouring channels of one pixel (channels_last); tiles of two channels are tile_size elements apart.
template <class T>
GRASP_SPARSE_INLINE void unpack_channel_run(const T* tile, int64_t tile_size, int channels, T* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  alignas(64) T block[L * L];
  transpose(tile, tile_size, channels, block);
  if (channels == L) {
    for (int l = 0; l < lanes; ++l) std::memcpy(out + l * on, block + l * L, sizeof(T) * L);
  } else {
    for (int l = 0; l < lanes; ++l)
      for (int c = 0; c < channels; ++c) out[l * on + c] = block[l * L + c];
  }
}

template <class T>
GRASP_SPARSE_INLINE void unpack_lanes(const T* tile, T* out, int64_t on, int lanes) {
  constexpr int L = kLanes<T>;
  if (on == 1 && lanes == L) {
    store_unaligned(out, load(tile));
  } else {
    for (int l = 0; l < lanes; ++l) out[l * on] = tile[l];
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
