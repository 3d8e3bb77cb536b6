// Square transposes of L x L blocks, in registers: how a batch gets in and out of the lanes.
#pragma once

#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

template <class T, int Bit>
struct Butterfly {
  static GRASP_SPARSE_INLINE void run(Native<T>* row) {
    constexpr int n = kNativeLanes<T>;
    if constexpr (Bit < n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        if (i & Bit) continue;
        const Native<T> a = row[i], b = row[i | Bit];
        row[i] = take<T, Bit, false>(a, b);
        row[i | Bit] = take<T, Bit, true>(a, b);
      }
      Butterfly<T, Bit * 2>::run(row);
    }
  }
};

template <class T>
struct Butterfly<T, 64> {
  static GRASP_SPARSE_INLINE void run(Native<T>*) {}
};

// Reads what lies at a place, which is so many columns from where the transpose began.
template <class S>
struct Plain {
  GRASP_SPARSE_INLINE Native<Compute<S>> operator()(const S* at, int) const { return load_native(at); }
  GRASP_SPARSE_INLINE Compute<S> one(const S* at) const { return to_compute(*at); }
  GRASP_SPARSE_INLINE Plain from(int) const { return *this; }  // the same for any channel
};

// Source rows from `rows` on are not read and count as zero; they are `step` elements apart and need no alignment.
// put(j, i, part) receives the native vector src[i … i + n][j] for every j in [0, L) and i = 0, n, 2n, … < L. What lies at a
// place is what read(place, j) says.
template <class S, class Read, class Put>
GRASP_SPARSE_INLINE void transpose_parts(const S* src, int64_t step, int rows, const Read& read, const Put& put) {
  using T = Compute<S>;
  constexpr int n = kNativeLanes<T>, L = kLanes<T>;
#pragma GCC unroll 1
  for (int i0 = 0; i0 < L; i0 += n) {
#pragma GCC unroll 1
    for (int j0 = 0; j0 < L; j0 += n) {
      Native<T> block[n];
      if (i0 + n <= rows) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) block[i] = read(src + (i0 + i) * step + j0, j0);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          block[i] = i0 + i < rows ? read(src + (i0 + i) * step + j0, j0) : Native<T>{};
        }
      }
      Butterfly<T, 1>::run(block);
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) put(j0 + j, i0, block[j]);
    }
  }
}

// place(j)[i] = src[i][j], i and j in [0, L).
template <bool Stream = false, class S, class Read, class Place>
GRASP_SPARSE_INLINE void transpose(const S* src, int64_t step, int rows, const Read& read, const Place& place) {
  using T = Compute<S>;
  transpose_parts(src, step, rows, read, [&](int j, int i, Native<T> part) { put_native<T, Stream>(place(j) + i, part); });
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
