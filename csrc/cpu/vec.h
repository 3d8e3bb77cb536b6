// One slice vector: L lanes, 64 bytes, held in as many native registers as the instruction set needs.
// Compiled once per instruction set; everything lives in namespace GRASP_SPARSE_ISA so that the linker can never merge
// a function compiled for AVX-512 with one that must run anywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)  // with AVX-512, too
#include <immintrin.h>
#endif

#include "isa.h"

#if defined(__AVX512F__)
#define GRASP_SPARSE_NATIVE_BYTES 64
#define GRASP_SPARSE_MAX_TILE 16  // accumulators of one slice each: 16 of 32 registers, the sampled product holds 16 more
#elif defined(__AVX2__)
#define GRASP_SPARSE_NATIVE_BYTES 32
#define GRASP_SPARSE_MAX_TILE 6
#else
#define GRASP_SPARSE_NATIVE_BYTES 16
#define GRASP_SPARSE_MAX_TILE 3
#endif

#define GRASP_SPARSE_INLINE inline __attribute__((always_inline))

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

constexpr int kMaxTile = GRASP_SPARSE_MAX_TILE;

template <class T>
struct NativeOf;
template <>
struct NativeOf<float> {
  typedef float type __attribute__((vector_size(GRASP_SPARSE_NATIVE_BYTES)));
  typedef int32_t index __attribute__((vector_size(GRASP_SPARSE_NATIVE_BYTES)));
};
template <>
struct NativeOf<double> {
  typedef double type __attribute__((vector_size(GRASP_SPARSE_NATIVE_BYTES)));
  typedef int64_t index __attribute__((vector_size(GRASP_SPARSE_NATIVE_BYTES)));
};

template <int Count>
struct ByteLanes {
  typedef uint8_t type __attribute__((vector_size(Count)));
};

template <class T>
using Native = typename NativeOf<T>::type;
template <class T>
constexpr int kNativeLanes = GRASP_SPARSE_NATIVE_BYTES / static_cast<int>(sizeof(T));
constexpr int kNatives = kSliceBytes / GRASP_SPARSE_NATIVE_BYTES;

template <class T>
struct Vec {
  Native<T> part[kNatives];
};

template <class T>
GRASP_SPARSE_INLINE Vec<T> broadcast(T value) {
  const Native<T> native = value - Native<T>{};  // minus zero is the identity and folds away; plus zero would not
  Vec<T> v;
#pragma GCC unroll 4
  for (int i = 0; i < kNatives; ++i) v.part[i] = native;
  return v;
}

// p is aligned to 64 bytes: packed images are.
template <class T>
GRASP_SPARSE_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
#pragma GCC unroll 4
  for (int i = 0; i < kNatives; ++i) v.part[i] = reinterpret_cast<const Native<T>*>(p)[i];
  return v;
}

template <class T>
GRASP_SPARSE_INLINE void store(T* p, const Vec<T>& v) {
#pragma GCC unroll 4
  for (int i = 0; i < kNatives; ++i) reinterpret_cast<Native<T>*>(p)[i] = v.part[i];
}

