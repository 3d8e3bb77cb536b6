// Max pooling of runs of numbers that lie side by side: forward picks the largest of some places and notes which it was,
// backward collects the gradients of the windows that picked a pixel. Both write every element once.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

template <class T>
using Bytes = typename ByteLanes<kNativeLanes<T>>::type;

// One byte a lane, as the integer of the lane. By hand: g++ 12 takes the vector of bytes apart and inserts them one by one.
template <class T>
GRASP_SPARSE_INLINE typename NativeOf<T>::index load_bytes(const uint8_t* p) {
  using Places = typename NativeOf<T>::index;
#if defined(__AVX2__)
  __m128i low{};
  std::memcpy(&low, p, sizeof(Bytes<T>));
#if defined(__AVX512F__)  // maskz, all lanes: of the plain ones g++ 12 warns that they read what nobody set
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Places>(_mm512_maskz_cvtepu8_epi32(0xffff, low));
  else
    return reinterpret_cast<Places>(_mm512_maskz_cvtepu8_epi64(0xff, low));
#else
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Places>(_mm256_cvtepu8_epi32(low));
  else
    return reinterpret_cast<Places>(_mm256_cvtepu8_epi64(low));
#endif
#else
  Bytes<T> bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Places);
#endif
}

// f(first element) for native vectors that cover [0, length), the last one shifted back; one(element) where there are too few.
template <class T, class F, class One>
GRASP_SPARSE_INLINE void for_vectors(int64_t length, const F& f, const One& one) {
  constexpr int n = kNativeLanes<T>;
  if (length < n) {
    for (int64_t i = 0; i < length; ++i) one(i);
    return;
  }
  int64_t i = 0;
  for (; i + n <= length; i += n) f(i);
  if (i < length) f(length - n);
}

template <class S>
GRASP_SPARSE_INLINE void max_pool_run(const PoolArgs<S>& p) {
  using T = Compute<S>;
  using Places = typename NativeOf<T>::index;
  for_vectors<T>(
      p.length,
      [&](int64_t i) {
        Native<T> best = load_native(p.from + p.offsets[0] + i);
        Places place = Places{} + p.taps[0];
        for (int k = 1; k < p.count; ++k) {
          const Native<T> v = load_native(p.from + p.offsets[k] + i);
          const Places better = (v > best) | (v != v);  // as torch: the first of the largest, or the last NaN
          best = better ? v : best;
          place = better ? Places{} + p.taps[k] : place;
        }
        put_native<T, false>(p.out + i, best);
        const Bytes<T> bytes = __builtin_convertvector(place, Bytes<T>);
        std::memcpy(p.places_out + i, &bytes, sizeof bytes);
      },
      [&](int64_t i) {
        int at = 0;
        T best = to_compute(p.from[p.offsets[0] + i]);
        for (int k = 1; k < p.count; ++k) {
          const T v = to_compute(p.from[p.offsets[k] + i]);
          if (v > best || v != v) best = v, at = k;
        }
        p.out[i] = p.from[p.offsets[at] + i], p.places_out[i] = p.taps[at];
      });
}

template <class S>
GRASP_SPARSE_INLINE void max_pool_grad_run(const PoolArgs<S>& p) {
  using T = Compute<S>;
  using Places = typename NativeOf<T>::index;
  for_vectors<T>(
      p.length,
      [&](int64_t i) {
        Native<T> sum{};
        for (int k = 0; k < p.count; ++k) {
          const Places picked = load_bytes<T>(p.places + p.offsets[k] + i) == Places{} + p.taps[k];
          sum += picked ? load_native(p.from + p.offsets[k] + i) : Native<T>{};
        }
        put_native<T, false>(p.out + i, sum);
      },
      [&](int64_t i) {
        T sum = 0;
        for (int k = 0; k < p.count; ++k)
          if (p.places[p.offsets[k] + i] == p.taps[k]) sum += to_compute(p.from[p.offsets[k] + i]);
        put(p.out + i, sum);
      });
}

template <class S>
void max_pool(PoolArgs<S> p) {
  for (int64_t run = 0; run < p.runs; ++run, p.from += p.from_step, p.out += p.out_step, p.places_out += p.out_step) max_pool_run(p);
}

template <class S>
void max_pool_grad(PoolArgs<S> p) {
  for (int64_t run = 0; run < p.runs; ++run, p.from += p.from_step, p.places += p.from_step, p.out += p.out_step) max_pool_grad_run(p);
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
