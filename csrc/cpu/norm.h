// Batch norm, one sheet at a time. Every loop is bound by memory, so each is one pass with as much done in it as can be, in the
// order in which the sheet lies there. Sums run in the type that x is computed in over kRun rows only and are then added up in
// double; the moments of a run are taken about its own first row, so that the digits of the spread survive a mean of any size: the
// value they are taken about is at most sqrt(kRun) deviations from the run's mean.
#pragma once

#include <algorithm>
#include <type_traits>

#include "norm_args.h"
#include "norm_gradient.h"
#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

constexpr int kRun = 32;
constexpr int kNormVectors = kNatives == 1 ? 8 : 4;  // what the registers hold, about: up to five values for each

template <int K>
using Count = std::integral_constant<int, K>;

// How the vectors of a block are read and written: all lanes, or the first few at the end of a row.
template <class T>
struct WholeLanes {
  template <class S>
  GRASP_SPARSE_INLINE Native<T> load(const S* p) const { return load_native(p); }
  template <bool Stream, class S>
  GRASP_SPARSE_INLINE void store(S* p, Native<T> v) const { put_native<T, Stream>(p, v); }
};

// One vector of a line whose rest others write, through the cache: past it half a line costs as much as a whole one.
template <class T>
struct LanesOfPart : WholeLanes<T> {
  template <bool Stream, class S>
  GRASP_SPARSE_INLINE void store(S* p, Native<T> v) const { put_native<T, false>(p, v); }
};

template <class T>
struct FirstLanes {
  int count;
  template <class S>
  GRASP_SPARSE_INLINE Native<T> load(const S* p) const { return load_part(p, count); }
  template <bool Stream, class S>
  GRASP_SPARSE_INLINE void store(S* p, Native<T> v) const { store_part<T>(p, v, count); }
};

// Calls block(number of vectors, lanes, first column) until columns [col, end) are covered.
template <class T, class Block>
GRASP_SPARSE_INLINE void for_columns(int64_t col, int64_t end, const Block& block) {
  constexpr int n = kNativeLanes<T>;
  for (; col + kNormVectors * n <= end; col += kNormVectors * n) block(Count<kNormVectors>{}, WholeLanes<T>{}, col);
  for (; col + kNatives * n <= end; col += kNatives * n) block(Count<kNatives>{}, WholeLanes<T>{}, col);  // a line
  if constexpr (kNatives > 1) {
    for (; col + n <= end; col += n) block(Count<1>{}, LanesOfPart<T>{}, col);
  }
  if (col < end) block(Count<1>{}, FirstLanes<T>{static_cast<int>(end - col)}, col);
}

// Rows that pass by while what belongs to some vectors of columns stays in registers. All of a run, where those vectors are a whole
// row; else one, for the processor foresees who reads line after line, and not who takes a piece of every row (256 channels at 56x56
// on a Zen 4: 79 -> 63 ms for all loops). Rows of a page or more are foreseen each, and so are rows that lie apart: four of them read
// once what belongs to a column (1024 channels at 14x14: 15.3 -> 12.7 ms). To ask for lines early was slower in all these orders.
template <class S>
GRASP_SPARSE_INLINE int64_t turn_of(const NormArgs<S>& p) {
  constexpr int64_t kPageBytes = 4 << 10;
  if (p.cols <= kNormVectors * kNativeLanes<Compute<S>>) return kRun;
  return p.stride == p.cols && p.cols * static_cast<int64_t>(sizeof(S)) < kPageBytes ? 1 : 4;
}

// Calls block(number of vectors, lanes, first row, rows, first column) until the sheet is covered.
template <class S, class Block>
GRASP_SPARSE_INLINE void for_blocks(const NormArgs<S>& p, const Block& block) {
  const int64_t turn = turn_of(p);
  for (int64_t row = 0; row < p.rows; row += turn) {
    const int rows = static_cast<int>(p.rows - row < turn ? p.rows - row : turn);
    for_columns<Compute<S>>(0, p.cols, [&](auto vectors, const auto& lanes, int64_t col) {
      block(vectors, lanes, row, rows, col);
    });
  }
}

constexpr int64_t kPanelBytes = 4 << 10;  // of columns that are summed together

template <class T>
constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(T));

