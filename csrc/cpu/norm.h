// Batch norm, one sheet at a time. Every loop is bound by memory, so each is one pass with as much done in it as can be:
// some vectors of columns stay in registers while up to kRun rows pass by. Sums run in the type that x is computed in over those
// rows only and are then added up in double; the moments of a run are taken about its own first row, so that the digits of the
// spread survive a mean of any size: the value they are taken about is at most sqrt(kRun) deviations from the run's mean.
#pragma once

#include <type_traits>

#include "norm_args.h"
#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

constexpr int kRun = 32;
constexpr int kNormVectors = kCanStream ? 8 : 4;  // what the registers hold, about: up to five values for each
constexpr int kRowsAhead = 8;  // fetched early: two or three streams of strided rows are more than the hardware follows

template <int K>
using Count = std::integral_constant<int, K>;

// How the vectors of a block are read and written: all lanes, or the first few at the end of a row.
template <class T>
struct WholeLanes {
  static constexpr int count = kNativeLanes<T>;
  template <class S>
  GRASP_SPARSE_INLINE Native<T> load(const S* p) const { return load_native(p); }
  template <bool Stream, class S>
  GRASP_SPARSE_INLINE void store(S* p, Native<T> v) const { put_native<T, Stream>(p, v); }
};

template <class T>
struct FirstLanes {
  int count;
  template <class S>
  GRASP_SPARSE_INLINE Native<T> load(const S* p) const { return load_part(p, count); }
  template <bool Stream, class S>
  GRASP_SPARSE_INLINE void store(S* p, Native<T> v) const { store_part<T>(p, v, count); }
};

// Calls block(number of vectors, lanes, first row, rows, first column) until the sheet is covered, `run` rows at a time.
template <class S, class Block>
GRASP_SPARSE_INLINE void for_blocks(const NormArgs<S>& p, const Block& block) {
  using T = Compute<S>;
  constexpr int n = kNativeLanes<T>;
  for (int64_t row = 0; row < p.rows; row += kRun) {
    const int rows = static_cast<int>(p.rows - row < kRun ? p.rows - row : kRun);
    int64_t col = 0;
    for (; col + kNormVectors * n <= p.cols; col += kNormVectors * n) block(Count<kNormVectors>{}, WholeLanes<T>{}, row, rows, col);
    for (; col + n <= p.cols; col += n) block(Count<1>{}, WholeLanes<T>{}, row, rows, col);
    if (col < p.cols) block(Count<1>{}, FirstLanes<T>{static_cast<int>(p.cols - col)}, row, rows, col);
  }
}

// The k-th vector at p, whose rows are `stride` apart; asks for the line of a later row as well, once per line.
template <class S, class Lanes>
GRASP_SPARSE_INLINE Native<Compute<S>> load_ahead(const Lanes& lanes, const S* p, int k, int64_t stride) {
  constexpr int n = kNativeLanes<Compute<S>>;
  const S* at = p + k * n;
  if (k * n * static_cast<int>(sizeof(S)) % kSliceBytes == 0) __builtin_prefetch(at + kRowsAhead * stride);
  return lanes.load(at);
}

template <class S, int K, class Lanes>
GRASP_SPARSE_INLINE void load_columns(Native<Compute<S>> (&v)[K], const Lanes& lanes, const S* p) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) v[k] = lanes.load(p + k * kNativeLanes<Compute<S>>);
}

template <class T, int K, class Lanes>
GRASP_SPARSE_INLINE void store_columns(T* p, const Lanes& lanes, const Native<T> (&v)[K]) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) lanes.template store<false>(p + k * kNativeLanes<T>, v[k]);
}

template <class S>
void norm_moments(const NormArgs<S>& p) {
  using T = Compute<S>;
  constexpr int n = kNativeLanes<T>;
  for_blocks(p, [&](auto vectors, const auto& lanes, int64_t row, int rows, int64_t col) {
    constexpr int K = decltype(vectors)::value;
    const S* x = p.x + row * p.stride + col;
    Native<T> about[K], first[K], second[K];
    load_columns(about, lanes, x);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) first[k] = second[k] = Native<T>{};
    for (int i = 1; i < rows; ++i) {
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Native<T> d = load_ahead(lanes, x + i * p.stride, k, p.stride) - about[k];
        first[k] += d;
        second[k] += d * d;
      }
    }
    alignas(64) T a[K * n], s[K * n], q[K * n];
    store_columns(a, lanes, about), store_columns(s, lanes, first), store_columns(q, lanes, second);
    double *sums = p.first + col, *squares = p.second + col;
    const T* mean = p.mean + col;
    for (int l = 0; l < (K - 1) * n + lanes.count; ++l) {
      const double shift = static_cast<double>(a[l]) - mean[l], sum = s[l];
      sums[l] += sum + rows * shift;
      squares[l] += q[l] + shift * (2 * sum + rows * shift);
    }
  });
}

