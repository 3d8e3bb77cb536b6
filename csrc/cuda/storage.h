// How activations are stored and what is computed in. Plain C++: for kernels and for their host alike.
#pragma once

#include <cstdint>

namespace grasp_sparse::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
// Of values, bias and sums beside activations stored as S: the rule of ops/dtypes.py.
template <class S>
using Compute = typename ComputeOf<S>::type;

// The places of the kept weights, as CsrIndices of the Python side.
struct CsrView {
  int rows, cols, nnz;
  const int32_t *crow, *col, *ccol, *row, *permutation;
};

}  // namespace grasp_sparse::cuda