// Two sums of every column over the rows of a run: block(number of vectors, lanes, whether the run begins, first row, rows, first
// column, that in its panel, sums, sums) adds to them, fold(rows, first column, columns, sums, sums) takes them.
template <class S, class Block, class Fold>
GRASP_SPARSE_INLINE void for_sums(const NormArgs<S>& p, const Block& block, const Fold& fold) {
  using T = Compute<S>;
  alignas(64) T first[kPanel<T>], second[kPanel<T>];
  const int64_t turn = turn_of(p);
  for (int64_t run = 0; run < p.rows; run += kRun) {
    const int64_t end = p.rows - run < kRun ? p.rows : run + kRun;
    for (int64_t panel = 0; panel < p.cols; panel += kPanel<T>) {
      const int64_t cols = p.cols - panel < kPanel<T> ? p.cols - panel : kPanel<T>;
      std::fill_n(first, cols, T{}), std::fill_n(second, cols, T{});
      for (int64_t row = run; row < end; row += turn) {
        const int rows = static_cast<int>(end - row < turn ? end - row : turn);
        for_columns<T>(panel, panel + cols, [&](auto vectors, const auto& lanes, int64_t col) {
          block(vectors, lanes, row == run, row, rows, col, col - panel, first + (col - panel), second + (col - panel));
        });
      }
      fold(static_cast<int>(end - run), panel, cols, first, second);
    }
  }
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
  alignas(64) T pivots[kPanel<T>];
  for_sums(
      p,
      [&](auto vectors, const auto& lanes, bool begins, int64_t row, int rows, int64_t col, int64_t at, T* sums, T* squares) {
        constexpr int K = decltype(vectors)::value;
        const S* x = p.x + row * p.stride + col;
        Native<T> pivot[K], first[K], second[K];
        if (begins) load_columns(pivot, lanes, x), store_columns(pivots + at, lanes, pivot);
        load_columns(pivot, lanes, pivots + at), load_columns(first, lanes, sums), load_columns(second, lanes, squares);
        for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k) {
            const Native<T> d = lanes.load(x + i * p.stride + k * n) - pivot[k];
            first[k] += d;
            second[k] += d * d;
          }
        }
        store_columns(sums, lanes, first), store_columns(squares, lanes, second);
      },
      [&](int rows, int64_t col, int64_t cols, const T* first, const T* second) {
        for (int64_t i = 0; i < cols; ++i) {
          const double shift = static_cast<double>(pivots[i]) - p.mean[col + i];
          add_about(shift, rows, first[i], second[i], p.first[col + i], p.second[col + i]);
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
        Native<T> v = (lanes.load(p.x + at + k * n) - mean[k]) * scale[k] + bias[k];
        if constexpr (Residual) v += lanes.load(p.residual + at + k * n);
        if constexpr (Relu) v = positive(v, v);
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
  for_sums(
      p,
      [&](auto vectors, const auto& lanes, bool, int64_t row, int rows, int64_t col, int64_t, T* sums, T* products) {
        constexpr int K = decltype(vectors)::value;
        Native<T> mean[K], scale[K], bias[K], first[K], second[K];
        load_columns(mean, lanes, p.mean + col), load_columns(first, lanes, sums), load_columns(second, lanes, products);
        if constexpr (Masked == Mask::from_x) load_columns(scale, lanes, p.scale + col), load_columns(bias, lanes, p.bias + col);
        for (int i = 0; i < rows; ++i) {
          const int64_t at = (row + i) * p.stride + col;
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k) {
            const Native<T> d = lanes.load(p.x + at + k * n) - mean[k];
            Native<T> g = lanes.load(p.g + at + k * n);
            if constexpr (Masked == Mask::from_x) g = behind_relu(g, d, scale[k], bias[k]);
            if constexpr (Masked == Mask::from_y) {
              g = positive(lanes.load(p.y + at + k * n), g);
              lanes.template store<Stream>(p.out + at + k * n, g);
            }
            first[k] += g;
            second[k] += g * d;
          }
        }
        store_columns(sums, lanes, first), store_columns(products, lanes, second);
      },
      [&](int, int64_t col, int64_t cols, const T* first, const T* second) {
        for (int64_t i = 0; i < cols; ++i) p.first[col + i] += first[i], p.second[col + i] += second[i];
      });
  if constexpr (Stream) stream_fence();
}

template <class S, bool Relu, bool Stream>
void norm_input_grad_loop(const NormArgs<S>& p) {
  using T = Compute<S>;
  constexpr int n = kNativeLanes<T>;
  for_blocks(p, [&](auto vectors, const auto& lanes, int64_t row, int rows, int64_t col) {
    constexpr int K = decltype(vectors)::value;
    Native<T> mean[K], scale[K], bias[K]{}, offset[K], slope[K];
    load_columns(mean, lanes, p.mean + col), load_columns(scale, lanes, p.scale + col);
    load_columns(offset, lanes, p.offset + col), load_columns(slope, lanes, p.slope + col);
    if constexpr (Relu) load_columns(bias, lanes, p.bias + col);
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * p.stride + col;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Native<T> g = lanes.load(p.g + at + k * n), d = lanes.load(p.x + at + k * n) - mean[k];
        lanes.template store<Stream>(p.out + at + k * n, input_grad_of<Relu>(g, d, scale[k], bias[k], offset[k], slope[k]));
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