template <class S, bool Residual, bool Relu, bool Stream>
void norm_apply_loop(const NormArgs<S>& p) {
  using T = Compute<S>;
  constexpr int n = kNativeLanes<T>;
  for_blocks(p, [&](auto vectors, const auto& lanes, int64_t row, int rows, int64_t col) {
    constexpr int K = decltype(vectors)::value;
    Native<T> mean[K], scale[K], bias[K];
    load_columns(mean, lanes, p.mean + col), load_columns(scale, lanes, p.scale + col), load_columns(bias, lanes, p.bias + col);
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * p.stride + col;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        Native<T> v = (load_ahead(lanes, p.x + at, k, p.stride) - mean[k]) * scale[k] + bias[k];
        if constexpr (Residual) v += load_ahead(lanes, p.residual + at, k, p.stride);
        if constexpr (Relu) v = positive<T>(v, v);
        lanes.template store<Stream>(p.out + at + k * n, v);
      }
    }
  });
  if constexpr (Stream) stream_fence();
}

enum class Mask { none, from_x, from_y };

template <class S, Mask Masked, bool Stream>
void norm_sums_loop(const NormArgs<S>& p) {
  using T = Compute<S>;
  constexpr int n = kNativeLanes<T>;
  for_blocks(p, [&](auto vectors, const auto& lanes, int64_t row, int rows, int64_t col) {
    constexpr int K = decltype(vectors)::value;
    Native<T> mean[K], scale[K], bias[K], first[K], second[K];
    load_columns(mean, lanes, p.mean + col);
    if constexpr (Masked == Mask::from_x) load_columns(scale, lanes, p.scale + col), load_columns(bias, lanes, p.bias + col);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) first[k] = second[k] = Native<T>{};
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * p.stride + col;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Native<T> d = load_ahead(lanes, p.x + at, k, p.stride) - mean[k];
        Native<T> g = load_ahead(lanes, p.g + at, k, p.stride);
        if constexpr (Masked == Mask::from_x) g = positive<T>(d * scale[k] + bias[k], g);
        if constexpr (Masked == Mask::from_y) {
          g = positive<T>(load_ahead(lanes, p.y + at, k, p.stride), g);
          lanes.template store<Stream>(p.out + at + k * n, g);
        }
        first[k] += g;
        second[k] += g * d;
      }
    }
    alignas(64) T s[K * n], q[K * n];
    store_columns(s, lanes, first), store_columns(q, lanes, second);
    double *sums = p.first + col, *products = p.second + col;
    for (int l = 0; l < (K - 1) * n + lanes.count; ++l) sums[l] += s[l], products[l] += q[l];
  });
  if constexpr (Stream) stream_fence();
}

template <class S, bool Relu, bool Stream>
void norm_input_grad_loop(const NormArgs<S>& p) {
  using T = Compute<S>;
  constexpr int n = kNativeLanes<T>;
  for_blocks(p, [&](auto vectors, const auto& lanes, int64_t row, int rows, int64_t col) {
    constexpr int K = decltype(vectors)::value;
    Native<T> mean[K], scale[K], bias[K], offset[K], slope[K];
    load_columns(mean, lanes, p.mean + col), load_columns(scale, lanes, p.scale + col);
    load_columns(offset, lanes, p.offset + col), load_columns(slope, lanes, p.slope + col);
    if constexpr (Relu) load_columns(bias, lanes, p.bias + col);
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * p.stride + col;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Native<T> d = load_ahead(lanes, p.x + at, k, p.stride) - mean[k];
        Native<T> g = load_ahead(lanes, p.g + at, k, p.stride);
        if constexpr (Relu) g = positive<T>(d * scale[k] + bias[k], g);
        lanes.template store<Stream>(p.out + at + k * n, g * scale[k] - offset[k] - d * slope[k]);
      }
    }
  });
  if constexpr (Stream) stream_fence();
}

// Calls f with the flags as compile-time constants; a stream that this instruction set has no store of S for is none.
template <class S, class F>
GRASP_SPARSE_INLINE void with_flags(bool a, bool stream, const F& f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if constexpr (kCanStream && std::is_same_v<S, Compute<S>>) {
    if (stream) return a ? f(Yes{}, Yes{}) : f(No{}, Yes{});
  }
  a ? f(Yes{}, No{}) : f(No{}, No{});
}

template <class S>
void norm_apply(const NormArgs<S>& p) {
  with_flags<S>(p.relu, p.stream, [&](auto relu, auto stream) {
    constexpr bool R = decltype(relu)::value, Past = decltype(stream)::value;
    p.residual ? norm_apply_loop<S, true, R, Past>(p) : norm_apply_loop<S, false, R, Past>(p);
  });
}

template <class S>
void norm_sums(const NormArgs<S>& p) {
  if (p.y == nullptr) return p.relu ? norm_sums_loop<S, Mask::from_x, false>(p) : norm_sums_loop<S, Mask::none, false>(p);
  with_flags<S>(true, p.stream, [&](auto, auto stream) { norm_sums_loop<S, Mask::from_y, decltype(stream)::value>(p); });
}

template <class S>
void norm_input_grad(const NormArgs<S>& p) {
  with_flags<S>(p.relu, p.stream, [&](auto relu, auto stream) {
    norm_input_grad_loop<S, decltype(relu)::value, decltype(stream)::value>(p);
  });
}

template <class S>
constexpr NormKernels<S> kNormKernels = {&norm_moments<S>, &norm_apply<S>, &norm_sums<S>, &norm_input_grad<S>};

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
