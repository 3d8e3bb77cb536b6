// Optimizer steps: one pass that reads value, gradient and state and writes value and state, a slice vector at a time.
// Every element meets the same instructions wherever it lies, so results depend on neither threads nor cuts.
#pragma once

#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

template <class T>
using Index = typename NativeOf<T>::index;

// All ones where the lane's bit of `word` is set, lane 0 in the highest of kLanes bits.
template <class T>
GRASP_SPARSE_INLINE Index<T> kept_lanes(uint32_t word, int part) {
  Index<T> lane_bit;
#pragma GCC unroll 16
  for (int l = 0; l < kNativeLanes<T>; ++l) lane_bit[l] = 1 << (kLanes<T> - 1 - part * kNativeLanes<T> - l);
  const Index<T> all = Index<T>{} + word;
  return (all & lane_bit) != 0;
}

template <class T>
GRASP_SPARSE_INLINE Native<T> zero_unless(Index<T> kept, Native<T> v) {
  return reinterpret_cast<Native<T>>(reinterpret_cast<Index<T>>(v) & kept);
}

template <class T>
GRASP_SPARSE_INLINE Native<T> square_root(Native<T> v) {
#if defined(__AVX512F__)  // maskz, all lanes: of the plain ones g++ 12 warns that they read what nobody set
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Native<T>>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(v)));
  else
    return reinterpret_cast<Native<T>>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Native<T>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
  else
    return reinterpret_cast<Native<T>>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(v)));
#else
#pragma GCC unroll 4
  for (int l = 0; l < kNativeLanes<T>; ++l) v[l] = std::sqrt(v[l]);
  return v;
#endif
}

// Calls step(part, arrays...) for every native vector of one slice; it returns nothing and changes the vectors it is given.
// array[0] is the gradient and only read; the others are written back, zero where pruned.
template <class T, bool Masked, int Arrays, class Step>
GRASP_SPARSE_INLINE void update_slice(T* const (&array)[Arrays], uint32_t word, const Step& step) {
  Vec<T> held[Arrays];
#pragma GCC unroll 4
  for (int a = 0; a < Arrays; ++a) held[a] = load_unaligned(array[a]);
#pragma GCC unroll 4
  for (int i = 0; i < kNatives; ++i) {
    Native<T> v[Arrays];
#pragma GCC unroll 4
    for (int a = 0; a < Arrays; ++a) v[a] = held[a].part[i];
    step(v);
#pragma GCC unroll 4
    for (int a = 1; a < Arrays; ++a) held[a].part[i] = Masked ? zero_unless<T>(kept_lanes<T>(word, i), v[a]) : v[a];
  }
#pragma GCC unroll 4
  for (int a = 1; a < Arrays; ++a) store_unaligned(array[a], held[a]);
}

// The bits of one slice, `bytes` of them there; the rest count as pruned.
template <class T>
GRASP_SPARSE_INLINE uint32_t slice_bits(const uint8_t* bits, int bytes) {
  if constexpr (kLanes<T> == 8) return bits[0];
  return static_cast<uint32_t>(bits[0]) << 8 | (bytes > 1 ? bits[1] : 0u);
}

template <class T, bool Masked, int Arrays, class Step>
GRASP_SPARSE_INLINE void update_slices(T* const (&array)[Arrays], const uint8_t* bits, int64_t count, const Step& step) {
  constexpr int L = kLanes<T>;
  static_assert(L == 8 || L == 16);
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    T* at[Arrays];
#pragma GCC unroll 4
    for (int a = 0; a < Arrays; ++a) at[a] = array[a] + i;
    update_slice<T, Masked>(at, Masked ? slice_bits<T>(bits + i / 8, L / 8) : 0, step);
  }
  if (const int rest = static_cast<int>(count - i)) {
    T local[Arrays][L] = {};
    T* at[Arrays];
    for (int a = 0; a < Arrays; ++a) at[a] = local[a], std::memcpy(at[a], array[a] + i, rest * sizeof(T));
    update_slice<T, Masked>(at, Masked ? slice_bits<T>(bits + i / 8, (rest + 7) / 8) : 0, step);
    for (int a = 1; a < Arrays; ++a) std::memcpy(array[a] + i, at[a], rest * sizeof(T));
  }
}

template <class T, bool Masked, bool Momentum>
void sgd_slices(const SgdArgs<T>& p) {
  const SgdArgs<T> s = p;  // by value: stores to the arrays cannot change it
  const auto step = [s](Native<T>* v) {
    Native<T> grad = s.maximize ? -v[0] : v[0];
    if (s.weight_decay != 0) grad += s.weight_decay * v[1];
    if constexpr (Momentum) {
      v[2] = s.first_step ? grad : s.momentum * v[2] + s.grad_share * grad;
      grad = s.nesterov ? grad + s.momentum * v[2] : v[2];
    }
    v[1] -= s.lr * grad;
  };
  T* const grad = const_cast<T*>(s.grad);  // read only
  if constexpr (Momentum) {
    T* const array[] = {grad, s.value, s.momentum_buffer};
    update_slices<T, Masked>(array, s.bits, s.count, step);
  } else {
    T* const array[] = {grad, s.value};
    update_slices<T, Masked>(array, s.bits, s.count, step);
  }
}

template <class T>
void sgd(const SgdArgs<T>& p) {
  if (p.momentum_buffer) return p.bits ? sgd_slices<T, true, true>(p) : sgd_slices<T, false, true>(p);
  return p.bits ? sgd_slices<T, true, false>(p) : sgd_slices<T, false, false>(p);
}

template <class T, bool Masked>
void adamw_slices(const AdamwArgs<T>& p) {
  const AdamwArgs<T> s = p;
  T* const array[] = {const_cast<T*>(s.grad), s.value, s.exp_avg, s.exp_avg_sq};
  update_slices<T, Masked>(array, s.bits, s.count, [s](Native<T>* v) {
    const Native<T> grad = s.maximize ? -v[0] : v[0];
    v[2] += s.grad_share * (grad - v[2]);
    v[3] = s.beta2 * v[3] + s.square_share * grad * grad;
    v[1] = s.value_share * v[1] - s.step_size * v[2] / (square_root<T>(v[3]) * s.root_share + s.eps);
  });
}

template <class T>
void adamw(const AdamwArgs<T>& p) {
  return p.bits ? adamw_slices<T, true>(p) : adamw_slices<T, false>(p);
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
