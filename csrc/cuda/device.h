// The vocabulary of the kernels: CUDA's own, and what it lacks. Kernels are written in headers against this one alone, so that
// a C++ compiler builds the same sources for the CPU (tests/ops/cuda/emulate.h gives CUDA's words a meaning there).
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulate.h"
#endif

#include <cstdint>
#include <type_traits>

#include "storage.h"

namespace grasp_sparse::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

#if defined(__CUDACC__)

__device__ inline float widened(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float widened(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
// Both halves of a word: each costs one instruction, half of it taken out first would cost two.
__device__ inline void widened_pair(unsigned word, Bf16, float& low, float& high) {
  low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void widened_pair(unsigned word, Fp16, float& low, float& high) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  low = both.x, high = both.y;
}
__device__ inline void narrowed(float x, Bf16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void narrowed(float x, Fp16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

// Dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Copies Bytes from global to shared memory without waiting, or zeros if not `valid`; both sides aligned to them.
template <int Bytes>
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(size) : "memory");
  else if constexpr (Bytes >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from), "n"(Bytes), "r"(size) : "memory");
  else
    *static_cast<uint16_t*>(to) = valid ? *static_cast<const uint16_t*>(from) : uint16_t{0};
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most Groups of the committed groups of this thread are under way.
template <int Groups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

__device__ inline unsigned high_product(unsigned a, unsigned b) { return __umulhi(a, b); }

#endif

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline void narrowed(float x, float& to) { to = x; }
__device__ inline void narrowed(double x, double& to) { to = x; }

// V neighbours that are loaded and stored at once.
template <class S, int V>
struct alignas(sizeof(S) * V) Pack {
  S at[V];
};

template <class S, int V>
__device__ inline Pack<S, V> load(const S* from) {
  return *reinterpret_cast<const Pack<S, V>*>(from);
}

// V neighbours in what is computed in.
template <class S, int V>
__device__ inline void load_wide(const S* from, Compute<S> (&to)[V]) {
  if constexpr (sizeof(S) == 2) {
    const auto words = load<unsigned, V / 2>(reinterpret_cast<const unsigned*>(from));
#pragma unroll
    for (int i = 0; i < V / 2; ++i) widened_pair(words.at[i], S{}, to[2 * i], to[2 * i + 1]);
  } else {
    const auto pack = load<S, V>(from);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = pack.at[v];
  }
}

// Quotients by a divisor that the host knows, for dividends below 2^31 (Granlund and Montgomery 1994).
struct Divisor {
  unsigned divisor = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(unsigned d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<unsigned>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ unsigned divide(unsigned x) const { return (high_product(x, multiplier) + x) >> shift; }
};

template <class T>
__device__ inline T not_a_number() {
  return static_cast<T>(nanf(""));
}

}  // namespace grasp_sparse::cuda
