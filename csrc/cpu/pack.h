// Packing: from a torch tensor of any strides to [channel][row][column][L], padding included. One read of the tensor.
// Fast ways for the layouts in use (whole images in a row, channels_last with many or few channels, batch innermost), a slow one
// for the rest.
#pragma once

#include "norm_gradient.h"
#include "transpose.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// Zero where the gate is closed, else what lies there.
template <class S>
struct Gated {
  using T = Compute<S>;
  uintptr_t gate;  // bytes from the image to what gates it
  GRASP_SPARSE_INLINE const S* gate_of(const S* at) const {
    return reinterpret_cast<const S*>(reinterpret_cast<uintptr_t>(at) + gate);
  }
  GRASP_SPARSE_INLINE Native<T> operator()(const S* at, int) const { return positive(load_native(gate_of(at)), load_native(at)); }
  GRASP_SPARSE_INLINE T one(const S* at) const { return positive(to_compute(*gate_of(at)), to_compute(*at)); }
  GRASP_SPARSE_INLINE Gated from(int) const { return *this; }
};

// What a batch norm makes of the gradient there, of channels that lie side by side.
template <class S, bool Relu>
struct Normed {
  using T = Compute<S>;
  const NormGradient<S>& norm;
  const S* src;
  int channel;  // where the transpose begins
  GRASP_SPARSE_INLINE const S* x_of(const S* at) const { return norm.x + (at - src); }
  GRASP_SPARSE_INLINE Native<T> operator()(const S* at, int column) const {
    const auto of = norm.channels.from(channel + column);
    const Native<T> g = load_native(at), d = load_native(x_of(at)) - load_native(of.mean);
    return input_grad_of<Relu>(g, d, load_native(of.scale), load_native(of.bias), load_native(of.offset), load_native(of.slope));
  }
  GRASP_SPARSE_INLINE T one(const S* at) const {
    const auto of = norm.channels.from(channel);
    return input_grad_of<Relu>(to_compute(*at), to_compute(*x_of(at)) - *of.mean, *of.scale, *of.bias, *of.offset, *of.slope);
  }
  GRASP_SPARSE_INLINE Normed from(int channel) const { return {norm, src, channel}; }
};

// Asks for what lies at `src` in every lane, into L2: into L1 there was less to gain. It may lie past the image and is not read.
template <class S>
GRASP_SPARSE_INLINE void ask_for(const PackArgs<S>& p, const S* src) {
  for (int lane = 0; lane < p.lanes; ++lane) __builtin_prefetch(src + lane * p.sn, 0, 2);
}

template <class S, class Read>
GRASP_SPARSE_INLINE void ask_for(const PackArgs<S>& p, const Read&, const S* src) { ask_for(p, src); }
template <class S, bool Relu>
GRASP_SPARSE_INLINE void ask_for(const PackArgs<S>& p, const Normed<S, Relu>& read, const S* src) {
  ask_for(p, src), ask_for(p, read.x_of(src));
}

// Pixels lie one after the other across rows (NCHW): transpose runs of L pixels x L lanes, and ask for the next run, of the next
// channel at last. Rows [row_begin, row_end).
template <class S, class Read>
GRASP_SPARSE_INLINE void pack_pixel_runs(const PackArgs<S>& p, const Read& read, int row_begin, int row_end) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t pixels = static_cast<int64_t>(row_end - row_begin) * p.width;
  const int64_t* const row_place = p.row_place + (row_begin - p.row_begin);
  for (int c = 0; c < p.channels; ++c) {
    const S* src = p.src + c * p.sc + row_begin * p.sh;
    T* dst = p.dst + c * p.channel_size;
    for (int64_t q = 0; q < pixels; q += L) {
      // The last run is shifted back: packing a pixel twice is harmless, reading past the image is not.
      const int64_t first = q + L <= pixels ? q : pixels - L;
      alignas(64) T unused[L];
      T* places[L];
      int row = static_cast<int>(first / p.width), col = static_cast<int>(first % p.width);
      for (int i = 0; i < L; ++i) {
        const bool used = row_place[row] >= 0 && p.col_place[col] >= 0;
        places[i] = used ? dst + row_place[row] + p.col_place[col] : unused;
        if (++col == p.width) col = 0, ++row;
      }
      ask_for(p, src + (q + L < pixels ? first + L : p.sc));
      transpose(src + first, p.sn, p.lanes, read, [&](int i) { return places[i]; });
    }
  }
}

// A 1x1 window of stride 2 leaves out every other row.
template <class S, class Read>
void pack_pixels(const PackArgs<S>& p, const Read& read) {
  const auto used = [&](int row) { return p.row_place[row - p.row_begin] >= 0; };
  for (int row = p.row_begin; row < p.row_end;) {
    int end = p.row_end;
    if (p.width >= kLanes<Compute<S>>) {
      for (end = row; end < p.row_end && used(end);) ++end;
    }
    if (row < end) pack_pixel_runs(p, read, row, end);
    row = end + (end < p.row_end);
  }
}

