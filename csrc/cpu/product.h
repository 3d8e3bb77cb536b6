// The product (fprop, and dgrad on the transposed list): a tile of R x C pixels of one output channel stays in registers
// while the channel's weights pass by. Per weight: one value, one offset, R*C loads and multiply-adds.
#pragma once

#include <utility>

#include "gradients.h"
#include "tile_moments.h"
#include "unpack.h"
#include "walk.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// Starts from the tile at `from`, or from the bias if that is null. A function of its own, so that what the loop needs stays
// in registers: inlined into its callers it was up to a tenth slower.
template <class T, int R, int C, bool Checked, class S>
__attribute__((noinline)) void product_tile(const ProductArgs<S>& p, const T* packed, int channel, const T* from, T* tile) {
  constexpr int L = kLanes<T>;
  const Entries& e = p.entries;
  const T* const values = p.values;
  const int32_t* const places = e.place;
  const int64_t row_step = p.row_step;
  Vec<T> acc[R * C];
  if (from) {
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) acc[i] = load(from + i * L);
  } else {
    const Vec<T> first = broadcast(p.bias ? p.bias[channel] : T(0));
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) acc[i] = first;
  }
  int32_t j = e.begin[channel];
  const int32_t end = e.end[channel];
  const auto multiply = [&](const T* at) {
    const Vec<T> value = broadcast(values[j]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) multiply_add(acc[r * C + c], value, load(at + r * row_step + c * L));
    }
  };
  if constexpr (Checked) {
    for (; j < end; ++j) multiply(packed + places[j]);
  } else {
    prefetch_walk(e, values, channel + kPrefetchAhead, p.channel_end);
    const uint32_t first = static_cast<uint32_t>(e.first), count = e.count;
    const int64_t step = e.step;
    for (; j < end; ++j) {
      const uint32_t place = static_cast<uint32_t>(places[j]) - first;
      if (place >= count) break;
      multiply(packed + place * step);
    }
    end_walk(e, channel, j);
  }
  if (p.relu) {
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kNatives; ++n) acc[i].part[n] = positive(acc[i].part[n], acc[i].part[n]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) store(tile + i * L, acc[i]);
}

// Whether every whole vector this tile writes, of channels from first_channel on, is one aligned line.
template <class T, class S>
GRASP_SPARSE_INLINE bool writes_lines(const ProductArgs<S>& p, const S* out, int first_channel, bool channels_last, bool runs) {
  const auto aligned = [](int64_t elements) { return elements % kLanes<T> == 0; };
  if (sizeof(S) != sizeof(T) || !kCanStream || !p.stream || reinterpret_cast<uintptr_t>(out) % kSliceBytes != 0) return false;
  if (channels_last) return aligned(p.on) && aligned(p.oh) && aligned(p.ow) && aligned(first_channel);
  // Of two vectors in a line a transpose writes the second too long after the first.
  if (runs) return kNatives == 1 && aligned(p.on) && aligned(p.oc) && aligned(p.oh);
  return aligned(p.oc) && aligned(p.oh) && aligned(p.ow);
}

// `begun` is where the pixels begin in what tiles start from: a partial image, or null; of gradients, what their companion reads.
// `first`: these are the first pixels of the band.
template <class T, bool Gradients, bool Stream, int R, int C, class S>
GRASP_SPARSE_INLINE void product_channels(const ProductArgs<S>& p, const T* packed, const T* begun, S* out, bool first,
                                          bool channels_last, bool runs) {
  constexpr int L = kLanes<T>, kTile = R * C * L;
  const int64_t partial_size = static_cast<int64_t>(p.rows) * p.cols * L;
  const auto product_of = p.entries.checked ? &product_tile<T, R, C, true, S> : &product_tile<T, R, C, false, S>;
  const auto fill = [&](int channel, T* tile) {
    if (first) fetch_share(p.ahead, channel - p.channel_begin, p.channel_end - p.channel_begin);
    if constexpr (Gradients) {
      if (first) fetch_share(p.with.ahead, channel - p.channel_begin, p.channel_end - p.channel_begin);
      gradient_tiles<T, R, C>(p, packed, channel, begun + channel * p.with.channel_size, first && p.with.start, tile);
    } else {
      product_of(p, packed, channel, begun && is_begun(p.entries, channel) ? begun + channel * partial_size : nullptr, tile);
    }
  };
  // channels_last computes a group of channels before it writes; a group of large tiles is smaller, to stay in L1.
  constexpr int kGroup = L * (R * C <= 8 ? kStagedBlocks : kStagedBlocks / 2);
  alignas(64) T tiles[kGroup * kTile];
  if (channels_last) {
    for (int channel = p.channel_begin; channel < p.channel_end; channel += kGroup) {
      const int count = p.channel_end - channel < kGroup ? p.channel_end - channel : kGroup;
      for (int i = 0; i < count; ++i) fill(channel + i, tiles + i * kTile);
      if (p.moments.first) tile_moments<T>(tiles, R * C, count, p.lanes, p.moments.from(channel, first));
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
          unpack_channel_runs<T, Stream>(tiles + (r * C + c) * L, kTile, count, out + channel + r * p.oh + c * p.ow, p.on, p.lanes);
    }
    return;
  }
  const bool one_run = runs && (R == 1 || p.oh == C);
  for (int channel = p.channel_begin; channel < p.channel_end; ++channel) {
    fill(channel, tiles);
    S* to = out + channel * p.oc;
    if (one_run) {
      unpack_pixel_run<T, Stream, R * C>(tiles, to, p.on, p.lanes);
    } else if (runs) {
      for (int r = 0; r < R; ++r) unpack_pixel_run<T, Stream, C>(tiles + r * C * L, to + r * p.oh, p.on, p.lanes);
    } else {
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
          unpack_lanes<T, Stream>(tiles + (r * C + c) * L, to + r * p.oh + c * p.ow, p.on, p.lanes);
    }
  }
}

// All channels of one tile whose first pixel is (row, col).
template <class S, bool Gradients, int R, int C>
void product_strip(const ProductArgs<S>& p, int row, int col) {
  using T = Compute<S>;
  const T* packed = p.packed + row * p.row_step + col * kLanes<T>;
  S* out = p.out + row * p.oh + col * p.ow;
  // The strips of these R rows share R * cols pixels of a partial image, one after the other.
  T* partial = p.partial ? p.partial + (static_cast<int64_t>(row) * p.cols + col * R) * kLanes<T> : nullptr;
  const T* const begun = Gradients ? p.with.x + row * p.with.row_step + col * kLanes<T> : partial;
  if (partial && !p.last) {
    for (int channel = p.channel_begin; channel < p.channel_end; ++channel) {
      if (is_idle(p.entries, channel)) {
        end_walk(p.entries, channel, p.entries.begin[channel]);
        continue;
      }
      T* to = partial + channel * (static_cast<int64_t>(p.rows) * p.cols * kLanes<T>);
      product_tile<T, R, C, false>(p, packed, channel, is_begun(p.entries, channel) ? to : nullptr, to);
    }
    return;
  }
  const bool first = row == 0 && col == 0;
  const bool channels_last = p.oc == 1 && p.on != 1, runs = p.ow == 1 && p.on != 1;
  if constexpr (kCanStream) {
    if (writes_lines<T>(p, out, p.channel_begin, channels_last, runs)) {
      product_channels<T, Gradients, true, R, C>(p, packed, begun, out, first, channels_last, runs);
      return stream_fence();
    }
  }
  product_channels<T, Gradients, false, R, C>(p, packed, begun, out, first, channels_last, runs);
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
