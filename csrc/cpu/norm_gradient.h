// The gradient of what a batch norm is given, in one place: of vectors (norm.h, pack.h), or of one number (pack.h).
#pragma once

#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// g, of what a ReLU behind the norm gave, as the norm gets it.
template <class V>
GRASP_SPARSE_INLINE V behind_relu(V g, V d, V scale, V bias) {
  return positive(d * scale + bias, g);
}

// g: that of what the norm gave, before its ReLU if there is one; d: x - mean.
template <bool Relu, class V>
GRASP_SPARSE_INLINE V input_grad_of(V g, V d, V scale, V bias, V offset, V slope) {
  if constexpr (Relu) g = behind_relu(g, d, scale, bias);
  return g * scale - offset - d * slope;
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