// Channels innermost: transpose L channels x L lanes of one pixel, and ask for those of the next one, or for what comes soon in
// this one where all lanes of a pixel are a large part of L2: so many streams no hardware prefetcher follows (256 -> 64 channels
// at 56x56, 1x1, 98 %, a Zen 4: forward 12.6 -> 8.9 ms).
template <class S, class Read>
void pack_channel_runs(const PackArgs<S>& p, const Read& read) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kPixelBytes = 64 << 10, kSoon = 256 / sizeof(S);
  const bool by_pixel = p.channels * static_cast<int64_t>(L * sizeof(S)) <= kPixelBytes;
  for (int row = p.row_begin; row < p.row_end; ++row) {
    const int64_t row_place = p.row_place[row - p.row_begin];
    if (row_place < 0) continue;
    for (int col = 0; col < p.width; ++col) {
      if (p.col_place[col] < 0) continue;
      const bool skips = col + 1 < p.width && p.col_place[col + 1] < 0;  // a 1x1 window of stride 2
      const int64_t ahead = by_pixel ? p.sw * (skips ? 2 : 1) : kSoon;
      const S* src = p.src + row * p.sh + col * p.sw;
      T* dst = p.dst + row_place + p.col_place[col];
      for (int c = 0; c < p.channels; c += L) {
        const int first = c + L <= p.channels ? c : p.channels - L;
        T* to = dst + first * p.channel_size;
        ask_for(p, read, src + first + ahead);
        transpose(src + first, p.sn, p.lanes, read.from(first), [&](int i) { return to + i * p.channel_size; });
      }
    }
  }
}

// Channels innermost and fewer than L of them (an image's colours): rows lie whole, so transpose runs of L elements x L
// lanes, whatever pixels and channels they are.
template <class S, class Read>
void pack_element_runs(const PackArgs<S>& p, const Read& read) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t elements = static_cast<int64_t>(p.width) * p.channels;
  for (int row = p.row_begin; row < p.row_end; ++row) {
    const int64_t row_place = p.row_place[row - p.row_begin];
    if (row_place < 0) continue;
    for (int64_t e = 0; e < elements; e += L) {
      const int64_t first = e + L <= elements ? e : elements - L;
      alignas(64) T unused[L];
      T* places[L];
      int col = static_cast<int>(first / p.channels), c = static_cast<int>(first % p.channels);
      for (int i = 0; i < L; ++i) {
        places[i] = p.col_place[col] >= 0 ? p.dst + c * p.channel_size + row_place + p.col_place[col] : unused;
        if (++c == p.channels) c = 0, ++col;
      }
      transpose(p.src + row * p.sh + first, p.sn, p.lanes, read, [&](int i) { return places[i]; });
    }
  }
}

template <class S, class Read>
void pack_lanes(const PackArgs<S>& p, const Read& read) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for (int c = 0; c < p.channels; ++c) {
    const Read here = read.from(c);
    for (int row = p.row_begin; row < p.row_end; ++row) {
      const int64_t row_place = p.row_place[row - p.row_begin];
      if (row_place < 0) continue;
      for (int col = 0; col < p.width; ++col) {
        if (p.col_place[col] < 0) continue;
        const S* src = p.src + c * p.sc + row * p.sh + col * p.sw;
        T* dst = p.dst + c * p.channel_size + row_place + p.col_place[col];
        if (p.sn == 1 && p.lanes == L) {
          Vec<T> v;
#pragma GCC unroll 4
          for (int i = 0; i < kNatives; ++i) v.part[i] = here(src + i * kNativeLanes<T>, 0);
          store(dst, v);
        } else {
          for (int l = 0; l < L; ++l) dst[l] = l < p.lanes ? here.one(src + l * p.sn) : T(0);
        }
      }
    }
  }
}

template <class S, class Read>
void pack_with(const PackArgs<S>& p, const Read& read) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  if (p.zero_first) std::memset(p.dst, 0, sizeof(T) * p.channel_size * p.channels);
  if (p.sn != 1 && p.sw == 1 && p.sh == p.width && static_cast<int64_t>(p.row_end - p.row_begin) * p.width >= L) {
    pack_pixels(p, read);
  } else if (p.sn != 1 && p.sc == 1 && p.channels >= L) {
    pack_channel_runs(p, read);
  } else if (p.sn != 1 && p.sc == 1 && p.sw == p.channels && static_cast<int64_t>(p.width) * p.channels >= L) {
    pack_element_runs(p, read);
  } else {
    pack_lanes(p, read);
  }
}

template <class S, bool Relu>
void pack_normed(const PackArgs<S>& p) {
  if (p.zero_first) std::memset(p.dst, 0, sizeof(Compute<S>) * p.channel_size * p.channels);
  const Normed<S, Relu> read{p.norm, p.src, 0};
  // Of an image whose channels several threads share each may have few; lanes lie apart in it, so pack_lanes reads one by one.
  p.channels >= kLanes<Compute<S>> ? pack_channel_runs(p, read) : pack_lanes(p, read);
}

template <class S>
void pack(const PackArgs<S>& p) {
  if (p.norm.x)
    p.norm.relu ? pack_normed<S, true>(p) : pack_normed<S, false>(p);
  else if (p.gate)
    pack_with(p, Gated<S>{reinterpret_cast<uintptr_t>(p.gate) - reinterpret_cast<uintptr_t>(p.src)});
  else
    pack_with(p, Plain<S>{});
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