template <class T>
GRASP_SPARSE_INLINE Vec<T> load_unaligned(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
GRASP_SPARSE_INLINE void store_unaligned(T* p, const Vec<T>& v) {
  std::memcpy(p, &v, sizeof v);
}

// One native vector of what is stored at p, any alignment.
template <class S>
GRASP_SPARSE_INLINE Native<S> load_native(const S* p) {
  Native<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

typedef uint32_t Words __attribute__((vector_size(GRASP_SPARSE_NATIVE_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(GRASP_SPARSE_NATIVE_BYTES / 2)));

GRASP_SPARSE_INLINE Native<float> load_native(const Bf16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return reinterpret_cast<Native<float>>(__builtin_convertvector(halves, Words) << 16);
}

// Rounded to nearest, ties to even; a NaN stays one.
GRASP_SPARSE_INLINE Halves to_halves(Native<float> v) {
  const Words bits = reinterpret_cast<Words>(v), nan = reinterpret_cast<Words>(v != v);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector(((nan & (bits | 0x400000)) | (~nan & rounded)) >> 16, Halves);
}

template <class T>
GRASP_SPARSE_INLINE T to_compute(T value) { return value; }
GRASP_SPARSE_INLINE float to_compute(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <class T>
GRASP_SPARSE_INLINE void put(T* p, T value) { *p = value; }
GRASP_SPARSE_INLINE void put(Bf16* p, float value) { p->bits = to_halves(value - Native<float>{})[0]; }

// Whether stores past the cache exist. They are worth having where what fills a line follows at once: one vector or two.
constexpr bool kCanStream = kNatives <= 2;

// Stores one native vector; with Stream (p aligned to its size) past the cache, without reading the line first.
template <class T, bool Stream>
GRASP_SPARSE_INLINE void put_native(T* p, Native<T> v) {
#if defined(__AVX512F__)
  if constexpr (Stream) {
    if constexpr (sizeof(T) == 4)
      _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
    else
      _mm512_stream_pd(p, reinterpret_cast<__m512d>(v));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (Stream) {
    if constexpr (sizeof(T) == 4)
      _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
    else
      _mm256_stream_pd(p, reinterpret_cast<__m256d>(v));
    return;
  }
#endif
  std::memcpy(p, &v, sizeof v);
}

template <class T, bool Stream>
GRASP_SPARSE_INLINE void put_native(Bf16* p, Native<T> v) {
  const Halves halves = to_halves(v);
  std::memcpy(p, &halves, sizeof halves);
}

// Makes streamed stores visible to other threads.
GRASP_SPARSE_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first Count lanes of one native vector.
template <class T, int Count>
GRASP_SPARSE_INLINE void store_first(T* p, Native<T> v) {
  static_assert(Count >= 0 && Count <= kNativeLanes<T>);
#if defined(__AVX512F__)
  constexpr auto mask = (1u << Count) - 1;
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
#else
  std::memcpy(p, &v, sizeof(T) * Count);  // a constant: moves, no call
#endif
}

// The first `count` lanes (1 … n); the others are zero, and nothing is read or written for them.
template <class T>
GRASP_SPARSE_INLINE Native<T> load_part(const T* p, int count) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Native<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  else
    return reinterpret_cast<Native<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
#else
  Native<T> v{};
  for (int l = 0; l < count; ++l) v[l] = p[l];
  return v;
#endif
}

GRASP_SPARSE_INLINE Native<float> load_part(const Bf16* p, int count) {
  Halves halves{};
  for (int l = 0; l < count; ++l) halves[l] = p[l].bits;
  return reinterpret_cast<Native<float>>(__builtin_convertvector(halves, Words) << 16);
}

template <class T>
GRASP_SPARSE_INLINE void store_part(T* p, Native<T> v, int count) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
#else
  for (int l = 0; l < count; ++l) p[l] = v[l];
#endif
}

template <class T>
GRASP_SPARSE_INLINE void store_part(Bf16* p, Native<T> v, int count) {
  const Halves halves = to_halves(v);
  for (int l = 0; l < count; ++l) p[l].bits = halves[l];
}

template <class T, int Count>
GRASP_SPARSE_INLINE void store_first(Bf16* p, Native<T> v) {
  const Halves halves = to_halves(v);
  std::memcpy(p, &halves, sizeof(Bf16) * Count);
}

// v where `at` is positive (or NaN), zero elsewhere; vectors or numbers.
template <class V>
GRASP_SPARSE_INLINE V positive(V at, V v) {
  const V zero{};
  return at <= zero ? zero : v;
}

// acc += a * b. Contracts to one fused multiply-add where the instruction set has it.
template <class T>
GRASP_SPARSE_INLINE void multiply_add(Vec<T>& acc, const Vec<T>& a, const Vec<T>& b) {
#pragma GCC unroll 4
  for (int i = 0; i < kNatives; ++i) acc.part[i] += a.part[i] * b.part[i];
}

template <class T>
GRASP_SPARSE_INLINE void add(Vec<T>& acc, const Vec<T>& a) {
#pragma GCC unroll 4
  for (int i = 0; i < kNatives; ++i) acc.part[i] += a.part[i];
}

// The lane that lane `l` of take() comes from, counting through a and then b.
template <int Lanes, int Bit, bool Set>
constexpr int source_lane(int l) {
  return ((l & ~Bit) | (Set ? Bit : 0)) + ((l & Bit) ? Lanes : 0);
}

template <class T, int Bit, bool Set, int... Lane>
GRASP_SPARSE_INLINE Native<T> take_lanes(Native<T> a, Native<T> b, std::integer_sequence<int, Lane...>) {
  constexpr int n = kNativeLanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source_lane<n, Bit, Set>(Lane)...);
#else
  return __builtin_shuffle(a, b, typename NativeOf<T>::index{source_lane<n, Bit, Set>(Lane)...});
#endif
}

// From two native vectors, those lanes whose bit `Bit` of the lane number is clear (or set), interleaved: with the same
// bit taken from both, lane l of the result is lane (l & ~Bit | Set) of a where l & Bit is clear, of b where it is set.
template <class T, int Bit, bool Set>
GRASP_SPARSE_INLINE Native<T> take(Native<T> a, Native<T> b) {
  return take_lanes<T, Bit, Set>(a, b, std::make_integer_sequence<int, kNativeLanes<T>>());
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
