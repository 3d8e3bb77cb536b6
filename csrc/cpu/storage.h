// How elements lie in memory, and what they are computed as.
#pragma once

#include <cstdint>

namespace grasp_sparse {

// How a bfloat16 lies in a tensor. Tensors of it are computed in float: it exists in memory only.
struct Bf16 {
  uint16_t bits;
};

// What elements stored as S are packed and computed as.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<Bf16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

}  // namespace grasp_sparse
